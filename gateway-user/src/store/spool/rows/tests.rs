//! The spool by itself; against a model of it, see [`model`].

mod model;

use super::super::names::Kind;
use super::super::testing::{TempDir, begin};
use super::super::{open_spool, scan};
use super::*;
use crate::config::{ByteSize, WhenFull};
use std::fs;
use std::path::Path;
use std::time::Duration;

/// A spool of small segments that nobody tends but the test.
fn config(dir: &Path) -> SpoolConfig {
    SpoolConfig {
        dir: dir.to_owned(),
        segment_bytes: ByteSize::from_kib(4),
        max_bytes: ByteSize::from_kib(4 * 8),
        fsync: Fsync::Off,
        ..SpoolConfig::default()
    }
}

fn open(config: &SpoolConfig) -> Spool {
    open_spool(config, "gw").expect("it opens")
}

fn row(id: &str, padding: usize) -> Vec<u8> {
    format!("{{\"event_id\":\"{id}\",\"pad\":\"{}\"}}", "x".repeat(padding)).into_bytes()
}

/// Takes in a row that nobody waits for.
fn append(spool: &Spool, id: &str, padding: usize) {
    drop(spool.append(&row(id, padding)).expect("there is room"));
}

fn seal(spool: &Spool) {
    spool.retire(Instant::now(), true);
    assert!(spool.seal_full());
}

/// The ids in the files that wait, by file, oldest first.
fn sealed_ids(spool: &Spool) -> Vec<Vec<String>> {
    let read = |batch: &Arc<Batch>| {
        let bytes = fs::read(&batch.path).expect("it is there");
        assert_eq!(
            scan::intact_rows(&bytes, &row_prefix(&batch.id)),
            Some(batch.rows),
            "{bytes:?}"
        );
        assert_eq!(bytes.len() as u64, batch.bytes);
        scan::event_ids(&bytes).map(str::to_owned).collect()
    };
    spool.sealed(usize::MAX).iter().map(read).collect()
}

#[test]
fn a_row_is_in_its_file_with_its_batch_as_soon_as_it_is_taken_in() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    let ticket = spool
        .append(br#"{"event_id":"gw-1","n":1}"#)
        .expect("there is room");
    assert!(!ticket.must_wait());
    let open = dir.files_ending("-00000001.open");
    let bytes = fs::read(&open[0]).expect("it is there");
    let end = bytes.iter().position(|byte| *byte == 0).expect("it is not full");
    let row: serde_json::Value = serde_json::from_slice(&bytes[..end]).expect("a JSON object");
    let id = spool
        .state
        .lock()
        .expect("no panic")
        .active
        .as_ref()
        .expect("there is a row")
        .id
        .clone();
    assert_eq!(
        row,
        serde_json::json!({"batch": id.to_string(), "event_id": "gw-1", "n": 1})
    );
    seal(&spool);
    assert_eq!(sealed_ids(&spool), [["gw-1"]]);
    assert_eq!(spool.sealed(9)[0].id, id);
}

#[test]
fn what_is_no_row_is_refused_and_counted() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    for line in [
        &b""[..],
        b"{}",
        b"[1]",
        b"{\"a\":1}\n",
        b"{\"a\":\n1}",
        b"{\"a\":\"\0\"}",
        b"{\"a\":1",
    ] {
        assert_eq!(spool.append(line).err(), Some(DropCause::Malformed), "{line:?}");
    }
    assert_eq!(spool.append(&row("long", 5000)).err(), Some(DropCause::TooLarge));
    let stats = spool.stats();
    assert_eq!(
        (
            stats.dropped_by(DropCause::Malformed),
            stats.dropped_by(DropCause::TooLarge)
        ),
        (7, 1)
    );
    assert!(
        dir.files_ending(".open").is_empty(),
        "nothing came that needs a file"
    );
    // The longest row that fits by its promise does.
    let longest = row("", spool.fields_bytes_max - row("", 0).len() + 1);
    drop(spool.append(&longest).expect("it fits"));
}

#[test]
fn segments_are_sealed_by_size_and_by_age_and_an_idle_spool_makes_no_files() {
    let dir = TempDir::new();
    let spool = open(&SpoolConfig {
        seal_after: Duration::from_secs(60),
        ..config(dir.path())
    });
    let start = Instant::now();
    assert_eq!(spool.tend(start), None, "there is nothing to wake up for");
    for number in 0..5 {
        append(&spool, &number.to_string(), 1000);
    }
    let next = spool.tend(Instant::now()).expect("a segment grows older");
    assert_eq!(
        sealed_ids(&spool),
        [["0", "1", "2"]],
        "three rows fit into a segment"
    );
    assert!(next > start + Duration::from_secs(59));
    assert_eq!(spool.tend(next), None);
    assert_eq!(sealed_ids(&spool).concat().len(), 5);
    assert_eq!(spool.tend(next + Duration::from_secs(600)), None);
    assert_eq!(
        (dir.files_ending(".jsonl").len(), dir.files_ending(".open").len()),
        (2, 2)
    );
}

#[test]
fn with_a_backlog_rows_wait_for_larger_files() {
    let dir = TempDir::new();
    let wide = SpoolConfig {
        max_bytes: ByteSize::from_mib(1),
        ..config(dir.path())
    };
    let spool = open(&SpoolConfig {
        seal_after: Duration::from_secs(1),
        ..wide
    });
    for number in 0..16 {
        append(&spool, &number.to_string(), 10);
        seal(&spool);
    }
    append(&spool, "patient", 10);
    let next = spool
        .tend(Instant::now() + Duration::from_secs(30))
        .expect("it is not sealed yet");
    assert_eq!(spool.stats().files, 16);
    spool.tend(next);
    assert_eq!(spool.stats().files, 17);
}

#[test]
fn acknowledged_is_gone_for_good() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    append(&spool, "a", 10);
    seal(&spool);
    let batch = Arc::clone(&spool.sealed(1)[0]);
    spool.acknowledge(&batch).expect("it is deleted");
    spool.acknowledge(&batch).expect("twice is no error");
    assert_eq!((spool.stats().files, spool.stats().bytes), (0, 0));
    drop(spool);
    assert_eq!(open(&config(dir.path())).stats().files, 0);
}

#[test]
fn refused_rows_are_put_aside_and_the_rest_stays_a_batch() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    for id in ["a", "b", "c"] {
        append(&spool, id, 10);
    }
    seal(&spool);
    let batch = Arc::clone(&spool.sealed(1)[0]);
    let left = spool
        .quarantine(&batch, &[1], "bad type")
        .expect("it is written")
        .expect("two rows are left");
    assert_eq!((left.rows, &left.id), (2, &batch.id));
    assert_eq!(sealed_ids(&spool), [["a", "c"]]);
    assert_eq!(spool.stats().bytes, left.bytes);
    assert_eq!(
        spool
            .quarantine(&left, &[0, 1], "bad type")
            .expect("it is written"),
        None
    );
    assert_eq!(
        (
            spool.stats().bytes,
            spool.stats().files,
            spool.stats().quarantined
        ),
        (0, 0, 3)
    );
    let aside = dir.files_ending("-00000001.0.jsonl");
    let line: serde_json::Value =
        serde_json::from_slice(&fs::read(&aside[0]).expect("it is there")).expect("JSON");
    assert_eq!(
        (&line["reason"], &line["row"]["event_id"]),
        (&"bad type".into(), &"b".into())
    );
    assert_eq!(dir.files_ending("-00000001.1.jsonl").len(), 1);
}

#[test]
fn a_full_spool_drops_the_newest_until_there_is_room() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    let mut kept = 0;
    while spool.append(&row(&kept.to_string(), 1000)).is_ok() {
        kept += 1;
        seal(&spool);
    }
    // Each file has one row of a kilobyte, and there must be room for a whole segment.
    assert!((24..=28).contains(&kept), "{kept}");
    assert_eq!(spool.stats().dropped_by(DropCause::SpoolFull), 1);
    assert_eq!(spool.stats().files, kept);
    let misses = spool.stats().spare_misses;
    assert_eq!(spool.append(&row("no", 1000)).err(), Some(DropCause::SpoolFull));
    assert_eq!(
        spool.stats().spare_misses,
        misses,
        "a request does not try again what has just failed"
    );
    for batch in spool.sealed(8) {
        spool.acknowledge(&batch).expect("it is deleted");
    }
    spool.tend(Instant::now());
    append(&spool, "yes", 1000);
}

#[test]
fn a_segment_without_a_successor_is_filled_before_anything_is_lost() {
    let dir = TempDir::new();
    let spool = open(&SpoolConfig {
        max_bytes: ByteSize::from_kib(4 * 4),
        ..config(dir.path())
    });
    for number in 0..9 {
        append(&spool, &number.to_string(), 1000);
        seal(&spool);
    }
    append(&spool, "first", 1);
    spool.tend(Instant::now());
    assert_eq!(spool.supply.blocked(), Some(DropCause::SpoolFull));
    let late = Instant::now() + Duration::from_secs(3600);
    let next = spool.tend(late).expect("the keeper tries again");
    assert!(next > late, "and not all the time");
    let (mut rows, files) = (1, spool.stats().files);
    while spool.append(&row(&rows.to_string(), 100)).is_ok() {
        rows += 1;
    }
    assert!(rows > 20, "{rows} rows of some 150 bytes in 4 KiB");
    for batch in spool.sealed(4) {
        spool.acknowledge(&batch).expect("it is deleted");
    }
    spool.tend(late);
    assert!(spool.supply.has_successor());
    spool.tend(late);
    assert_eq!(
        spool.stats().files,
        files - 4 + 1,
        "with a successor it is sealed by age"
    );
    assert_eq!(sealed_ids(&spool).last().map(Vec::len), Some(rows));
}

#[test]
fn a_full_spool_gives_up_the_oldest_when_told_to() {
    let dir = TempDir::new();
    let spool = open(&SpoolConfig {
        when_full: WhenFull::DropOldest,
        ..config(dir.path())
    });
    for number in 0..100 {
        append(&spool, &number.to_string(), 1000);
        seal(&spool);
    }
    let ids = sealed_ids(&spool).concat();
    let evicted = spool.stats().dropped_by(DropCause::Evicted);
    assert_eq!(
        (evicted + ids.len() as u64, ids.last().map(String::as_str)),
        (100, Some("99"))
    );
    assert_eq!(
        ids[0],
        evicted.to_string(),
        "the rows that are left are the newest"
    );
    assert!(spool.stats().bytes <= 32 * 1024);
}

#[test]
fn a_directory_that_vanished_loses_rows_by_cause_and_heals() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    let (ours, away) = (dir.path().join("gw"), dir.path().join("away"));
    fs::rename(&ours, &away).expect("it is moved");
    assert_eq!(spool.append(&row("a", 1)).err(), Some(DropCause::Io));
    assert_eq!(spool.append(&row("b", 1)).err(), Some(DropCause::Io));
    fs::rename(&away, &ours).expect("it is moved back");
    assert!(
        spool.tend(Instant::now()).is_none(),
        "the keeper has nothing left to try"
    );
    append(&spool, "c", 1);
    assert_eq!(
        (
            spool.stats().dropped_by(DropCause::Io),
            spool.stats().spare_misses
        ),
        (2, 1)
    );
}

#[test]
fn errors_of_the_file_system_have_causes_of_their_own() {
    use super::super::supply::cause_of;
    let of = |errno: rustix::io::Errno| cause_of(&errno.into());
    assert_eq!(of(rustix::io::Errno::NOSPC), DropCause::DiskFull);
    assert_eq!(of(rustix::io::Errno::DQUOT), DropCause::DiskFull);
    assert_eq!(of(rustix::io::Errno::ROFS), DropCause::ReadOnly);
    assert_eq!(of(rustix::io::Errno::ACCESS), DropCause::ReadOnly);
    assert_eq!(of(rustix::io::Errno::IO), DropCause::Io);
}

#[test]
fn under_each_a_ticket_waits_for_the_disk_and_no_longer() {
    let dir = TempDir::new();
    let spool = open(&SpoolConfig {
        fsync: Fsync::Each,
        ..config(dir.path())
    });
    let first = spool.append(&row("a", 10)).expect("there is room");
    assert!(first.must_wait());
    spool.tend(Instant::now());
    assert!(!first.must_wait());
    let tickets: Vec<Ticket> = (0..5)
        .map(|number| {
            spool
                .append(&row(&number.to_string(), 1000))
                .expect("there is room")
        })
        .collect();
    assert!(tickets.iter().all(Ticket::must_wait));
    spool.tend(Instant::now());
    assert!(
        !tickets.iter().any(Ticket::must_wait),
        "rows of a sealed segment and of the next one"
    );
    let last = spool.append(&row("z", 10)).expect("there is room");
    spool.close();
    assert!(!last.must_wait());
    assert_eq!(spool.append(&row("late", 1)).err(), Some(DropCause::Closed));
}

#[test]
fn a_begin_goes_when_its_row_is_as_durable_as_was_asked_for() {
    for (fsync, freed_at_once) in [(Fsync::Off, true), (Fsync::Interval, false), (Fsync::Each, false)] {
        let dir = TempDir::new();
        let spool = open(&SpoolConfig {
            fsync,
            fsync_interval: Duration::from_secs(60),
            ..config(dir.path())
        });
        spool.journal.begin(&begin("gw-1"));
        let slot = spool.journal.ended("gw-1");
        drop(spool.append_end(&row("gw-1", 1), slot).expect("there is room"));
        let begun = || {
            let bytes = fs::read(&dir.files_ending(".begins")[0]).expect("it is there");
            super::super::journal::read(&bytes).0.len()
        };
        assert_eq!(begun(), usize::from(!freed_at_once), "{fsync}");
        spool.tend(Instant::now() + Duration::from_secs(61));
        assert_eq!(begun(), 0, "{fsync}");
    }
}

#[test]
fn a_row_that_is_lost_is_counted_and_does_not_come_back_as_a_crash() {
    let dir = TempDir::new();
    let spool = open(&config(dir.path()));
    spool.journal.begin(&begin("gw-1"));
    assert!(
        spool
            .append_end(&row("gw-1", 5000), spool.journal.ended("gw-1"))
            .is_err()
    );
    drop(spool);
    let again = open(&config(dir.path()));
    assert_eq!((again.stats().crashed, again.stats().files), (0, 0));
}

#[test]
fn what_another_gateway_left_is_taken_over_unless_it_is_in_use() {
    let dir = TempDir::new();
    let left = open_spool(&config(dir.path()), "old-host").expect("it opens");
    append(&left, "old-1", 1);
    left.journal.begin(&begin("old-2"));
    let ours = open(&config(dir.path()));
    assert_eq!(ours.stats().files, 0, "the other one is still at work");
    drop((left, ours));
    let ours = open(&config(dir.path()));
    assert_eq!(sealed_ids(&ours).concat(), ["old-1", "old-2"]);
    let owners: Vec<Box<str>> = ours
        .sealed(9)
        .iter()
        .map(|batch| batch.id.gateway.clone())
        .collect();
    assert_eq!(owners, [Box::from("old-host"), Box::from("old-host")]);
    assert!(
        dir.files_ending("old-host/lock").len() == 1,
        "its directory stays"
    );
}

#[test]
fn what_another_gateway_left_and_cannot_be_read_keeps_nobody_from_starting() {
    let dir = TempDir::new();
    let other = SpoolConfig {
        max_bytes: ByteSize::from_mib(1),
        segment_bytes: ByteSize::from_kib(64),
        ..config(dir.path())
    };
    let spool = open_spool(&other, "other").expect("it opens");
    append(&spool, "other-1", 1);
    seal(&spool);
    drop(spool);
    // Its rows are torn, and there is no place to put them aside.
    let batch = &dir.files_ending(".jsonl")[0];
    fs::write(batch, "no row\n").expect("it is written");
    fs::write(dir.path().join("other/quarantine"), "no directory").expect("it is written");
    append(&open(&config(dir.path())), "gw-1", 1);
    assert_eq!(fs::read(batch).expect("it is where it was"), b"no row\n");
}

#[test]
fn strangers_files_are_left_alone_and_counted() {
    let dir = TempDir::new();
    fs::create_dir_all(dir.path().join("gw")).expect("a directory");
    fs::create_dir_all(dir.path().join("lost+found")).expect("a directory");
    fs::write(dir.path().join("gw/README"), "mine").expect("it is written");
    let spool = open(&config(dir.path()));
    assert_eq!(spool.stats().foreign, 1);
    assert_eq!(
        fs::read(dir.path().join("gw/README")).expect("it is there"),
        b"mine"
    );
}

#[test]
fn a_boot_is_above_all_that_were_even_when_the_clock_was_set_back() {
    let dir = TempDir::new();
    let future = BatchId {
        boot: u64::from(u32::MAX) << 12,
        sequence: 9,
        gateway: "gw".into(),
    };
    fs::create_dir_all(dir.path().join("gw")).expect("a directory");
    let line = [&row_prefix(&future), &br#""event_id":"f"}"#[..], b"\n"].concat();
    fs::write(dir.path().join("gw").join(future.file_name(Kind::Sealed)), line).expect("it is written");
    let spool = open(&config(dir.path()));
    append(&spool, "now", 1);
    seal(&spool);
    assert_eq!(sealed_ids(&spool), [["f"], ["now"]]);
    assert_eq!(spool.sealed(9)[1].id.boot, future.boot + 1);
}
