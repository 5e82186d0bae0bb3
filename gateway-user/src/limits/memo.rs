//! What a gateway writes down of its budgets, so that a restart knows them before ClickHouse answers, and also when it does not.
//!
//! A small file beside the spool's directory of this gateway, replaced as a whole after each read. It can lack what was charged since; nothing is
//! in it that was not charged, and an amount can only grow within a period, so that what it says is never too much.

use super::{Limiter, Now};
use crate::config::BudgetPeriod;
use crate::ledger::{Micros, NanoUsd};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The file.
#[derive(Clone, Debug)]
pub struct Memo {
    path: PathBuf,
}

/// What stands in it.
#[derive(Default, Serialize, Deserialize)]
struct Written {
    budgets: Vec<Line>,
}

/// One team's budget.
#[derive(Serialize, Deserialize)]
struct Line {
    team: Box<str>,
    period: String,
    from_us: u64,
    spent_nano_usd: u64,
}

impl Memo {
    /// That of a gateway whose spool lies in `spool_dir`.
    pub fn at(spool_dir: &Path, gateway: &str) -> Memo {
        Memo {
            path: spool_dir.join(format!("{gateway}.budgets.json")),
        }
    }

    /// What was spent in the period of this kind that began at `from`. Nothing, where nothing can be read.
    pub fn read(&self, kind: BudgetPeriod, from: Micros) -> BTreeMap<Box<str>, NanoUsd> {
        let text = std::fs::read(&self.path).unwrap_or_default();
        let written: Written = serde_json::from_slice(&text).unwrap_or_default();
        let lines = written.budgets.into_iter();
        let of_period = lines.filter(|line| line.period == kind.as_str() && line.from_us == from.0);
        of_period
            .map(|line| (line.team, NanoUsd(line.spent_nano_usd)))
            .collect()
    }

    /// Writes down what all teams have spent. Teams that share an allowance are left out: who they are, nobody knows after a restart.
    pub fn write(&self, limiter: &Limiter, now: Now) {
        let mut written = Written::default();
        for team in limiter.teams() {
            let Some(budget) = team.standing(now).budget else {
                continue;
            };
            if budget.spent > NanoUsd(0) && !team.name().starts_with("__") {
                written.budgets.push(Line {
                    team: team.name().into(),
                    period: budget.kind.as_str().to_owned(),
                    from_us: budget.period.from().0,
                    spent_nano_usd: budget.spent.0,
                });
            }
        }
        let new = self.path.with_extension("tmp");
        let text = serde_json::to_vec(&written).unwrap_or_default();
        let replaced = std::fs::write(&new, text).and_then(|()| std::fs::rename(&new, &self.path));
        if let Err(error) = replaced {
            tracing::warn!(path = %self.path.display(), %error, "what budgets have spent cannot be written down; a restart waits for ClickHouse to know it");
        }
    }
}
