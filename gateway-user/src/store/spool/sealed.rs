//! The batches that wait to be stored.

use super::names::BatchId;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use tokio::sync::Notify;

use super::lock;

/// A file of rows that nobody adds to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Its name, which each of its rows carries as `batch`: the token under which it is stored.
    pub id: BatchId,
    /// The file: one JSON object a line.
    pub path: PathBuf,
    /// Lines in it.
    pub rows: u64,
    /// Its size.
    pub bytes: u64,
    /// When it was sealed, microseconds since 1970.
    pub sealed_at_us: i64,
}

/// All of them, in order.
#[derive(Default)]
pub struct SealedBatches {
    waiting: Mutex<BTreeMap<BatchId, Arc<Batch>>>,
    arrived: Notify,
}

impl SealedBatches {
    /// Adds a batch, or replaces it, and wakes whoever waits.
    pub fn put(&self, batch: Batch) {
        lock(&self.waiting).insert(batch.id.clone(), Arc::new(batch));
        self.arrived.notify_waiters();
    }

    /// Takes a batch out.
    pub fn remove(&self, id: &BatchId) -> Option<Arc<Batch>> {
        lock(&self.waiting).remove(id)
    }

    /// Takes the oldest batch out.
    pub fn remove_oldest(&self) -> Option<Arc<Batch>> {
        lock(&self.waiting).pop_first().map(|(_, batch)| batch)
    }

    /// The oldest batches, oldest first.
    pub fn oldest(&self, count_max: usize) -> Vec<Arc<Batch>> {
        lock(&self.waiting).values().take(count_max).cloned().collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        lock(&self.waiting).len()
    }

    /// The number of batches, their rows, and when the oldest was sealed.
    pub fn totals(&self) -> (u64, u64, Option<i64>) {
        let waiting = lock(&self.waiting);
        let rows = waiting.values().map(|batch| batch.rows).sum();
        (
            waiting.len() as u64,
            rows,
            waiting.first_key_value().map(|(_, batch)| batch.sealed_at_us),
        )
    }

    /// Done as soon as there is a batch.
    pub async fn wait(&self) {
        loop {
            let arrived = self.arrived.notified();
            tokio::pin!(arrived);
            // Registered before the look, so that a batch that comes in between is not missed.
            arrived.as_mut().enable();
            if self.len() > 0 {
                return;
            }
            arrived.await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(sequence: u64) -> Batch {
        let id = BatchId {
            boot: 1,
            sequence,
            gateway: "gw".into(),
        };
        Batch {
            id,
            path: PathBuf::new(),
            rows: 2,
            bytes: 10,
            sealed_at_us: sequence as i64,
        }
    }

    #[test]
    fn batches_come_out_oldest_first_whatever_order_they_came_in() {
        let sealed = SealedBatches::default();
        for sequence in [3, 1, 2] {
            sealed.put(batch(sequence));
        }
        assert_eq!(sealed.totals(), (3, 6, Some(1)));
        let first: Vec<u64> = sealed.oldest(2).iter().map(|batch| batch.id.sequence).collect();
        assert_eq!(first, [1, 2]);
        assert_eq!(sealed.remove_oldest().map(|batch| batch.id.sequence), Some(1));
        assert!(sealed.remove(&batch(3).id).is_some());
        assert_eq!(sealed.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_is_woken_by_a_batch_and_not_before() {
        let sealed = Arc::new(SealedBatches::default());
        let early = tokio::time::timeout(std::time::Duration::from_secs(60), sealed.wait()).await;
        assert!(early.is_err(), "there was nothing to wake for");
        let waiter = tokio::spawn({
            let sealed = Arc::clone(&sealed);
            async move { sealed.wait().await }
        });
        tokio::task::yield_now().await;
        sealed.put(batch(1));
        waiter.await.expect("it was woken");
        sealed.wait().await;
    }
}
