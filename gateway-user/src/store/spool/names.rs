//! The names of files and batches. A name says all that a file's place in the order of things needs, so that there is no index
//! that could be lost or disagree.
//!
//! `GATEWAY.BOOT-SEQUENCE.jsonl` is a sealed batch of rows, `….open` a segment that is or was being filled, `….begins` a file of the
//! journal. Gateway names hold dots and dashes themselves, so a name is read from its end.

use std::fmt;

/// Names a batch of rows for ever: `gateway/boot/sequence`. Orders by time, as far as the clocks of gateways agree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BatchId {
    /// Milliseconds since 1970 at the start of the gateway, or just above the last such number in the directory.
    pub boot: u64,
    /// Counts from 1 within a boot.
    pub sequence: u64,
    /// Which gateway wrote the rows.
    pub gateway: Box<str>,
}

impl fmt::Display for BatchId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{:012x}/{:08x}", self.gateway, self.boot, self.sequence)
    }
}

/// What a file of the spool's directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Rows that nobody adds to.
    Sealed,
    /// A segment that rows are, or were, added to.
    Open,
    /// Requests that have begun.
    Begins,
    /// The unfinished replacement of a file.
    Unfinished,
}

impl Kind {
    const ALL: [Kind; 4] = [Kind::Sealed, Kind::Open, Kind::Begins, Kind::Unfinished];

    fn extension(self) -> &'static str {
        match self {
            Kind::Sealed => "jsonl",
            Kind::Open => "open",
            Kind::Begins => "begins",
            Kind::Unfinished => "tmp",
        }
    }
}

impl BatchId {
    /// The name without its extension.
    pub fn stem(&self) -> String {
        format!("{}.{:012x}-{:08x}", self.gateway, self.boot, self.sequence)
    }

    /// The name of a file that belongs to this id.
    pub fn file_name(&self, kind: Kind) -> String {
        format!("{}.{}", self.stem(), kind.extension())
    }

    /// Reads a file's name; `None` for a stranger's.
    pub fn of_file(name: &str) -> Option<(BatchId, Kind)> {
        let (stem, extension) = name.rsplit_once('.')?;
        let kind = Kind::ALL.into_iter().find(|kind| kind.extension() == extension)?;
        let (gateway, numbers) = stem.rsplit_once('.')?;
        let (boot, sequence) = numbers.split_once('-')?;
        let number = |text: &str| u64::from_str_radix(text, 16).ok();
        let id = BatchId {
            boot: number(boot)?,
            sequence: number(sequence)?,
            gateway: gateway.into(),
        };
        // What is read must be what would be written: otherwise two files could claim one id.
        (id.file_name(kind) == name).then_some((id, kind))
    }
}

/// What every row of a batch begins with; the row's own first field follows.
pub fn row_prefix(id: &BatchId) -> Box<[u8]> {
    // A gateway's name holds nothing that JSON would escape (`config::Name`).
    format!("{{\"batch\":\"{id}\",").into_bytes().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_batch_whatever_the_gateway_is_called() {
        for gateway in ["gw", "gw-1.example.org", "a.b-c", "0.1-2"] {
            let id = BatchId {
                boot: 0x0190_1234_5678,
                sequence: 7,
                gateway: gateway.into(),
            };
            for kind in Kind::ALL {
                assert_eq!(BatchId::of_file(&id.file_name(kind)), Some((id.clone(), kind)));
            }
        }
    }

    #[test]
    fn a_strangers_file_is_none_of_ours() {
        for name in [
            "lock",
            "notes.jsonl",
            "gw.1-2.jsonl",
            "gw.000000000001-00000002.json",
            "gw.00000000000G-00000002.jsonl",
            "",
        ] {
            assert_eq!(BatchId::of_file(name), None, "{name}");
        }
    }

    #[test]
    fn batches_order_by_boot_and_sequence_before_the_gateway() {
        let id = |boot, sequence, gateway: &str| BatchId {
            boot,
            sequence,
            gateway: gateway.into(),
        };
        assert!(id(1, 9, "z") < id(2, 1, "a"));
        assert!(id(1, 1, "z") < id(1, 2, "a"));
    }
}
