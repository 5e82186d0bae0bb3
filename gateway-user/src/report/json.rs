//! The report as one JSON object: stable names, each with its unit, in the order of the columns. Unknown is `null`.

use super::Report;
use super::column::{COLUMNS, key_names};
use super::time;
use crate::store::Backlog;
use crate::store::figures::Figures;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

/// All of it, with a line end.
pub fn print(report: &Report) -> String {
    let lines = |keys: &[String], figures: &Figures| {
        let names = key_names(&report.by)
            .zip(keys)
            .map(|(name, key)| (name, Field::Key(key.clone())));
        let values = COLUMNS
            .iter()
            .map(|column| (column.name, Field::Number((column.value)(figures).number())));
        Line(names.chain(values).collect())
    };
    let document = Document {
        from: time::format(report.period.from_us()),
        to: time::format(report.period.to_us()),
        counted_by: "end of request",
        by: key_names(&report.by).collect(),
        groups: report
            .figures
            .groups
            .iter()
            .map(|group| lines(&group.keys, &group.figures))
            .collect(),
        total: lines(&[], &report.figures.total),
        spool: SpoolObject::of(report),
    };
    // Texts and numbers with names that are texts: there is nothing in it that JSON cannot say.
    serde_json::to_string_pretty(&document).unwrap_or_default() + "\n"
}

#[derive(Serialize)]
struct Document {
    from: String,
    to: String,
    counted_by: &'static str,
    by: Vec<&'static str>,
    groups: Vec<Line>,
    total: Line,
    spool: SpoolObject,
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
struct Line(Vec<(&'static str, Field)>);

#[derive(Serialize)]
#[serde(untagged)]
enum Field {
    Key(String),
    Number(Option<u64>),
}

impl Serialize for Line {
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
                "ttft_p95_us": 1000000, "itl_p50_us": null, "itl_p95_us": null, "e2e_p50_us": 600000, "e2e_p95_us": 600001
            })
        );
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
