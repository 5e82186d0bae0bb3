//! Just enough HTTP to ask a program on this machine how it is, and to read a number off its metrics page.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// How long a program on this machine may take to accept, and to send something; a starting one on a busy machine is slow.
const TIMEOUT: Duration = Duration::from_secs(5);

/// More than any page that is asked for; an answer without an end must not fill the memory.
const BODY_BYTES_MAX: u64 = 64 << 20;

/// The body of a page that answers 200.
///
/// It asks in HTTP/1.0, so that the server closes the connection and sends no chunks.
///
/// # Errors
/// When there is no answer, or another status.
pub fn get(port: u16, path: &str) -> Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, TIMEOUT)
        .with_context(|| format!("nothing answers on port {port}"))?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))?;
    // In one piece: a server that answers after the first of several would reset the rest.
    let request = format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n");
    stream.write_all(request.as_bytes())?;
    let mut answer = Vec::new();
    stream
        .take(BODY_BYTES_MAX)
        .read_to_end(&mut answer)
        .with_context(|| format!("port {port} broke off its answer to {path}"))?;
    let answer = String::from_utf8(answer).with_context(|| format!("{path} on port {port} is not text"))?;
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .with_context(|| format!("port {port} does not speak HTTP"))?;
    let status_line = head.lines().next().unwrap_or_default();
    ensure!(
        status_line.split(' ').nth(1) == Some("200"),
        "expected 200 for {path} on port {port}, found `{status_line}`: {body}"
    );
    Ok(body.to_owned())
}

/// The sum of a family on a metrics page; 0 when it is not there.
pub fn sum_of(family: &str, metrics: &str) -> f64 {
    sum_where(family, "", metrics)
}

/// The same of the series that are of requests' rows, where a family counts by table.
pub fn sum_of_events(family: &str, metrics: &str) -> f64 {
    sum_where(family, "table=\"request_events\"", metrics)
}

fn sum_where(family: &str, label: &str, metrics: &str) -> f64 {
    let values = metrics.lines().filter_map(|line| {
        let (series, value) = line.rsplit_once(' ')?;
        let is_meant = series.split('{').next() == Some(family) && series.contains(label);
        is_meant.then(|| value.parse::<f64>().ok())?
    });
    values.sum()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    fn answered_with(answer: &'static str) -> Result<String> {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let mut request = [0; 1024];
            let read = stream.read(&mut request).expect("a request");
            stream.write_all(answer.as_bytes()).expect("a client that reads");
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        let got = get(port, "/page");
        let request = server.join().expect("a server");
        assert!(request.starts_with("GET /page HTTP/1.0\r\n"), "{request}");
        got
    }

    #[test]
    fn a_family_is_summed_over_all_tables_or_over_requests_alone() {
        let page =
            "a_total{table=\"request_events\"} 2\na_total{table=\"request_segments\"} 3\na_total_more 9\n";
        assert_eq!(
            (sum_of("a_total", page), sum_of_events("a_total", page)),
            (5.0, 2.0)
        );
        assert_eq!(sum_of("b_total", page), 0.0);
    }

    #[test]
    fn only_a_200_is_an_answer() {
        let body = answered_with("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi").expect("a page");
        assert_eq!(body, "hi");
        let error = answered_with("HTTP/1.1 503 Service Unavailable\r\n\r\nstarting").expect_err("not ready");
        let text = error.to_string();
        assert!(text.contains("503") && text.contains("starting"), "{text}");
        assert!(answered_with("hello").is_err());
    }
}
