//! Which cgroups the probe is attached to, and whether these are still the right ones: a container that restarts comes back in another.

use super::attacher::{Attacher, Helper};
use super::cgroup::{Cgroup, Hierarchy, How, Located};
use super::error::TapError;
use super::link::Programs;
use crate::config::CgroupChoice;
use std::path::Path;
use std::process::Command;

/// The probe's place.
#[derive(Debug)]
pub struct Attachment {
    hierarchy: Hierarchy,
    choice: CgroupChoice,
    ports: Vec<u16>,
    attacher: Attacher,
    now: Located,
}

/// What a look at the place found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// All is as it was.
    None,
    /// The probe was moved; [`Attachment::located`] says where to.
    Moved,
    /// It should be moved, and nobody has the capabilities any more: what happens in other cgroups is not seen until the gateway
    /// is started again.
    Stuck,
}

impl Attachment {
    /// Attaches the programs to what `choice` means now. With a command for a helper they can be moved later.
    ///
    /// # Errors
    /// [`TapError`], which says what is missing.
    pub fn make(
        programs: Programs,
        choice: &CgroupChoice,
        ports: &[u16],
        helper: Option<Command>,
    ) -> Result<Attachment, TapError> {
        let hierarchy = Hierarchy::find()?;
        let now = hierarchy.locate(choice, ports)?;
        let mut attacher = match helper {
            Some(command) => Attacher::Helper(Helper::start(command, &programs)?),
            None => Attacher::Own {
                programs,
                links: Vec::new(),
            },
        };
        attacher.attach(&now.cgroups)?;
        Ok(Attachment {
            hierarchy,
            choice: choice.clone(),
            ports: ports.to_vec(),
            attacher,
            now,
        })
    }

    /// Where the probe is.
    pub fn located(&self) -> &Located {
        &self.now
    }

    /// The directories of the cgroups that are watched.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        self.now.cgroups.iter().map(Cgroup::path)
    }

    /// Looks whether the place is still right, and moves the probe if it is not. Reads `/proc` and the cgroup file system, some
    /// milliseconds of work that blocks: once a second is enough, since a server that comes up takes longer than that.
    ///
    /// # Errors
    /// As [`Hierarchy::locate`] and [`Attacher::attach`]; the probe stays where it is.
    pub fn check(&mut self) -> Result<Change, TapError> {
        self.attacher.check()?;
        let right = self.hierarchy.locate(&self.choice, &self.ports)?;
        let ids = |located: &Located| {
            located
                .cgroups
                .iter()
                .map(|cgroup| cgroup.id())
                .collect::<Vec<_>>()
        };
        // Where a listener's cgroup cannot be told any more, the one that it was found in is still the best answer, while it exists.
        let keeps = right.how == How::OutOfSight && self.now.cgroups.iter().all(Cgroup::exists);
        if keeps || ids(&right) == ids(&self.now) {
            return Ok(Change::None);
        }
        if self.attacher.can_follow() {
            self.attacher.attach(&right.cgroups)?;
            self.now = right;
            return Ok(Change::Moved);
        }
        // Attached to more than is needed, the probe sees what it should.
        let covered = right.cgroups.iter().all(|cgroup| {
            let outer = |watched: &Cgroup| watched.exists() && cgroup.path().starts_with(watched.path());
            self.now.cgroups.iter().any(outer)
        });
        Ok(if covered { Change::None } else { Change::Stuck })
    }
}
