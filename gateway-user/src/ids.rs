//! Ids of requests: unique for ever, and such that only a gateway can make them.
//!
//! An id is `gateway-boot-sequence`; on its way to the upstream it carries a MAC as a fourth part, so that a kernel tap can tell
//! the requests of a gateway from those that only claim to be. A client's own `X-Gateway-Request-Id` is overwritten.

use hmac::{Hmac, KeyInit, Mac};
use rand::RngCore;
use sha2::Sha256;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Bytes of the MAC that are sent: 64 bits, far more than a forger can try within the life of a request.
const MAC_BYTES: usize = 8;

/// Longest `X-Request-Id` that is taken over from a client: it becomes part of vLLM's ids, log lines and rows.
const CLIENT_ID_BYTES_MAX: usize = 128;

/// Makes request ids.
pub struct RequestIds {
    gateway_id: Box<str>,
    /// What all ids of this run begin with.
    run: Box<str>,
    /// Seconds since 1970 at the start, so that sequence numbers of two runs of one gateway never meet.
    boot: u64,
    next: AtomicU64,
    key: Hmac<Sha256>,
}

impl RequestIds {
    /// A maker for the gateway called `gateway_id`. `secret` is shared by all gateways of a cluster; without it the key is random.
    pub fn new(gateway_id: &str, secret: Option<&[u8]>) -> RequestIds {
        let mut random = [0; 32];
        rand::rng().fill_bytes(&mut random);
        let boot = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .as_millis();
        let boot = u64::try_from(boot).unwrap_or(u64::MAX);
        RequestIds {
            gateway_id: gateway_id.into(),
            run: format!("{gateway_id}-{boot:x}-").into(),
            boot,
            next: AtomicU64::new(1),
            key: keyed(secret.unwrap_or(&random)),
        }
    }

    /// Which gateway this is.
    pub fn gateway_id(&self) -> &str {
        &self.gateway_id
    }

    /// The next id.
    pub fn next(&self) -> Box<str> {
        let sequence = self.next.fetch_add(1, Ordering::Relaxed);
        let digits = (u64::BITS - sequence.leading_zeros()).div_ceil(4).max(1);
        // As long as it will be, so that it need not be moved; by hand, as below.
        let mut id = String::with_capacity(self.run.len() + digits as usize);
        id.push_str(&self.run);
        for digit in (0..digits).rev() {
            id.push(char::from(DIGITS[(sequence >> (4 * digit)) as usize & 15]));
        }
        id.into()
    }

    /// Whether this very run of the gateway made `id`, given that it was verified.
    pub fn is_own(&self, id: &str) -> bool {
        origin(id).is_some_and(|(origin, _)| {
            let boot = origin
                .rsplit_once('-')
                .map(|(gateway, boot)| (gateway, u64::from_str_radix(boot, 16)));
            boot == Some((&*self.gateway_id, Ok(self.boot)))
        })
    }

    /// The value of `X-Gateway-Request-Id` for `id`.
    pub fn signed(&self, id: &str) -> String {
        let mut signed = String::with_capacity(id.len() + 1 + 2 * MAC_BYTES);
        signed.push_str(id);
        signed.push('.');
        push_hex(&self.mac(id), &mut signed);
        signed
    }

    /// The id inside a signed value, if a holder of the same secret made it.
    pub fn verified<'v>(&self, value: &'v str) -> Option<&'v str> {
        let (id, _) = value.rsplit_once('.')?;
        // Not constant-time: an id buys no access, it only joins two views of one request.
        (self.signed(id) == value).then_some(id)
    }

    fn mac(&self, id: &str) -> [u8; MAC_BYTES] {
        let mut mac = self.key.clone();
        mac.update(id.as_bytes());
        let whole = mac.finalize().into_bytes();
        std::array::from_fn(|at| whole[at])
    }
}

/// A client's `X-Request-Id`, if it is short and visible ASCII.
pub fn acceptable(value: &[u8]) -> Option<&str> {
    let is_good = (1..=CLIENT_ID_BYTES_MAX).contains(&value.len()) && value.iter().all(u8::is_ascii_graphic);
    std::str::from_utf8(value).ok().filter(|_| is_good)
}

/// Which run of which gateway made `id`, and its sequence number within that run.
pub fn origin(id: &str) -> Option<(&str, u64)> {
    let (origin, sequence) = id.rsplit_once('-')?;
    Some((origin, u64::from_str_radix(sequence, 16).ok()?))
}

fn keyed(secret: &[u8]) -> Hmac<Sha256> {
    // HMAC takes keys of any length, so the error cannot occur; an empty key would only make ids forgeable.
    Hmac::new_from_slice(secret).unwrap_or_else(|_| Hmac::new(&Default::default()))
}

/// So many random bytes in hexadecimal: an `X-Request-Id` for a client that sent none, a trace id or the id of a span.
pub fn random_hex<const BYTES: usize>() -> String {
    let mut random = [0; BYTES];
    rand::rng().fill_bytes(&mut random);
    let mut text = String::with_capacity(2 * BYTES);
    push_hex(&random, &mut text);
    text
}

/// Of hexadecimal.
const DIGITS: &[u8; 16] = b"0123456789abcdef";

/// By hand, since a request has some fifty such bytes and formatting each took as long as all of its headers.
fn push_hex(bytes: &[u8], text: &mut String) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(DIGITS[usize::from(digit)]));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_holder_of_the_secret_makes_valid_ids() {
        let ours = RequestIds::new("gw-1", Some(b"a shared secret of the cluster"));
        let sibling = RequestIds::new("gw-2", Some(b"a shared secret of the cluster"));
        let stranger = RequestIds::new("gw-1", None);
        let id = ours.next();
        let signed = ours.signed(&id);
        assert_eq!(sibling.verified(&signed), Some(&*id));
        assert_eq!(stranger.verified(&signed), None);
        assert_eq!(ours.verified(&id), None, "an id without its MAC");
        assert_eq!(ours.verified(&signed.replace("gw-1", "gw-9")), None);
        assert_ne!(ours.next(), id);
    }

    #[test]
    fn an_id_says_which_run_of_which_gateway_made_it() {
        let ours = RequestIds::new("gw-1", None);
        let id = ours.next();
        assert!(ours.is_own(&id));
        let (run, sequence) = origin(&id).unwrap();
        assert!(run.starts_with("gw-1-"), "{run}");
        assert_eq!(sequence, 1);
        for other in [
            id.replace("gw-1", "gw-2"),
            "gw-1-0-1".to_owned(),
            "gw".to_owned(),
            String::new(),
        ] {
            assert!(!ours.is_own(&other), "{other}");
        }
        assert_eq!(origin("gw-1-xyz"), None);
    }

    #[test]
    fn sequence_numbers_are_in_hexadecimal_without_zeros_before_them() {
        let ours = RequestIds::new("gw-1", None);
        for sequence in [0, 1, 15, 16, 0xabc, 0x1000, u64::MAX - 1, u64::MAX] {
            ours.next.store(sequence, Ordering::Relaxed);
            assert_eq!(&*ours.next(), format!("gw-1-{:x}-{sequence:x}", ours.boot));
        }
    }

    #[test]
    fn hexadecimal_has_two_digits_a_byte() {
        let mut text = String::from("0x");
        push_hex(&[0, 9, 10, 0x9f, 0xff], &mut text);
        assert_eq!(text, "0x00090a9fff");
        assert_eq!(random_hex::<16>().len(), 32);
        assert_ne!(random_hex::<16>(), random_hex::<16>());
    }
}
