//! What the type of a single value cannot say: ranges, and settings that must fit each other.

use std::{net::SocketAddr, time::Duration};

use super::{
    error::quote,
    limits,
    read::Findings,
    schema::{
        AdminToken, Config, GatewayConfig, IdentityConfig, LedgerConfig, ProxyConfig, SpoolConfig,
        UpstreamConfig,
    },
    tap::TapConfig,
    token::TokenDigest,
    units::{ByteSize, format_duration},
    values::UpstreamUrl,
};
use crate::ledger::{Millionths, PriceList, RateCard};

/// More threads than any machine has cores: a slip of the pen, and memory for each.
const WORKERS_MAX: u32 = 1024;

/// A head of a request with a few headers and a token in it must fit.
const HEAD_MIN: ByteSize = ByteSize::from_kib(1);

/// Each connection may hold a head of this size, so that more would let few clients take all memory.
const HEAD_MAX: ByteSize = ByteSize::from_mib(1);

/// A file of the spool must hold some rows, and the longest one.
const SEGMENT_MIN: ByteSize = ByteSize::from_kib(64);

/// A batch is sent as one block of ClickHouse, which would split a larger one.
const SEGMENT_MAX: ByteSize = ByteSize::from_mib(64);

/// One file that is filled, two that are ready, and one that waits, of requests and of their segments.
const SEGMENTS_MIN: u64 = 8;

/// What little of each packet to a server must be captured, so that a usual head is whole.
const INGRESS_PREFIX_MIN: ByteSize = ByteSize::from_kib(1);

/// Packets are hardly ever longer.
const INGRESS_PREFIX_MAX: ByteSize = ByteSize::from_kib(512);

/// At 50 000 records a second the default ring is full after half a second, and the smallest one after two milliseconds.
const POLL_MAX: Duration = Duration::from_millis(100);

/// Headers that name nobody: those of the connection and the framing, which the proxy itself acts on, and those that carry
/// credentials, which must not end up as a team's name in metrics and tables.
const HEADERS_REFUSED: [&str; 16] = [
    "authorization",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "cookie",
    "expect",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The header with which the proxy marks requests for the kernel probe.
const REQUEST_ID_HEADER: &str = "x-gateway-request-id";

/// Reports everything in the config that cannot work.
pub(super) fn validate(config: &Config, findings: &mut Findings<'_>) {
    validate_gateway(&config.gateway, findings);
    validate_tokens(&config.admin.tokens, findings);
    validate_addresses(config, findings);
    validate_tap(&config.tap, findings);
    validate_identity(&config.identity, findings);
    validate_upstreams(&config.upstreams, findings);
    validate_proxy(&config.proxy, findings);
    validate_database(&config.store.database, findings);
    validate_days("store.raw_days", config.store.raw_days, findings);
    validate_days("store.ledger_days", config.store.ledger_days, findings);
    validate_spool(&config.spool, findings);
    validate_ledger(&config.ledger, findings);
    limits::validate(config, findings);
    if config.reconciliation.gap_share > Millionths::ONE {
        let found = config.reconciliation.gap_share;
        let message = format!("expected a share, from 0 to 1, found {found}");
        findings.refuse("reconciliation.gap_share", message);
    }
    refuse_zero_duration("reconciliation.window", config.reconciliation.window, findings);
    if let Err(error) = RateCard::new(config.rates.clone()) {
        findings.refuse("rates", error.to_string());
    }
    for (path, interval) in [
        ("metrics.emit_interval", config.metrics.emit_interval),
        ("vllm.scrape_interval", config.vllm.scrape_interval),
    ] {
        refuse_zero_duration(path, interval, findings);
    }
    if config.metrics.max_teams == 0 {
        findings.refuse("metrics.max_teams", "expected at least 1, found 0".to_owned());
    }
}

fn validate_gateway(gateway: &GatewayConfig, findings: &mut Findings<'_>) {
    if gateway.workers > WORKERS_MAX {
        let message = format!(
            "expected at most {WORKERS_MAX}, found {}: 0 is one a core",
            gateway.workers
        );
        findings.refuse("gateway.workers", message);
    }
    if let Some(secret) = &gateway.secret
        && secret.expose().len() < GatewayConfig::SECRET_BYTES_MIN
    {
        let message = format!(
            "expected at least {} bytes, found {}: `openssl rand -hex 32` makes a good one",
            GatewayConfig::SECRET_BYTES_MIN,
            secret.expose().len()
        );
        findings.refuse("gateway.secret", message);
    }
}

fn validate_addresses(config: &Config, findings: &mut Findings<'_>) {
    let (clients, admin) = (config.gateway.listen, config.admin.listen);
    // Port 0 asks the system for a free port, so that two of them do not collide.
    let overlap = clients.ip() == admin.ip() || clients.ip().is_unspecified() || admin.ip().is_unspecified();
    if clients.port() == admin.port() && clients.port() != 0 && overlap {
        let message = format!("{admin} is taken by gateway.listen, {clients}: give one of them another port");
        findings.refuse("admin.listen", message);
    }
    for (index, upstream) in config.upstreams.iter().enumerate() {
        for (key, listen) in [("gateway.listen", clients), ("admin.listen", admin)] {
            if leads_to(&upstream.url, listen) {
                let message = format!(
                    "{} leads back to this gateway, which listens on {listen} ({key})",
                    upstream.url
                );
                findings.refuse(&format!("upstreams[{index}].url"), message);
            }
        }
    }
}

/// Whether an address surely is one that is listened on here. A name other than localhost is not looked up.
fn leads_to(url: &UpstreamUrl, listen: SocketAddr) -> bool {
    let same_host = match url.host().parse() {
        Ok(std::net::IpAddr::V4(ip)) if ip.is_loopback() => {
            listen.ip().is_loopback() || listen.ip().is_unspecified()
        }
        Ok(ip) => ip == listen.ip(),
        Err(_) => url.host() == "localhost" && (listen.ip().is_loopback() || listen.ip().is_unspecified()),
    };
    same_host && url.port() == listen.port()
}

fn validate_tokens(tokens: &[AdminToken], findings: &mut Findings<'_>) {
    for (index, token) in tokens.iter().enumerate() {
        let earlier = &tokens[..index];
        if earlier.iter().any(|other| other.name == token.name) {
            let message = format!("{} is the name of an earlier token", quote(token.name.as_str()));
            findings.refuse(&format!("admin.tokens[{index}].name"), message);
        }
        if let Some(other) = earlier.iter().find(|other| other.sha256 == token.sha256) {
            let message = format!(
                "it is that of token {} already: each needs a token of its own",
                quote(other.name.as_str())
            );
            findings.refuse(&format!("admin.tokens[{index}].sha256"), message);
        }
        if token.sha256 == TokenDigest::of(b"") {
            let message = "it is that of an empty token: was a variable not set?".to_owned();
            findings.refuse(&format!("admin.tokens[{index}].sha256"), message);
        }
    }
}

fn validate_identity(identity: &IdentityConfig, findings: &mut Findings<'_>) {
    let headers = [
        ("identity.team_header", &identity.team_header),
        ("identity.project_header", &identity.project_header),
        ("identity.user_header", &identity.user_header),
    ];
    for (index, (path, header)) in headers.iter().enumerate() {
        let lower = header.as_str().to_ascii_lowercase();
        if HEADERS_REFUSED.contains(&lower.as_str()) {
            findings.refuse(
                path,
                format!(
                    "{} has a meaning in HTTP already: choose another header",
                    quote(&lower)
                ),
            );
        }
        if lower == REQUEST_ID_HEADER {
            findings.refuse(
                path,
                format!(
                    "{} is set by the gateway itself: choose another header",
                    quote(&lower)
                ),
            );
        }
        if let Some((other, _)) = headers[..index].iter().find(|(_, earlier)| earlier == header) {
            findings.refuse(
                path,
                format!(
                    "{} is {other} already: each needs its own header",
                    quote(header.as_str())
                ),
            );
        }
    }
    if !identity.trust_headers {
        let message = "false needs keys or tokens to tell teams apart, which this version does not have: \
                       every request would be refused; leave it true";
        findings.refuse("identity.trust_headers", message.to_owned());
    }
}

fn validate_tap(tap: &TapConfig, findings: &mut Findings<'_>) {
    let range = TapConfig::RING_MIN..=TapConfig::RING_MAX;
    if !range.contains(&tap.ring_bytes) || !tap.ring_bytes.bytes().is_power_of_two() {
        let message = format!(
            "expected a power of two from {} to {}, found {}",
            TapConfig::RING_MIN,
            TapConfig::RING_MAX,
            tap.ring_bytes
        );
        findings.refuse("tap.ring_bytes", message);
    }
    if !(INGRESS_PREFIX_MIN..=INGRESS_PREFIX_MAX).contains(&tap.ingress_prefix_bytes) {
        let message = format!(
            "expected {INGRESS_PREFIX_MIN} to {INGRESS_PREFIX_MAX}, found {}: a request's head must fit",
            tap.ingress_prefix_bytes
        );
        findings.refuse("tap.ingress_prefix_bytes", message);
    }
    refuse_zero_duration("tap.poll_interval", tap.poll_interval, findings);
    if tap.poll_interval > POLL_MAX {
        let message = format!(
            "expected at most {}, found {}: the ring would fill up meanwhile",
            format_duration(POLL_MAX),
            format_duration(tap.poll_interval)
        );
        findings.refuse("tap.poll_interval", message);
    }
}

fn validate_upstreams(upstreams: &[UpstreamConfig], findings: &mut Findings<'_>) {
    if upstreams.is_empty() {
        let message = "expected at least one upstream, found none: leave the key out for the default ones";
        findings.refuse("upstreams", message.to_owned());
    }
    for (index, upstream) in upstreams.iter().enumerate() {
        let earlier = &upstreams[..index];
        if earlier.iter().any(|other| other.name == upstream.name) {
            let message = format!(
                "{} is the name of an earlier upstream",
                quote(upstream.name.as_str())
            );
            findings.refuse(&format!("upstreams[{index}].name"), message);
        }
        if let Some(other) = earlier
            .iter()
            .find(|other| (&other.url, other.serves) == (&upstream.url, upstream.serves))
        {
            // Counted as two, its GPUs would be billed twice.
            let message = format!(
                "{} is upstream {} already",
                upstream.url,
                quote(other.name.as_str())
            );
            findings.refuse(&format!("upstreams[{index}].url"), message);
        }
        let path = &upstream.health_path;
        if !path.starts_with('/') || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            let message = format!("expected a path such as /health, found {}", quote(path));
            findings.refuse(&format!("upstreams[{index}].health_path"), message);
        }
        if let Err(error) = PriceList::new(upstream.price.clone()) {
            findings.refuse(&format!("upstreams[{index}].price"), error.to_string());
        }
        for (number, model) in upstream.models.iter().enumerate() {
            if upstream.models[..number].contains(model) {
                let message = format!("{} stands in the list already", quote(model));
                findings.refuse(&format!("upstreams[{index}].models[{number}]"), message);
            }
        }
    }
}

fn validate_proxy(proxy: &ProxyConfig, findings: &mut Findings<'_>) {
    // Two durations may be zero: `abort_drain` (do not wait for a count) and `gateway.drain_timeout` (stop at once).
    for (path, timeout) in [
        ("proxy.head_timeout", proxy.head_timeout),
        ("proxy.idle_timeout", proxy.idle_timeout),
        ("proxy.connect_timeout", proxy.connect_timeout),
        ("proxy.response_head_timeout", proxy.response_head_timeout),
        ("proxy.stream_idle_timeout", proxy.stream_idle_timeout),
        ("proxy.client_write_timeout", proxy.client_write_timeout),
        ("proxy.upstream_idle", proxy.upstream_idle),
        ("proxy.health_interval", proxy.health_interval),
    ] {
        refuse_zero_duration(path, timeout, findings);
    }
    if proxy.inspect_max.bytes() == 0 {
        findings.refuse(
            "proxy.inspect_max",
            "expected more than 0B: a request is routed by its body's model".to_owned(),
        );
    }
    if proxy.inspect_max > proxy.max_body {
        let message = format!(
            "expected at most proxy.max_body, {}, found {}",
            proxy.max_body, proxy.inspect_max
        );
        findings.refuse("proxy.inspect_max", message);
    }
    if !(HEAD_MIN..=HEAD_MAX).contains(&proxy.max_head) {
        findings.refuse(
            "proxy.max_head",
            format!("expected {HEAD_MIN} to {HEAD_MAX}, found {}", proxy.max_head),
        );
    }
    if proxy.max_connections == 0 {
        findings.refuse(
            "proxy.max_connections",
            "expected at least 1, found 0: nobody could connect".to_owned(),
        );
    }
}

/// Days that rows can be kept: ClickHouse counts their end in seconds of 32 bits, which are over in 2106. Beyond that it would come round to the past,
/// and rows would be deleted as soon as they are there.
const DAYS_MAX: u32 = 20_000;

fn validate_days(path: &str, days: u32, findings: &mut Findings<'_>) {
    if !(1..=DAYS_MAX).contains(&days) {
        findings.refuse(path, format!("expected 1 to {DAYS_MAX} days, found {days}"));
    }
}

/// The database's name becomes part of SQL, so that it must need no quotes.
fn validate_database(database: &str, findings: &mut Findings<'_>) {
    let is_identifier = database
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    if !is_identifier || database.starts_with(|first: char| first.is_ascii_digit()) {
        let message = format!(
            "expected letters, digits and '_', not a digit first, found {}",
            quote(database)
        );
        findings.refuse("store.database", message);
    }
}

fn validate_spool(spool: &SpoolConfig, findings: &mut Findings<'_>) {
    if !(SEGMENT_MIN..=SEGMENT_MAX).contains(&spool.segment_bytes) {
        let message = format!(
            "expected {SEGMENT_MIN} to {SEGMENT_MAX}, found {}",
            spool.segment_bytes
        );
        findings.refuse("spool.segment_bytes", message);
    }
    if spool.max_bytes.bytes() / SEGMENTS_MIN < spool.segment_bytes.bytes() {
        let message = format!(
            "expected at least {SEGMENTS_MIN} files of spool.segment_bytes, {}, found {}",
            spool.segment_bytes, spool.max_bytes
        );
        findings.refuse("spool.max_bytes", message);
    }
    refuse_zero_duration("spool.fsync_interval", spool.fsync_interval, findings);
    refuse_zero_duration("spool.seal_after", spool.seal_after, findings);
}

fn validate_ledger(ledger: &LedgerConfig, findings: &mut Findings<'_>) {
    if ledger.theta > Millionths::ONE {
        let message = format!("expected a share, from 0 to 1, found {}", ledger.theta);
        findings.refuse("ledger.theta", message);
    }
    refuse_zero_duration("ledger.settle_after", ledger.settle_after, findings);
}

fn refuse_zero_duration(path: &str, duration: Duration, findings: &mut Findings<'_>) {
    if duration.is_zero() {
        findings.refuse(path, "expected more than 0s, found 0s".to_owned());
    }
}
