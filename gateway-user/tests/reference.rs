//! `docs/CONFIG.md`, `docs/METRICS.md` and `docs/TABLES.md` are what the program says of itself: the reader of the config and `config.yaml`, the registry
//! of metrics, and the tables that the migrations make in a real engine with their meanings in `sql/meanings.yaml`.
//!
//! A test fails when a page is not what comes out now, or when a key, a metric, a label or a column is on one side only. `cargo xtask reference`
//! writes the pages.

mod references;
mod support;

use references::{config, metrics, tables};
use std::path::Path;

/// `write` has the pages written instead of compared.
const VARIABLE: &str = "VLLM_GATEWAY_REFERENCE";

/// Holds a page against what is generated, or writes it.
fn check(page: &str, generated: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(page);
    if std::env::var_os(VARIABLE).is_some_and(|value| value == "write") {
        std::fs::write(&path, generated).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        return;
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    if found == generated {
        return;
    }
    let (mut found, mut expected) = (found.lines(), generated.lines());
    for number in 1.. {
        match (found.next(), expected.next()) {
            (found, expected) if found == expected && found.is_some() => {}
            (found, expected) => panic!(
                "docs/{page}:{number} is not what the program says now: run `cargo xtask reference`\n  expected {expected:?}\n  found    {found:?}"
            ),
        }
    }
}

#[test]
fn the_reference_of_the_config_is_what_the_reader_knows() {
    check("CONFIG.md", &config::page());
}

#[test]
#[cfg_attr(not(target_os = "linux"), ignore = "some families are of Linux alone")]
fn the_reference_of_metrics_is_what_the_registry_has() {
    check("METRICS.md", &metrics::page());
}

#[tokio::test]
async fn the_reference_of_tables_is_what_the_migrations_make() {
    check("TABLES.md", &tables::page().await);
}
