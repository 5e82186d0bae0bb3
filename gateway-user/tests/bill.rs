//! What `vllm-gateway report` says of money: the real program, against ClickHouse's own engine with windows that the ledger itself allocated, held
//! against the sums that SQL makes of the same rows.
//!
//! These tests need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod report_support;
mod support;

use report_support::{Installed, text};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::process::Output;
use vllm_gateway::config::IdleTo;
use vllm_gateway::ledger::money::apportion;
use vllm_gateway::ledger::{
    Account, Condition, CostRow, Edition, EngineSpan, EngineView, Method, Micros, NanoUsd, Price, PriceList,
    Segment, Span, State, Weights, Window, WindowFacts, Work, allocate,
};

/// 2024-05-11T00:00:00Z, seconds since 1970: a month that is over, whenever this runs.
const MIDNIGHT_S: u64 = 1_715_385_600;

const MONTH: [&str; 2] = ["--bill", "2024-05"];

/// The two days around midnight.
const DAYS: [&str; 4] = ["--from", "2024-05-10", "--to", "2024-05-12"];

/// A request's work within a window: `from` and `to` are seconds of it.
fn segment(event: &str, [team, project, model]: [&str; 3], window_s: u64, [from, to]: [u64; 2]) -> Segment {
    let at = |second: u64| Micros((window_s + second) * 1_000_000);
    Segment {
        event_id: event.into(),
        account: Account {
            team_id: team.into(),
            project: project.into(),
            model: model.into(),
        },
        run: Span::new(at(from), at(to)),
        work: Work {
            prompt_tokens: 100,
            completion_tokens: 20,
            ..Work::default()
        },
    }
}

/// A window to be booked.
struct Booking {
    window_s: u64,
    upstream: &'static str,
    segments: Vec<Segment>,
    engine: EngineView,
    idle: IdleTo,
    edition: Edition,
}

impl Booking {
    fn new(window_s: u64, upstream: &'static str, segments: Vec<Segment>) -> Booking {
        Booking {
            window_s,
            upstream,
            segments,
            engine: EngineView::default(),
            idle: IdleTo::Separate,
            edition: Edition {
                revision: 2,
                state: State::Settled,
            },
        }
    }

    fn in_state(self, state: State) -> Booking {
        let edition = Edition {
            state,
            ..self.edition
        };
        Booking { edition, ..self }
    }

    fn window(&self) -> Window {
        Window::at(Micros(self.window_s * 1_000_000))
    }

    /// What the ledger makes of it.
    fn rows(&self) -> Vec<CostRow> {
        let method =
            Method::new(Method::THETA_ASSUMED, Weights::ASSUMED, self.idle).expect("a half is a share");
        let facts = WindowFacts {
            window: self.window(),
            upstream: self.upstream,
            prices: &prices(),
            segments: &self.segments,
            engine: &self.engine,
            accounts_before: &[],
        };
        allocate(&facts, &method, self.edition)
    }

    fn head(&self, rows: &[CostRow]) -> Value {
        let known = self.segments.len() as u64;
        let unattributed = rows
            .iter()
            .find(|row| &*row.account.team_id == "__unattributed__");
        json!({
            "window_start": self.window_s, "upstream": self.upstream, "bill_nano_usd": prices().bill(self.window().span()).0,
            "busy_us": rows.iter().map(|row| row.busy_us).sum::<u64>(), "segments": known,
            "prompt_tokens": 100 * known, "completion_tokens": 20 * known,
            "engine_prompt_tokens": self.engine.counted.map(|work| work.prompt_tokens),
            "engine_completion_tokens": self.engine.counted.map(|work| work.completion_tokens),
            "unattributed_prompt_tokens": unattributed.map_or(0, |row| row.prompt_tokens),
            "unattributed_completion_tokens": unattributed.map_or(0, |row| row.completion_tokens),
            "facts": 1, "rules": "2.5 USD an hour", "revision": self.edition.revision, "state": self.edition.state.name(), "gateway_id": "gw"
        })
    }

    /// What each request has of its account's rows.
    fn segment_costs(&self, rows: &[CostRow]) -> Vec<Value> {
        let mut costs = Vec::new();
        for row in rows {
            let of_row: Vec<&Segment> = self
                .segments
                .iter()
                .filter(|segment| segment.account == row.account)
                .collect();
            for (segment, part) in of_row.iter().zip(apportion(row.cost.0, &vec![1; of_row.len()])) {
                costs.push(json!({
                    "window_start": self.window_s, "upstream": self.upstream, "event_id": segment.event_id, "team_id": row.account.team_id,
                    "project": row.account.project, "model": row.account.model, "busy_us": 1, "cost_nano_usd": part,
                    "revision": self.edition.revision, "state": self.edition.state.name()
                }));
            }
        }
        costs
    }
}

fn prices() -> PriceList {
    PriceList::new(vec![Price::ASSUMED]).expect("one price")
}

async fn insert(installed: &Installed, table: &str, rows: impl IntoIterator<Item = Value>) {
    let lines: Vec<String> = rows.into_iter().map(|row| row.to_string()).collect();
    if !lines.is_empty() {
        installed
            .run(&format!(
                "INSERT INTO {table} FORMAT JSONEachRow {}",
                lines.join(" ")
            ))
            .await;
    }
}

/// Books windows, each after an earlier revision that must not count any more. Returns the rows.
async fn book(installed: &Installed, bookings: &[Booking]) -> Vec<CostRow> {
    let mut all = Vec::new();
    for table in ["cost_ledger", "ledger_windows", "segment_costs"] {
        installed.run(&format!("SYSTEM STOP MERGES {table}")).await;
    }
    for booking in bookings {
        let rows = booking.rows();
        for revision in [1, 2] {
            let of = |mut row: Value| {
                if revision == 1 {
                    row["revision"] = 1.into();
                    for amount in ["cost_nano_usd", "bill_nano_usd"] {
                        if row.get(amount).is_some() {
                            row[amount] = 77.into();
                        }
                    }
                }
                row
            };
            let costs = rows
                .iter()
                .map(|row| of(serde_json::to_value(row).expect("JSON")));
            insert(installed, "cost_ledger", costs).await;
            insert(installed, "ledger_windows", [of(booking.head(&rows))]).await;
            insert(
                installed,
                "segment_costs",
                booking.segment_costs(&rows).into_iter().map(of),
            )
            .await;
        }
        all.extend(rows);
    }
    all
}

/// A request that ended so many seconds after midnight, and was charged so much.
async fn request(
    installed: &Installed,
    event: &str,
    team: &str,
    user: &str,
    end_s: i64,
    charge_nano_usd: i64,
) {
    let duration_us = 20_000_000;
    let row = json!({
        "event_id": event, "team_id": team, "project": "p", "user_id": user, "model": "m", "endpoint": "/v1/chat/completions",
        "outcome": "completed", "usage_source": "reported", "prompt_tokens": 100, "completion_tokens": 20, "duration_us": duration_us,
        "started_at": (MIDNIGHT_S as i64 + end_s) * 1_000_000 - duration_us, "charge_nano_usd": charge_nano_usd
    });
    insert(installed, "request_events", [row]).await;
}

/// Two days of two upstreams: requests of two users, one that runs over midnight, one that has not ended, and time of every kind.
fn bookings() -> Vec<Booking> {
    let (w0, w1, w2) = (MIDNIGHT_S - 30, MIDNIGHT_S - 15, MIDNIGHT_S);
    let (of_a, of_b, of_c) = (["a", "p", "m"], ["b", "p", "m"], ["c", "", "other"]);
    let at = |second: u64| Micros((w0 + second) * 1_000_000);
    let spans = [
        (0, 5, Condition::Loading),
        (5, 8, Condition::Down),
        (8, 10, Condition::ScaledToZero),
    ];
    vec![
        Booking::new(
            w0,
            "chat",
            vec![
                segment("e1", of_a, w0, [0, 5]),
                segment("e2", of_a, w0, [3, 10]),
                segment("e3", of_b, w0, [12, 15]),
            ],
        ),
        Booking {
            engine: EngineView {
                spans: Vec::new(),
                counted: Some(Work {
                    prompt_tokens: 150,
                    completion_tokens: 41,
                    ..Work::default()
                }),
            },
            ..Booking::new(w1, "chat", vec![segment("e3", of_b, w1, [0, 11])])
        }
        .in_state(State::Restated),
        Booking::new(
            w2,
            "chat",
            vec![segment("e3", of_b, w2, [0, 1]), segment("e4", of_c, w2, [1, 7])],
        )
        .in_state(State::Provisional),
        Booking {
            engine: EngineView {
                spans: spans
                    .map(|(from, to, condition)| EngineSpan {
                        at: Micros(0),
                        span: Span::new(at(from), at(to)),
                        condition,
                    })
                    .into(),
                counted: None,
            },
            ..Booking::new(w0, "embeddings", Vec::new())
        },
    ]
}

async fn two_days(name: &str) -> (Installed, Vec<CostRow>) {
    let installed = Installed::new(name).await;
    let rows = book(&installed, &bookings()).await;
    for (event, team, user, end_s, charge) in [
        ("e1", "a", "u1", -25, 1_000),
        ("e2", "a", "u2", -20, 2_000),
        ("e3", "b", "u3", 1, 4_000_000_000),
        ("e5", "d", "u4", -10, 0),
    ] {
        request(&installed, event, team, user, end_s, charge).await;
    }
    (installed, rows)
}

/// What SQL makes of the stored rows.
async fn summed(installed: &Installed, condition: &str) -> i64 {
    let client = installed.client().with_database("vllm_attribution");
    let sql = format!("SELECT sum(cost_nano_usd) FROM cost_ledger FINAL WHERE {condition}");
    client.query(&sql).fetch_one().await.expect("a sum")
}

/// The fields of each line of CSV, by the names of the first one.
fn records(output: &Output) -> Vec<BTreeMap<String, String>> {
    let text = text(&output.stdout);
    let mut lines = text.split("\r\n").filter(|line| !line.is_empty());
    let names: Vec<&str> = lines.next().expect("names").split(',').collect();
    let fields = |line: &str| {
        // A field in quotes has commas of its own, and its quotes are doubled.
        let mut fields = vec![String::new()];
        let mut is_quoted = false;
        let mut characters = line.chars().peekable();
        while let Some(c) = characters.next() {
            let field = fields.last_mut().expect("a field");
            match c {
                '"' if is_quoted && characters.next_if_eq(&'"').is_some() => field.push('"'),
                '"' => is_quoted = !is_quoted,
                ',' if !is_quoted => fields.push(String::new()),
                c => field.push(c),
            }
        }
        assert_eq!(fields.len(), names.len(), "{line}");
        names.iter().map(|name| (*name).to_owned()).zip(fields).collect()
    };
    lines.map(fields).collect()
}

/// Nano-USD of exact dollars.
fn nano(usd: &str) -> i64 {
    let (sign, digits) = usd.strip_prefix('-').map_or((1, usd), |digits| (-1, digits));
    assert_eq!(
        digits.split_once('.').map(|(_, places)| places.len()),
        Some(9),
        "{usd}"
    );
    sign * NanoUsd::from_usd(digits).expect("dollars").as_i64()
}

fn column_sum(lines: &Value, column: &str) -> i64 {
    let lines = lines.as_array().expect("lines");
    lines.iter().map(|line| line[column].as_i64().unwrap_or(0)).sum()
}

#[tokio::test(flavor = "multi_thread")]
async fn lines_sum_to_the_stored_rows_to_the_nano_in_all_formats_however_they_are_grouped() {
    let (installed, rows) = two_days("sums").await;
    let allocated: i64 = rows.iter().map(|row| row.cost.as_i64()).sum();
    assert_eq!(
        summed(&installed, "1").await,
        allocated,
        "earlier revisions do not count"
    );
    let first_day = ["--from", "2024-05-10", "--to", "2024-05-11"];
    let second_day = ["--from", "2024-05-11", "--to", "2024-05-12"];
    // It cuts two windows: the one that begins in it counts, whole.
    let cut = ["--from", "2024-05-10T23:59:31Z", "--to", "2024-05-10T23:59:46Z"];
    let second_window = format!("window_start = {}", MIDNIGHT_S - 15);
    let before_midnight = format!("window_start < {MIDNIGHT_S}");
    let after_midnight = format!("window_start >= {MIDNIGHT_S}");
    for (period, condition) in [
        (&DAYS[..], "1"),
        (&first_day, before_midnight.as_str()),
        (&second_day, after_midnight.as_str()),
        (&cut, second_window.as_str()),
        (&MONTH, "1"),
    ] {
        let sum = summed(&installed, condition).await;
        assert!(sum > 0);
        for by in [
            "team",
            "project,model",
            "team,project,model,day",
            "user",
            "endpoint,day",
        ] {
            if period == MONTH && (by.contains("user") || by.contains("endpoint")) {
                continue;
            }
            let arguments = [period, &["--by", by]].concat();
            let report = installed.json(&arguments);
            let lines = column_sum(&report["groups"], "cost_nano_usd")
                + column_sum(&report["lines"], "cost_nano_usd");
            assert_eq!(lines, sum, "{arguments:?}: {report}");
            assert_eq!(report["total"]["cost_nano_usd"], sum, "{arguments:?}");
            assert_eq!(
                (
                    &report["ledger"]["bill_nano_usd"],
                    &report["ledger"]["difference_nano_usd"]
                ),
                (&json!(sum), &json!(0))
            );
            let csv = installed.report(&[&arguments[..], &["--format", "csv"]].concat());
            let (totals, others): (Vec<_>, Vec<_>) =
                records(&csv).into_iter().partition(|line| line["row"] == "total");
            let of_csv = |lines: &[BTreeMap<String, String>]| -> i64 {
                lines
                    .iter()
                    .map(|line| &line["cost_usd"])
                    .filter(|usd| !usd.is_empty())
                    .map(|usd| nano(usd))
                    .sum()
            };
            assert_eq!((of_csv(&others), of_csv(&totals)), (sum, sum), "{arguments:?}");
        }
        let focus = records(&installed.report(&[period, &["--format", "focus"]].concat()));
        assert_eq!(
            focus.iter().map(|row| nano(&row["EffectiveCost"])).sum::<i64>(),
            sum,
            "{period:?}"
        );
        let table = text(&installed.report(period).stdout);
        let exact = format!(
            "together {}.{:09} USD: the difference is 0 USD",
            sum / 1_000_000_000,
            sum % 1_000_000_000
        );
        assert!(table.contains(&exact), "{exact} in {table}");
    }
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn costs_charges_and_lines_are_whose_they_are() {
    let (installed, rows) = two_days("whose").await;
    let report = installed.json(&["--from", "2024-05-10", "--to", "2024-05-11", "--by", "team"]);
    let of = |team: &str, windows: std::ops::Range<u64>| -> i64 {
        let rows = rows.iter().filter(|row| &*row.account.team_id == team);
        let within = |row: &&CostRow| windows.contains(&(row.window_start.start().0 / 1_000_000));
        rows.filter(within).map(|row| row.cost.as_i64()).sum()
    };
    let first_day = MIDNIGHT_S - 86_400..MIDNIGHT_S;
    let groups = report["groups"].as_array().expect("groups");
    let teams: Vec<&str> = groups
        .iter()
        .map(|group| group["team"].as_str().expect("a name"))
        .collect();
    assert_eq!(teams, ["a", "b", "d"]);
    let (a, b, d) = (&groups[0], &groups[1], &groups[2]);
    let cost_a = of("a", first_day.clone());
    assert_eq!(
        (&a["charge_nano_usd"], &a["cost_nano_usd"]),
        (&json!(3_000), &json!(cost_a))
    );
    assert_eq!(a["recovery_nano_usd"], 3_000 - cost_a);
    // Two segments of 120 tokens.
    assert_eq!(
        a["cost_per_million_tokens_nano_usd"],
        (cost_a * 1_000_000 + 120) / 240
    );
    // The request of b ends on the next day, and so its charge is there; its work was on both.
    assert_eq!((&b["requests"], &b["charge_nano_usd"]), (&json!(0), &json!(0)));
    assert_eq!(b["cost_nano_usd"], of("b", first_day.clone()));
    assert!(of("b", first_day.clone()) > 0);
    // Of a day that is not all booked nobody knows that d cost nothing.
    assert_eq!(
        (&d["requests"], &d["cost_nano_usd"], &d["recovery_nano_usd"]),
        (&json!(1), &Value::Null, &Value::Null)
    );
    let lines = report["lines"].as_array().expect("lines");
    let named: Vec<(&str, i64)> = lines
        .iter()
        .map(|line| {
            (
                line["line"].as_str().expect("a name"),
                line["cost_nano_usd"].as_i64().expect("a cost"),
            )
        })
        .collect();
    let expected = [
        "__idle__",
        "__unattributed__",
        "__loading__",
        "__down__",
        "__scaled_to_zero__",
    ]
    .map(|line| (line, of(line, first_day.clone())));
    assert_eq!(named, expected);
    assert!(named.iter().all(|(_, cost)| *cost > 0), "{named:?}");
    assert!(
        lines
            .iter()
            .all(|line| line["requests"].is_null() && line["charge_nano_usd"].is_null())
    );

    // Users have what their requests cost, the one that still runs is nobody's yet.
    let users = installed.json(&[&DAYS[..], &["--by", "user"]].concat());
    let by_user: Vec<(&str, i64)> = users["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .filter_map(|group| Some((group["user"].as_str()?, group["cost_nano_usd"].as_i64()?)))
        .collect();
    let both_days = MIDNIGHT_S - 86_400..MIDNIGHT_S + 86_400;
    assert_eq!(
        by_user.iter().map(|user| user.0).collect::<Vec<_>>(),
        ["u1", "u2", "u3"]
    );
    assert_eq!(by_user[0].1 + by_user[1].1, cost_a);
    assert_eq!(by_user[2].1, of("b", both_days.clone()));
    assert_eq!(users["lines"][0]["line"], "__without_request__");
    assert_eq!(users["lines"][0]["cost_nano_usd"], of("c", both_days));
    assert!(
        users["groups"][0]["cost_per_million_tokens_nano_usd"].is_null(),
        "tokens of windows are not known by user"
    );

    // What is booked, how final it is, and what the engine counted.
    let ledger = &installed.json(&DAYS)["ledger"];
    assert_eq!(
        (&ledger["booked_from"], &ledger["booked_to"]),
        (&json!("2024-05-10T23:59:30Z"), &json!("2024-05-11T00:00:15Z"))
    );
    let states = [
        "windows",
        "windows_provisional",
        "windows_settled",
        "windows_restated",
        "is_complete",
    ];
    assert_eq!(
        states.map(|name| ledger[name].clone()),
        [json!(4), json!(1), json!(2), json!(1), json!(false)]
    );
    let chat = &ledger["upstreams"][0];
    // The second day has 5760 windows, and chat was opened with the last two of the first.
    assert_eq!(
        (&chat["upstream"], &chat["windows_due"], &chat["windows"]),
        (&json!("chat"), &json!(5762), &json!(3))
    );
    let counted = [
        "engine_windows",
        "engine_tokens",
        "known_tokens",
        "unattributed_tokens",
    ];
    assert_eq!(
        counted.map(|name| chat[name].clone()),
        [json!(1), json!(191), json!(120), json!(71)]
    );
    assert_eq!(chat["bill_by_config_nano_usd"], chat["bill_nano_usd"]);
    assert_eq!(ledger["upstreams"][1]["engine_tokens"], Value::Null);
    let table = text(&installed.report(&DAYS).stdout);
    assert!(
        table.contains("4 of 11524 windows of 15 s (0.0 %)")
            && table.contains("provisional: 1, restated among the settled: 1"),
        "{table}"
    );

    // Another price in the config makes another bill, and that is told with the rules, and is no error.
    let config = std::fs::read_to_string(installed.dir.join("config.yaml")).expect("a config");
    let dearer = "upstreams: [{name: chat, url: \"http://127.0.0.1:8000\", serves: generate, price: [{usd_per_gpu_hour: 5, gpus: 1}]}]\n";
    std::fs::write(installed.dir.join("config.yaml"), config + dearer).expect("a file");
    let other = installed.json(&DAYS);
    let chat = &other["ledger"]["upstreams"][0];
    let twice = chat["bill_nano_usd"].as_i64().expect("a bill") * 2;
    assert!(
        (chat["bill_by_config_nano_usd"].as_i64().expect("a bill") - twice).abs() <= 2,
        "{chat}"
    );
    assert!(
        chat["notes"].to_string().contains("2.5 USD an hour (3 windows)"),
        "{chat}"
    );
    assert_eq!(
        other["ledger"]["upstreams"][1]["bill_by_config_nano_usd"],
        Value::Null
    );
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_of_a_window_can_be_idle_and_shares_of_idle_time_are_shown_as_such() {
    let installed = Installed::new("idle").await;
    // Nothing was ever booked.
    request(&installed, "e1", "a", "u1", 10, 5_000).await;
    let never = installed.json(&DAYS);
    assert_eq!(
        (
            &never["groups"][0]["charge_nano_usd"],
            &never["groups"][0]["cost_nano_usd"]
        ),
        (&json!(5_000), &Value::Null)
    );
    assert_eq!(
        (&never["total"]["cost_nano_usd"], &never["lines"]),
        (&Value::Null, &json!([]))
    );
    assert_eq!(
        never["ledger"]["unbooked_upstreams"],
        json!(["chat", "embeddings"])
    );
    let said = text(&installed.report(&DAYS).stdout);
    assert!(said.contains("Nothing of the period is booked yet"), "{said}");

    // Only idle time.
    let later = MIDNIGHT_S + 15;
    book(&installed, &[Booking::new(MIDNIGHT_S, "chat", Vec::new())]).await;
    let idle_only = installed.json(&["--from", "2024-05-11T00:00:00Z", "--to", "2024-05-11T00:00:15Z"]);
    let bill = idle_only["ledger"]["bill_nano_usd"].as_i64().expect("a bill");
    assert_eq!(
        (
            &idle_only["lines"][0]["line"],
            &idle_only["lines"][0]["cost_nano_usd"]
        ),
        (&json!("__idle__"), &json!(bill))
    );
    assert_eq!(
        bill,
        prices()
            .bill(Window::at(Micros(MIDNIGHT_S * 1_000_000)).span())
            .as_i64()
    );

    // Shared out evenly: the teams' shares are theirs, and told apart.
    let (of_a, of_b) = (["a", "p", "m"], ["b", "p", "m"]);
    let shared = Booking {
        idle: IdleTo::Even,
        ..Booking::new(
            later,
            "chat",
            vec![
                segment("e1", of_a, later, [0, 3]),
                segment("e2", of_b, later, [3, 5]),
            ],
        )
    };
    book(&installed, &[shared]).await;
    let window = ["--from", "2024-05-11T00:00:15Z", "--to", "2024-05-11T00:00:30Z"];
    let report = installed.json(&window);
    assert_eq!(report["lines"], json!([]));
    let idle = column_sum(&report["groups"], "idle_nano_usd");
    let bill = report["ledger"]["bill_nano_usd"].as_i64().expect("a bill");
    assert!((idle - bill * 10 / 15).abs() <= 1, "{report}");
    assert_eq!(
        (
            column_sum(&report["groups"], "cost_nano_usd"),
            &report["total"]["idle_nano_usd"]
        ),
        (bill, &json!(idle))
    );
    let models = installed.json(&[&window[..], &["--by", "model"]].concat());
    assert_eq!(
        (
            &models["groups"][0]["model"],
            &models["groups"][0]["cost_nano_usd"]
        ),
        (&json!("__idle__"), &json!(idle))
    );
    assert!(text(&installed.report(&window).stdout).contains("of it"));
    assert!(
        !text(
            &installed
                .report(&["--from", "2024-05-11T00:00:00Z", "--to", "2024-05-11T00:00:15Z"])
                .stdout
        )
        .contains("of it")
    );
    let empty = installed.report(&["--from", "2020-01-01", "--to", "2020-01-02", "--format", "focus"]);
    assert_eq!(
        (empty.status.code(), text(&empty.stdout).lines().count()),
        (Some(0), 1)
    );

    // Of another version of the schema nothing is guessed.
    installed
        .run("INSERT INTO schema_migrations (version, name, program) VALUES (1000, 'later', '9.9.9')")
        .await;
    for arguments in [&MONTH[..], &[&DAYS[..], &["--format", "focus"]].concat()] {
        let (code, said) = installed.refused(arguments);
        assert_eq!(code, Some(65), "{said}");
        assert!(said.contains("found 1000"), "{said}");
    }
    installed.finish().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bill_is_shared_out_to_the_invoice_and_books_that_do_not_add_up_are_told_with_an_exit_code() {
    let (installed, rows) = two_days("bill").await;
    let sum: i64 = rows.iter().map(|row| row.cost.as_i64()).sum();
    let invoice = [&MONTH[..], &["--actual", "123.456789012"]].concat();
    let bill = installed.json(&[&invoice[..], &["--by", "team,model"]].concat());
    let shares =
        column_sum(&bill["groups"], "actual_nano_usd") + column_sum(&bill["lines"], "actual_nano_usd");
    assert_eq!(
        (shares, &bill["total"]["actual_nano_usd"]),
        (123_456_789_012, &json!(123_456_789_012_i64))
    );
    let factor = bill["bill"]["actual_per_cost"].as_f64().expect("a factor");
    for line in bill["groups"]
        .as_array()
        .expect("groups")
        .iter()
        .filter(|line| !line["cost_nano_usd"].is_null())
    {
        let (cost, share) = (
            line["cost_nano_usd"].as_f64().expect("a cost"),
            line["actual_nano_usd"].as_f64().expect("a share"),
        );
        assert!((share - cost * factor).abs() < 2.0, "{line}");
    }
    assert_eq!(
        (&bill["bill"]["month"], &bill["bill"]["is_over"]),
        (&json!("2024-05"), &json!(true))
    );
    assert_eq!(bill["groups"][0]["ttft_p50_us"], Value::Null);
    assert!(
        bill["groups"][0].get("ttft_p50_us").is_none(),
        "a bill has no latencies"
    );
    let focus = records(&installed.report(&[&invoice[..], &["--format", "focus"]].concat()));
    assert_eq!(
        focus.iter().map(|row| nano(&row["BilledCost"])).sum::<i64>(),
        123_456_789_012
    );
    assert_eq!(
        focus.iter().map(|row| nano(&row["EffectiveCost"])).sum::<i64>(),
        sum
    );
    let table = text(&installed.report(&invoice).stdout);
    assert!(
        table.contains("Bill of 2024-05: over, and not closed")
            && table.contains("Invoice: 123.456789012 USD"),
        "{table}"
    );
    let (code, said) = installed.refused(&["--bill", "2023-01", "--actual", "1"]);
    assert_eq!(code, Some(2), "{said}");
    assert!(said.contains("none booked"), "{said}");

    // The month that runs.
    let client = installed.client();
    let running: String = client
        .query("SELECT formatDateTime(now('UTC'), '%Y-%m')")
        .fetch_one()
        .await
        .expect("a month");
    let said = text(&installed.report(&["--bill", &running]).stdout);
    assert!(said.contains(&format!("Bill of {running}: UNFINISHED")), "{said}");

    // Closed as it is, and then written to.
    let closed = json!({"month": "2024-05-01", "bill_nano_usd": sum, "windows": 4, "closed_by": "ops"});
    insert(&installed, "ledger_months", [closed]).await;
    let bill = installed.json(&MONTH);
    assert_eq!(bill["bill"]["closed_by"], "ops");
    let late = Booking::new(MIDNIGHT_S + 15, "chat", Vec::new());
    book(&installed, &[late]).await;
    let changed = installed.report(&MONTH);
    assert_eq!(changed.status.code(), Some(70));
    assert!(
        text(&changed.stderr).contains("somebody wrote to a closed month"),
        "{}",
        text(&changed.stderr)
    );

    // A nano too much in one line.
    let mut row = serde_json::to_value(&rows[0]).expect("JSON");
    row["revision"] = 3.into();
    row["cost_nano_usd"] = (rows[0].cost.as_i64() + 1).into();
    insert(&installed, "cost_ledger", [row]).await;
    for format in ["table", "csv", "json", "focus"] {
        let uneven = installed.report(&[&DAYS[..], &["--format", format]].concat());
        let said = text(&uneven.stderr);
        assert_eq!(uneven.status.code(), Some(70), "{format}: {said}");
        assert!(
            said.contains("a difference of 0.000000001 USD") && said.contains("2024-05-10T23:59:30Z of chat"),
            "{said}"
        );
        assert!(!uneven.stdout.is_empty(), "it is printed all the same");
    }
    installed.finish().await;
}

/// What FOCUS 1.3 says of a column.
#[derive(Clone, Copy)]
enum Kind {
    Decimal,
    DateTime,
    Text,
    OneOf(&'static [&'static str]),
    Json,
}

/// Columns that are demanded of everyone, and those of the others that are given: name, kind, and whether there must be a value.
const FOCUS: &[(&str, Kind, bool)] = &[
    ("BilledCost", Kind::Decimal, true),
    ("BillingAccountId", Kind::Text, true),
    ("BillingAccountName", Kind::Text, false),
    ("BillingCurrency", Kind::OneOf(&["USD"]), true),
    ("BillingPeriodEnd", Kind::DateTime, true),
    ("BillingPeriodStart", Kind::DateTime, true),
    (
        "ChargeCategory",
        Kind::OneOf(&["Usage", "Purchase", "Tax", "Credit", "Adjustment"]),
        true,
    ),
    ("ChargeClass", Kind::OneOf(&["Correction"]), false),
    ("ChargeDescription", Kind::Text, false),
    (
        "ChargeFrequency",
        Kind::OneOf(&["One-Time", "Recurring", "Usage-Based"]),
        true,
    ),
    ("ChargePeriodEnd", Kind::DateTime, true),
    ("ChargePeriodStart", Kind::DateTime, true),
    ("ConsumedQuantity", Kind::Decimal, true),
    ("ConsumedUnit", Kind::OneOf(&["Tokens"]), true),
    ("ContractedCost", Kind::Decimal, true),
    ("EffectiveCost", Kind::Decimal, true),
    ("HostProviderName", Kind::Text, true),
    ("InvoiceIssuerName", Kind::Text, true),
    ("ListCost", Kind::Decimal, true),
    ("PricingQuantity", Kind::Decimal, true),
    ("PricingUnit", Kind::OneOf(&["Hours"]), true),
    ("ProviderName", Kind::Text, true),
    ("PublisherName", Kind::Text, true),
    ("ResourceId", Kind::Text, true),
    ("ResourceName", Kind::Text, true),
    ("ResourceType", Kind::Text, true),
    ("ServiceCategory", Kind::OneOf(&["AI and Machine Learning"]), true),
    ("ServiceName", Kind::Text, true),
    ("ServiceProviderName", Kind::Text, true),
    ("ServiceSubcategory", Kind::OneOf(&["Generative AI"]), true),
    ("SubAccountId", Kind::Text, false),
    ("SubAccountName", Kind::Text, false),
    ("Tags", Kind::Json, false),
    (
        "x_LedgerState",
        Kind::OneOf(&["provisional", "settled", "restated"]),
        true,
    ),
    ("x_Method", Kind::Text, true),
];

fn is_of(kind: Kind, value: &str) -> bool {
    let is_decimal = |value: &str| {
        let digits = value.strip_prefix('-').unwrap_or(value).replacen('.', "", 1);
        !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
    };
    match kind {
        Kind::Decimal => is_decimal(value),
        Kind::Text => true,
        Kind::OneOf(allowed) => allowed.contains(&value),
        Kind::DateTime => {
            let shape: String = value
                .chars()
                .map(|c| if c.is_ascii_digit() { '0' } else { c })
                .collect();
            shape == "0000-00-00T00:00:00Z"
        }
        Kind::Json => serde_json::from_str(value).is_ok_and(|tags: BTreeMap<String, String>| {
            let known = ["team", "project", "model"];
            tags.contains_key("team") && tags.keys().all(|key| known.contains(&key.as_str()))
        }),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_focus_have_the_columns_and_values_of_its_specification() {
    let (installed, rows) = two_days("focus").await;
    let output = installed.report(&[&DAYS[..], &["--format", "focus", "--issuer", "Platform, Inc"]].concat());
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let head = text(&output.stdout).lines().next().expect("names").to_owned();
    assert_eq!(
        head,
        FOCUS.iter().map(|column| column.0).collect::<Vec<_>>().join(",")
    );
    let charges = records(&output);
    assert!(charges.len() > 8, "{charges:?}");
    for charge in &charges {
        for (name, kind, is_demanded) in FOCUS {
            let value = &charge[*name];
            assert!(!is_demanded || !value.is_empty(), "{name} of {charge:?}");
            assert!(value.is_empty() || is_of(*kind, value), "{name} is {value:?}");
        }
        assert!(charge["ChargePeriodStart"] < charge["ChargePeriodEnd"]);
        assert!(
            charge["BillingPeriodStart"] <= charge["ChargePeriodStart"]
                && charge["ChargePeriodEnd"] <= charge["BillingPeriodEnd"]
        );
        assert_eq!(
            (&charge["InvoiceIssuerName"], &charge["BilledCost"]),
            (&"Platform, Inc".to_owned(), &charge["EffectiveCost"])
        );
    }
    let sum: i64 = rows.iter().map(|row| row.cost.as_i64()).sum();
    for cost in ["BilledCost", "ContractedCost", "EffectiveCost", "ListCost"] {
        assert_eq!(
            charges.iter().map(|charge| nano(&charge[cost])).sum::<i64>(),
            sum,
            "{cost}"
        );
    }
    // Hours of an upstream are the time of its windows: four of 15 s, each cut at the ninth place.
    let hours: i64 = charges
        .iter()
        .map(|charge| nano(&charge["PricingQuantity"]))
        .sum();
    assert!(
        (60_000_000_000 / 3600 - hours).unsigned_abs() <= charges.len() as u64,
        "{hours}"
    );
    // The request over midnight has a row on each day.
    let of_b: Vec<&str> = charges
        .iter()
        .filter(|charge| charge["SubAccountId"] == "b")
        .map(|charge| charge["ChargePeriodStart"].as_str())
        .collect();
    assert_eq!(of_b, ["2024-05-10T00:00:00Z", "2024-05-11T00:00:00Z"]);
    let of_nobody = charges.iter().filter(|charge| charge["SubAccountId"].is_empty());
    assert!(of_nobody.clone().count() >= 5);
    assert!(
        of_nobody
            .clone()
            .all(|charge| charge["ChargeDescription"].contains("no team"))
    );
    installed.finish().await;
}

#[test]
fn what_cannot_be_billed_is_refused_before_anything_is_asked() {
    let installed = Installed::bare("bill-arguments");
    for (arguments, expected) in [
        (&["--bill", "2024-13"][..], "a month such as 2026-11"),
        (&["--bill", "2024-05", "--since", "1h"], "cannot be used with"),
        (&["--bill", "2024-05", "--by", "user"], "found user"),
        (&["--bill", "2024-05", "--by", "team,endpoint"], "found endpoint"),
        (&["--actual", "5"], "--bill"),
        (&["--bill", "2024-05", "--actual=-5"], "not negative"),
        (
            &["--bill", "2024-05", "--actual", "0.0000000001"],
            "at most 9 digits",
        ),
        (&["--format", "focus", "--by", "team"], "no --by"),
        (&["--issuer", "Platform"], "--format focus"),
        (&["--format", "focus", "--reconciliation"], "no counters"),
        (
            &["--bill", "2024-05", "--actual", "1", "--reconciliation"],
            "cannot be used with",
        ),
    ] {
        let (code, said) = installed.refused(arguments);
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(expected), "{arguments:?}: {said}");
    }
}
