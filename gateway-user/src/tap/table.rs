//! Values by the addresses of a connection, in the order in which they were last used.

use foldhash::quality::RandomState;
use std::collections::HashMap;
use std::hash::{Hash, Hasher};
use std::net::{IpAddr, SocketAddr};

/// The addresses of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Peers {
    pub(super) client: SocketAddr,
    pub(super) server: SocketAddr,
}

/// In few pieces, where one by one it would be ten: to a hash a piece costs more than its bytes. It is made for each segment.
impl Hash for Peers {
    fn hash<H: Hasher>(&self, state: &mut H) {
        let Peers { client, server } = self;
        if let (IpAddr::V4(client), IpAddr::V4(server)) = (client.ip(), server.ip()) {
            state.write_u64(u64::from(client.to_bits()) << 32 | u64::from(server.to_bits()));
        } else {
            for ip in [client.ip(), server.ip()] {
                state.write_u128(match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped().to_bits(),
                    IpAddr::V6(ip) => ip.to_bits(),
                });
            }
        }
        state.write_u32(u32::from(client.port()) << 16 | u32::from(server.port()));
    }
}

/// Stands for no slot.
const NONE: u32 = u32::MAX;

#[derive(Debug)]
struct Slot<V> {
    /// `None` while the slot is free.
    entry: Option<(Peers, V)>,
    older: u32,
    newer: u32,
}

/// Finds a value by its peers, and the one that was not used for longest, at constant cost each.
#[derive(Debug)]
pub(super) struct Table<V> {
    /// By a hash with a seed of this process, which peers do not know. It is weaker than the standard library's against who can study how long a
    /// look-up takes, which nobody sees of a reader beside the path; and there are at most as many connections as may be followed.
    index: HashMap<Peers, u32, RandomState>,
    slots: Vec<Slot<V>>,
    free: Vec<u32>,
    oldest: u32,
    newest: u32,
}

impl<V> Table<V> {
    pub(super) fn new() -> Table<V> {
        Table {
            index: HashMap::default(),
            slots: Vec::new(),
            free: Vec::new(),
            oldest: NONE,
            newest: NONE,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.index.len()
    }

    /// The slot of these peers.
    pub(super) fn find(&self, peers: &Peers) -> Option<u32> {
        self.index.get(peers).copied()
    }

    pub(super) fn get_mut(&mut self, slot: u32) -> Option<(&Peers, &mut V)> {
        let (peers, value) = self.slots.get_mut(slot as usize)?.entry.as_mut()?;
        Some((peers, value))
    }

    /// The slot that was not used for longest.
    pub(super) fn oldest(&self) -> Option<u32> {
        (self.oldest != NONE).then_some(self.oldest)
    }

    /// The slot that was used next after this one.
    pub(super) fn newer(&self, slot: u32) -> Option<u32> {
        let newer = self.slots.get(slot as usize)?.newer;
        (newer != NONE).then_some(newer)
    }

    /// Makes it the one that was used last.
    pub(super) fn touch(&mut self, slot: u32) {
        if self.newest != slot {
            self.unlink(slot);
            self.link(slot);
        }
    }

    /// Puts a value in, as the one that was used last. There must be none of these peers.
    pub(super) fn insert(&mut self, peers: Peers, value: V) -> u32 {
        let filled = Slot {
            entry: Some((peers, value)),
            older: NONE,
            newer: NONE,
        };
        let slot = match self.free.pop() {
            Some(slot) => {
                self.slots[slot as usize] = filled;
                slot
            }
            None => {
                self.slots.push(filled);
                (self.slots.len() - 1) as u32
            }
        };
        self.index.insert(peers, slot);
        self.link(slot);
        slot
    }

    pub(super) fn remove(&mut self, slot: u32) -> Option<(Peers, V)> {
        let entry = self.slots.get_mut(slot as usize)?.entry.take()?;
        self.index.remove(&entry.0);
        self.unlink(slot);
        self.free.push(slot);
        Some(entry)
    }

    fn link(&mut self, slot: u32) {
        let older = std::mem::replace(&mut self.newest, slot);
        self.slots[slot as usize].older = older;
        self.slots[slot as usize].newer = NONE;
        match self.slots.get_mut(older as usize) {
            Some(older) => older.newer = slot,
            None => self.oldest = slot,
        }
    }

    fn unlink(&mut self, slot: u32) {
        let Slot { older, newer, .. } = self.slots[slot as usize];
        match self.slots.get_mut(older as usize) {
            Some(older) => older.newer = newer,
            None => self.oldest = newer,
        }
        match self.slots.get_mut(newer as usize) {
            Some(newer) => newer.older = older,
            None => self.newest = older,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peers(port: u16) -> Peers {
        let at = |port| SocketAddr::from(([10, 0, 0, 1], port));
        Peers {
            client: at(port),
            server: at(8000),
        }
    }

    fn order(table: &mut Table<u16>) -> Vec<u16> {
        let (mut order, mut next) = (Vec::new(), table.oldest());
        while let Some(slot) = next {
            order.push(*table.get_mut(slot).unwrap().1);
            next = table.newer(slot);
        }
        order
    }

    proptest! {
        #[test]
        fn it_does_what_a_list_does(steps in prop::collection::vec((0u8..3, 0u16..8), 0..80)) {
            let (mut table, mut list) = (Table::new(), Vec::new());
            for (step, port) in steps {
                let slot = table.find(&peers(port));
                prop_assert_eq!(slot.is_some(), list.contains(&port));
                match (step, slot) {
                    (0, None) => {
                        table.insert(peers(port), port);
                        list.push(port);
                    }
                    (1, Some(slot)) => {
                        table.touch(slot);
                        list.retain(|other| *other != port);
                        list.push(port);
                    }
                    (2, Some(slot)) => {
                        prop_assert_eq!(table.remove(slot), Some((peers(port), port)));
                        prop_assert!(table.get_mut(slot).is_none());
                        list.retain(|other| *other != port);
                    }
                    _ => {}
                }
                prop_assert_eq!(&order(&mut table), &list);
                prop_assert_eq!((table.len(), table.slots.len() <= 8), (list.len(), true));
            }
        }
    }
}
