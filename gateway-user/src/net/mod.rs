//! Listening sockets, and errors that say what to do when there is none to be had.
//!
//! Promises: two gateways never share a port without knowing, although one gateway may open a port several times (once for each
//! core). A taken port is reported with the process that holds it, where the system tells.

#[cfg(target_os = "linux")]
mod owner;

use socket2::{Domain, Protocol, Socket, Type};
use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZeroUsize;

/// Connections that may wait to be accepted. A burst of clients that reconnect must not be turned away while one core is busy;
/// the kernel caps it at `net.core.somaxconn`, which is 4096 by default since Linux 5.4.
const BACKLOG: i32 = 4096;

/// Why an address could not be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Someone else listens there.
    #[error("{what} address {addr} is in use by {owner}; set {setting}")]
    InUse {
        /// What the address is for.
        what: &'static str,
        /// The address asked for.
        addr: SocketAddr,
        /// Who listens there.
        owner: Owner,
        /// Where another address can be set.
        setting: &'static str,
    },
    /// The address belongs to no interface of this machine.
    #[error(
        "{what} address {addr} is not an address of this machine; set {setting} to one that is, or to 0.0.0.0"
    )]
    NotLocal {
        /// What the address is for.
        what: &'static str,
        /// The address asked for.
        addr: SocketAddr,
        /// Where another address can be set.
        setting: &'static str,
    },
    /// The system forbids it.
    #[error(
        "{what} address {addr} may not be listened on by this user (a port below 1024 takes a privilege); set {setting}"
    )]
    Forbidden {
        /// What the address is for.
        what: &'static str,
        /// The address asked for.
        addr: SocketAddr,
        /// Where another address can be set.
        setting: &'static str,
    },
    /// Anything else.
    #[error("{what} address {addr} cannot be listened on ({setting}): {source}")]
    Other {
        /// What the address is for.
        what: &'static str,
        /// The address asked for.
        addr: SocketAddr,
        /// Where another address can be set.
        setting: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// Who holds an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Owner {
    /// This very process: two settings name the same address.
    Ourselves,
    /// A process that this user may see.
    Process {
        /// Its id.
        pid: u32,
        /// Its name, as the kernel has it (15 characters at most).
        name: String,
    },
    /// The system does not say.
    Unknown,
}

impl fmt::Display for Owner {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Owner::Ourselves => out.write_str("this gateway itself, for another of its listeners"),
            Owner::Process { pid, name } => write!(out, "process {pid} ({name})"),
            Owner::Unknown => out.write_str("another process"),
        }
    }
}

/// A non-blocking listener on `addr`. `what` and `setting` name the address and where it is configured, for the error.
///
/// # Errors
/// [`BindError`], which says who holds the address or what else is wrong with it.
pub fn bind_listener(
    addr: SocketAddr,
    what: &'static str,
    setting: &'static str,
) -> Result<TcpListener, BindError> {
    listen(addr, false).map_err(|source| explain(source, addr, what, setting))
}

/// `count` non-blocking listeners on one address, between which the kernel spreads connections. Port 0 gives all of them the same
/// port.
///
/// `SO_REUSEPORT` from the start would let a second gateway of the same user join in silently and take half the requests. So the
/// first socket is bound without it, which fails if anyone listens there, and is opened for the others only then.
///
/// Elsewhere than on Linux `SO_REUSEPORT` spreads nothing, and the listeners are descriptors of one socket.
///
/// # Errors
/// As [`bind_listener`].
pub fn bind_listeners(
    addr: SocketAddr,
    what: &'static str,
    setting: &'static str,
    count: NonZeroUsize,
) -> Result<Vec<TcpListener>, BindError> {
    let all = || -> io::Result<Vec<TcpListener>> {
        let first = listen(addr, cfg!(target_os = "linux") && count.get() > 1)?;
        let bound = first.local_addr()?;
        let mut listeners = vec![first];
        while listeners.len() < count.get() {
            let next = if cfg!(target_os = "linux") {
                join(bound)?
            } else {
                listeners[0].try_clone()?
            };
            listeners.push(next);
        }
        Ok(listeners)
    };
    all().map_err(|source| explain(source, addr, what, setting))
}

/// A listener where nobody else listens; `joinable` lets sockets of the same user join it afterwards.
fn listen(addr: SocketAddr, joinable: bool) -> io::Result<TcpListener> {
    let socket = socket(addr)?;
    socket.bind(&addr.into())?;
    #[cfg(unix)]
    socket.set_reuse_port(joinable)?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// A further listener beside a joinable one.
fn join(addr: SocketAddr) -> io::Result<TcpListener> {
    let socket = socket(addr)?;
    #[cfg(unix)]
    socket.set_reuse_port(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

fn socket(addr: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // Without it a restarted gateway would wait a minute for connections of its predecessor that linger in TIME_WAIT.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn explain(source: io::Error, addr: SocketAddr, what: &'static str, setting: &'static str) -> BindError {
    match source.kind() {
        io::ErrorKind::AddrInUse => BindError::InUse {
            what,
            addr,
            owner: owner_of(addr),
            setting,
        },
        io::ErrorKind::AddrNotAvailable => BindError::NotLocal { what, addr, setting },
        io::ErrorKind::PermissionDenied => BindError::Forbidden { what, addr, setting },
        _ => BindError::Other {
            what,
            addr,
            setting,
            source,
        },
    }
}

/// Who listens on `addr`, or on its port everywhere; for an unspecified address, who listens on its port at all.
#[cfg(target_os = "linux")]
pub fn owner_of(addr: SocketAddr) -> Owner {
    owner::find(addr)
}

/// Who listens on an address of a container of this machine.
#[cfg(target_os = "linux")]
pub fn owner_in_containers(addr: SocketAddr) -> Owner {
    owner::find_in_containers(addr)
}

/// Whether anyone listens there, in this network namespace; unlike the owner, it shows to everybody.
#[cfg(target_os = "linux")]
pub fn is_listened_on(addr: SocketAddr) -> bool {
    owner::is_listened_on(addr)
}

/// Elsewhere the system does not say.
#[cfg(not(target_os = "linux"))]
pub fn owner_of(_: SocketAddr) -> Owner {
    Owner::Unknown
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpStream;
    #[cfg(target_os = "linux")]
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    const ANY: &str = "127.0.0.1:0";

    fn bind(addr: SocketAddr) -> Result<TcpListener, BindError> {
        bind_listener(addr, "admin", "admin.listen or GATEWAY_ADMIN_ADDR")
    }

    fn bind_many(addr: SocketAddr, count: usize) -> Result<Vec<TcpListener>, BindError> {
        bind_listeners(
            addr,
            "gateway",
            "listen or GATEWAY_LISTEN_ADDR",
            NonZeroUsize::new(count).unwrap(),
        )
    }

    /// Handshakes end in the kernel's own time, and a test that starts a process holds every descriptor for an instant.
    fn within_deadline(what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while !condition() {
            assert!(Instant::now() < deadline, "not within 5 s: {what}");
            std::thread::yield_now();
        }
    }

    #[test]
    fn several_listeners_share_one_port_and_the_kernel_spreads_connections() {
        let listeners = bind_many(ANY.parse().unwrap(), 3).unwrap();
        let addr = listeners[0].local_addr().unwrap();
        let clients: Vec<TcpStream> = (0..96).map(|_| TcpStream::connect(addr).unwrap()).collect();
        let mut accepted = vec![0; listeners.len()];
        within_deadline("every connection is accepted", || {
            for (listener, accepted) in listeners.iter().zip(&mut accepted) {
                *accepted += std::iter::from_fn(|| listener.accept().ok()).count();
            }
            accepted.iter().sum::<usize>() == clients.len()
        });
        assert!(
            listeners
                .iter()
                .all(|listener| listener.local_addr().unwrap() == addr)
        );
        // Each connection picks one of three by a hash: that one of them gets none of 96 has a chance of 1e-17.
        assert!(
            !cfg!(target_os = "linux") || !accepted.contains(&0),
            "{accepted:?}"
        );
    }

    #[test]
    fn a_port_that_is_shared_within_one_gateway_is_still_taken_for_another() {
        let first = bind_many(ANY.parse().unwrap(), 2).unwrap();
        let addr = first[0].local_addr().unwrap();
        for second in [
            bind_many(addr, 2).map(drop),
            bind_many(addr, 1).map(drop),
            bind(addr).map(drop),
        ] {
            assert!(matches!(second, Err(BindError::InUse { .. })), "{second:?}");
        }
        drop(first);
        within_deadline("the port is free once the first gateway has gone", || {
            bind_many(addr, 2).is_ok()
        });
    }

    #[test]
    fn a_taken_port_is_named_with_its_setting_and_its_owner() {
        let held = bind(ANY.parse().unwrap()).unwrap();
        let addr = held.local_addr().unwrap();
        let owner = if cfg!(target_os = "linux") {
            "this gateway itself, for another of its listeners"
        } else {
            "another process"
        };
        let expected =
            format!("admin address {addr} is in use by {owner}; set admin.listen or GATEWAY_ADMIN_ADDR");
        assert_eq!(bind(addr).unwrap_err().to_string(), expected);
    }

    /// The socket is inherited by a child and closed here, so that the child alone holds the port.
    #[test]
    #[cfg(target_os = "linux")]
    fn the_process_that_holds_the_port_is_named() {
        let held = bind(ANY.parse().unwrap()).unwrap();
        let addr = held.local_addr().unwrap();
        let as_stdin = Stdio::from(std::os::fd::OwnedFd::from(held));
        let mut child = Command::new("sleep").arg("60").stdin(as_stdin).spawn().unwrap();
        let error = bind(addr).unwrap_err();
        let everywhere = bind(SocketAddr::from(([0, 0, 0, 0], addr.port()))).unwrap_err();
        let pid = child.id();
        child.kill().unwrap();
        child.wait().unwrap();
        for error in [error, everywhere] {
            let BindError::InUse { owner, .. } = &error else {
                panic!("{error}")
            };
            assert_eq!(
                *owner,
                Owner::Process {
                    pid,
                    name: "sleep".to_owned()
                },
                "{error}"
            );
        }
    }

    #[test]
    fn a_foreign_address_is_told_apart_from_a_taken_one() {
        // TEST-NET-1 of RFC 5737 is on no machine.
        let error = bind("192.0.2.1:9464".parse().unwrap()).unwrap_err();
        assert!(matches!(error, BindError::NotLocal { .. }), "{error}");
        assert!(error.to_string().contains("192.0.2.1:9464"), "{error}");
    }
}
