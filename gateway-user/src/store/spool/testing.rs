//! What the store's tests share.

use crate::event::{Begin, CapturedBy};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

static NEXT: AtomicU64 = AtomicU64::new(0);

/// A directory that goes when the test ends.
pub struct TempDir(PathBuf);

impl TempDir {
    pub fn new() -> TempDir {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vllm-gateway-store-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&path).expect("a temporary directory");
        TempDir(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The files whose names end like that, in the order of their names, wherever they are.
    pub fn files_ending(&self, end: &str) -> Vec<PathBuf> {
        let mut found: Vec<PathBuf> = walk(&self.0)
            .into_iter()
            .filter(|path| path.to_string_lossy().ends_with(end))
            .collect();
        found.sort();
        found
    }

    /// What a kill at this moment would leave behind.
    pub fn copy(&self) -> TempDir {
        let copy = TempDir::new();
        for path in walk(&self.0) {
            let to = copy.0.join(path.strip_prefix(&self.0).expect("it lies within"));
            std::fs::create_dir_all(to.parent().expect("it has one")).expect("a directory");
            std::fs::copy(&path, &to).expect("a copy");
        }
        copy
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).expect("a directory") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            files.extend(walk(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// A request of `team-a`.
pub fn begin(event_id: &str) -> Begin<'_> {
    Begin {
        event_id,
        started_at_us: 1_700_000_000_000_000,
        gateway_id: "gw",
        capture: CapturedBy::Proxy,
        team_id: "team-a",
        project: None,
        user_id: Some("u"),
        endpoint: "/v1/chat/completions",
        request_id: "r-1",
        trace_id: None,
        upstream: None,
        model: None,
    }
}
