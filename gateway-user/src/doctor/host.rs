//! What concerns the process as a whole: clock, open files, identity.

use super::Check;
use crate::config::Config;
use crate::descriptors;
use std::time::{Duration, SystemTime};

/// No clock is right that says it is earlier: 2026-01-01, before which there was no such program.
const EARLIEST_S: u64 = 1_767_225_600;

/// Nor one that says it is later: 2100-01-01. ClickHouse's `DateTime` ends in 2106.
const LATEST_S: u64 = 4_102_444_800;

pub(super) fn checks(config: &Config) -> Vec<Check> {
    vec![
        clock(SystemTime::now()),
        descriptors(descriptors::raise_limit(), config.proxy.max_connections),
        secret(config),
        identity(config),
    ]
}

/// Rows are placed in time, and kept for so many days, by this clock.
fn clock(now: SystemTime) -> Check {
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    // Beyond the year 9999 the text would not be one.
    let said = if now < at(LATEST_S) && now >= SystemTime::UNIX_EPOCH {
        httpdate::fmt_http_date(now)
    } else {
        "a time beyond 2100 or before 1970".to_owned()
    };
    if now < at(EARLIEST_S) || now >= at(LATEST_S) {
        return Check::problem("host", "clock", format!("the machine's clock says {said}"))
            .advise("set it, and keep it right (systemd-timesyncd, chrony): rows would be put into the wrong windows, or be too old to be kept");
    }
    Check::ok("host", "clock", said)
}

fn descriptors(available: Option<u64>, max_connections: u32) -> Check {
    let Some(available) = available else {
        return Check::ok("host", "open files", "not limited");
    };
    let clients = descriptors::clients_within(available);
    let found = format!(
        "at most {available}: {clients} clients at a time, proxy.max_connections is {max_connections}"
    );
    if clients < u64::from(max_connections) {
        Check::warning("host", "open files", found).advise(
            "raise the hard limit (ulimit -Hn, LimitNOFILE=, docker --ulimit nofile=) or lower proxy.max_connections: \
             further clients would wait",
        )
    } else {
        Check::ok("host", "open files", found)
    }
}

fn secret(config: &Config) -> Check {
    match config.gateway.secret {
        Some(_) => Check::ok("host", "gateway.secret", "set; gateways with the same one recognise each other's request ids"),
        None => Check::ok("host", "gateway.secret", "random at each start").advise(
            "with several gateways, or one proxy and one tap in two processes, give all the same (GATEWAY_SECRET): else one does not \
             recognise the other's request ids and counts the requests as direct traffic",
        ),
    }
}

fn identity(config: &Config) -> Check {
    let (identity, id) = (&config.identity, config.gateway.id_or_host_name());
    let named = match config.gateway.id {
        Some(_) => "gateway.id",
        None => "the host's name; in a container that changes with each one, so set gateway.id there",
    };
    Check::ok(
        "host",
        "identity",
        format!(
            "teams are named by {}, which is believed as clients send it; this gateway is {id} ({named})",
            identity.team_header
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn a_clock_that_was_never_set_is_a_problem() {
        assert_eq!(clock(at(86_400)).state, State::Problem);
        assert_eq!(clock(at(LATEST_S)).state, State::Problem);
        assert_eq!(
            clock(SystemTime::UNIX_EPOCH - Duration::from_secs(1)).state,
            State::Problem
        );
        let fine = clock(at(EARLIEST_S));
        assert_eq!(
            (fine.state, &*fine.found),
            (State::Ok, "Thu, 01 Jan 2026 00:00:00 GMT")
        );
    }

    #[test]
    fn too_few_descriptors_are_a_warning_with_the_number_of_clients() {
        let few = descriptors(Some(1_064), 20_000);
        assert_eq!(few.state, State::Warning);
        assert!(few.found.contains("500 clients"), "{}", few.found);
        assert_eq!(descriptors(Some(40_064), 20_000).state, State::Ok);
        assert_eq!(descriptors(None, 20_000).state, State::Ok);
    }

    #[test]
    fn a_secret_is_never_shown() {
        let config = |text| Config::parse("c", text, &|_| None).unwrap();
        let given = checks(&config("gateway: {secret: 'a-secret-that-is-long-enough'}"));
        assert!(
            given
                .iter()
                .all(|check| !format!("{check:?}").contains("a-secret"))
        );
        let none = secret(&config(""));
        assert!(none.advice.contains("GATEWAY_SECRET"), "{none:?}");
    }
}
