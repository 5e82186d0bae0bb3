//! Attaches the probe's programs to cgroups, and again to others later.
//!
//! Attaching takes capabilities that the gateway gives up once it has started. Who wants to follow a restarted container all the same has
//! them kept by a helper, a process that holds the programs' descriptors and the two capabilities and does nothing but attach to the
//! cgroups that the gateway hands it. The links are the helper's, and it ends when the gateway's end of their socket is closed,
//! however that came: no end of either process leaves a program attached.

use super::cgroup::Cgroup;
use super::error::TapError;
use super::link::{Links, Programs};
use super::privileges;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recv, recvmsg, send, sendmsg, socketpair,
};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Most descriptors in a message; more cgroups are never located.
const DESCRIPTORS_MAX: usize = 64;

/// A link is made in microseconds; a helper that takes this long hangs.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);

/// Whoever attaches.
#[derive(Debug)]
pub enum Attacher {
    /// This process: once, before it gives up its capabilities.
    Own {
        /// What is attached.
        programs: Programs,
        /// Where it is attached.
        links: Vec<Links>,
    },
    /// A process that keeps them.
    Helper(Helper),
}

impl Attacher {
    /// Attaches to all `cgroups`, and to nothing else any more. For a moment both the former and the new ones are watched, and
    /// packets may be recorded twice; none is missed.
    ///
    /// # Errors
    /// [`TapError::Attach`], upon which the former ones are still watched; [`TapError::Attacher`] if the helper has gone, and with it all links.
    pub fn attach(&mut self, cgroups: &[Cgroup]) -> Result<(), TapError> {
        match self {
            Attacher::Own { programs, links } => {
                *links = cgroups
                    .iter()
                    .map(|cgroup| programs.attach(cgroup))
                    .collect::<Result<_, _>>()?;
                Ok(())
            }
            Attacher::Helper(helper) => helper.attach(cgroups),
        }
    }

    /// Whether what was attached still is.
    ///
    /// # Errors
    /// [`TapError::Attacher`] when the helper has ended, by whatever hand, and all links with it.
    pub fn check(&mut self) -> Result<(), TapError> {
        match self {
            Attacher::Own { .. } => Ok(()),
            Attacher::Helper(helper) => match helper.child.try_wait() {
                Ok(None) => Ok(()),
                Ok(Some(status)) => {
                    let source = io::Error::other(format!("it has ended with {status}; restart the gateway"));
                    Err(TapError::Attacher { source })
                }
                Err(source) => Err(TapError::Attacher { source }),
            },
        }
    }

    /// Whether it can attach again after the capabilities are gone.
    pub fn can_follow(&self) -> bool {
        matches!(self, Attacher::Helper(_))
    }
}

/// The helper, as the gateway sees it.
#[derive(Debug)]
pub struct Helper {
    socket: OwnedFd,
    child: Child,
}

impl Helper {
    /// Starts it: `command` must come to [`serve`], and nothing else, on its standard input. Must be called before the capabilities are dropped.
    ///
    /// # Errors
    /// [`TapError::Attacher`].
    pub fn start(mut command: Command, programs: &Programs) -> Result<Helper, TapError> {
        let start = || -> io::Result<Helper> {
            let (socket, theirs) = socketpair(
                AddressFamily::UNIX,
                SocketType::SEQPACKET,
                SocketFlags::CLOEXEC,
                None,
            )?;
            set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_TIMEOUT))?;
            let child = command.stdin(Stdio::from(theirs)).stdout(Stdio::null()).spawn()?;
            // The command holds its end of the socket, whose end is to be seen.
            drop(command);
            let helper = Helper { socket, child };
            helper.order(&[programs.ingress.as_fd(), programs.egress.as_fd()])?;
            Ok(helper)
        };
        start().map_err(|source| TapError::Attacher { source })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn attach(&self, cgroups: &[Cgroup]) -> Result<(), TapError> {
        let directories: Vec<BorrowedFd<'_>> =
            cgroups.iter().map(|cgroup| cgroup.directory.as_fd()).collect();
        let code = self
            .order(&directories)
            .map_err(|source| TapError::Attacher { source })?;
        if code == 0 {
            return Ok(());
        }
        let source = io::Error::from_raw_os_error(code);
        Err(TapError::Attach { source })
    }

    /// Sends descriptors and waits for the answer: 0, or the number of an error.
    fn order(&self, descriptors: &[BorrowedFd<'_>]) -> io::Result<i32> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        sendmsg(
            &self.socket,
            &[IoSlice::new(&[0])],
            &mut control,
            SendFlags::NOSIGNAL,
        )?;
        let mut answer = [0; 4];
        match recv(&self.socket, &mut answer[..], RecvFlags::empty())? {
            (4, _) => Ok(i32::from_ne_bytes(answer)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        // It would end by itself, at the end of the socket; this way its links are gone when we go on.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The helper itself, on standard input, until the gateway goes.
///
/// # Errors
/// When the capabilities are not there, or standard input is no gateway.
pub fn serve() -> io::Result<()> {
    privileges::keep_for_attaching()?;
    let socket = io::stdin().as_fd().try_clone_to_owned()?;
    let programs: [OwnedFd; 2] = receive(&socket)?
        .try_into()
        .map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
    let [ingress, egress] = programs;
    let programs = Programs { ingress, egress };
    answer(&socket, 0)?;
    let mut links: Vec<Links> = Vec::new();
    loop {
        let cgroups = receive(&socket)?;
        if cgroups.is_empty() {
            return Ok(());
        }
        let made: io::Result<Vec<Links>> = cgroups
            .iter()
            .map(|cgroup| programs.attach_to(cgroup.as_fd()))
            .collect();
        let code = match made {
            Ok(made) => {
                links.clear();
                links.extend(made);
                0
            }
            Err(error) => error.raw_os_error().unwrap_or(libc::EIO),
        };
        answer(&socket, code)?;
    }
}

/// The descriptors of one message; none at the end.
fn receive(socket: &OwnedFd) -> io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let messages = control.drain();
    let descriptors = messages.filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
        _ => None,
    });
    Ok(descriptors.flatten().collect())
}

fn answer(socket: &OwnedFd, code: i32) -> io::Result<()> {
    send(socket, &code.to_ne_bytes(), SendFlags::NOSIGNAL)?;
    Ok(())
}
