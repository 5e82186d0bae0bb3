//! What a server speaks that takes connections and answers no HTTP: mostly TLS, which neither the proxy nor the tap understands.

use super::Check;
use super::upstream::{ANSWER_LIMIT, Asking};
use crate::config::UpstreamConfig;
use std::io;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

/// The line for a server whose answer was no HTTP.
pub(super) async fn no_http(asking: &Asking, group: &str, error: &str) -> Check {
    let speaks_tls = timeout(ANSWER_LIMIT, speaks_tls(&asking.upstream));
    if matches!(speaks_tls.await, Ok(Ok(true))) {
        return Check::problem(group, "TLS", "it speaks TLS, no plain HTTP").advise(
            "start vLLM without --ssl-certfile and --ssl-keyfile, and let something in front of the gateway end TLS: the gateway speaks plain \
             HTTP to upstreams, and the tap cannot look into TLS",
        );
    }
    Check::problem(group, "health", error)
        .advise("check what listens there: it takes connections, and gives no HTTP answer")
}

/// Greets as a TLS client does. A TLS server answers with its own greeting or an alert, each in a record of TLS; no HTTP server
/// begins with such bytes.
async fn speaks_tls(upstream: &UpstreamConfig) -> io::Result<bool> {
    let mut stream = TcpStream::connect((upstream.url.host(), upstream.url.port())).await?;
    stream.write_all(&client_hello()).await?;
    let mut head = [0; 3];
    stream.read_exact(&mut head).await?;
    let [kind, major, _minor] = head;
    // RFC 8446, 5.1: alert is 21, handshake 22; the version's first byte has been 3 since SSL 3.0.
    Ok(matches!(kind, 21 | 22) && major == 3)
}

/// The least ClientHello of TLS 1.2 (RFC 5246, 7.4.1.2). It offers two suites, the points and the signatures for them; a server that
/// wants TLS 1.3 answers with an alert, which says as much.
fn client_hello() -> Vec<u8> {
    const EXTENSIONS: &[u8] = &[
        0, 10, 0, 4, 0, 2, 0, 23, // supported_groups: secp256r1
        0, 13, 0, 8, 0, 6, 4, 3, 4, 1, 8,
        4, // signature_algorithms: ECDSA, RSA, RSA-PSS, each with SHA-256
    ];
    let mut hello = vec![3, 3];
    // Random bytes that need not be random: nothing is said over this connection.
    hello.extend([0x5a; 32]);
    hello.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    // PROOF: every length here is that of constants, below 256.
    let low = |length: usize| length as u8;
    hello.extend([0, low(EXTENSIONS.len())]);
    hello.extend(EXTENSIONS);
    let mut record = vec![22, 3, 1, 0, low(hello.len() + 4), 1, 0, 0, low(hello.len())];
    record.append(&mut hello);
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_one_whole_record() {
        let hello = client_hello();
        assert_eq!(
            hello.len(),
            5 + usize::from(hello[4]),
            "a record of the length it states"
        );
        assert_eq!(
            hello.len(),
            9 + usize::from(hello[8]),
            "and a message of the length it states"
        );
    }
}
