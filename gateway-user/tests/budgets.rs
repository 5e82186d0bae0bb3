//! Budgets over several gateways, over restarts and kills, and while ClickHouse is away: the real program, and ClickHouse's own engine.
//!
//! These tests need libchdb, which `cargo xtask test` fetches; without it they fail and say so.

mod support;

use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use support::installed::{ClickHouse, Installed, Running, free_address};
use support::{Sim, eventually, exchange, post};

const CHAT: &str = "/v1/chat/completions";
const ASK: &str =
    r#"{"model": "tiny", "max_tokens": 20, "messages": [{"role": "user", "content": "a few words"}]}"#;

/// What a request of that kind may be charged at most, so that a budget is some requests: 0.40 USD for a million tokens, of which there are
/// fewer than a hundred.
const REQUEST_NANO_USD_MAX: u64 = 40_000;

/// Status of the answer, and the code of its error.
async fn ask(gateway: SocketAddr, team: &str) -> (u16, String) {
    let answer = String::from_utf8(exchange(gateway, &post(CHAT, team, ASK)).await).expect("text");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    let body: Value = serde_json::from_str(body).unwrap_or_default();
    let status = head
        .split(' ')
        .nth(1)
        .expect("a status")
        .parse()
        .expect("a number");
    (
        status,
        body["error"]["code"].as_str().unwrap_or_default().to_owned(),
    )
}

fn is_refused((status, code): &(u16, String)) -> bool {
    *status == 429 && code == "budget_exceeded"
}

/// Asks until the budget is spent; returns how many requests were let in.
async fn spend(gateway: SocketAddr, team: &str) -> usize {
    for passed in 0.. {
        let answer = ask(gateway, team).await;
        if is_refused(&answer) {
            return passed;
        }
        assert_eq!(answer.0, 200);
        assert!(passed < 10_000, "it is never spent");
    }
    unreachable!("it counts on")
}

async fn spent_nano_usd(gateway: &Running, team: &str) -> u64 {
    let label = format!("team=\"{team}\"");
    (gateway.metric("gateway_budget_spent_usd", &[&label]).await * 1e9).round() as u64
}

async fn stored_nano_usd(installed: &Installed, team: &str) -> Option<u64> {
    installed
        .number(&format!(
            "(SELECT sum(charge_nano_usd) FROM request_events FINAL WHERE team_id = '{team}')"
        ))
        .await
}

/// A budget of so many nano-USD for each team, read every fifth of a second.
fn budget(nano_usd: u64) -> String {
    format!(
        "metrics: {{emit_interval: 200ms}}\nlimits: {{default: {{budget: {{usd: {}}}}}}}\n",
        nano_usd as f64 / 1e9
    )
}

fn memo(installed: &Installed) -> PathBuf {
    installed.dir.join("spool/gw.budgets.json")
}

/// Not one request too many: a budget that was spent has what its requests were charged, less than one beyond it.
fn assert_just_spent(spent_nano_usd: u64, budget_nano_usd: u64) {
    let most = budget_nano_usd + REQUEST_NANO_USD_MAX;
    assert!(
        (budget_nano_usd..most).contains(&spent_nano_usd),
        "{spent_nano_usd} of {budget_nano_usd}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_budget_is_one_for_all_gateways() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let store = format!("url: \"http://{clickhouse}\"");
    let one = Installed::with_store("budget-one", sim.addr, clickhouse, &store);
    let two = Installed::with_store("budget-two", sim.addr, clickhouse, &store);
    let file = two.dir.join("config.yaml");
    let config = std::fs::read_to_string(&file).expect("its configuration");
    std::fs::write(&file, config.replace("id: gw}", "id: gw-2}")).expect("a file");
    let budget_nano_usd = 20 * REQUEST_NANO_USD_MAX;
    one.configure(&budget(budget_nano_usd));
    two.configure(&budget(budget_nano_usd));
    let _engine = ClickHouse::start(clickhouse, &one.dir.join("clickhouse"), None);
    let gateways = [one.start(), two.start()];
    let passed = spend(gateways[0].clients, "red").await;
    assert!(passed >= 20, "{passed}");
    let spent = spent_nano_usd(&gateways[0], "red").await;
    assert_just_spent(spent, budget_nano_usd);
    // The other one has not charged anything, and knows.
    eventually("the other gateway to know", async || {
        is_refused(&ask(gateways[1].clients, "red").await).then_some(())
    })
    .await;
    assert_eq!(
        ask(gateways[1].clients, "blue").await.0,
        200,
        "of another team it is no affair"
    );
    // What each knows in the end is what is stored, each row once.
    for gateway in &gateways {
        eventually("the same sum everywhere", async || {
            let stored = stored_nano_usd(&one, "red").await?;
            (spent_nano_usd(gateway, "red").await == stored && stored >= spent).then_some(())
        })
        .await;
    }
    for gateway in gateways {
        gateway.stop();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spent_budget_stays_spent_over_restarts_and_kills() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let installed = Installed::embedded("budget-kept", sim.addr);
    let budget_nano_usd = 10 * REQUEST_NANO_USD_MAX;
    installed.configure(&budget(budget_nano_usd));
    let gateway = installed.start();
    spend(gateway.clients, "red").await;
    let spent = spent_nano_usd(&gateway, "red").await;
    assert_just_spent(spent, budget_nano_usd);
    eventually("it to be stored and written down", async || {
        let written = std::fs::read_to_string(memo(&installed)).unwrap_or_default();
        let is_stored = stored_nano_usd(&installed, "red").await == Some(spent);
        (is_stored && written.contains(&format!(":{spent}}}"))).then_some(())
    })
    .await;
    gateway.kill();
    for stop in [Running::stop, Running::kill] {
        let gateway = installed.start();
        assert!(
            is_refused(&ask(gateway.clients, "red").await),
            "with the first request"
        );
        // And when ClickHouse was asked it is no more and no less.
        gateway
            .until_metric("gateway_store_batches_total", &["request_events"], 0.0)
            .await;
        eventually("the sum that is stored", async || {
            (spent_nano_usd(&gateway, "red").await == spent).then_some(())
        })
        .await;
        stop(gateway);
    }
    // What was written down is lost: ClickHouse knows.
    std::fs::remove_file(memo(&installed)).expect("it is there");
    let gateway = installed.start();
    eventually("ClickHouse to be asked", async || {
        is_refused(&ask(gateway.clients, "red").await).then_some(())
    })
    .await;
    gateway.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn without_clickhouse_a_gateway_goes_on_by_its_own_count_and_knows_its_spool() {
    let sim = Sim::start(&["--model", "tiny", "--instant"]);
    let clickhouse = free_address();
    let store = format!("url: \"http://{clickhouse}\"");
    let installed = Installed::with_store("budget-alone", sim.addr, clickhouse, &store);
    let budget_nano_usd = 10 * REQUEST_NANO_USD_MAX;
    // Entries only, so that ClickHouse is asked for these teams alone, also for one whose name is no easy one to quote.
    let entries =
        [r"red", r"blue", r"it's\\o'neil"].map(|team| format!("{{team: \"{team}\", budget: *budget}}"));
    let usd = budget_nano_usd as f64 / 1e9;
    installed.configure(&format!(
        "metrics: {{emit_interval: 200ms}}\nlimits:\n  default:\n    budget: ~\n  teams:\n    - {{team: other, budget: &budget {{usd: {usd}}}}}\n{}",
        entries.map(|entry| format!("    - {entry}\n")).concat()
    ));
    // Nobody is there.
    let gateway = installed.start();
    let passed = spend(gateway.clients, "red").await;
    let spent = spent_nano_usd(&gateway, "red").await;
    assert_just_spent(spent, budget_nano_usd);
    let blue = ask(gateway.clients, "blue").await;
    assert_eq!((passed >= 10, blue.0), (true, 200));
    gateway.kill();
    drop(std::fs::remove_file(memo(&installed)));
    let gateway = installed.start();
    assert!(
        is_refused(&ask(gateway.clients, "red").await),
        "its rows are in the spool"
    );
    assert_eq!(ask(gateway.clients, "blue").await.0, 200);
    // While these get to ClickHouse, from where they are read too, nothing is counted twice and nothing is missed.
    let engine = ClickHouse::start(clickhouse, &installed.dir.join("clickhouse"), None);
    eventually("all rows to be stored", async || {
        assert_eq!(spent_nano_usd(&gateway, "red").await, spent);
        (stored_nano_usd(&installed, "red").await? == spent).then_some(())
    })
    .await;
    // What is read is written down, so that then a read has seen the rows.
    eventually("a read", async || {
        assert_eq!(spent_nano_usd(&gateway, "red").await, spent);
        memo(&installed).exists().then_some(())
    })
    .await;
    std::fs::remove_file(memo(&installed)).expect("it is there");
    eventually("another read", async || {
        assert_eq!(spent_nano_usd(&gateway, "red").await, spent);
        memo(&installed).exists().then_some(())
    })
    .await;
    assert!(is_refused(&ask(gateway.clients, "red").await));
    // It goes away again, and blue's own budget is spent without it.
    engine.kill();
    spend(gateway.clients, "blue").await;
    assert_just_spent(spent_nano_usd(&gateway, "blue").await, budget_nano_usd);
    gateway.stop();
}
