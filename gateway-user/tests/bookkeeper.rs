//! The bill, from stored facts to rows, in ClickHouse's own engine and with a clock that the tests set: whoever keeps the books, however late facts
//! come, and whatever goes wrong on the way.
//!
//! These tests need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod books_site;
mod support;

use books_site::{CROOKED, MINUTE_US, Request, SECOND_US, START_US, Site, WINDOW_US, cut, requests, scrapes};
use support::Sim;
use support::installed::{Installed, load};
use vllm_gateway::bookkeeper::job::Bookkeeper;
use vllm_gateway::ledger::{HourCost, Line, Micros, NanoUsd, Price, PriceList, Span, State};

/// Moments after the start.
fn at(us: u64) -> Micros {
    Micros(START_US + us)
}

/// What `Price::ASSUMED` comes to.
fn bill(from: Micros, to: Micros) -> u64 {
    let prices = PriceList::new(vec![Price::ASSUMED]).expect("a price");
    prices.bill(Span::new(from, to)).0
}

#[tokio::test(flavor = "multi_thread")]
async fn two_gateways_of_which_one_is_an_hour_late_come_to_the_ledger_of_one() {
    let site = Site::start("two");
    let requests = requests(120, 20 * MINUTE_US);
    let segments = cut(&requests);
    let end = 25 * MINUTE_US;

    // One gateway that sees everything, at once.
    let solo = site.database("solo").await;
    solo.store_segments(&segments, |_| "one").await;
    solo.store_scrapes(&scrapes("one", 0, end, &segments, 2)).await;
    let mut alone = solo.bookkeeper("one", "");
    alone.cycle(at(3 * 60 * MINUTE_US)).await.expect("a cycle");

    // Two, each with its own half of the requests; the other's clock is 3 s ahead.
    let both = site.database("both").await;
    let is_ones = |event: &str| event.ends_with(['0', '2', '4', '6', '8']);
    let (ones, others): (Vec<_>, Vec<_>) = segments.iter().cloned().partition(|part| is_ones(&part.event_id));
    let mut keepers = [both.bookkeeper("one", ""), both.bookkeeper("two", "")];
    let mut stored = 0;
    for minute in 1..30 {
        let now = minute * MINUTE_US;
        let before = now - MINUTE_US;
        let part: Vec<_> = ones
            .iter()
            .filter(|part| (before..now).contains(&(part.run.to().0 - START_US)))
            .cloned()
            .collect();
        stored += part.len();
        both.store_segments(&part, |_| "one").await;
        for (name, skew) in [("one", 0), ("two", 3)] {
            let looks = scrapes(name, before.min(end), now.min(end), &segments, 2);
            both.store_scrapes(&looks.iter().map(|look| look.later(skew)).collect::<Vec<_>>())
                .await;
        }
        // Now the one and now the other is first, and in between both at once.
        let [one, two] = &mut keepers;
        match minute % 3 {
            0 => drop((
                one.cycle(at(now)).await.expect("a cycle"),
                two.cycle(at(now)).await.expect("a cycle"),
            )),
            1 => drop((
                two.cycle(at(now)).await.expect("a cycle"),
                one.cycle(at(now)).await.expect("a cycle"),
            )),
            _ => drop(tokio::try_join!(one.cycle(at(now)), two.cycle(at(now))).expect("two cycles")),
        }
    }
    assert_eq!(stored, ones.len());
    let unattributed = both
        .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = '__unattributed__'")
        .await;
    both.store_segments(&others, |_| "two").await;
    for minute in [80, 81, 180] {
        for keeper in &mut keepers {
            keeper.cycle(at(minute * MINUTE_US)).await.expect("a cycle");
        }
    }
    assert_eq!(both.ledger().await, solo.ledger().await);
    assert_eq!(both.items().await, solo.items().await);
    both.check().await;
    solo.check().await;
    // The late half was first taken for traffic that nobody knows.
    let settled = both
        .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = '__unattributed__'")
        .await;
    assert!(settled < unattributed, "{settled} of {unattributed}");
    assert!(
        both.number("SELECT count() FROM ledger_windows FINAL WHERE state = 'restated'")
            .await
            > 0
    );
    assert_eq!(
        both.number("SELECT count() FROM ledger_windows FINAL WHERE state = 'provisional' AND window_start < toDateTime(1792454400 + 160 * 60, 'UTC')")
            .await,
        0
    );
    // And who looks again finds nothing to do, also who looks for the first time.
    for id in ["one", "three"] {
        let mut fresh = both.bookkeeper(id, "");
        assert_eq!(
            fresh.cycle(at(180 * MINUTE_US)).await.expect("a cycle"),
            0,
            "{id}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_hour_is_the_same_whoever_tells_it() {
    let site = Site::start("hour");
    let database = site.database("hour").await;
    let segments = cut(&requests(200, 100 * MINUTE_US));
    let told = |keeper: &Bookkeeper, now: Micros| -> Option<HourCost> {
        let stats = keeper.stats();
        let mut hours = stats.last_hours(now);
        let (name, hour) = hours.next().expect("an upstream");
        assert!(name == "chat" && hours.next().is_none(), "{name}");
        hour
    };
    let mut one = database.bookkeeper("one", "");
    one.cycle(at(MINUTE_US)).await.expect("a cycle");
    assert_eq!(told(&one, at(MINUTE_US)), None, "nothing is known yet");
    database.store_segments(&segments, |_| "one").await;
    let looks = scrapes("one", 0, 100 * MINUTE_US, &segments, 2);
    database.store_scrapes(&looks).await;

    // Younger than an hour: all of it.
    one.cycle(at(20 * MINUTE_US)).await.expect("a cycle");
    let young = told(&one, at(20 * MINUTE_US)).expect("it is known");
    let booked_until = 20 * MINUTE_US - WINDOW_US;
    assert_eq!(young.span, Span::new(at(0), at(booked_until)));

    // An hour, the same by another gateway that shares idle time out as this one does, and what ClickHouse says.
    let now = at(100 * MINUTE_US);
    one.cycle(now).await.expect("a cycle");
    let mut two = database.bookkeeper("two", "");
    two.cycle(now).await.expect("a cycle");
    let hour = told(&one, now).expect("it is known");
    assert_eq!(told(&two, now), Some(hour));
    let (from, to) = (hour.span.from(), hour.span.to());
    assert_eq!(to.0 - from.0, 60 * MINUTE_US);
    let sum: u64 = Line::ALL.iter().map(|line| hour.cost(*line).0).sum();
    assert_eq!(sum, bill(from, to));
    let within = format!(
        "window_start >= toDateTime({}, 'UTC') AND window_start < toDateTime({}, 'UTC')",
        from.0 / SECOND_US,
        to.0 / SECOND_US
    );
    for (line, rows) in [
        (Line::Teams, "NOT startsWith(team_id, '__')"),
        (Line::Idle, "team_id = '__idle__'"),
        (Line::Unattributed, "team_id = '__unattributed__'"),
    ] {
        let sql = format!("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE {within} AND {rows}");
        assert_eq!(hour.cost(line).0, database.number(&sql).await, "{line:?}");
    }
    assert!(
        hour.cost(Line::Teams).0 > 0 && hour.cost(Line::Idle).0 > 0,
        "{hour:?}"
    );

    // Nobody has booked for a while, or a window of it is gone: unknown, and not what it was.
    assert_eq!(told(&one, at(111 * MINUTE_US)), None);
    database
        .run(&format!(
            "DELETE FROM ledger_windows WHERE window_start = toDateTime({}, 'UTC')",
            from.0 / SECOND_US
        ))
        .await;
    let mut three = database.bookkeeper("three", "ledger: {settle_after: 1m}\n");
    three.cycle(now).await.expect("a cycle");
    assert_eq!(
        told(&three, now).map(|hour| hour.span),
        Some(hour.span),
        "the first look fills holes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn every_window_is_booked_since_the_first_fact_also_when_no_gateway_ran() {
    let site = Site::start("holes");
    let database = site.database("holes").await;
    let mut keeper = database.bookkeeper("one", "");
    assert_eq!(
        keeper.cycle(at(MINUTE_US)).await.expect("a cycle"),
        0,
        "nothing is known yet"
    );
    database
        .store_segments(&cut(&requests(5, MINUTE_US)), |_| "one")
        .await;
    let windows = |now: u64| (now - 5 * SECOND_US) / WINDOW_US;
    keeper.cycle(at(2 * MINUTE_US)).await.expect("a cycle");
    assert_eq!(
        database.number("SELECT count() FROM ledger_windows FINAL").await,
        windows(2 * MINUTE_US)
    );
    assert_eq!(keeper.stats().written(State::Provisional), windows(2 * MINUTE_US));
    // A day later another one begins: nobody was there meanwhile.
    let later = 26 * 60 * MINUTE_US;
    let mut keeper = database.bookkeeper("two", "");
    for minute in 0..10 {
        keeper
            .cycle(at(later + minute * MINUTE_US))
            .await
            .expect("a cycle");
    }
    let until = later + 9 * MINUTE_US;
    assert_eq!(
        database.number("SELECT count() FROM ledger_windows FINAL").await,
        windows(until)
    );
    let total = database
        .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL")
        .await;
    assert_eq!(total, bill(at(0), at(windows(until) * WINDOW_US)));
    let states = database
        .number("SELECT countIf(state = 'provisional') FROM ledger_windows FINAL")
        .await;
    assert_eq!(
        states,
        windows(until) - windows(until - 15 * MINUTE_US + 5 * SECOND_US)
    );
    database.check().await;
    let (_, booked) = keeper
        .stats()
        .booked_until()
        .next()
        .map(|(name, at)| (name.to_owned(), at))
        .expect("it is booked");
    assert_eq!(booked, at(windows(until) * WINDOW_US));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_statement_that_is_mixed_or_torn_is_written_anew() {
    let site = Site::start("mixed");
    let database = site.database("mixed").await;
    database
        .store_segments(&cut(&requests(40, 3 * MINUTE_US)), |_| "one")
        .await;
    let mut keeper = database.bookkeeper("one", "");
    let now = at(5 * MINUTE_US);
    assert!(keeper.cycle(now).await.expect("a cycle") > 0);
    assert_eq!(keeper.cycle(now).await.expect("a cycle"), 0);
    database.check().await;
    let (ledger, items) = (database.ledger().await, database.items().await);
    let window = format!("window_start = toDateTime({}, 'UTC')", START_US / SECOND_US + 60);
    // What two writers at once, and one that was killed, can leave.
    for wound in [
        // Another's row, of a lower revision.
        format!(
            "INSERT INTO cost_ledger SELECT * REPLACE('ghost' AS team_id, revision - 1 AS revision) FROM cost_ledger FINAL WHERE {window} LIMIT 1"
        ),
        // Another's row of the same revision.
        format!(
            "INSERT INTO cost_ledger SELECT * REPLACE('ghost' AS team_id) FROM cost_ledger FINAL WHERE {window} AND cost_nano_usd > 0 LIMIT 1"
        ),
        // One with tokens and no cost.
        format!(
            "INSERT INTO cost_ledger SELECT * REPLACE('ghost' AS team_id, 0 AS cost_nano_usd, 0 AS busy_us, 5 AS prompt_tokens) FROM cost_ledger FINAL WHERE {window} LIMIT 1"
        ),
        // Rows of a writer that died before its head.
        format!(
            "INSERT INTO cost_ledger SELECT * REPLACE(revision + 1000000 AS revision, cost_nano_usd + 1 AS cost_nano_usd) FROM cost_ledger FINAL WHERE {window}"
        ),
        // Costs of a segment that nobody has, and others than the head's.
        format!(
            "INSERT INTO segment_costs SELECT * REPLACE('ghost' AS event_id, revision - 1 AS revision) FROM segment_costs FINAL WHERE {window} LIMIT 1"
        ),
        format!(
            "INSERT INTO segment_costs SELECT * REPLACE(revision + 1 AS revision, 9 AS cost_nano_usd) FROM segment_costs FINAL WHERE {window} LIMIT 1"
        ),
        // A head without rows, or rows without a head.
        format!("DELETE FROM cost_ledger WHERE {window}"),
        format!("DELETE FROM segment_costs WHERE {window}"),
        format!("DELETE FROM ledger_windows WHERE {window}"),
    ] {
        database.run(&wound).await;
        assert!(!database.is_whole().await, "no wound: {wound}");
        assert_eq!(keeper.cycle(now).await.expect("a cycle"), 1, "{wound}");
        database.check().await;
        assert_eq!(database.ledger().await, ledger, "{wound}");
        assert_eq!(database.items().await, items, "{wound}");
        assert_eq!(keeper.cycle(now).await.expect("a cycle"), 0, "{wound}");
    }
    // Segments that are gone have been paid for.
    database
        .run(&format!("DELETE FROM request_segments WHERE {window}"))
        .await;
    assert_eq!(keeper.cycle(now).await.expect("a cycle"), 0);
    assert_eq!(database.ledger().await, ledger);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_price_that_changes_in_the_middle_of_a_window_counts_from_its_moment() {
    let site = Site::start("price");
    let database = site.database("price").await;
    database
        .store_segments(
            &cut(&[Request::new("a-1", "a", 0, 60 * SECOND_US, 600)]),
            |_| "one",
        )
        .await;
    // A nano-USD for each microsecond, then three.
    let price = "price: [{usd_per_gpu_hour: 3.6, gpus: 1}, {usd_per_gpu_hour: 3.6, gpus: 3, from: \"2026-10-20T00:00:20Z\"}]";
    let mut keeper = database.bookkeeper_with("one", "", price);
    keeper.cycle(at(66 * SECOND_US)).await.expect("a cycle");
    let costs = database
        .strings(
            "SELECT toString(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = 'a' ORDER BY window_start",
        )
        .await;
    assert_eq!(costs, ["15000000", "35000000", "45000000", "45000000"]);
    let rules = database
        .strings("SELECT DISTINCT toString(rules) FROM ledger_windows FINAL ORDER BY rules")
        .await;
    assert_eq!(
        rules,
        [
            "3.6*1 from 2026-10-20T00:00:20Z 3.6*3 v1 theta=0.5 a=1 b=4 c=0.04 idle=separate settle=900s",
            "3.6*1 v1 theta=0.5 a=1 b=4 c=0.04 idle=separate settle=900s",
            "3.6*3 v1 theta=0.5 a=1 b=4 c=0.04 idle=separate settle=900s",
        ]
    );
    database.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_two_hours_is_paid_for_while_it_runs() {
    let site = Site::start("stream");
    let database = site.database("stream").await;
    let stream = [Request::new("a-1", "a", 7_654_321, 120 * MINUTE_US, 700_000)];
    let segments = cut(&stream);
    let mut keeper = database.bookkeeper("one", "");
    let mut stored = 0;
    for step in 1..=24 {
        let now = step * 5 * MINUTE_US + 10 * SECOND_US;
        let part: Vec<_> = segments[stored..]
            .iter()
            .filter(|part| part.run.to() <= at(now))
            .cloned()
            .collect();
        stored += part.len();
        database.store_segments(&part, |_| "one").await;
        keeper.cycle(at(now)).await.expect("a cycle");
        // It pays all of what has passed, but for the time before it began.
        let paid = database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = 'a'")
            .await;
        let booked = at((now - 5 * SECOND_US) / WINDOW_US * WINDOW_US);
        let idle = database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = '__idle__'")
            .await;
        assert_eq!(paid + idle, bill(at(0), booked));
        assert!(idle.abs_diff(bill(at(0), at(7_654_321))) <= 1, "{idle}");
    }
    assert_eq!(stored, segments.len());
    keeper.cycle(at(121 * MINUTE_US)).await.expect("a cycle");
    database.check().await;
    let tokens = database
        .number("SELECT sum(completion_tokens) FROM cost_ledger FINAL WHERE team_id = 'a'")
        .await;
    assert_eq!(tokens, 700_000);
    let cost = database
        .number("SELECT cost_nano_usd FROM request_costs WHERE event_id = 'a-1'")
        .await;
    assert_eq!(
        cost,
        database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE team_id = 'a'")
            .await
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_steps_ahead_and_back_costs_nobody_anything() {
    let site = Site::start("clock");
    let requests = requests(60, 100 * MINUTE_US);
    let segments = cut(&requests);
    let plain = site.database("plain").await;
    plain.store_segments(&segments, |_| "one").await;
    plain
        .bookkeeper("one", "")
        .cycle(at(153 * MINUTE_US))
        .await
        .expect("a cycle");

    let stepped = site.database("stepped").await;
    let mut keeper = stepped.bookkeeper("one", "");
    let mut stored = 0;
    for minute in 1..=153 {
        let now = minute * MINUTE_US;
        let part: Vec<_> = segments
            .iter()
            .filter(|part| (now - MINUTE_US..now).contains(&(part.run.to().0 - START_US)))
            .cloned()
            .collect();
        stored += part.len();
        stepped.store_segments(&part, |_| "one").await;
        // For ten minutes it is an hour ahead, so that windows to come are booked as idle, and settled.
        let shown = if (30..40).contains(&minute) {
            now + 60 * MINUTE_US
        } else {
            now
        };
        if minute % 5 == 3 {
            keeper.cycle(at(shown)).await.expect("a cycle");
        }
        if minute == 38 {
            let settled = "SELECT countIf(state = 'settled' AND window_start > toDateTime(1792454400 + 3600, 'UTC')) FROM ledger_windows FINAL";
            assert!(stepped.number(settled).await > 0, "the step did nothing");
        }
    }
    assert_eq!(stored, segments.len());
    assert_eq!(stepped.ledger().await, plain.ledger().await);
    assert_eq!(stepped.items().await, plain.items().await);
    stepped.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_other_rules_computed_stays_until_its_facts_change() {
    let site = Site::start("rules");
    let database = site.database("rules").await;
    database
        .store_segments(&cut(&requests(40, 3 * MINUTE_US)), |_| "one")
        .await;
    database
        .store_scrapes(&scrapes("one", 0, 5 * MINUTE_US, &[], 3))
        .await;
    let mut keepers = [
        database.bookkeeper("one", ""),
        database.bookkeeper("two", "ledger: {theta: 1, settle_after: 5m}\n"),
    ];
    let now = at(4 * MINUTE_US);
    assert!(keepers[0].cycle(now).await.expect("a cycle") > 0);
    let ledger = database.ledger().await;
    for keeper in &mut keepers {
        assert_eq!(keeper.cycle(now).await.expect("a cycle"), 0);
    }
    assert_eq!(database.ledger().await, ledger);
    database
        .store_segments(
            &cut(&[Request::new("late-1", "late", 0, SECOND_US, 5)]),
            |_| "two",
        )
        .await;
    assert!(keepers[1].cycle(now).await.expect("a cycle") >= 1);
    assert_eq!(keepers[0].cycle(now).await.expect("a cycle"), 0);
    assert_eq!(keepers[1].cycle(now).await.expect("a cycle"), 0);
    let methods = database
        .number("SELECT uniqExact(rules) FROM ledger_windows FINAL")
        .await;
    assert_eq!(methods, 2);
    database.check().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_month_is_never_written_again_and_what_comes_late_is_counted_once() {
    let site = Site::start("closed");
    let database = site.database("closed").await;
    let segments = cut(&requests(20, 3 * MINUTE_US));
    database.store_segments(&segments, |_| "one").await;
    let mut keeper = database.bookkeeper("one", "");
    let now = at(30 * MINUTE_US);
    keeper.cycle(now).await.expect("a cycle");
    let ledger = database.ledger().await;
    database.run("INSERT INTO ledger_months (month, bill_nano_usd, windows, closed_by) VALUES ('2026-10-01', 0, 0, 'me')").await;
    let late = cut(&[Request::new("late-1", "late", 0, 40 * SECOND_US, 5)]);
    database.store_segments(&late, |_| "two").await;
    for _ in 0..2 {
        assert_eq!(keeper.cycle(now).await.expect("a cycle"), 0);
    }
    assert_eq!(keeper.stats().late_segments(), late.len() as u64);
    assert_eq!(database.ledger().await, ledger);
}

/// Streams and others; clients leave in the middle.
#[rustfmt::skip] // Options in pairs.
const LOAD: &[&str] = &[
    "--stream-fraction", "0.7", "--abort-fraction", "0.1", "--teams", "4", "--concurrency", "8", "--prompt-tokens", "4..60",
    "--output-tokens", "20..200", "--abort-after-ms", "1..200",
];

/// Windows that are missing between the first and the last one.
const MISSING: &str = "(SELECT toUInt64((max(window_start) - min(window_start)) / 15 + 1 - uniqExact(window_start)) FROM ledger_windows)";

/// Tokens of segments that are in no row, or the other way round.
const UNBOOKED: &str = "(SELECT toUInt64(abs(toInt64((SELECT sum(prompt_tokens + completion_tokens) FROM request_segments FINAL)) - \
     toInt64((SELECT sum(prompt_tokens + completion_tokens) FROM cost_ledger FINAL WHERE NOT startsWith(team_id, '__'))))))";

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_that_is_killed_in_the_middle_of_a_window_books_it_when_it_is_back() {
    let sim = Sim::start(&["--model", "tiny", "--step-base-us", "4000"]);
    let installed = Installed::embedded("ledger-kill", sim.addr);
    let config = installed.dir.join("config.yaml");
    let yaml = std::fs::read_to_string(&config).expect("a file");
    std::fs::write(
        &config,
        yaml + "metrics: {emit_interval: 1s}\nledger: {settle_after: 20s}\n",
    )
    .expect("a file");
    let crooked = format!("({CROOKED})");
    for round in 0..3 {
        let gateway = installed.start();
        let records = installed.dir.join("records");
        let mut load = load(gateway.clients, round, 120, &records, LOAD)
            .spawn()
            .expect("it starts");
        // Some of them have ended when it is killed, and some have not.
        gateway
            .until_metric("gateway_spool_rows_total", &["request_events"], 30.0)
            .await;
        gateway.kill();
        load.kill().expect("our own process");
        load.wait().expect("our own process");
    }
    let gateway = installed.start();
    gateway
        .until_metric("gateway_ledger_windows_total", &["provisional"], 0.0)
        .await;
    installed
        .until(
            "all tokens to be booked",
            &format!("if((SELECT count() FROM request_segments) = 0, 1, {UNBOOKED})"),
            0,
        )
        .await;
    installed.until("whole statements", &crooked, 0).await;
    installed.until("no holes", MISSING, 0).await;
    // Settled: until the last segment's window, and some more.
    let open = "(SELECT count() FROM ledger_windows FINAL WHERE state = 'provisional' AND window_start <= (SELECT max(window_start) FROM request_segments))";
    installed.until("windows to settle", open, 0).await;
    installed.until("whole statements", &crooked, 0).await;
    let segments = installed
        .number("(SELECT count() FROM request_segments FINAL)")
        .await;
    assert!(segments > Some(90), "{segments:?}");
    // Price times time, as the ledger's own windows have it.
    let ends = installed
        .ask("SELECT toUInt64(toUnixTimestamp(min(window_start))) AS begin, toUInt64(toUnixTimestamp(max(window_start))) + 15 AS end, \
              (SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE window_start <= (SELECT max(window_start) FROM ledger_windows)) AS cost FROM ledger_windows")
        .await
        .expect("rows");
    let of = |name: &str| ends[0][name].as_u64().expect("a number");
    assert_eq!(
        of("cost"),
        bill(Micros(of("begin") * SECOND_US), Micros(of("end") * SECOND_US))
    );
    assert!(gateway.metric("gateway_ledger_lag_seconds", &["chat"]).await < 60.0);
    gateway.stop();
}

/// What `vllm-gateway ledger` says.
fn amount_after(text: &str, word: &str) -> NanoUsd {
    let rest = text
        .split(word)
        .nth(1)
        .unwrap_or_else(|| panic!("no {word} in {text}"));
    let amount = rest
        .trim_start()
        .split([',', ';', ' ', '\n'])
        .next()
        .unwrap_or_default();
    NanoUsd::from_usd(amount).unwrap_or_else(|error| panic!("{amount}: {error}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_corrects_a_bill_by_the_configs_rules_and_closes_a_month() {
    let site = Site::start("command");
    let database = site.database("command").await;
    // The last hour of October.
    let hour = 1_793_491_200 * SECOND_US - 60 * MINUTE_US;
    let mut requests = requests(50, 20 * MINUTE_US);
    requests
        .iter_mut()
        .for_each(|request| request.start_us += hour - START_US);
    database.store_segments(&cut(&requests), |_| "one").await;
    let period = ["--from", "2026-10-31", "--to", "2026-11-01"];
    let close = ["--close", "2026-10"];
    let assumed = bill(Micros(hour), Micros(hour + 60 * MINUTE_US));

    database.configure("", "price: [{usd_per_gpu_hour: 2.50, gpus: 1}]");
    let (code, _, err) = database.command(&close);
    assert_eq!(code, Some(75), "{err}");
    assert!(err.contains("240 of chat that are not"), "{err}");
    let (code, out, err) = database.command(&[&period[..], &["--dry-run"]].concat());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(
        out.contains("240 windows computed, 0 unchanged, 0 would be restated, 240 would be booked"),
        "{out}"
    );
    assert_eq!(database.number("SELECT count() FROM ledger_windows").await, 0);
    assert_eq!(database.number("SELECT count() FROM cost_ledger").await, 0);
    let (code, out, _) = database.command(&period);
    assert_eq!(code, Some(0), "{out}");
    assert_eq!(amount_after(&out, "rows sum to").0, assumed, "{out}");
    assert_eq!(amount_after(&out, "after").0, assumed, "{out}");
    database.check().await;
    let (_, out, _) = database.command(&period);
    assert!(
        out.contains("240 windows computed, 240 unchanged, 0 restated, 0 booked"),
        "{out}"
    );

    // The price was wrong.
    database.configure("", "price: [{usd_per_gpu_hour: 5, gpus: 1}]");
    let (_, planned, _) = database.command(&[&period[..], &["--dry-run"]].concat());
    assert_eq!(
        database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL")
            .await,
        assumed
    );
    let (_, out, _) = database.command(&period);
    assert_eq!(out, planned.replace("would be ", ""));
    assert!(
        out.contains("240 restated") && out.contains("__idle__: "),
        "{out}"
    );
    assert_eq!(
        (amount_after(&out, "before").0, amount_after(&out, "after").0),
        (assumed, 2 * assumed),
        "{out}"
    );
    assert_eq!(
        database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL")
            .await,
        2 * assumed
    );
    database.check().await;

    let (code, out, err) = database.command(&["--from", "2026-10-31", "--upstream", "chut"]);
    assert_eq!((code, out.as_str()), (Some(2), ""));
    assert!(err.contains("found `chut`: it has chat"), "{err}");
    let (code, out, _) = database.command(&[&close[..], &["--dry-run"]].concat());
    assert!(
        code == Some(0) && out.contains("2026-10 can be closed: 5 USD, 240 windows"),
        "{out}"
    );
    let (code, out, _) = database.command(&close);
    assert!(
        code == Some(0) && out.contains("2026-10 is closed: 5 USD, 240 windows"),
        "{out}"
    );
    let (code, out, _) = database.command(&close);
    assert!(
        code == Some(0) && out.contains("2026-10 was closed before: 5 USD"),
        "{out}"
    );
    assert_eq!(database.number("SELECT count() FROM ledger_months").await, 1);
    database.configure("", "price: [{usd_per_gpu_hour: 7, gpus: 1}]");
    let (_, out, _) = database.command(&period);
    assert!(out.contains("240 are of closed months"), "{out}");
    assert_eq!(
        database
            .number("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL")
            .await,
        2 * assumed
    );

    let (code, _, err) = database.command(&["--close", "2199-01"]);
    assert!(
        code == Some(75) && err.contains("that is over and settled"),
        "{err}"
    );
    let (code, _, err) = database.command(&["--close", "October"]);
    assert!(
        code == Some(2) && err.contains("expected a month such as 2026-10"),
        "{err}"
    );
    assert_eq!(database.command(&[]).0, Some(2));
}
