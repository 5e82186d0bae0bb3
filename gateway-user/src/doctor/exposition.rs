//! An upstream's `/metrics`: whether it can be read, what it has, and whether one server stands behind it.

use super::Check;
use super::upstream::{Asking, shown};
use crate::vllm::names::{names_in, newest_names};
use crate::vllm::origin::follows;
use crate::vllm::page::{Page, Unsupported};
use hyper::StatusCode;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// Scrapes, each on a connection of its own. A balancer that draws between two servers shows one alone with a chance of 1 in 128.
const SCRAPES: usize = 8;

/// No further scrape is begun after this: a server that takes so long has shown what it is.
const SCRAPING_LIMIT: Duration = Duration::from_secs(4);

/// Families, engines, and what stands behind them.
pub(super) async fn checks(asking: &Asking, group: &str) -> Vec<Check> {
    let mut pages = Vec::with_capacity(SCRAPES);
    let mut text = String::new();
    let started = Instant::now();
    while pages.len() < SCRAPES && started.elapsed() < SCRAPING_LIMIT {
        match page(asking).await {
            Ok((page, body)) => {
                pages.push(page);
                text = body;
            }
            // One that fails among others may be a server of several that is down.
            Err(error) if pages.is_empty() => return vec![missing(group, error)],
            Err(error) => return vec![flapping(group, &error)],
        }
    }
    let mut checks = vec![
        families(group, &text),
        engines(group, &pages[0]),
        behind(group, &pages),
    ];
    checks.extend(prefill(group, &pages[0], asking.upstream.external_kv_is_cache));
    checks
}

async fn page(asking: &Asking) -> Result<(Page, String), String> {
    let said = asking.get("/metrics").await?;
    if said.status != StatusCode::OK {
        return Err(format!("/metrics answers {}", said.status));
    }
    let page = Page::read(&said.body).map_err(|error| error.to_string())?;
    // It was read as UTF-8 just now.
    Ok((page, String::from_utf8_lossy(&said.body).into_owned()))
}

fn missing(group: &str, error: String) -> Check {
    Check::problem(group, "metrics", error).advise(
        "without vLLM's own counters nothing can be reconciled, and queue and cache are not shown; check what answers at /metrics \
         (vllm-mlx needs --enable-metrics)",
    )
}

fn flapping(group: &str, error: &str) -> Check {
    Check::problem(group, "metrics", format!("it answers at times only: {error}")).advise(
        "several servers behind one address, of which not all are up? List each as an upstream of its own",
    )
}

fn families(group: &str, page: &str) -> Check {
    let found = names_in(page);
    let all = newest_names().count();
    let missing: Vec<&str> = newest_names().filter(|name| !found.contains_key(name)).collect();
    let renamed: Vec<&str> = found
        .iter()
        .filter(|(newest, name)| newest != name)
        .map(|(_, name)| *name)
        .collect();
    let mut text = format!("{} of the {all} families that are read", found.len());
    if !renamed.is_empty() {
        text += &format!(", under old names: {}", renamed.join(", "));
    }
    if missing.is_empty() {
        return Check::ok(group, "families", text);
    }
    Check::warning(
        group,
        "families",
        format!("{text}; missing: {}", missing.join(", ")),
    )
    .advise("what they would say stays unknown; vLLM 0.12 and newer have all of them")
}

fn engines(group: &str, page: &Page) -> Check {
    let each = page
        .models
        .iter()
        .map(|(name, model)| match model.engine_count() {
            1 => format!("{}: one engine", shown(name)),
            count => format!("{}: {count} engines", shown(name)),
        });
    Check::ok(group, "engines", each.collect::<Vec<_>>().join(", "))
}

/// Whether what a server did for a request is all that was done for it; nothing is said where it is.
fn prefill(group: &str, page: &Page, external_kv_is_cache: bool) -> Option<Check> {
    let found = match page.unsupported()? {
        Unsupported::KvConnector => "it has a connector for prefill on another server (NIXL)",
        Unsupported::ExternalKv => {
            "prompts come to it prefilled by another server, or out of a cache that is not its own"
        }
    };
    if external_kv_is_cache {
        let found = format!("{found}; it counts as a cache (external_kv_is_cache)");
        return Some(Check::ok(group, "prefill", found));
    }
    Some(Check::problem(group, "prefill", found).advise(
        "disaggregated prefill and decode cannot be billed: requests do not show what each server did for them, so that the time of this one goes to \
         __unattributed__. Serve teams from servers that do both, or, if it is but a cache such as LMCache, set upstreams[].external_kv_is_cache",
    ))
}

/// Counters of one process only grow, and it has started once.
fn behind(group: &str, pages: &[Page]) -> Check {
    let starts: BTreeSet<Option<u64>> = pages
        .iter()
        .map(|page| page.process_start_s.map(f64::to_bits))
        .collect();
    let several = "several servers answer at this address in turn";
    let found = if starts.len() > 1 {
        format!(
            "{several}: {} processes among {} scrapes",
            starts.len(),
            pages.len()
        )
    } else if pages.windows(2).any(|pair| !follows(&pair[0], &pair[1])) {
        format!(
            "{several}: counters went back between two of {} scrapes",
            pages.len()
        )
    } else if pages.len() < 2 {
        return Check::unknown(group, "one server", "one scrape took too long for another");
    } else if starts.contains(&None) {
        let found = format!("{} scrapes fit each other, and tell no process", pages.len());
        return Check::ok(group, "one server", found);
    } else {
        return Check::ok(
            group,
            "one server",
            format!("{} scrapes are of one process", pages.len()),
        );
    };
    Check::problem(group, "one server", found).advise(
        "what vLLM says of itself is worthless then: list each server by its own address as an upstream (VLLM_URL takes several, separated by \
         commas), and start vLLM with --api-server-count 1 if its processes do not sum their metrics. Requests are counted as they should be",
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    const REAL: &str = include_str!("../../tests/fixtures/vllm-0.32.0/metrics_after.prom");
    const EARLIER: &str = include_str!("../../tests/fixtures/vllm-0.32.0/metrics_under_load.prom");

    fn read(text: &str) -> Page {
        Page::read(text.as_bytes()).unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn pages_of_one_process_are_one_server() {
        let (earlier, later) = (read(EARLIER), read(REAL));
        assert_eq!(
            behind("g", &[earlier.clone(), later.clone(), later]).state,
            State::Ok
        );
        let without = read("vllm:prompt_tokens_total{model_name=\"m\"} 1\n");
        let check = behind("g", &[without.clone(), without]);
        assert!(
            check.state == State::Ok && check.found.contains("no process"),
            "{check:?}"
        );
    }

    #[test]
    fn counters_that_go_back_are_several_servers_even_if_they_tell_no_process() {
        let at = |tokens: u32| {
            read(&format!(
                "vllm:prompt_tokens_total{{model_name=\"m\"}} {tokens}\n"
            ))
        };
        let check = behind("g", &[at(7), at(3), at(7)]);
        assert_eq!(check.state, State::Problem);
        assert!(check.found.contains("went back"), "{check:?}");
        assert_eq!(behind("g", &[read(REAL), read(EARLIER)]).state, State::Problem);
    }

    #[test]
    fn two_processes_are_told_by_when_they_started() {
        let at = |second: u32| {
            read(&format!(
                "process_start_time_seconds {second}\nvllm:prompt_tokens_total{{model_name=\"m\"}} 0\n"
            ))
        };
        let check = behind("g", &[at(1), at(2), at(1)]);
        assert!(
            check.state == State::Problem && check.found.contains("2 processes among 3"),
            "{check:?}"
        );
    }

    #[test]
    fn prefill_elsewhere_is_a_problem_unless_it_is_a_cache() {
        assert!(prefill("g", &read(REAL), false).is_none());
        let nixl = read("vllm:nixl_num_failed_transfers_total{model_name=\"m\"} 0\n");
        let state = |is_cache| prefill("g", &nixl, is_cache).map(|check| check.state);
        assert_eq!(
            (state(false), state(true)),
            (Some(State::Problem), Some(State::Ok))
        );
    }

    #[test]
    fn missing_and_renamed_families_are_named() {
        assert_eq!(families("g", REAL).state, State::Ok);
        let old = families("g", "vllm:gpu_cache_usage_perc{model_name=\"m\"} 0\n");
        assert_eq!(old.state, State::Warning);
        assert!(
            old.found.starts_with("1 of the 15 families that are read, under old names: gpu_cache_usage_perc; missing: num_requests_running"),
            "{old:?}"
        );
    }
}
