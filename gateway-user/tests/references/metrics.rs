//! `docs/METRICS.md`, from the registry with everything in it that a gateway can show.

use super::{beginning, cell};
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;
use std::sync::{Arc, Weak};
use vllm_gateway::bookkeeper::LedgerStats;
use vllm_gateway::config::Config;
use vllm_gateway::metrics::{Family, LABELS, Limits, Metrics};
use vllm_gateway::store::service::StoreService;

/// Families by the beginning of their names, the first that fits: what a reader looks for together.
const GROUPS: [(&str, &[&str]); 10] = [
    (
        "Requests, latency, tokens, money",
        &[
            "gen_ai_",
            "gateway_requests_",
            "gateway_inter_token_",
            "gateway_tokens_",
            "gateway_engine_tokens_",
            "gateway_charge_",
            "gateway_cost_",
            "gateway_usage_",
            "gateway_inflight_",
        ],
    ),
    (
        "The proxy",
        &[
            "gateway_request_",
            "gateway_response_",
            "gateway_refused_",
            "gateway_injection_",
            "gateway_client_",
        ],
    ),
    ("Limits and budgets", &["gateway_limit", "gateway_budget"]),
    (
        "Upstreams",
        &["gateway_upstream_", "gateway_scrape_", "gateway_vllm_"],
    ),
    ("Reconciliation with the engines", &["gateway_reconciliation_"]),
    ("The ledger", &["gateway_ledger_"]),
    (
        "The spool and the store",
        &[
            "gateway_spool_",
            "gateway_store_",
            "gateway_journal_",
            "gateway_crashed_",
            "gateway_samples_",
        ],
    ),
    ("The tap", &["gateway_tap_"]),
    (
        "The program",
        &["gateway_build_", "gateway_capture_", "gateway_start_", "process_"],
    ),
    ("Others", &[""]),
];

/// Units by the end of a name, without `_total`.
const UNITS: [(&str, &str); 7] = [
    ("_seconds", "seconds"),
    ("_bytes", "bytes"),
    ("_usd", "USD"),
    ("_tokens", "tokens"),
    ("_ratio", "a ratio"),
    ("_info", "always 1"),
    ("_rows", "rows"),
];

/// All families that a gateway can show, in a directory for its spool.
fn families(dir: &Path) -> Vec<Family> {
    let metrics = Metrics::new(Limits::default()).expect("a registry");
    let mut config = Config::default();
    config.spool.dir = dir.to_owned();
    let store = StoreService::open(&config).expect("a spool").expect("a store");
    metrics.show_store(store.counts()).expect("the store's families");
    metrics
        .show_ledger(Arc::new(LedgerStats::default()))
        .expect("the ledger's families");
    metrics.show_tap(Weak::new()).expect("the tap's families");
    metrics.show_limits(Weak::new()).expect("the limits' families");
    metrics.families()
}

/// The page.
///
/// # Panics
/// When a family, a label or a text is missing.
pub fn page() -> String {
    let dir = std::env::temp_dir().join(format!("reference-spool-{}", std::process::id()));
    let families = families(&dir);
    let _ = std::fs::remove_dir_all(&dir);
    check(&families);
    let mut page = beginning("Metrics", "the program's registry (`gateway-user/src/metrics/`)");
    page.push_str(
        "\nEvery family of `GET /metrics` on the admin port, in Prometheus' text format. A family has no sample before there is something to count. \
         A histogram has `_bucket`, `_sum` and `_count`. Labels have few values: the table at the end says what bounds each of them.\n",
    );
    let mut left: Vec<&Family> = families.iter().collect();
    for (title, beginnings) in GROUPS {
        let (of_group, others) = left.into_iter().partition(|family| {
            beginnings
                .iter()
                .any(|beginning| family.name.starts_with(beginning))
        });
        left = others;
        table(&mut page, title, of_group);
    }
    page.push_str("\n## Labels\n\n| label | what it says | values |\n|---|---|---|\n");
    for label in LABELS {
        let _ = writeln!(
            page,
            "| `{}` | {} | {} |",
            label.name,
            cell(label.means),
            cell(label.bound)
        );
    }
    page
}

fn table(page: &mut String, title: &str, families: Vec<&Family>) {
    if families.is_empty() {
        return;
    }
    let _ = writeln!(
        page,
        "\n## {title}\n\n| family | type | labels | unit | what |\n|---|---|---|---|---|"
    );
    for family in families {
        let labels: Vec<String> = family.labels.iter().map(|label| format!("`{label}`")).collect();
        let base = family.name.trim_end_matches("_total");
        let unit = UNITS
            .iter()
            .find(|(ending, _)| base.ends_with(ending))
            .map_or("", |(_, unit)| unit);
        let (name, labels) = (&family.name, labels.join(", "));
        let _ = writeln!(
            page,
            "| `{name}` | {} | {labels} | {unit} | {} |",
            family.kind,
            cell(&family.help)
        );
    }
}

/// What the registry cannot know by itself.
fn check(families: &[Family]) {
    for family in families {
        assert!(
            family.help.ends_with('.'),
            "the help of {} is no sentence: {:?}",
            family.name,
            family.help
        );
        let is_total = family.name.ends_with("_total");
        assert_eq!(
            is_total,
            family.kind == "counter",
            "{} is a {}: only counters end in _total",
            family.name,
            family.kind
        );
    }
    let used: BTreeSet<&str> = families
        .iter()
        .flat_map(|family| &family.labels)
        .map(String::as_str)
        .collect();
    let known: BTreeSet<&str> = LABELS.iter().map(|label| label.name).collect();
    assert_eq!(
        used, known,
        "labels of families (left) and those that metrics/labels.rs explains (right)"
    );
    let names: BTreeSet<&str> = families.iter().map(|family| family.name.as_str()).collect();
    let in_source = names_in_source();
    let forgotten: Vec<&String> = in_source
        .iter()
        .filter(|name| !names.contains(name.as_str()))
        .collect();
    assert!(
        forgotten.is_empty(),
        "these families are in gateway-user/src/metrics and not in the registry that this page is made of: show them in \
         gateway-user/tests/references/metrics.rs: {forgotten:?}"
    );
}

/// What looks like a family's name in the sources of the metrics: so none is missed that is registered in a way of its own.
fn names_in_source() -> BTreeSet<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/metrics");
    let mut names = BTreeSet::new();
    for entry in std::fs::read_dir(dir).expect("the sources") {
        let path = entry.expect("an entry").path();
        if path.ends_with("tests.rs") {
            continue;
        }
        let text = std::fs::read_to_string(&path).expect("a source");
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let quoted = code.split('"').skip(1).step_by(2);
        let is_name = |text: &&str| {
            ["gateway_", "gen_ai_", "process_"]
                .iter()
                .any(|beginning| text.starts_with(beginning))
                && text.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        };
        names.extend(quoted.filter(is_name).map(str::to_owned));
    }
    assert!(
        names.len() > 50,
        "only {} names were found: is the search broken?",
        names.len()
    );
    names
}
