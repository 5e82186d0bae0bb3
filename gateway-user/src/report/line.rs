//! The lines of a report: those who used and pay, the lines of nobody, and all of it.

use crate::store::figures::{Cost, Figures, GroupedFigures, LedgerFigures, WITHOUT_REQUEST};
use std::collections::BTreeMap;

/// Whose a line is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// A group's, by its keys.
    Group(Vec<String>),
    /// One of the ledger's lines that nobody has.
    Nobody(String),
    /// All together.
    Total,
}

/// What is told of one of them. Unknown is not 0.
#[derive(Clone, Debug)]
pub struct Line {
    /// Whose it is.
    pub whose: Whose,
    /// Its requests; `None` where there can be none.
    pub figures: Option<Figures>,
    /// What it cost.
    pub cost: Option<Cost>,
    /// What all lines cost.
    pub bill_nano_usd: Option<i64>,
    /// Its share of the invoice.
    pub actual_nano_usd: Option<i64>,
}

/// The lines, the total last. `is_complete` says that all of the period is booked, so that whoever has no rows has no cost, if all costs of single
/// requests are known.
pub fn lines_of(figures: GroupedFigures, ledger: &LedgerFigures, is_complete: bool) -> Vec<Line> {
    let is_booked = ledger.upstreams.iter().any(|books| books.windows > 0);
    let bill_nano_usd = is_booked.then(|| ledger.cost_nano_usd());
    let mut groups: BTreeMap<Vec<String>, (Figures, Option<Cost>)> = BTreeMap::new();
    for group in figures.groups {
        groups.insert(group.keys, (group.figures, None));
    }
    for group in &ledger.groups {
        groups.entry(group.keys.clone()).or_default().1 = Some(group.cost);
    }
    let is_explained = ledger.lines.iter().all(|line| line.name != WITHOUT_REQUEST);
    let nothing = (is_complete && is_explained).then_some(Cost {
        nano_usd: 0,
        idle_nano_usd: Some(0),
        tokens: None,
    });
    let line = |whose, figures, cost| Line {
        whose,
        figures,
        cost,
        bill_nano_usd,
        actual_nano_usd: None,
    };
    let mut lines: Vec<Line> = groups
        .into_iter()
        .map(|(keys, (figures, cost))| line(Whose::Group(keys), Some(figures), cost.or(nothing)))
        .collect();
    lines.extend(ledger.lines.iter().map(|of_nobody| {
        let cost = Cost {
            nano_usd: of_nobody.nano_usd,
            idle_nano_usd: None,
            tokens: None,
        };
        line(Whose::Nobody(of_nobody.name.clone()), None, Some(cost))
    }));
    let total = bill_nano_usd.map(|nano_usd| Cost {
        nano_usd,
        idle_nano_usd: ledger.groups.iter().map(|group| group.cost.idle_nano_usd).sum(),
        tokens: ledger.groups.iter().map(|group| group.cost.tokens).sum(),
    });
    lines.push(line(Whose::Total, Some(figures.total), total));
    lines
}

impl Line {
    /// What its requests are charged.
    pub fn charge_nano_usd(&self) -> Option<i64> {
        self.figures.as_ref().map(|figures| figures.charge_nano_usd)
    }

    /// What it cost.
    pub fn cost_nano_usd(&self) -> Option<i64> {
        self.cost.map(|cost| cost.nano_usd)
    }

    /// What is charged beyond the cost; negative where charges do not cover it.
    pub fn recovery_nano_usd(&self) -> Option<i64> {
        Some(self.charge_nano_usd()?.saturating_sub(self.cost_nano_usd()?))
    }

    /// What a million of the tokens cost that were worked on, to the nearest nano-USD.
    pub fn cost_per_million_nano_usd(&self) -> Option<i64> {
        let cost = self.cost?;
        let tokens = i128::from(cost.tokens.filter(|tokens| *tokens > 0)?);
        let millionfold = i128::from(cost.nano_usd) * 1_000_000;
        i64::try_from((millionfold + tokens / 2).div_euclid(tokens)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::figures::{CostGroup, CostLine, Group, UpstreamBooks};

    fn figures(requests: u64, charge_nano_usd: i64) -> Figures {
        Figures {
            requests,
            charge_nano_usd,
            ..Figures::default()
        }
    }

    fn ledger() -> LedgerFigures {
        let group = |key: &str, nano_usd, idle, tokens| CostGroup {
            keys: vec![key.to_owned()],
            cost: Cost {
                nano_usd,
                idle_nano_usd: Some(idle),
                tokens: Some(tokens),
            },
        };
        LedgerFigures {
            groups: vec![group("b", 700, 100, 3), group("c", 200, 0, 0)],
            lines: vec![CostLine {
                name: "__idle__".to_owned(),
                nano_usd: 100,
            }],
            upstreams: vec![UpstreamBooks {
                windows: 1,
                bill_nano_usd: 1000,
                ..UpstreamBooks::default()
            }],
            ..LedgerFigures::default()
        }
    }

    fn events() -> GroupedFigures {
        let group = |key: &str, figures| Group {
            keys: vec![key.to_owned()],
            figures,
        };
        GroupedFigures {
            groups: vec![group("a", figures(1, 5)), group("b", figures(2, 900))],
            total: figures(3, 905),
        }
    }

    #[test]
    fn who_has_only_requests_or_only_costs_has_a_line_too_and_all_costs_are_in_the_total() {
        let lines = lines_of(events(), &ledger(), false);
        let told: Vec<_> = lines
            .iter()
            .map(|line| {
                (
                    &line.whose,
                    line.charge_nano_usd(),
                    line.cost_nano_usd(),
                    line.recovery_nano_usd(),
                )
            })
            .collect();
        let group = |key: &str| Whose::Group(vec![key.to_owned()]);
        assert_eq!(
            told,
            [
                (&group("a"), Some(5), None, None),
                (&group("b"), Some(900), Some(700), Some(200)),
                (&group("c"), Some(0), Some(200), Some(-200)),
                (&Whose::Nobody("__idle__".to_owned()), None, Some(100), None),
                (&Whose::Total, Some(905), Some(1000), Some(-95)),
            ]
        );
        assert_eq!(lines[1].cost_per_million_nano_usd(), Some(233_333_333));
        assert_eq!(
            lines[2].cost_per_million_nano_usd(),
            None,
            "no tokens, no price of one"
        );
        let total = lines[4].cost.expect("it is booked");
        assert_eq!((total.idle_nano_usd, total.tokens), (Some(100), Some(3)));
    }

    #[test]
    fn without_rows_the_cost_is_nothing_only_where_all_is_booked() {
        let booked = lines_of(events(), &ledger(), true);
        assert_eq!(booked[0].cost_nano_usd(), Some(0));
        let mut unexplained = ledger();
        unexplained.lines[0].name = WITHOUT_REQUEST.to_owned();
        assert_eq!(lines_of(events(), &unexplained, true)[0].cost_nano_usd(), None);
        let never = lines_of(events(), &LedgerFigures::default(), false);
        assert!(never.iter().all(|line| line.cost.is_none()), "{never:?}");
    }
}
