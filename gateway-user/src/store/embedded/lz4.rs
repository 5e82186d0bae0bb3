//! ClickHouse's own compressed blocks, which its clients send with `decompress=1` and ask for with `compress=1`.
//!
//! A block is a CityHash128 (version 1.0.2) of all that follows it, a byte that names the method, the length of the block from that
//! byte on, the length of what it holds (both little-endian, 32 bits), and the compressed bytes.

use bytes::{Buf, Bytes, BytesMut};
use cityhash_rs::cityhash_102_128;

/// Length of the hash.
const HASH_BYTES: usize = 16;
/// Length of the method and the two lengths.
const HEADER_BYTES: usize = 9;
/// LZ4.
const METHOD_LZ4: u8 = 0x82;
/// Not compressed.
const METHOD_NONE: u8 = 0x02;
/// ClickHouse's own limit is 1 GiB. Its clients send blocks of 256 KiB to 1 MiB; this bounds what a false length can make us allocate.
const BLOCK_MAX_BYTES: usize = 64 << 20;
/// How much goes into a block that we write: what ClickHouse's own writer takes.
const WRITE_BYTES: usize = 1 << 20;

/// What is wrong with compressed data.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BlockError {
    /// The hash is of other bytes.
    #[error(
        "the checksum of a compressed block does not match: the data are damaged, or not in ClickHouse's block format"
    )]
    Checksum,
    /// Neither LZ4 nor plain.
    #[error("compression method 0x{0:02x} is not supported: send LZ4, or do not compress")]
    Method(u8),
    /// Lengths that no client sends.
    #[error("a compressed block claims {0} bytes; at most {BLOCK_MAX_BYTES} are taken")]
    Length(usize),
    /// LZ4 refuses it.
    #[error("a compressed block is not LZ4: {0}")]
    Lz4(String),
    /// The end comes inside a block.
    #[error("the data end inside a compressed block")]
    Truncated,
}

/// Takes the next whole block off the front of `input` and returns what it holds, or `None` when more bytes are needed.
///
/// # Errors
/// When it is not a block.
pub fn decode(input: &mut BytesMut) -> Result<Option<Bytes>, BlockError> {
    let Some(header) = input.get(HASH_BYTES..HASH_BYTES + HEADER_BYTES) else {
        return Ok(None);
    };
    let method = header[0];
    let length =
        |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]) as usize;
    let (block_length, plain_length) = (length(1), length(5));
    if method != METHOD_LZ4 && method != METHOD_NONE {
        return Err(BlockError::Method(method));
    }
    if let Some(wrong) = [block_length, plain_length]
        .into_iter()
        .find(|length| *length > BLOCK_MAX_BYTES)
    {
        return Err(BlockError::Length(wrong));
    }
    if block_length < HEADER_BYTES {
        return Err(BlockError::Length(block_length));
    }
    if input.len() < HASH_BYTES + block_length {
        return Ok(None);
    }
    let mut block = input.split_to(HASH_BYTES + block_length).freeze();
    let hash = block.split_to(HASH_BYTES);
    if hash != hash_of(&block)[..] {
        return Err(BlockError::Checksum);
    }
    block.advance(HEADER_BYTES);
    if method == METHOD_NONE {
        return Ok(Some(block));
    }
    let plain = lz4_flex::block::decompress(&block, plain_length)
        .map_err(|error| BlockError::Lz4(error.to_string()))?;
    Ok(Some(plain.into()))
}

/// `plain` as blocks.
pub fn encode(plain: &[u8]) -> Bytes {
    let mut out = Vec::with_capacity(plain.len() / 2 + HASH_BYTES + HEADER_BYTES);
    for part in plain.chunks(WRITE_BYTES) {
        let compressed = lz4_flex::block::compress(part);
        // PROOF of the casts: a part is at most a mebibyte, and LZ4 adds at most a few per cent.
        let (block_length, plain_length) = ((compressed.len() + HEADER_BYTES) as u32, part.len() as u32);
        let mut block = Vec::with_capacity(HEADER_BYTES + compressed.len());
        block.push(METHOD_LZ4);
        block.extend(block_length.to_le_bytes());
        block.extend(plain_length.to_le_bytes());
        block.extend(compressed);
        out.extend(hash_of(&block));
        out.extend(block);
    }
    out.into()
}

/// ClickHouse writes the half that this library returns as the high one first.
fn hash_of(block: &[u8]) -> [u8; HASH_BYTES] {
    let hash = cityhash_102_128(block);
    let (high, low) = ((hash >> 64) as u64, hash as u64);
    let mut bytes = [0; HASH_BYTES];
    bytes[..8].copy_from_slice(&high.to_le_bytes());
    bytes[8..].copy_from_slice(&low.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_as_they_were_written_however_they_arrive() {
        let plain: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        let encoded = encode(&plain);
        assert!(encoded.len() < plain.len() / 10, "{} bytes", encoded.len());
        let (mut input, mut read) = (BytesMut::new(), Vec::new());
        for part in encoded.chunks(1000) {
            input.extend_from_slice(part);
            while let Some(block) = decode(&mut input).unwrap() {
                read.extend(block);
            }
        }
        assert!(read == plain && input.is_empty());
    }

    #[test]
    fn what_is_damaged_is_refused() {
        let good = encode(b"some bytes that matter, that matter, that matter");
        let damage = |at: usize, value: u8| {
            let mut bytes = BytesMut::from(&good[..]);
            bytes[at] = value;
            decode(&mut bytes)
        };
        assert_eq!(
            damage(good.len() - 1, good[good.len() - 1] ^ 1),
            Err(BlockError::Checksum)
        );
        assert_eq!(damage(0, good[0] ^ 1), Err(BlockError::Checksum));
        assert_eq!(damage(HASH_BYTES, 0x90), Err(BlockError::Method(0x90)));
        assert!(matches!(damage(HASH_BYTES + 4, 0xff), Err(BlockError::Length(_))));
        assert_eq!(decode(&mut BytesMut::from(&good[..good.len() - 1])), Ok(None));
    }
}
