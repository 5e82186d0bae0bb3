//! The store as a sink: events, segments, and what a kill leaves of both.

use super::testing::{TempDir, begin};
use super::*;
use crate::config::{ByteSize, Fsync, WhenFull};
use crate::event::{CapturedBy, Context};
use crate::ledger::facts::Work;
use crate::ledger::{Micros, Span, Window};
use crate::wire::At;
use crate::wire::exchange::{Ending, Facts};
use std::time::Instant;

fn config(dir: &TempDir, fsync: Fsync) -> SpoolConfig {
    let segment_bytes = ByteSize::from_kib(64);
    SpoolConfig {
        dir: dir.path().to_owned(),
        segment_bytes,
        fsync,
        ..SpoolConfig::default()
    }
}

fn ended(event_id: &str) -> RequestEvent {
    let begin = begin(event_id);
    let context = Context {
        event_id: event_id.into(),
        started_at_us: begin.started_at_us,
        gateway_id: begin.gateway_id.into(),
        team: Some(begin.team_id.into()),
        project: None,
        user: None,
        upstream: None,
        request_id: begin.request_id.into(),
        trace_id: None,
        status: Some(200),
        error_type: None,
        gateway_overhead_us: None,
        tap: None,
    };
    RequestEvent::new(
        context,
        Facts::unread(At(0), At(5_000), Ending::Complete),
        CapturedBy::Proxy,
    )
}

/// A segment of this event, in the window that begins so many seconds after 1970.
fn segment(event_id: &str, window_s: u64) -> SegmentRow<'_> {
    let from = Micros(window_s * 1_000_000);
    SegmentRow {
        window_start: Window::at(from),
        upstream: "chat",
        event_id,
        team_id: "team-a",
        project: "",
        model: "llama",
        run: Span::new(from, Micros(from.0 + 1_000)),
        work: Work::default(),
        gateway_id: "gw",
    }
}

fn batches_of(store: &Store, table: Table) -> Vec<Arc<Batch>> {
    store.spool_of(table).sealed(usize::MAX)
}

fn rows(spool: &Spool) -> Vec<serde_json::Value> {
    let read = |batch: &Arc<Batch>| std::fs::read_to_string(&batch.path).expect("it is there");
    let text: String = spool.sealed(usize::MAX).iter().map(read).collect();
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a JSON object"))
        .collect()
}

#[tokio::test]
async fn under_each_what_is_settled_is_durable() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Each), "gw").expect("it opens");
    store.began(&begin("gw-1"));
    store.record(&ended("gw-1"));
    if let Some(settled) = store.settled() {
        settled.await;
    }
    assert!(store.settled().is_none());
    assert_eq!(*store.spool.durable.borrow(), 1);
}

#[tokio::test]
async fn a_row_is_sealed_in_time_and_is_the_event() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
    assert!(store.settled().is_none());
    store.record(&ended("gw-1"));
    store.spool.wait_for_sealed().await;
    let mut expected = serde_json::to_value(ended("gw-1")).expect("JSON");
    expected["batch"] = store.spool.sealed(1)[0].id.to_string().into();
    assert_eq!(rows(&store.spool), [expected]);
}

#[test]
fn a_store_that_is_closed_leaves_batches_and_no_journal() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
    store.began(&begin("gw-1"));
    store.record(&ended("gw-1"));
    drop(store);
    assert_eq!(dir.files_ending(".jsonl").len(), 1);
    assert!(dir.files_ending(".begins").is_empty() && dir.files_ending(".open").is_empty());
}

#[test]
fn a_request_that_a_crash_cut_off_becomes_a_row_with_all_that_was_known() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
    store.began(&begin("gw-1"));
    store.began(&begin("gw-2"));
    store.began(&Begin {
        upstream: Some("chat"),
        model: Some("llama"),
        ..begin("gw-2")
    });
    store.record(&ended("gw-1"));
    let killed = dir.copy();
    drop(store);
    let store = Store::open(&config(&killed, Fsync::Interval), "gw").expect("it opens");
    assert_eq!(store.spool.stats().crashed, 1);
    let rows = rows(&store.spool);
    let crash = rows
        .iter()
        .find(|row| row["outcome"] == "gateway_crash")
        .expect("it is there");
    assert_eq!(rows.len(), 2);
    for (key, value) in [
        ("event_id", "gw-2"),
        ("team_id", "team-a"),
        ("user_id", "u"),
        ("upstream", "chat"),
        ("model", "llama"),
        ("endpoint", "/v1/chat/completions"),
        ("error_type", "gateway_crash"),
        ("usage_source", "none"),
    ] {
        assert_eq!(crash[key], value, "{key}");
    }
    assert_eq!(
        (&crash["started_at"], &crash["status_code"]),
        (&1_700_000_000_000_000_i64.into(), &0.into())
    );
}

#[test]
fn segments_that_a_client_could_know_of_are_there_after_a_kill_under_names_of_their_own() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Interval), "gw").expect("it opens");
    store.segment(&segment("gw-1", 15));
    store.segment(&segment("gw-1", 30));
    store.record(&ended("gw-1"));
    let killed = dir.copy();
    drop(store);
    let store = Store::open(&config(&killed, Fsync::Interval), "gw").expect("it opens");
    let segments = rows(store.spool_of(Table::Segments));
    let batch = &batches_of(&store, Table::Segments)[0];
    assert!(batch.id.to_string().starts_with("gw~segments/"), "{}", batch.id);
    let expected = [15, 30].map(|window_s| {
        let mut row = serde_json::to_value(segment("gw-1", window_s)).expect("JSON");
        row["batch"] = batch.id.to_string().into();
        row
    });
    assert_eq!(segments, expected);
    assert_eq!(rows(store.spool()).len(), 1);
    assert_eq!(store.spool_of(Table::Segments).stats().crashed, 0);
}

#[test]
fn torn_segments_are_put_aside_and_those_of_a_gateway_that_is_no_more_are_taken_over() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Off), "old-host").expect("it opens");
    store.segment(&segment("old-1", 15));
    store.segment(&segment("old-2", 15));
    drop(store);
    let batch = &dir.files_ending(".jsonl")[0];
    let text = std::fs::read_to_string(batch).expect("it is there");
    std::fs::write(batch, &text[..text.len() - 9]).expect("it is written");
    let store = Store::open(&config(&dir, Fsync::Off), "gw").expect("it opens");
    let (segments, events) = (store.spool_of(Table::Segments), store.spool());
    assert_eq!(rows(segments)[0]["event_id"], "old-1");
    assert_eq!((segments.stats().rows, segments.stats().torn), (1, 1));
    assert_eq!((events.stats().rows, events.stats().torn), (0, 0));
    let taken = &batches_of(&store, Table::Segments)[0];
    assert_eq!(&*taken.id.gateway, "old-host~segments");
    assert!(taken.path.starts_with(dir.path().join("gw/segments")));
    let aside = std::fs::read_dir(dir.path().join("old-host/segments/quarantine"));
    assert_eq!(aside.expect("a directory").count(), 1);
}

#[tokio::test]
async fn under_each_an_end_waits_for_its_segments_too() {
    let dir = TempDir::new();
    let store = Store::open(&config(&dir, Fsync::Each), "gw").expect("it opens");
    store.segment(&segment("gw-1", 15));
    store.record(&ended("gw-1"));
    if let Some(settled) = store.settled() {
        settled.await;
    }
    for table in Table::ALL {
        assert_eq!(*store.spool_of(table).durable.borrow(), 1, "{table:?}");
    }
}

/// Both spools with files of 4 KiB and room for eight, which nobody tends but the test.
fn narrow(dir: &TempDir, when_full: WhenFull) -> [Spool; 2] {
    let config = SpoolConfig {
        segment_bytes: ByteSize::from_kib(4),
        max_bytes: ByteSize::from_kib(4 * 8),
        when_full,
        ..config(dir, Fsync::Off)
    };
    open_spools(&config, "gw").expect("it opens").into()
}

/// Appends a row that fills a file, and seals it.
fn append_file(spool: &Spool, id: &str) -> Result<(), DropCause> {
    let row = format!("{{\"event_id\":\"{id}\",\"pad\":\"{}\"}}", "x".repeat(3900));
    spool.append(row.as_bytes()).map(drop)?;
    spool.retire(Instant::now(), true);
    assert!(spool.seal_full());
    Ok(())
}

#[test]
fn events_and_segments_share_one_limit_and_what_is_lost_is_counted_where_it_was() {
    let dir = TempDir::new();
    let [events, segments] = narrow(&dir, WhenFull::DropNewest);
    for number in 0..6 {
        append_file(&segments, &format!("s-{number}")).expect("there is room");
    }
    append_file(&events, "e-0").expect("there is room");
    // Sealed files are a little smaller than 4 KiB each, and not by as much as a file in all.
    append_file(&events, "e-1").expect("there is room");
    assert_eq!(append_file(&events, "e-2"), Err(DropCause::SpoolFull));
    assert_eq!(append_file(&segments, "s-6"), Err(DropCause::SpoolFull));
    let used = [&events, &segments].map(|spool| spool.stats().bytes);
    assert!(used[0] < used[1] && used[0] + used[1] <= 4 * 8 * 1024, "{used:?}");
    for spool in [&events, &segments] {
        assert_eq!(spool.stats().dropped_by(DropCause::SpoolFull), 1);
    }
    let stored = segments.sealed(1)[0].clone();
    segments.acknowledge(&stored).expect("it is deleted");
    events.supply.fill();
    append_file(&events, "e-3").expect("room of the one is room of the other");
}

#[test]
fn what_gives_way_is_the_oldest_of_both() {
    let dir = TempDir::new();
    let [events, segments] = narrow(&dir, WhenFull::DropOldest);
    for number in 0..8 {
        append_file(&segments, &format!("s-{number}")).expect("there is room");
    }
    append_file(&events, "e-0").expect("the oldest makes room");
    append_file(&events, "e-1").expect("the oldest makes room");
    let evicted = [&events, &segments].map(|spool| spool.stats().dropped_by(DropCause::Evicted));
    assert_eq!(evicted, [0, 2]);
    assert_eq!(segments.sealed(1)[0].id.sequence, 3);
    assert_eq!([&events, &segments].map(|spool| spool.stats().files), [2, 6]);
}

#[test]
fn a_second_gateway_of_the_same_name_is_told_who_the_first_is() {
    let dir = TempDir::new();
    let _first = Store::open(&config(&dir, Fsync::Off), "gw").expect("it opens");
    let refused = Store::open(&config(&dir, Fsync::Off), "gw")
        .err()
        .expect("it is taken")
        .to_string();
    assert!(
        refused.contains(&format!("process {}", std::process::id())) && refused.contains("gateway.id"),
        "{refused}"
    );
}

#[test]
fn a_directory_that_cannot_be_made_is_named_with_what_to_do() {
    let dir = TempDir::new();
    let file = dir.path().join("file");
    std::fs::write(&file, "").expect("it is written");
    let config = SpoolConfig {
        dir: file.clone(),
        ..config(&dir, Fsync::Off)
    };
    let refused = Store::open(&config, "gw")
        .err()
        .expect("a file is no directory")
        .to_string();
    assert!(
        refused.contains(&*file.to_string_lossy()) && refused.contains("SPOOL_DIR"),
        "{refused}"
    );
}
