//! The KV cache: a fixed number of blocks, shared between sequences by the hash of the prefix they hold.
//!
//! A full prompt block stays after its last user has gone, until its place is needed (least recently used first).
//! Blocks of generated tokens are never shared.

use std::collections::{BTreeMap, HashMap};

/// The blocks and who uses them.
#[derive(Debug)]
pub struct KvPool {
    total: u32,
    /// Blocks that belong to one sequence alone.
    private: u32,
    cached: HashMap<u64, Cached>,
    /// Cached blocks without a user, by the time they were last used.
    idle: BTreeMap<u64, u64>,
    clock: u64,
    shared: bool,
}

#[derive(Debug)]
struct Cached {
    users: u32,
    /// Key in `idle` while there is no user.
    idle_since: u64,
}

/// What one sequence holds.
#[derive(Debug, Default)]
pub struct Held {
    /// How many of the prompt's leading blocks are held through the cache; the rest is private.
    shared: Vec<u64>,
    private: u32,
}

impl Held {
    /// Blocks in all.
    pub fn blocks(&self) -> u32 {
        self.shared.len() as u32 + self.private
    }
}

impl KvPool {
    /// A pool of `total` blocks; without `shared` nothing is ever found again.
    pub fn new(total: u32, shared: bool) -> Self {
        KvPool {
            total,
            private: 0,
            cached: HashMap::new(),
            idle: BTreeMap::new(),
            clock: 0,
            shared,
        }
    }

    /// Whether prefixes are looked up at all.
    pub fn shares(&self) -> bool {
        self.shared
    }

    /// Takes the longest cached beginning of `blocks` into `held`; returns how many blocks that were.
    pub fn take_prefix(&mut self, blocks: &[u64], held: &mut Held) -> u32 {
        if !self.shared {
            return 0;
        }
        let before = held.shared.len();
        for hash in blocks {
            let Some(block) = self.cached.get_mut(hash) else {
                break;
            };
            if block.users == 0 {
                self.idle.remove(&block.idle_since);
            }
            block.users += 1;
            held.shared.push(*hash);
        }
        (held.shared.len() - before) as u32
    }

    /// Grows `held` to `blocks` blocks, evicting idle ones; false, and nothing changed, if there is no room.
    pub fn grow(&mut self, held: &mut Held, blocks: u32) -> bool {
        let missing = blocks.saturating_sub(held.blocks());
        let free = self.total - self.private - self.cached.len() as u32;
        if missing > free + self.idle.len() as u32 {
            return false;
        }
        for _ in free..missing {
            if let Some((_, hash)) = self.idle.pop_first() {
                self.cached.remove(&hash);
            }
        }
        self.private += missing;
        held.private += missing;
        true
    }

    /// Offers the computed leading `blocks` of a prompt to other sequences.
    pub fn publish(&mut self, held: &mut Held, blocks: &[u64]) {
        if !self.shared {
            return;
        }
        while held.private > 0 && held.shared.len() < blocks.len() {
            let hash = blocks[held.shared.len()];
            // Computed twice at the same time: the second copy stays private, as does all behind it.
            if self.cached.contains_key(&hash) {
                break;
            }
            self.cached.insert(
                hash,
                Cached {
                    users: 1,
                    idle_since: 0,
                },
            );
            held.shared.push(hash);
            held.private -= 1;
            self.private -= 1;
        }
    }

    /// Gives back all of `held`.
    pub fn release(&mut self, held: &mut Held) {
        self.private -= held.private;
        held.private = 0;
        // The tail first, so that a prefix outlives what builds on it.
        for hash in held.shared.drain(..).rev() {
            let Some(block) = self.cached.get_mut(&hash) else {
                continue;
            };
            block.users -= 1;
            if block.users == 0 {
                self.clock += 1;
                block.idle_since = self.clock;
                self.idle.insert(self.clock, hash);
            }
        }
    }

    /// Blocks in use by a sequence.
    pub fn used(&self) -> u32 {
        self.private + (self.cached.len() - self.idle.len()) as u32
    }

    /// Share of the blocks in use, 0–1.
    pub fn usage(&self) -> f64 {
        f64::from(self.used()) / f64::from(self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_sequence_finds_the_first_ones_prefix() {
        let mut pool = KvPool::new(10, true);
        let (mut first, mut second) = (Held::default(), Held::default());
        assert!(pool.grow(&mut first, 3));
        pool.publish(&mut first, &[1, 2]);
        assert_eq!(pool.take_prefix(&[1, 2, 3], &mut second), 2);
        assert_eq!(pool.used(), 3);
        pool.release(&mut first);
        assert_eq!(pool.used(), 2);
        pool.release(&mut second);
        assert_eq!(pool.used(), 0);
        assert_eq!(
            pool.take_prefix(&[1, 2], &mut Held::default()),
            2,
            "idle blocks are still found"
        );
    }

    #[test]
    fn room_is_made_from_the_least_recently_used_and_never_from_the_used() {
        let mut pool = KvPool::new(3, true);
        for hash in [1, 2, 3] {
            let mut held = Held::default();
            assert!(pool.grow(&mut held, 1));
            pool.publish(&mut held, &[hash]);
            pool.release(&mut held);
        }
        let mut user = Held::default();
        assert_eq!(pool.take_prefix(&[1], &mut user), 1);
        let mut other = Held::default();
        assert!(pool.grow(&mut other, 1));
        assert_eq!(
            pool.take_prefix(&[2], &mut Held::default()),
            0,
            "2 was the oldest idle block"
        );
        assert_eq!(pool.take_prefix(&[3], &mut other), 1);
        assert!(!pool.grow(&mut Held::default(), 1), "all three are in use");
    }
}
