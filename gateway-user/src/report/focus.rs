//! Costs as rows of the FinOps Open Cost and Usage Specification, in CSV: <https://focus.finops.org/focus-specification/v1-3/>.
//!
//! A row is a day of an upstream, by whom and for what: a charge for the use of a shared service, with the team as the sub account that is charged
//! and the upstream as the resource that was used. All of them sum to the ledger's bill to the nano-USD. Columns stand in the order of the alphabet;
//! a null is an empty field.
//!
//! All columns that version 1.3 demands of everyone are there, also `ProviderName` and `PublisherName`, which it deprecates and still demands, and of
//! the conditional and recommended ones those that the ledger knows: consumption, resource, sub account, tags, frequency, subcategory. Left out are
//! those whose condition does not hold here (commitments, capacity reservations, regions, other currencies, invoices with numbers), unit prices and
//! SKUs, since upstreams have dated prices and no price list, and the columns of split cost allocation: no charge for the whole upstream stands in
//! the data beside its parts. What FOCUS has no column for has one with its prefix `x_`.

use super::Report;
use super::{amount, csv};
use crate::command::time;
use crate::store::figures::{ChargeRow, Period};

/// Who bills where nobody is named.
pub const ISSUER_DEFAULT: &str = "vllm-gateway";

const DAY_US: i64 = 86_400_000_000;

/// Length of a window.
const WINDOW_US: i64 = crate::ledger::Window::LEN_US as i64;

/// What is known of a row besides itself.
struct Context<'r> {
    period: Period,
    /// The books that it is out of: the name of their database.
    account: &'r str,
    issuer: &'r str,
    /// Its share of the invoice, or its cost where there is none.
    billed_nano_usd: i64,
}

/// What fills a field; `None` is null.
type Fill = fn(&ChargeRow, &Context<'_>) -> Option<String>;

fn text(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

fn cost(row: &ChargeRow, _: &Context<'_>) -> Option<String> {
    Some(amount::exact(row.cost_nano_usd))
}

fn issuer(_: &ChargeRow, context: &Context<'_>) -> Option<String> {
    text(context.issuer)
}

fn team(row: &ChargeRow, _: &Context<'_>) -> Option<String> {
    text(&row.team).filter(|_| row.is_a_teams())
}

fn upstream(row: &ChargeRow, _: &Context<'_>) -> Option<String> {
    text(&row.upstream)
}

/// Every column, in its place.
const COLUMNS: &[(&str, Fill)] = &[
    ("BilledCost", |_, context| {
        Some(amount::exact(context.billed_nano_usd))
    }),
    ("BillingAccountId", |_, context| text(context.account)),
    ("BillingAccountName", |_, _| None),
    ("BillingCurrency", |_, _| text("USD")),
    ("BillingPeriodEnd", |row, _| {
        Some(time::format(time::month_of(row.day_s * 1_000_000).1))
    }),
    ("BillingPeriodStart", |row, _| {
        Some(time::format(time::month_of(row.day_s * 1_000_000).0))
    }),
    ("ChargeCategory", |_, _| text("Usage")),
    // A correction is of a month that was invoiced before; late windows change their own month until it is closed.
    ("ChargeClass", |_, _| None),
    ("ChargeDescription", |row, _| Some(description(row))),
    ("ChargeFrequency", |_, _| text("Usage-Based")),
    ("ChargePeriodEnd", |row, context| {
        Some(time::format(charge_period(row, context).1))
    }),
    ("ChargePeriodStart", |row, context| {
        Some(time::format(charge_period(row, context).0))
    }),
    ("ConsumedQuantity", |row, _| Some(row.tokens.to_string())),
    ("ConsumedUnit", |_, _| text("Tokens")),
    ("ContractedCost", cost),
    ("EffectiveCost", cost),
    ("HostProviderName", issuer),
    ("InvoiceIssuerName", issuer),
    ("ListCost", cost),
    ("PricingQuantity", |row, _| Some(hours(row.time_us))),
    ("PricingUnit", |_, _| text("Hours")),
    ("ProviderName", issuer),
    ("PublisherName", issuer),
    ("ResourceId", upstream),
    ("ResourceName", upstream),
    ("ResourceType", |_, _| text("Inference Server")),
    ("ServiceCategory", |_, _| text("AI and Machine Learning")),
    ("ServiceName", |_, _| text("LLM Inference")),
    ("ServiceProviderName", issuer),
    ("ServiceSubcategory", |_, _| text("Generative AI")),
    ("SubAccountId", team),
    ("SubAccountName", team),
    ("Tags", |row, _| Some(tags(row))),
    ("x_LedgerState", |row, _| text(&row.state)),
    ("x_Method", |row, _| text(&row.method)),
];

/// All of it; `account` names the books.
pub fn print(report: &Report, account: &str, issuer: &str) -> String {
    let head = csv::line(COLUMNS.iter().map(|(name, _)| *name));
    let rows = report.charges.iter().map(|(row, billed_nano_usd)| {
        let context = Context {
            period: report.period,
            account,
            issuer,
            billed_nano_usd: *billed_nano_usd,
        };
        csv::line(
            COLUMNS
                .iter()
                .map(|(_, fill)| fill(row, &context).unwrap_or_default()),
        )
    });
    head + &rows.collect::<String>()
}

fn description(row: &ChargeRow) -> String {
    let (team, model, upstream) = (&row.team, &row.model, &row.upstream);
    if !row.is_a_teams() {
        return format!(
            "Time of {upstream} that no team has: {}",
            team.trim_matches('_').replace('_', " ")
        );
    }
    match model.as_str() {
        crate::ledger::facts::IDLE => format!("Share of {team} in idle time of {upstream}"),
        "" => format!("Share of {team} in {upstream}"),
        model => format!("Share of {team} in {upstream} for {model}"),
    }
}

/// The part of the day that is in the period, whole windows.
fn charge_period(row: &ChargeRow, context: &Context<'_>) -> (i64, i64) {
    let edge = |us: i64| {
        us.saturating_add(WINDOW_US - 1)
            .div_euclid(WINDOW_US)
            .saturating_mul(WINDOW_US)
    };
    let day_us = row.day_s * 1_000_000;
    let from = day_us.max(edge(context.period.from_us()));
    (from, (day_us + DAY_US).min(edge(context.period.to_us())))
}

/// Hours with nine places, cut there.
fn hours(time_us: u64) -> String {
    let billionths = u128::from(time_us) * 1_000_000_000 / 3_600_000_000;
    format!("{}.{:09}", billionths / 1_000_000_000, billionths % 1_000_000_000)
}

/// What there is of team, project and model, a line of nobody under the name of its team.
fn tags(row: &ChargeRow) -> String {
    let tags = [
        ("team", &row.team),
        ("project", &row.project),
        ("model", &row.model),
    ];
    let known = tags.into_iter().filter(|(_, value)| !value.is_empty());
    let object: serde_json::Map<String, serde_json::Value> = known
        .map(|(name, value)| (name.to_owned(), value.clone().into()))
        .collect();
    serde_json::Value::Object(object).to_string()
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    fn row(team: &str, model: &str, cost_nano_usd: i64) -> ChargeRow {
        ChargeRow {
            day_s: 1_795_478_400,
            upstream: "chat".to_owned(),
            team: team.to_owned(),
            project: String::new(),
            model: model.to_owned(),
            cost_nano_usd,
            time_us: 5_400_000_000,
            tokens: 7,
            method: "v1 theta=0.5".to_owned(),
            state: "settled".to_owned(),
        }
    }

    fn fields(row: &ChargeRow, period: (i64, i64)) -> Vec<Option<String>> {
        let context = Context {
            period: Period::new(period.0, period.1).expect("a period"),
            account: "vllm_attribution",
            issuer: "Platform",
            billed_nano_usd: 9,
        };
        COLUMNS.iter().map(|(_, fill)| fill(row, &context)).collect()
    }

    fn field(row: &ChargeRow, name: &str) -> Option<String> {
        let at = COLUMNS
            .iter()
            .position(|(known, _)| *known == name)
            .expect("a column");
        fields(row, (1_795_478_400_000_000, 1_795_478_400_000_000 + 2 * DAY_US))[at].clone()
    }

    #[test]
    fn columns_are_in_the_order_of_the_alphabet_the_own_ones_last() {
        let names: Vec<&str> = COLUMNS.iter().map(|(name, _)| *name).collect();
        let mut sorted = names.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(names, sorted);
    }

    #[test]
    fn a_line_of_nobody_has_no_sub_account_and_says_in_its_tags_what_it_is() {
        let idle = row("__idle__", "", 3);
        assert_eq!(field(&idle, "SubAccountId"), None);
        assert_eq!(field(&idle, "Tags").as_deref(), Some(r#"{"team":"__idle__"}"#));
        assert_eq!(
            field(&idle, "ChargeDescription").as_deref(),
            Some("Time of chat that no team has: idle")
        );
        let of_a = row("a\"", "m", 3);
        assert_eq!(field(&of_a, "SubAccountName").as_deref(), Some("a\""));
        assert_eq!(
            field(&of_a, "Tags").as_deref(),
            Some(r#"{"model":"m","team":"a\""}"#)
        );
        let share = field(&row("a", "__idle__", 3), "ChargeDescription");
        assert_eq!(share.as_deref(), Some("Share of a in idle time of chat"));
    }

    #[test]
    fn a_charge_period_is_the_part_of_the_day_that_was_asked_for_in_whole_windows() {
        let day_us = 1_795_478_400_000_000;
        let at = |name: &str| {
            COLUMNS
                .iter()
                .position(|(known, _)| *known == name)
                .expect("a column")
        };
        let cut = fields(&row("a", "m", 1), (day_us + 1, day_us + 3_600_000_000));
        assert_eq!(
            cut[at("ChargePeriodStart")].as_deref(),
            Some("2026-11-24T00:00:15Z")
        );
        assert_eq!(
            cut[at("ChargePeriodEnd")].as_deref(),
            Some("2026-11-24T01:00:00Z")
        );
        assert_eq!(
            cut[at("BillingPeriodStart")].as_deref(),
            Some("2026-11-01T00:00:00Z")
        );
        assert_eq!(
            cut[at("BillingPeriodEnd")].as_deref(),
            Some("2026-12-01T00:00:00Z")
        );
        assert_eq!(cut[at("PricingQuantity")].as_deref(), Some("1.500000000"));
    }

    #[test]
    fn without_rows_there_are_names() {
        let text = print(&report(), "books", ISSUER_DEFAULT);
        assert_eq!(text.lines().count(), 1);
        assert!(text.starts_with("BilledCost,BillingAccountId,"), "{text}");
    }
}
