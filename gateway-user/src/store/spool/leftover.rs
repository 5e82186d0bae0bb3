//! What earlier runs left in the spool of events, for whoever counts what requests were charged before ClickHouse has their rows.
//!
//! It is asked for once, before anything is sent. From then on a charge is known in one of three ways that do not overlap: it stands in a batch
//! that was left, it is of this process, or it is in ClickHouse in a batch of neither kind. [`Counted`] tells the first two from the third, and
//! never changes, so that it does not matter when a batch gets there.

use super::Spool;
use super::names::BatchId;
use serde::Deserialize;

/// Runs of batches that are told apart. They go into a question's address; each is one gateway's that did not end well, and there are seldom two.
const RUNS_MAX: usize = 100;

/// Batches whose charges are counted without ClickHouse, in runs of adjoining names.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// The first of each run.
    pub firsts: Vec<String>,
    /// The last of each.
    pub lasts: Vec<String>,
}

/// What a request that was left is charged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LeftCharge<'a> {
    /// Who pays.
    pub team: &'a str,
    /// When it ended, microseconds since 1970.
    pub ended_us: i64,
    /// How much.
    pub nano_usd: u64,
}

/// What is read of a row; crash rows have no charge.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Row<'r> {
    #[serde(borrow)]
    team_id: std::borrow::Cow<'r, str>,
    started_at: i64,
    duration_us: u64,
    charge_nano_usd: i64,
}

impl Spool {
    /// Reads the charges in all batches that were left, and says which batches are counted by that or by the process itself. A file that cannot
    /// be read, and what goes beyond a bound, is counted when ClickHouse has it.
    pub fn leftover(&self, mut each: impl FnMut(LeftCharge<'_>)) -> Counted {
        let mut counted = Counted::default();
        // Batches of this process are written from now on.
        let own = self.supply.boot_prefix();
        counted.lasts.push(format!("{own}~"));
        counted.firsts.push(own);
        let mut last: Option<BatchId> = None;
        for batch in self.sealed(usize::MAX) {
            let adjoins = last.as_ref().is_some_and(|last| adjoin(last, &batch.id));
            if !adjoins && counted.firsts.len() > RUNS_MAX {
                tracing::warn!(
                    "there are more gateways' files in the spool than budgets are told of at once; the rest counts when it is stored"
                );
                break;
            }
            let text = match std::fs::read(&batch.path) {
                Ok(text) => text,
                Err(error) => {
                    tracing::warn!(path = %batch.path.display(), %error, "what is charged in a file of the spool counts when it is stored");
                    continue;
                }
            };
            read_charges(&text, &mut each);
            let name = batch.id.to_string();
            match counted.lasts.last_mut().filter(|_| adjoins) {
                Some(end) => *end = name,
                None => {
                    counted.firsts.push(name.clone());
                    counted.lasts.push(name);
                }
            }
            last = Some(batch.id.clone());
        }
        counted
    }
}

fn adjoin(before: &BatchId, next: &BatchId) -> bool {
    let of_one_boot = (before.boot, &before.gateway) == (next.boot, &next.gateway);
    of_one_boot && before.sequence + 1 == next.sequence
}

fn read_charges(text: &[u8], each: &mut impl FnMut(LeftCharge<'_>)) {
    for line in text.split(|byte| *byte == b'\n') {
        let Ok(row) = serde_json::from_slice::<Row<'_>>(line) else {
            continue;
        };
        if let Ok(nano_usd @ 1..) = u64::try_from(row.charge_nano_usd) {
            each(LeftCharge {
                team: &row.team_id,
                ended_us: row.started_at.saturating_add_unsigned(row.duration_us),
                nano_usd,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::names::row_prefix;
    use super::super::testing::TempDir;
    use super::super::{Store, directory};
    use super::*;
    use crate::config::SpoolConfig;

    fn row(id: &BatchId, team: &str, charge: u64) -> Vec<u8> {
        let fields = format!(
            "\"event_id\":\"e\",\"team_id\":\"{team}\",\"started_at\":5,\"duration_us\":7,\"charge_nano_usd\":{charge}}}\n"
        );
        [&row_prefix(id)[..], fields.as_bytes()].concat()
    }

    #[test]
    fn what_was_left_is_counted_by_its_batches_and_what_comes_by_its_boot() {
        let dir = TempDir::new();
        let own = dir.path().join("gw");
        std::fs::create_dir_all(&own).expect("a directory");
        for (sequence, team) in [(1, "a"), (2, "b"), (4, "a")] {
            let id = BatchId {
                boot: 0xb,
                sequence,
                gateway: "gw".into(),
            };
            let rows = [row(&id, team, 10 + sequence), row(&id, team, 0)];
            directory::write_sealed(&own, &id, &[&rows[0], &rows[1]]).expect("it is written");
        }
        let config = SpoolConfig {
            dir: dir.path().to_owned(),
            ..SpoolConfig::default()
        };
        let store = Store::open(&config, "gw").expect("it opens");
        let mut charges = Vec::new();
        let counted = store
            .spool()
            .leftover(|charge| charges.push((charge.team.to_owned(), charge.ended_us, charge.nano_usd)));
        let charge = |team: &str, nano| (team.to_owned(), 12, nano);
        assert_eq!(charges, [charge("a", 11), charge("b", 12), charge("a", 14)]);
        let name = |sequence: u64| format!("gw/00000000000b/{sequence:08x}");
        assert_eq!(counted.firsts[1..], [name(1), name(4)]);
        assert_eq!(counted.lasts[1..], [name(2), name(4)]);
        // A row of this process is in a batch that lies in the first run.
        drop(store.spool().append(b"{\"event_id\":\"e\"}").expect("room"));
        let spool = std::sync::Arc::clone(store.spool());
        drop(store);
        let newest = spool
            .sealed(usize::MAX)
            .pop()
            .expect("it was sealed")
            .id
            .to_string();
        assert!(
            counted.firsts[0] < newest && newest < counted.lasts[0],
            "{newest} in {counted:?}"
        );
        assert!(!(counted.firsts[0].clone()..=counted.lasts[0].clone()).contains(&name(2)));
    }
}
