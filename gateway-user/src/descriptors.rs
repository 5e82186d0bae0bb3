//! How many sockets and files the process may have open.
//!
//! Systems start programs with a soft limit of 1024 (256 on macOS), for the sake of old ones that use `select`; each request in flight
//! takes two sockets. The hard limit is the operator's word, and the soft one is raised to it.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What is tried where the hard limit is infinite and the system refuses that for the soft one, as macOS does: its `OPEN_MAX`.
const OPEN_MAX: u64 = 10_240;

/// Sockets and files besides those of clients and upstreams: listeners, the runtime's own, logs, the admin server.
const OTHERS: u64 = 64;

/// Raises the limit, and says in the log what the system allows: with too few descriptors, clients would wait where `max_connections` says they need
/// not.
pub fn raise_for(max_connections: u32) {
    let Some(available) = raise_limit() else {
        return;
    };
    let clients = clients_within(available);
    if clients < u64::from(max_connections) {
        tracing::warn!(
            descriptors = available,
            clients,
            max_connections,
            "the limit on open files serves fewer clients than proxy.max_connections; raise it (ulimit -Hn, LimitNOFILE) or lower that"
        );
    } else {
        tracing::info!(descriptors = available, "open files and sockets are limited");
    }
}

/// Raises the soft limit to the hard one, as far as the system allows. Returns the limit in force; `None` if there is none.
pub fn raise_limit() -> Option<u64> {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current == maximum {
        return current;
    }
    let infinite = maximum.is_none().then_some(Some(OPEN_MAX));
    for wanted in [Some(maximum), infinite].into_iter().flatten() {
        // Never downwards: a limit that is above what would be tried stays.
        let is_more = wanted.is_none_or(|wanted| current.is_some_and(|current| wanted > current));
        if is_more
            && setrlimit(
                Resource::Nofile,
                Rlimit {
                    current: wanted,
                    maximum,
                },
            )
            .is_ok()
        {
            return wanted;
        }
    }
    current
}

/// How many clients can be served at a time under a limit of `descriptors`: each takes a socket, and one to its upstream.
pub fn clients_within(descriptors: u64) -> u64 {
    descriptors.saturating_sub(OTHERS) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one_and_stays() {
        let raised = raise_limit();
        let now = getrlimit(Resource::Nofile);
        assert_eq!(now.current, raised);
        assert!(now.current == now.maximum || now.maximum.is_none(), "{now:?}");
        assert_eq!(raise_limit(), raised);
    }

    #[test]
    fn each_client_takes_two_sockets() {
        assert_eq!(clients_within(OTHERS + 2_001), 1_000);
        assert_eq!(clients_within(1), 0);
    }
}
