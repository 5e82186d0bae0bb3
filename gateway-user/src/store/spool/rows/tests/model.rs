//! The spool against a model of it: a list of the rows it has taken in and of the requests that are on the way.
//!
//! Whatever the order of appending, sealing, storing, refusing, running full and being killed: each row that was taken in is in exactly
//! one place, in its order within a batch, and each request that was cut off gets one row. A kill leaves what is in the page cache, which
//! is what a copy of the directory holds, and perhaps a part of a row that was being copied.

use super::super::super::scan::Scan;
use super::*;
use crate::event::Begin;
use proptest::prelude::*;
use std::collections::BTreeSet;

#[derive(Clone, Debug)]
enum Step {
    /// A request begins and stays on its way.
    Begin,
    /// The request that is longest on its way ends; or one that begins and ends at once.
    End {
        padding: usize,
    },
    Tend,
    Seal,
    Acknowledge(prop::sample::Index),
    Quarantine(prop::sample::Index),
    /// `torn` bytes of a row were being copied; `undone` are the files whose removal the kill of a first recovery prevented.
    Kill {
        torn: usize,
        undone: u8,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let index = any::<prop::sample::Index>;
    let step = prop_oneof![
        2 => Just(Step::Begin),
        12 => (0_usize..1500).prop_map(|padding| Step::End { padding }),
        2 => Just(Step::Tend),
        2 => Just(Step::Seal),
        2 => index().prop_map(Step::Acknowledge),
        1 => index().prop_map(Step::Quarantine),
        2 => (0_usize..200, any::<u8>()).prop_map(|(torn, undone)| Step::Kill { torn, undone }),
    ];
    prop::collection::vec(step, 1..60)
}

struct Run {
    dir: TempDir,
    config: SpoolConfig,
    spool: Spool,
    next: u32,
    under_way: Vec<String>,
    /// The rows that must be there, in the order in which they were taken in.
    live: Vec<String>,
    evicted: usize,
}

impl Run {
    fn new(when_full: WhenFull, fsync: Fsync) -> Run {
        let dir = TempDir::new();
        let config = SpoolConfig {
            when_full,
            fsync,
            ..config(dir.path())
        };
        let spool = open(&config);
        Run {
            dir,
            config,
            spool,
            next: 0,
            under_way: Vec::new(),
            live: Vec::new(),
            evicted: 0,
        }
    }

    fn step(&mut self, step: Step) {
        let waited: Vec<Arc<Batch>> = self.spool.sealed(usize::MAX);
        let ids: Vec<Vec<String>> = sealed_ids(&self.spool);
        match step {
            Step::Begin => {
                let id = self.begin();
                self.under_way.push(id);
            }
            Step::End { padding } => self.end(padding),
            Step::Tend => drop(self.spool.tend(Instant::now())),
            Step::Seal => seal(&self.spool),
            Step::Acknowledge(index) if !waited.is_empty() => {
                let index = index.index(waited.len());
                self.spool.acknowledge(&waited[index]).expect("it is deleted");
                self.live.retain(|id| !ids[index].contains(id));
            }
            Step::Quarantine(index) if !waited.is_empty() => {
                let index = index.index(waited.len());
                let left = self
                    .spool
                    .quarantine(&waited[index], &[0], "test")
                    .expect("it is written");
                assert_eq!(left.map_or(0, |left| left.rows) as usize, ids[index].len() - 1);
                self.live.retain(|id| *id != ids[index][0]);
            }
            Step::Acknowledge(_) | Step::Quarantine(_) => {}
            Step::Kill { torn, undone } => self.kill(torn, undone),
        }
        self.follow_evictions(&ids);
    }

    fn begin(&mut self) -> String {
        self.next += 1;
        let id = format!("gw-{}", self.next);
        let started_at_us = 1_700_000_000_000_000 + i64::from(self.next);
        self.spool.journal.begin(&Begin {
            started_at_us,
            ..begin(&id)
        });
        id
    }

    fn end(&mut self, padding: usize) {
        let id = if self.under_way.is_empty() {
            self.begin()
        } else {
            self.under_way.remove(0)
        };
        let used = self.spool.stats().bytes;
        match self
            .spool
            .append_end(&row(&id, padding), self.spool.journal.ended(&id))
        {
            Ok(_) => self.live.push(id),
            Err(cause) => {
                assert_eq!(cause, DropCause::SpoolFull);
                let segment = self.config.segment_bytes.bytes();
                assert!(
                    used + segment > self.config.max_bytes.bytes(),
                    "refused at {used} bytes"
                );
            }
        }
    }

    /// Under `drop_oldest` batches may go by themselves: then they are the oldest, and counted.
    fn follow_evictions(&mut self, before: &[Vec<String>]) {
        let evicted = self.spool.stats().dropped_by(DropCause::Evicted) as usize;
        let mut left = evicted - self.evicted;
        self.evicted = evicted;
        assert!(left == 0 || self.config.when_full == WhenFull::DropOldest);
        for ids in before {
            if left == 0 {
                break;
            }
            assert!(ids.len() <= left, "batches go as a whole");
            left -= ids.len();
            self.live.retain(|id| !ids.contains(id));
        }
        assert_eq!(left, 0, "more rows went than there were");
    }

    fn kill(&mut self, torn: usize, undone: u8) {
        let copy = self.dir.copy();
        self.tear(&copy, torn);
        let killed = copy.copy();
        self.config.dir = copy.path().to_owned();
        drop(open(&self.config));
        // As if that recovery had been killed before it removed some of the files it had done with.
        for (number, path) in [killed.files_ending(".begins"), killed.files_ending(".open")]
            .concat()
            .iter()
            .enumerate()
        {
            if undone >> (number % 8) & 1 == 1 {
                let to = copy
                    .path()
                    .join(path.strip_prefix(killed.path()).expect("it lies within"));
                let whole = path.extension().is_some_and(|kind| kind == "begins")
                    || to.with_extension("jsonl").exists();
                if whole {
                    fs::copy(path, to).expect("a copy");
                }
            }
        }
        self.spool = open(&self.config);
        self.dir = copy;
        self.evicted = 0;
        self.live.append(&mut self.under_way);
    }

    /// Leaves a part of a row where the next one would have come.
    fn tear(&self, copy: &TempDir, torn: usize) {
        let state = self.spool.state.lock().expect("no panic");
        let Some(active) = &state.active else { return };
        let name = active
            .segment
            .path()
            .strip_prefix(self.dir.path())
            .expect("it lies within");
        let path = copy.path().join(name);
        let mut bytes = fs::read(&path).expect("it is there");
        let uncommitted = [&row_prefix(&active.id), &row("torn", 200)[1..]].concat();
        let end = (active.at + torn.min(uncommitted.len())).min(bytes.len());
        if active.at + 1 < end {
            bytes[active.at + 1..end].copy_from_slice(&uncommitted[1..end - active.at]);
        }
        fs::write(&path, bytes).expect("it is written");
    }

    fn check(&self) {
        let mut found = sealed_ids(&self.spool);
        for path in self.dir.files_ending(".open") {
            let (id, _) =
                BatchId::of_file(&path.file_name().expect("a name").to_string_lossy()).expect("ours");
            let bytes = fs::read(&path).expect("it is there");
            let scan = Scan::of(&bytes, &row_prefix(&id));
            assert!(scan.torn.is_empty() && scan.whole_until().is_some());
            found.push(scan::event_ids(&bytes).map(str::to_owned).collect());
        }
        for batch in &found {
            let positions: Vec<_> = batch
                .iter()
                .map(|id| self.live.iter().position(|live| live == id))
                .collect();
            assert!(
                positions.is_sorted() && positions.iter().all(Option::is_some),
                "{batch:?} of {:?}",
                self.live
            );
        }
        let all: Vec<&String> = found.iter().flatten().collect();
        assert_eq!(all.len(), self.live.len(), "a row is lost or doubled");
        assert_eq!(
            all.into_iter().collect::<BTreeSet<_>>(),
            self.live.iter().collect::<BTreeSet<_>>()
        );
        self.check_limit();
        assert_eq!(self.spool.stats().open, self.under_way.len() as u64);
    }

    fn check_limit(&self) {
        let size = |path: &std::path::PathBuf| fs::metadata(path).expect("it is there").len();
        let in_spool = |path: &std::path::PathBuf| !path.to_string_lossy().contains("quarantine");
        let files = [self.dir.files_ending(".jsonl"), self.dir.files_ending(".open")].concat();
        let on_disk: u64 = files.iter().filter(|path| in_spool(path)).map(size).sum();
        let stats = self.spool.stats();
        assert_eq!(stats.bytes, on_disk, "what is counted is what is there");
        // Rows of requests that a crash cut off are written past the limit.
        let crashed = if stats.crashed > 0 {
            self.config.segment_bytes.bytes() * 4
        } else {
            0
        };
        assert!(stats.bytes <= self.config.max_bytes.bytes() + crashed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn each_row_is_in_one_place_whatever_happens(
        steps in steps(),
        when_full in prop::sample::select(vec![WhenFull::DropNewest, WhenFull::DropOldest]),
        fsync in prop::sample::select(vec![Fsync::Off, Fsync::Off, Fsync::Interval, Fsync::Each]),
    ) {
        let mut run = Run::new(when_full, fsync);
        for step in steps {
            run.step(step);
            run.check();
        }
    }

    #[test]
    fn a_power_loss_makes_no_row_that_was_not_there(
        rows in 1_u32..40,
        lost in prop::collection::vec(any::<bool>(), 64),
        sealed in any::<bool>(),
    ) {
        let mut run = Run::new(WhenFull::DropNewest, Fsync::Off);
        for _ in 0..rows {
            run.end(300);
        }
        if sealed {
            seal(&run.spool);
        }
        let copy = run.dir.copy();
        // Any sector that was not written yet reads as zeros.
        let mut lost = lost.into_iter().cycle();
        for path in [copy.files_ending(".jsonl"), copy.files_ending(".open")].concat() {
            let mut bytes = fs::read(&path).expect("it is there");
            for sector in bytes.chunks_mut(512) {
                if lost.next() == Some(true) {
                    sector.fill(0);
                }
            }
            fs::write(&path, bytes).expect("it is written");
        }
        let after = open(&SpoolConfig { dir: copy.path().to_owned(), ..run.config.clone() });
        let found: Vec<String> = sealed_ids(&after).concat();
        prop_assert!(found.iter().all(|id| run.live.contains(id)));
        prop_assert_eq!(found.iter().collect::<BTreeSet<_>>().len(), found.len());
        for batch in after.sealed(usize::MAX) {
            let bytes = fs::read(&batch.path).expect("it is there");
            prop_assert!(Scan::of(&bytes, &row_prefix(&batch.id)).torn.is_empty());
        }
    }
}
