//! What teams were charged in a span: what budgets go by.
//!
//! It is read from the windows, which hold what rows hold to the nano-USD and are some twentieth of them; deduplicated, as everything that is billed.

use super::error::ReadError;
use super::reader::{FIGURES_MAX, FiguresReader};
use crate::ledger::{NanoUsd, Span};
use crate::store::spool::Counted;
use clickhouse::Row;
use serde::Deserialize;
use std::collections::BTreeMap;

/// Longest list of names that goes into a question's address; beyond it all teams are read.
const NAMES_BYTES_MAX: usize = 8 * 1024;

/// What teams were charged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Charges {
    /// Of those that were charged most.
    pub by_team: BTreeMap<Box<str>, NanoUsd>,
    /// Of all others together.
    pub rest: NanoUsd,
}

/// Whose charges are wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Whose {
    /// Those of these teams.
    Of(Vec<String>),
    /// Those of everybody.
    All,
}

impl FiguresReader {
    /// What was charged for requests that ended in a span, whose edges are those of windows. Left out is what lies in batches that are `counted`
    /// otherwise. At most so many teams are told apart, those that were charged most.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn charged_elsewhere(
        &self,
        span: Span,
        counted: &Counted,
        whose: &Whose,
        teams_max: usize,
    ) -> Result<Charges, ReadError> {
        let mut statement = String::from(CHARGES);
        let names = match whose {
            Whose::Of(names) if names.iter().map(String::len).sum::<usize>() <= NAMES_BYTES_MAX => {
                Some(names)
            }
            _ => None,
        };
        if names.is_some() {
            statement += " AND team_id IN {teams:Array(String)}";
        }
        statement += " GROUP BY team_id HAVING charge > 0 ORDER BY charge DESC, team";
        let mut query = self
            .client
            .query(&statement)
            // A window lies in one month, and so do all rows of it.
            .with_setting("do_not_merge_across_partitions_select_final", "1")
            .param("from", span.from().0 / 1_000_000)
            .param("to", span.to().0.div_ceil(1_000_000))
            .param("firsts", &counted.firsts)
            .param("lasts", &counted.lasts);
        if let Some(names) = names {
            query = query.param("teams", names);
        }
        let reading = async {
            let mut rows = query.fetch::<ChargeRow>()?;
            let mut charges = Charges::default();
            while let Some(row) = rows.next().await? {
                let amount = NanoUsd(row.charge);
                if charges.by_team.len() < teams_max {
                    charges.by_team.insert(row.team.into(), amount);
                } else {
                    charges.rest += amount;
                }
            }
            Ok(charges)
        };
        self.answer(FIGURES_MAX, reading).await
    }
}

const CHARGES: &str = "SELECT toString(team_id) AS team, toUInt64(greatest(sum(charge_nano_usd), 0)) AS charge
    FROM request_metrics FINAL
    WHERE window_start >= toDateTime({from:UInt32}, 'UTC') AND window_start < toDateTime({to:UInt32}, 'UTC')
        AND NOT arrayExists((first, last) -> batch >= first AND batch <= last, {firsts:Array(String)}, {lasts:Array(String)})";

#[derive(Debug, Row, Deserialize)]
struct ChargeRow {
    team: String,
    charge: u64,
}
