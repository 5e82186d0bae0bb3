//! Reads the probe's records. They come from the kernel, and are still not trusted: an object of another version, or a fault in it, must
//! show as a count and not as wrong facts.

use super::segment::Segment;
use crate::wire::At;
use crate::wire::connection::Direction;
use gateway_common::record::{EGRESS, FIN, HEADER_BYTES, INGRESS, PART_BYTES, RST, Record, SYN, VERSION};
use std::mem::offset_of;
use std::net::{Ipv6Addr, SocketAddr};

/// The segment that an entry of the ring holds; `None` for one that does not keep to the layout.
pub(super) fn parse(entry: &[u8]) -> Option<Segment<'_>> {
    let (header, payload) = entry.split_first_chunk::<HEADER_BYTES>()?;
    let len_bytes = u32::from_ne_bytes(field(header, offset_of!(Record, len_bytes)));
    let captured_bytes = u32::from_ne_bytes(field(header, offset_of!(Record, captured_bytes)));
    let flags = header[offset_of!(Record, flags)];
    let direction = match header[offset_of!(Record, direction)] {
        INGRESS => Direction::ToServer,
        EGRESS => Direction::ToClient,
        _ => return None,
    };
    let sound = header[offset_of!(Record, version)] == VERSION
        && header[offset_of!(Record, reserved)] == 0
        && flags & !(SYN | FIN | RST) == 0
        && captured_bytes <= len_bytes.min(PART_BYTES);
    if !sound {
        return None;
    }
    let address = |ip, port| {
        let ip = Ipv6Addr::from(field::<16>(header, ip)).to_canonical();
        SocketAddr::new(ip, u16::from_ne_bytes(field(header, port)))
    };
    Some(Segment {
        at: At(u64::from_ne_bytes(field(header, offset_of!(Record, time_ns)))),
        client: address(offset_of!(Record, client), offset_of!(Record, client_port)),
        server: address(offset_of!(Record, server), offset_of!(Record, server_port)),
        direction,
        syn: flags & SYN != 0,
        fin: flags & FIN != 0,
        rst: flags & RST != 0,
        sequence: u32::from_ne_bytes(field(header, offset_of!(Record, sequence))),
        len_bytes,
        captured: payload.get(..captured_bytes as usize)?,
    })
}

/// The bytes of the field at `at`.
fn field<const N: usize>(header: &[u8; HEADER_BYTES], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&header[at..at + N]);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: Record = Record {
        time_ns: 7,
        client: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3],
        server: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1],
        client_port: 40_000,
        server_port: 8000,
        sequence: u32::MAX,
        len_bytes: 5,
        captured_bytes: 3,
        offset_bytes: 0,
        version: VERSION,
        direction: EGRESS,
        flags: SYN | FIN,
        reserved: 0,
    };

    /// An entry as the probe writes it.
    fn entry(record: &Record, payload: &[u8]) -> Vec<u8> {
        let mut bytes = record.time_ns.to_ne_bytes().to_vec();
        bytes.extend(record.client);
        bytes.extend(record.server);
        bytes.extend(record.client_port.to_ne_bytes());
        bytes.extend(record.server_port.to_ne_bytes());
        let words = [
            record.sequence,
            record.len_bytes,
            record.captured_bytes,
            record.offset_bytes,
        ];
        bytes.extend(words.into_iter().flat_map(u32::to_ne_bytes));
        bytes.extend([record.version, record.direction, record.flags, record.reserved]);
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn a_record_is_read_field_by_field_and_its_entry_s_rest_is_not() {
        let bytes = entry(&PLAIN, b"abc and what was there before");
        let segment = parse(&bytes).unwrap();
        assert_eq!(segment.at, At(7));
        assert_eq!(segment.client, "10.1.2.3:40000".parse().unwrap());
        assert_eq!(segment.server, "[::1]:8000".parse().unwrap());
        assert_eq!(segment.direction, Direction::ToClient);
        assert_eq!((segment.syn, segment.fin, segment.rst), (true, true, false));
        assert_eq!((segment.sequence, segment.len_bytes), (u32::MAX, 5));
        assert_eq!(segment.captured, b"abc");
    }

    #[test]
    fn what_does_not_keep_to_the_layout_is_refused() {
        let refused = |change: fn(&mut Record)| {
            let mut record = PLAIN;
            change(&mut record);
            parse(&entry(&record, &[0; 64])).is_none()
        };
        assert!(!refused(|_| {}));
        assert!(refused(|record| record.version += 1));
        assert!(refused(|record| record.direction = 2));
        assert!(refused(|record| record.flags = 8));
        assert!(refused(|record| record.reserved = 1));
        assert!(refused(|record| record.captured_bytes = record.len_bytes + 1));
        let (len_bytes, captured_bytes) = (PART_BYTES * 2, PART_BYTES + 1);
        let too_long = Record {
            len_bytes,
            captured_bytes,
            ..PLAIN
        };
        assert!(parse(&entry(&too_long, &vec![0; len_bytes as usize])).is_none());
        let whole = entry(&PLAIN, b"abc");
        assert!(parse(&whole).is_some());
        assert!((0..whole.len()).all(|len| parse(&whole[..len]).is_none()));
    }

    proptest! {
        #[test]
        fn whatever_the_ring_holds_a_segment_s_bytes_are_within_it(
            mut bytes in prop::collection::vec(any::<u8>(), 0..400), sound_head: bool, len in 0_u32..500, captured in 0_u32..500,
        ) {
            if sound_head && bytes.len() >= HEADER_BYTES {
                let record = Record { len_bytes: len, captured_bytes: captured, ..PLAIN };
                let payload = bytes.split_off(HEADER_BYTES);
                bytes = entry(&record, &payload);
            }
            let available = bytes.len().saturating_sub(HEADER_BYTES);
            match parse(&bytes) {
                Some(segment) => {
                    prop_assert!(segment.captured.len() <= available);
                    prop_assert!(segment.captured.len() <= segment.len_bytes as usize);
                }
                None if sound_head && bytes.len() >= HEADER_BYTES => {
                    prop_assert!(captured > len || captured as usize > available);
                }
                None => {}
            }
        }
    }
}
