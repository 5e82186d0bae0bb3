//! `cargo xtask test-power-cut`: what a power loss takes of the spool, against what `spool.fsync` says that it may take.
//!
//! A guest under emulation runs the gateway and a simulator, with the spool on a disk of its own. Clients outside of it note what they
//! saw end, and when. Under load QEMU is killed. Then the disk is made as it may be after that ([`disk`]), the gateway is started on its
//! spool, and what it finds is compared with what the clients saw ([`verdict`]). One run gives many such disks: what no flush had followed
//! may be there or not, and the log of writes lets the power be cut at earlier moments too.
//!
//! # What may be lost
//!
//! * `each`: no end that a client saw.
//! * `interval`: ends within `fsync_interval` and two flushes before the cut: when a flush is due, the sealing of a file may come first.
//!   How long a flush takes is measured: a request under `each` waits for one that is under way and then for its own, so that the longest
//!   of that round is a bound for both.
//! * `off`: what the kernel had not written. The guest's kernel is set to write what is older than 3 s, once a second, and to commit its
//!   journal each second, in place of 30 s, 5 s and 5 s: the same rule, so that the test need not run for minutes.

mod clients;
mod disk;
mod recovery;
mod verdict;

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use self::clients::{Clients, Sight};
use self::disk::{Unflushed, WriteLog};
use self::recovery::{GATEWAY_ID, IS_UP};
use self::verdict::{Moment, Taken, judge};
use crate::bench::process::free_addr;
use crate::guest::{self, Guest, Kernel, LoggedDisk, Scratch};
use crate::{dev, stage};

/// Room for the journal of ext4, the gateway's own of 4 MiB, and some seconds of rows.
const DISK_BYTES: u64 = 96 << 20;

/// Requests at a time. Emulation takes some tens a second.
const CLIENTS: usize = 4;

/// A round in which fewer ends were seen shows nothing.
const ENDS_MIN: usize = 50;

/// How often the size of the log is noted: a cut can be made at any of these moments. Often enough to meet writes that no flush has
/// followed yet.
const NOTE_EVERY: Duration = Duration::from_millis(5);

/// How many moments before the real cut are tried, spread over the round.
const EARLIER_CUTS: usize = 5;

/// For boot, load and a busy machine.
const GUEST_LIMIT: Duration = Duration::from_secs(120);

/// What else the scheduler may add to a window.
const SLACK: Duration = Duration::from_millis(500);

/// `fsync_interval` of the round that has one. Longer than the default, so that what is lost can be told from a slow flush.
const FSYNC_INTERVAL: Duration = Duration::from_secs(2);

/// After what time the guest's kernel writes by itself: age, wake-up, commit of the journal that says which blocks are written.
const KERNEL_WRITES_WITHIN: Duration = Duration::from_secs(3 + 1 + 1);

/// A gateway under load until its power is cut.
struct Round {
    policy: &'static str,
    /// Further settings of the spool.
    spool: &'static str,
    /// What the guest's kernel is told.
    kernel: &'static str,
    load: Duration,
}

const ROUNDS: [Round; 3] = [
    Round {
        policy: "each",
        spool: "segment_bytes: 64KiB, seal_after: 1s",
        kernel: "",
        load: Duration::from_secs(6),
    },
    Round {
        policy: "interval",
        // Files are sealed when they are full, and not before a flush would be due: sealing flushes too.
        spool: "segment_bytes: 64KiB, seal_after: 1h, fsync_interval: 2s",
        kernel: "",
        load: Duration::from_secs(8),
    },
    Round {
        policy: "off",
        spool: "segment_bytes: 64KiB, seal_after: 2s",
        kernel: "echo 300 > /proc/sys/vm/dirty_expire_centisecs\n\
                 echo 100 > /proc/sys/vm/dirty_writeback_centisecs\n\
                 mount -o remount,commit=1 /data\n",
        load: Duration::from_secs(12),
    },
];

/// What a round has left.
struct Cut {
    sights: Vec<Sight>,
    /// The real cut comes last.
    moments: Vec<(Moment, u64)>,
    log: WriteLog,
}

/// Runs all rounds on the oldest kernel, after building the programs.
///
/// # Errors
/// When no guest can run here, or more was lost than a policy says.
pub fn run(root: &Path) -> Result<()> {
    let kernels = guest::kernels()?;
    let oldest = kernels
        .first()
        .context("no guest can run here; the reason is above")?;
    with(oldest, root)
}

/// As [`run`], with this kernel.
///
/// # Errors
/// As above.
pub fn with(kernel: &Kernel, root: &Path) -> Result<()> {
    stage::run(&mut stage::build_programs(root))?;
    let started = Instant::now();
    let programs = dev::target_directory()?.join("debug");
    let scratch = Scratch::new("power-cut")?;
    let empty = scratch.path().join("empty.img");
    disk::make(&empty, DISK_BYTES)?;
    let test = Test {
        kernel,
        gateway: programs.join("vllm-gateway"),
        sim: programs.join("vllm-sim"),
        scratch,
        empty,
    };
    let mut longest = Duration::ZERO;
    for round in &ROUNDS {
        let cut = test
            .cut(round)
            .with_context(|| format!("the round under `{}`", round.policy))?;
        if round.policy == "each" {
            longest = longest_request(&cut.sights);
            println!(
                "the longest request under `each` took {:.3} s",
                longest.as_secs_f64()
            );
        }
        // Two flushes, and what this round's guest stood still at the most: its requests did too.
        let delays = longest + longest_request(&cut.sights) + SLACK;
        let window = match round.policy {
            "each" => None,
            "interval" => Some(FSYNC_INTERVAL + delays),
            _ => Some(KERNEL_WRITES_WITHIN + delays),
        };
        test.judge_all(round, &cut, window)
            .with_context(|| format!("under `{}`", round.policy))?;
    }
    println!(
        "no cut took more than it may; {:.0} s in all",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

struct Test<'k> {
    kernel: &'k Kernel,
    gateway: PathBuf,
    sim: PathBuf,
    scratch: Scratch,
    /// The disk's image before a guest has had it.
    empty: PathBuf,
}

impl Test<'_> {
    /// Boots a guest, has it serve clients, and cuts its power.
    fn cut(&self, round: &Round) -> Result<Cut> {
        let disk = LoggedDisk {
            image: self.scratch.path().join("disk.img"),
            log: self.scratch.path().join("writes.log"),
        };
        disk::copy(&self.empty, &disk.image)?;
        fs::write(&disk.log, "")?;
        let address = free_addr()?;
        let script = format!(
            "mount -t ext4 /dev/vda /data\n{}vllm-sim --listen 127.0.0.1:8000 --model sim &\nexec vllm-gateway run --config /config.yaml\n",
            round.kernel
        );
        let config = round.config();
        let guest = Guest {
            kernel: self.kernel,
            programs: &[self.gateway.clone(), self.sim.clone()],
            files: &[("config.yaml", &config)],
            script: &script,
            disk: Some(&disk),
            forward: Some((address, 8080)),
        };
        let mut running = guest.boot(self.scratch.path(), GUEST_LIMIT)?;
        running.wait_for(IS_UP)?;
        let clients = Clients::start(address, round.policy, CLIENTS);
        let mut moments = note_sizes(&disk.log, round.load)?;
        let before = Instant::now();
        let killed = running.kill();
        let after = Instant::now();
        let sights = clients.finish()?;
        killed?;
        moments.push((Moment { before, after }, fs::metadata(&disk.log)?.len()));
        let ends = sights.iter().filter(|sight| sight.ended.is_some()).count();
        ensure!(
            ends >= ENDS_MIN,
            "clients saw {ends} requests end, expected {ENDS_MIN} or more"
        );
        let log = WriteLog::read(&disk.log)?;
        Ok(Cut { sights, moments, log })
    }

    /// Tries the disks that the cut may have left, and those of earlier moments.
    fn judge_all(&self, round: &Round, cut: &Cut, window: Option<Duration>) -> Result<()> {
        let mut lost = 0;
        for (number, (moment, log_bytes)) in (1..).zip(cut.tried()) {
            // When every write was flushed there is only one such disk.
            let variants: &[Unflushed] = match cut.log.unflushed(log_bytes) {
                0 => &[Unflushed::Gone],
                _ => &[
                    Unflushed::Gone,
                    Unflushed::There,
                    Unflushed::Torn(number),
                    Unflushed::Torn(100 + number),
                ],
            };
            for unflushed in variants {
                let what = format!("cut {number}");
                let cut_at = (moment, log_bytes);
                lost += self
                    .judge_one(round, cut, cut_at, *unflushed, &what, window)?
                    .lost;
            }
        }
        ensure!(
            window.is_none() || lost > 0,
            "no cut took anything: they were none"
        );
        Ok(())
    }

    fn judge_one(
        &self,
        round: &Round,
        cut: &Cut,
        (moment, log_bytes): (Moment, u64),
        unflushed: Unflushed,
        what: &str,
        window: Option<Duration>,
    ) -> Result<Taken> {
        let directory = self.scratch.path().join("after");
        let image = self.scratch.path().join("after.img");
        disk::copy(&self.empty, &image)?;
        let pending = cut.log.replay(log_bytes, unflushed, &image)?;
        disk::repair(&image)?;
        disk::extract(&image, "spool", &directory)?;
        let recovered = recovery::recover(&self.gateway, &directory)?;
        let taken = judge(&cut.sights, moment, &recovered, window)
            .with_context(|| format!("{what}, unflushed writes: {unflushed:?}"))?;
        fs::remove_dir_all(&directory)?;
        println!(
            "{:<9}{what} {:<9} {pending:>3} unflushed writes: {taken}",
            round.policy,
            format!("{unflushed:?}")
        );
        Ok(taken)
    }
}

impl Cut {
    /// The moments to be tried: of each part of the round the one with the most writes in the disk's cache, and the real cut.
    fn tried(&self) -> Vec<(Moment, u64)> {
        let Some((last, earlier)) = self.moments.split_last() else {
            return Vec::new();
        };
        let parts = earlier.chunks(earlier.len().div_ceil(EARLIER_CUTS).max(1));
        let worst = |part: &[(Moment, u64)]| {
            part.iter()
                .max_by_key(|(_, bytes)| self.log.unflushed(*bytes))
                .copied()
        };
        parts.filter_map(worst).chain([*last]).collect()
    }
}

impl Round {
    fn config(&self) -> String {
        // Nobody listens at the store's address, so that rows stay in the spool.
        format!(
            "gateway: {{listen: \"0.0.0.0:8080\", id: {GATEWAY_ID}}}\nadmin: {{listen: \"127.0.0.1:9464\"}}\ncapture: proxy\n\
             store: {{url: \"http://127.0.0.1:9\"}}\nspool: {{dir: /data/spool, fsync: {}, {}}}\n\
             upstreams:\n  - {{name: chat, url: \"http://127.0.0.1:8000\", serves: generate}}\n",
            self.policy, self.spool
        )
    }
}

/// Lets the load go on for `load`, and notes how large the log is at each moment.
fn note_sizes(log: &Path, load: Duration) -> Result<Vec<(Moment, u64)>> {
    let (started, mut moments) = (Instant::now(), Vec::new());
    while started.elapsed() < load {
        thread::sleep(NOTE_EVERY);
        // The clock first: what had ended by then was written before the size is read.
        let now = Instant::now();
        moments.push((
            Moment {
                before: now,
                after: now,
            },
            fs::metadata(log)?.len(),
        ));
    }
    Ok(moments)
}

fn longest_request(sights: &[Sight]) -> Duration {
    let took = sights
        .iter()
        .filter_map(|sight| Some(sight.ended?.duration_since(sight.sent)));
    took.max().unwrap_or_default()
}
