//! The report as one JSON object: stable names, each with its unit, in the order of the columns. Unknown is `null`; money is whole nano-USD.

use super::Report;
use super::bill::Bill;
use super::column::{Column, key_names};
use super::line::{Line, Whose};
use super::proof::{Proof, UpstreamProof};
use crate::command::time;
use crate::store::Backlog;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// All of it, with a line end.
pub fn print(report: &Report) -> String {
    let columns: Vec<&Column> = report.columns(false).collect();
    let object = |names: Vec<(&'static str, Field)>, line: &Line| {
        let values = columns
            .iter()
            .map(|column| (column.name, Field::Number((column.value)(line).number())));
        LineObject(names.into_iter().chain(values).collect())
    };
    let mut document = Document {
        from: time::format(report.period.from_us()),
        to: time::format(report.period.to_us()),
        counted_by: "end of request",
        costs_counted_by: "begin of window",
        by: key_names(&report.by).collect(),
        groups: Vec::new(),
        lines: Vec::new(),
        total: LineObject(Vec::new()),
        bill: report
            .bill
            .as_ref()
            .map(|bill| BillObject::of(bill, &report.proof)),
        ledger: LedgerObject::of(&report.proof),
        spool: SpoolObject::of(report),
    };
    for line in &report.lines {
        match &line.whose {
            Whose::Group(keys) => {
                let names = key_names(&report.by).zip(keys);
                let names = names
                    .map(|(name, key)| (name, Field::Text(key.clone())))
                    .collect();
                document.groups.push(object(names, line));
            }
            Whose::Nobody(name) => {
                let names = vec![("line", Field::Text(name.clone()))];
                document.lines.push(object(names, line));
            }
            Whose::Total => document.total = object(Vec::new(), line),
        }
    }
    // Texts and numbers with names that are texts: there is nothing in it that JSON cannot say.
    serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
}

#[derive(Serialize)]
struct Document {
    from: String,
    to: String,
    counted_by: &'static str,
    costs_counted_by: &'static str,
    by: Vec<&'static str>,
    groups: Vec<LineObject>,
    lines: Vec<LineObject>,
    total: LineObject,
    #[serde(skip_serializing_if = "Option::is_none")]
    bill: Option<BillObject>,
    ledger: LedgerObject,
    spool: SpoolObject,
}

/// What a month's bill has besides.
#[derive(Serialize)]
struct BillObject {
    month: String,
    is_over: bool,
    closed_at: Option<String>,
    closed_by: Option<String>,
    actual_nano_usd: Option<i64>,
    /// What a dollar of cost came to.
    actual_per_cost: Option<f64>,
}

impl BillObject {
    fn of(bill: &Bill, proof: &Proof) -> BillObject {
        let closed = proof.closed.as_ref();
        BillObject {
            month: bill.month.name(),
            is_over: bill.is_over,
            closed_at: closed.map(|closed| time::format(closed.closed_at_us)),
            closed_by: closed.map(|closed| closed.closed_by.clone()),
            actual_nano_usd: bill.invoice.map(|invoice| invoice.actual_nano_usd),
            actual_per_cost: bill.invoice.map(|invoice| invoice.factor()),
        }
    }
}

/// Whether the books add up.
#[derive(Serialize)]
struct LedgerObject {
    booked_from: Option<String>,
    booked_to: Option<String>,
    windows: u64,
    windows_due: u64,
    windows_provisional: u64,
    windows_settled: u64,
    windows_restated: u64,
    is_complete: bool,
    bill_nano_usd: i64,
    teams_nano_usd: i64,
    cost_nano_usd: i64,
    difference_nano_usd: i64,
    uneven_windows: u64,
    unbooked_upstreams: Vec<String>,
    upstreams: Vec<UpstreamObject>,
}

#[derive(Serialize)]
struct UpstreamObject {
    upstream: String,
    opened: String,
    windows: u64,
    windows_due: u64,
    windows_provisional: u64,
    windows_settled: u64,
    windows_restated: u64,
    bill_nano_usd: i64,
    bill_by_config_nano_usd: Option<i64>,
    rules: Vec<RulesObject>,
    engine_windows: u64,
    engine_tokens: Option<u64>,
    known_tokens: u64,
    unattributed_tokens: u64,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct RulesObject {
    rules: String,
    windows: u64,
}

impl LedgerObject {
    fn of(proof: &Proof) -> LedgerObject {
        let at = |second: i64| time::format(second.saturating_mul(1_000_000));
        let booked = proof.booked_s();
        LedgerObject {
            booked_from: booked.map(|(from, _)| at(from)),
            booked_to: booked.map(|(_, to)| at(to)),
            windows: proof.sum(|upstream| upstream.books.windows),
            windows_due: proof.sum(|upstream| upstream.due),
            windows_provisional: proof.sum(|upstream| upstream.books.provisional),
            windows_settled: proof.sum(|upstream| upstream.books.settled),
            windows_restated: proof.sum(|upstream| upstream.books.restated),
            is_complete: proof.is_complete,
            bill_nano_usd: proof.bill_nano_usd,
            teams_nano_usd: proof.teams_nano_usd,
            cost_nano_usd: proof.cost_nano_usd,
            difference_nano_usd: proof.difference_nano_usd(),
            uneven_windows: proof.uneven_windows,
            unbooked_upstreams: proof.unbooked.clone(),
            upstreams: proof.upstreams.iter().map(UpstreamObject::of).collect(),
        }
    }
}

impl UpstreamObject {
    fn of(proof: &UpstreamProof) -> UpstreamObject {
        let books = &proof.books;
        let rules = books.rules.iter().map(|rules| RulesObject {
            rules: rules.rules.clone(),
            windows: rules.windows,
        });
        UpstreamObject {
            upstream: books.upstream.clone(),
            opened: time::format(books.opened_s.saturating_mul(1_000_000)),
            windows: books.windows,
            windows_due: proof.due,
            windows_provisional: books.provisional,
            windows_settled: books.settled,
            windows_restated: books.restated,
            bill_nano_usd: books.bill_nano_usd,
            bill_by_config_nano_usd: proof.priced_nano_usd,
            rules: rules.collect(),
            engine_windows: books.engine.windows,
            engine_tokens: books.engine.tokens,
            known_tokens: books.engine.known_tokens,
            unattributed_tokens: books.unattributed_tokens,
            notes: proof.notes(),
        }
    }
}

/// What waits on this host: of requests, and of their segments.
#[derive(Serialize)]
struct SpoolObject {
    dir: String,
    #[serde(flatten)]
    events: BacklogObject,
    segments: BacklogObject,
}

/// Unknown as a whole where there is no spool.
#[derive(Serialize)]
struct BacklogObject {
    rows: Option<u64>,
    bytes: Option<u64>,
    batches: Option<u64>,
    oldest_age_s: Option<f64>,
    quarantined_rows: Option<u64>,
}

impl SpoolObject {
    fn of(report: &Report) -> SpoolObject {
        let waiting = report.waiting.as_ref();
        SpoolObject {
            dir: report.spool_dir.display().to_string(),
            events: BacklogObject::of(report, waiting.map(|waiting| &waiting.events)),
            segments: BacklogObject::of(report, waiting.map(|waiting| &waiting.segments)),
        }
    }
}

impl BacklogObject {
    fn of(report: &Report, backlog: Option<&Backlog>) -> BacklogObject {
        BacklogObject {
            rows: backlog.map(|backlog| backlog.rows),
            bytes: backlog.map(|backlog| backlog.bytes),
            batches: backlog.map(|backlog| backlog.batches),
            oldest_age_s: backlog.and_then(|backlog| report.oldest_age_s(backlog)),
            quarantined_rows: backlog.map(|backlog| backlog.quarantined_rows),
        }
    }
}

/// An object whose members keep their order.
struct LineObject(Vec<(&'static str, Field)>);

#[derive(Serialize)]
#[serde(untagged)]
enum Field {
    Text(String),
    Number(Option<i128>),
}

impl Serialize for LineObject {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut object = serializer.serialize_map(Some(self.0.len()))?;
        for (name, field) in &self.0 {
            object.serialize_entry(name, field)?;
        }
        object.end()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn it_is_one_object_with_units_in_its_names_and_null_for_unknown() {
        let text = print(&report());
        let value: Value = serde_json::from_str(&text).expect("JSON");
        assert_eq!(value["from"], "2025-12-01T00:00:00Z");
        assert_eq!(value["to"], "2025-12-01T00:00:00.000001Z");
        assert_eq!(value["by"], json!(["team", "model"]));
        assert_eq!(
            value["groups"][1],
            json!({
                "team": "a,\"b\"", "model": "m", "requests": 12, "ok": 9, "errors": 1, "aborted": 1, "refused": 1, "prompt_tokens": 1000,
                "cached_tokens": 0, "completion_tokens": 250, "reasoning_tokens": null, "unknown_token_requests": 1, "ttft_p50_us": 20040,
                "ttft_p95_us": 1000000, "itl_p50_us": null, "itl_p95_us": null, "e2e_p50_us": 600000, "e2e_p95_us": 600001,
                "charge_nano_usd": 2_000_000_001_i64, "cost_nano_usd": 1_000_000_000, "idle_nano_usd": 250_000_000, "recovery_nano_usd": 1_000_000_001,
                "cost_per_million_tokens_nano_usd": 500_000_000
            })
        );
        assert_eq!(value["groups"][0]["cost_nano_usd"], Value::Null);
        let of_nobody = &value["lines"][0];
        assert_eq!(
            (&of_nobody["line"], &of_nobody["cost_nano_usd"]),
            (&json!("__down__"), &json!(7))
        );
        assert_eq!(
            (&of_nobody["requests"], &of_nobody["charge_nano_usd"]),
            (&Value::Null, &Value::Null)
        );
        assert_eq!(value["ledger"]["difference_nano_usd"], 0);
        assert!(value["total"]["team"].is_null() && value["total"]["requests"] == 12);
        assert_eq!(
            value["spool"],
            json!({
                "dir": "spool", "rows": 3, "bytes": 99, "batches": 1, "oldest_age_s": 2.5, "quarantined_rows": 2,
                "segments": {"rows": 5, "bytes": 70, "batches": 1, "oldest_age_s": 0.5, "quarantined_rows": 0}
            })
        );
        let at = |name: &str| text.find(name).expect("it is there");
        assert!(
            at("\"requests\"") < at("\"ok\""),
            "members stand in the order of the columns"
        );
    }
}
