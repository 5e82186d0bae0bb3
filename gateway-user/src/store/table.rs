//! The tables whose rows go through the spool.

/// What a row is of. Each has a spool of its own, and a sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Table {
    /// One row for each request that ended.
    Events,
    /// The part of a request that falls into one window: what the ledger is computed from.
    Segments,
}

impl Table {
    /// Every table.
    pub const ALL: [Table; 2] = [Table::Events, Table::Segments];

    /// The name in ClickHouse and in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Table::Events => "request_events",
            Table::Segments => "request_segments",
        }
    }
}
