//! A bill that adds up, end to end: what the gateway tells the ledger of real traffic is the work of the engines, and what the ledger makes of it
//! is what the engines cost.

#[allow(dead_code, reason = "the engines' own sums are not used here")]
mod books;
mod support;

use books::{Books, Row, Trial, Work};
use std::collections::BTreeSet;
use vllm_gateway::config::IdleTo;
use vllm_gateway::ledger::facts::IDLE;
use vllm_gateway::ledger::{
    CostRow, Edition, EngineView, Method, NanoUsd, Price, PriceList, Segment, State, Weights, Window,
    WindowFacts, allocate,
};

/// Streams and others, to two kinds of server; clients leave in the middle, requests fail.
#[rustfmt::skip] // Options in pairs.
const LOAD: &[&str] = &[
    "--endpoints", "chat=5,completions=3,embeddings=1,responses=1,messages=1", "--stream-fraction", "0.5",
    "--abort-fraction", "0.2", "--fail-fraction", "0.05", "--teams", "4", "--concurrency", "32",
    "--prompt-tokens", "4..60", "--output-tokens", "2..32", "--abort-after-ms", "1..100",
];

#[rustfmt::skip]
const SIM: &[&str] = &["--step-base-us", "4000", "--prefill-us-per-token", "20", "--decode-us-per-seq", "10"];

/// The ledger of one upstream over all the windows in which anything ran there, and what they cost.
fn ledger_of(books: &Books, upstream: &str, prices: &PriceList) -> (Vec<CostRow>, NanoUsd) {
    let here = || books.segments.iter().filter(|kept| &*kept.upstream == upstream);
    let windows: BTreeSet<Window> = here().map(|kept| kept.window).collect();
    let method =
        Method::new(Method::THETA_ASSUMED, Weights::ASSUMED, IdleTo::Separate).expect("a half is a share");
    let (mut rows, mut bill) = (Vec::new(), NanoUsd(0));
    for window in &windows {
        let segments: Vec<Segment> = here()
            .filter(|kept| kept.window == *window)
            .map(|kept| kept.segment.clone())
            .collect();
        let facts = WindowFacts {
            window: *window,
            upstream,
            prices,
            segments: &segments,
            engine: &EngineView::default(),
            accounts_before: &[],
        };
        let edition = Edition {
            revision: 1,
            state: State::Provisional,
        };
        rows.extend(allocate(&facts, &method, edition));
        bill += prices.bill(window.span());
    }
    (rows, bill)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_teams_pay_for_what_their_requests_ran_and_the_rows_sum_to_the_bill() {
    let trial = Trial {
        seed: 31,
        requests: 600,
        load: LOAD,
        sim: SIM,
        yaml: "",
    };
    let books = Books::keep(&trial).await;
    books.check_segments();
    let prices = PriceList::new(vec![Price::ASSUMED]).expect("one price");
    for upstream in ["chat", "embed"] {
        let (rows, bill) = ledger_of(&books, upstream, &prices);
        assert_eq!(
            rows.iter().map(|row| row.cost).sum::<NanoUsd>(),
            bill,
            "{upstream}"
        );
        let teams = rows.iter().filter(|row| !row.account.team_id.starts_with("__"));
        let paid: BTreeSet<&str> = teams
            .filter(|row| row.cost > NanoUsd(0))
            .map(|row| &*row.account.team_id)
            .collect();
        assert_eq!(paid.len(), 4, "{upstream}: {paid:?}");
        assert!(rows.iter().any(|row| &*row.account.team_id == IDLE), "{upstream}");
        let here = books.rows.values().filter(|row| &*row.event.upstream == upstream);
        let booked: Work = here.map(Row::booked).sum();
        let told = Work {
            prompt: rows.iter().map(|row| row.prompt_tokens).sum(),
            completion: rows.iter().map(|row| row.completion_tokens).sum(),
        };
        assert_eq!(told, booked, "{upstream}");
    }
}
