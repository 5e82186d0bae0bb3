//! What the tap counts, as plain numbers. Counts are since the start; what is called a level says so.

/// Why bytes that were waited for are given up, so that a hole stands in their place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GiveUp {
    /// One direction of a connection held back as much as it may.
    ConnectionFull,
    /// All connections together did.
    TotalFull,
    /// They did not come in time.
    TimedOut,
    /// The other side's bytes show that the receiver has them: they passed, and their record is lost.
    Overtaken,
    /// The connection ended, or is no longer followed.
    Closed,
    /// The caller knows that records were lost.
    Told,
}

impl GiveUp {
    /// Every cause.
    pub const ALL: [GiveUp; 6] = [
        GiveUp::ConnectionFull,
        GiveUp::TotalFull,
        GiveUp::TimedOut,
        GiveUp::Overtaken,
        GiveUp::Closed,
        GiveUp::Told,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            GiveUp::ConnectionFull => "connection_full",
            GiveUp::TotalFull => "total_full",
            GiveUp::TimedOut => "timed_out",
            GiveUp::Overtaken => "overtaken",
            GiveUp::Closed => "closed",
            GiveUp::Told => "told",
        }
    }
}

/// What the reassembly of all streams counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamStats {
    /// Payload that was handed on, holes included.
    pub bytes: u64,
    /// Payload that came once more after it was handed on, or lies behind the end of its stream.
    pub duplicate_bytes: u64,
    /// Segments that came ahead of their turn.
    pub early_segments: u64,
    /// Payload of segments that the probe did not capture.
    pub uncaptured_bytes: u64,
    /// Gaps that were given up, by cause, in the order of [`GiveUp::ALL`].
    pub gaps: [u64; GiveUp::ALL.len()],
    /// What was missing in them.
    pub gap_bytes: u64,
    /// Level: what is held back now, with what holding it costs.
    pub held_bytes: usize,
}

impl StreamStats {
    /// How many gaps were given up for this cause.
    pub fn gaps(&self, cause: GiveUp) -> u64 {
        self.gaps[cause as usize]
    }
}

/// Why a connection is no longer followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Retired {
    /// Both sides had ended it.
    Finished,
    /// One side broke it off.
    Reset,
    /// Its addresses belong to a new connection now.
    Superseded,
    /// Nothing was seen of it for long.
    Idle,
    /// It made room for another: there were as many as may be.
    Crowded,
    /// Watching ended.
    Stopped,
}

impl Retired {
    /// Every cause.
    pub const ALL: [Retired; 6] = [
        Retired::Finished,
        Retired::Reset,
        Retired::Superseded,
        Retired::Idle,
        Retired::Crowded,
        Retired::Stopped,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Retired::Finished => "finished",
            Retired::Reset => "reset",
            Retired::Superseded => "superseded",
            Retired::Idle => "idle",
            Retired::Crowded => "crowded",
            Retired::Stopped => "stopped",
        }
    }
}

/// What [`Connections`](super::connections::Connections) counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// Level: connections that are followed.
    pub live: usize,
    /// Connections that were seen from their beginning.
    pub opened: u64,
    /// Connections that were first seen in their middle.
    pub joined: u64,
    /// Connections that are no longer followed, by cause, in the order of [`Retired::ALL`].
    pub retired: [u64; Retired::ALL.len()],
    /// Segments that came, of whatever kind.
    pub segments: u64,
    /// Segments of no connection that is followed, and that begin none.
    pub stray_segments: u64,
    /// Bytes that belong to no exchange: TLS, other protocols, what could not be placed.
    pub opaque_bytes: u64,
    /// Connections that speak TLS or HTTP/2.
    pub unreadable: u64,
    /// Exchanges that began.
    pub began: u64,
    /// Exchanges that ended.
    pub ended: u64,
    /// Those of them of which not enough was seen.
    pub incomplete: u64,
    /// What reassembly counts.
    pub streams: StreamStats,
}

impl Stats {
    /// How many connections are no longer followed for this cause.
    pub fn retired(&self, cause: Retired) -> u64 {
        self.retired[cause as usize]
    }
}

/// What the probe counted of one direction since it was loaded. `payload_bytes` is always `submitted_bytes` plus `lost_bytes`, once no packet is under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packets with payload, SYN, FIN or RST.
    pub packets: u64,
    /// Their payload.
    pub payload_bytes: u64,
    /// Records in the ring, read or not.
    pub submitted: u64,
    /// Payload that they stand for.
    pub submitted_bytes: u64,
    /// Payload of lost records.
    pub lost_bytes: u64,
    /// Records lost because the ring was full.
    pub lost_ring_full: u64,
    /// Records lost because the kernel would not give their bytes.
    pub lost_load_failed: u64,
    /// Records lost because their segment was too long.
    pub lost_too_long: u64,
    /// TCP packets of any port that could not be understood; they are in no other count.
    pub malformed: u64,
}

impl Totals {
    /// Records lost, whatever the cause.
    pub fn lost(&self) -> u64 {
        self.lost_ring_full + self.lost_load_failed + self.lost_too_long
    }
}

/// What was counted between the kernel and the reader of the ring.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProbeTotals {
    /// Of what goes to servers.
    pub ingress: Totals,
    /// Of what comes from them.
    pub egress: Totals,
    /// Records that did not keep to the layout. Anything but 0 is a fault of the probe.
    pub unreadable: u64,
    /// Level: whether the probe is where the servers' sockets are, as far as that is known.
    pub is_in_place: bool,
}

impl ProbeTotals {
    /// Records that never came to be segments, whatever the cause.
    pub fn lost(&self) -> u64 {
        self.ingress.lost() + self.egress.lost() + self.unreadable
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_counted_where_they_stand_in_their_list() {
        for (index, cause) in GiveUp::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, index, "{}", cause.name());
        }
        for (index, cause) in Retired::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, index, "{}", cause.name());
        }
    }
}
