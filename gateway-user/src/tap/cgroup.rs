//! Finds the cgroups whose sockets are to be watched.

use super::error::TapError;
use super::listeners::{self, Listener};
use crate::config::CgroupChoice;
use crate::net::{self, Owner};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::fmt;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Most cgroups that are watched by themselves. With more upstreams than that on one machine, all of it is watched.
const CGROUPS_MAX: usize = 32;

/// Most directories that are looked through: a machine with more cgroups is hardly imaginable, and a search must end.
const DIRECTORIES_MAX: usize = 100_000;

/// Most names that a message lists.
const HINTS_MAX: usize = 8;

/// A cgroup, held open: the name of one that has gone can come back for another.
#[derive(Debug)]
pub struct Cgroup {
    pub(super) directory: OwnedFd,
    path: PathBuf,
    id: u64,
}

impl Cgroup {
    /// Opens the cgroup with this directory.
    ///
    /// # Errors
    /// [`TapError::Cgroup`].
    pub fn open(path: &Path) -> Result<Cgroup, TapError> {
        let failed = |source| TapError::Cgroup {
            path: path.to_owned(),
            source,
        };
        let directory = File::open(path).map_err(failed)?;
        let id = directory.metadata().map_err(failed)?.ino();
        Ok(Cgroup {
            directory: directory.into(),
            path: path.to_owned(),
            id,
        })
    }

    /// Its directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its number, which no other cgroup has had since the system started.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it still exists.
    pub fn exists(&self) -> bool {
        fs::metadata(&self.path).is_ok_and(|directory| directory.ino() == self.id)
    }
}

/// What is to be watched, and why that.
#[derive(Debug)]
pub struct Located {
    /// None of them contains another: a packet is seen once.
    pub cgroups: Vec<Cgroup>,
    /// How they were found.
    pub how: How,
}

/// How cgroups were found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The config names it.
    Configured,
    /// A socket that listens on a watched port was made in it.
    Listener,
    /// The process that listens on a watched port is in it, which is nearly always the same.
    Process,
    /// It is the root, since nobody listens on the watched ports.
    NoListener,
    /// It is the root, since the cgroup of the listener is not to be found below it, or there are too many.
    OutOfSight,
}

impl fmt::Display for How {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            How::Configured => "as configured",
            How::Listener => "that of the socket that listens",
            How::Process => "that of the process that listens",
            How::NoListener => "the root, since nobody listens on the watched ports",
            How::OutOfSight => "the root, since the listener's cgroup cannot be seen from here",
        })
    }
}

/// The cgroup2 file system as it is mounted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    mount: PathBuf,
    /// The cgroup that is mounted there, as `/proc/*/cgroup` names it: `/`, except in some containers.
    root: PathBuf,
}

impl Hierarchy {
    /// Where cgroup2 is mounted: usually `/sys/fs/cgroup`, or `unified` below it.
    ///
    /// # Errors
    /// [`TapError::NoCgroup2`].
    pub fn find() -> Result<Hierarchy, TapError> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Hierarchy::in_table(&mounts).ok_or(TapError::NoCgroup2)
    }

    /// The first mount of cgroup2 in a table of mounts. Its columns (proc_pid_mountinfo(5)): id, parent, device, root, mount point,
    /// options, optional ones, a hyphen, type of file system, source, its options.
    fn in_table(table: &str) -> Option<Hierarchy> {
        let of_line = |line: &str| {
            let (mount, file_system) = line.split_once(" - ")?;
            let mut columns = mount.split(' ').skip(3);
            let (root, point) = (columns.next()?, columns.next()?);
            let is_cgroup2 = file_system.split(' ').next() == Some("cgroup2");
            is_cgroup2.then(|| Hierarchy {
                mount: unescape(point).into(),
                root: unescape(root).into(),
            })
        };
        table.lines().find_map(of_line)
    }

    /// The mount point.
    pub fn mount(&self) -> &Path {
        &self.mount
    }

    /// The cgroups that `choice` means now.
    ///
    /// # Errors
    /// [`TapError::NoSuchCgroup`], and [`TapError::Cgroup`] for one that cannot be opened.
    pub fn locate(&self, choice: &CgroupChoice, ports: &[u16]) -> Result<Located, TapError> {
        let named = |path: Option<PathBuf>, is_alike: fn(&str) -> bool| {
            let path = path.ok_or_else(|| self.no_such(choice, is_alike))?;
            Ok(Located {
                cgroups: vec![Cgroup::open(&path)?],
                how: How::Configured,
            })
        };
        match choice {
            CgroupChoice::Auto => self.of_listeners(ports),
            CgroupChoice::Path(path) => {
                let inside = self.mount.join(path.strip_prefix("/").unwrap_or(path));
                let candidates = [path, &inside];
                let found = candidates.into_iter().find(|path| is_cgroup(path));
                named(found.cloned(), |_| false)
            }
            CgroupChoice::Unit(unit) => named(self.search(|name| name == unit), |name| {
                name.ends_with(".service")
            }),
            CgroupChoice::Container(id) => named(self.search(|name| name.contains(id.as_str())), holds_id),
        }
    }

    fn no_such(&self, choice: &CgroupChoice, is_alike: fn(&str) -> bool) -> TapError {
        let names: Vec<String> = self
            .directories()
            .filter_map(|path| path.file_name()?.to_str().map(str::to_owned))
            .filter(|name| is_alike(name))
            .take(HINTS_MAX)
            .collect();
        TapError::NoSuchCgroup {
            asked: choice.to_string(),
            mount: self.mount.clone(),
            hint: if names.is_empty() {
                "a directory there".to_owned()
            } else {
                names.join(", ")
            },
        }
    }

    fn of_listeners(&self, ports: &[u16]) -> Result<Located, TapError> {
        let (paths, how) = match listeners::find() {
            Ok(listeners) => (self.of_sockets(&listeners, ports), How::Listener),
            // A kernel without sock_diag.
            Err(_) => (self.of_processes(ports), How::Process),
        };
        match paths {
            Some(paths) if paths.is_empty() => self.everything(How::NoListener),
            Some(paths) if paths.len() <= CGROUPS_MAX => {
                let cgroups = outermost(paths).into_iter().map(|path| Cgroup::open(&path));
                Ok(Located {
                    cgroups: cgroups.collect::<Result<_, _>>()?,
                    how,
                })
            }
            _ => self.everything(How::OutOfSight),
        }
    }

    fn everything(&self, how: How) -> Result<Located, TapError> {
        Ok(Located {
            cgroups: vec![Cgroup::open(&self.mount)?],
            how,
        })
    }

    /// The directories of the cgroups of sockets that listen on the ports; `None` if one of them is not to be found.
    fn of_sockets(&self, listeners: &[Listener], ports: &[u16]) -> Option<Vec<PathBuf>> {
        let on_ports = listeners.iter().filter(|listener| ports.contains(&listener.port));
        let mut wanted: Vec<u64> = on_ports.map(|listener| listener.cgroup).collect();
        wanted.sort_unstable();
        wanted.dedup();
        if wanted.is_empty() {
            return Some(Vec::new());
        }
        let id = |path: &PathBuf| fs::metadata(path).map(|directory| directory.ino());
        let is_wanted = |path: &PathBuf| id(path).is_ok_and(|id| wanted.contains(&id));
        let found: Vec<PathBuf> = self.directories().filter(is_wanted).take(wanted.len()).collect();
        (found.len() == wanted.len()).then_some(found)
    }

    /// Likewise for the processes that hold such sockets.
    fn of_processes(&self, ports: &[u16]) -> Option<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for &port in ports {
            let anywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, port));
            let pid = match net::owner_of(anywhere) {
                Owner::Process { pid, .. } => pid,
                Owner::Ourselves => std::process::id(),
                // Processes of others cannot be looked into once the capabilities are gone.
                Owner::Unknown if net::is_listened_on(anywhere) => return None,
                Owner::Unknown => continue,
            };
            let table = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            paths.push(self.of_process(&table)?);
        }
        Some(paths)
    }

    /// The directory of the cgroup2 entry (hierarchy 0) in a `/proc/*/cgroup`.
    fn of_process(&self, table: &str) -> Option<PathBuf> {
        let name = table.lines().find_map(|line| line.strip_prefix("0::"))?;
        let inside = Path::new(name).strip_prefix(&self.root).ok()?;
        let path = self.mount.join(inside);
        is_cgroup(&path).then_some(path)
    }

    /// The outermost cgroup whose name is right.
    fn search(&self, is_right: impl Fn(&str) -> bool) -> Option<PathBuf> {
        self.directories().find(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(&is_right)
        })
    }

    /// All cgroups, outer ones before inner ones.
    fn directories(&self) -> impl Iterator<Item = PathBuf> {
        let mut waiting = VecDeque::from([self.mount.clone()]);
        let next = move || {
            let path = waiting.pop_front()?;
            let entries = fs::read_dir(&path).into_iter().flatten().flatten();
            let inner = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
            waiting.extend(inner.map(|entry| entry.path()));
            Some(path)
        };
        std::iter::from_fn(next).take(DIRECTORIES_MAX)
    }
}

/// Every cgroup has this file, and no other directory does.
fn is_cgroup(path: &Path) -> bool {
    path.join("cgroup.procs").is_file()
}

/// Whether a cgroup's name has a container's id in it, which is 64 hexadecimal digits.
fn holds_id(name: &str) -> bool {
    name.split(|letter: char| !letter.is_ascii_hexdigit())
        .any(|part| part.len() == 64)
}

/// The paths that are not below another one of them.
fn outermost(mut paths: Vec<PathBuf>) -> Vec<PathBuf> {
    paths.sort();
    paths.dedup();
    let mut kept: Vec<PathBuf> = Vec::new();
    for path in paths {
        // What contains a path stands before it.
        if !kept.iter().any(|outer| path.starts_with(outer)) {
            kept.push(path);
        }
    }
    kept
}

/// Spaces and such in paths are written as a backslash and three octal digits.
fn unescape(text: &str) -> OsString {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..3).filter(|_| first == b'\\');
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(first));
        rest = if code.is_some() { &after[3..] } else { after };
    }
    OsString::from_vec(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hierarchy(mount: &str, root: &str) -> Hierarchy {
        Hierarchy {
            mount: mount.into(),
            root: root.into(),
        }
    }

    #[test]
    fn the_mount_is_found_alone_beside_version_1_and_in_a_container() {
        let table = "\
22 1 0:20 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro
24 22 0:22 / /sys/fs/cgroup/memory rw shared:7 - cgroup cgroup rw,memory
25 22 0:23 / /sys/fs/cgroup/unified rw,relatime shared:8 master:2 - cgroup2 cgroup2 rw";
        assert_eq!(
            Hierarchy::in_table(table),
            Some(hierarchy("/sys/fs/cgroup/unified", "/"))
        );
        let table = "41 31 0:26 /kubepods/pod1 /sys/fs/my\\040cgroup rw - cgroup2 cgroup rw,nsdelegate\n";
        assert_eq!(
            Hierarchy::in_table(table),
            Some(hierarchy("/sys/fs/my cgroup", "/kubepods/pod1"))
        );
        assert_eq!(
            Hierarchy::in_table("22 1 0:20 / /cgroup2 rw - ext4 /dev/x rw\nshort\n"),
            None
        );
    }

    #[test]
    fn of_nested_cgroups_the_outer_one_is_watched() {
        let paths = ["/m/b/c", "/m/bc", "/m/b", "/m/b", "/m/a/x"]
            .map(PathBuf::from)
            .to_vec();
        assert_eq!(outermost(paths), ["/m/a/x", "/m/b", "/m/bc"].map(PathBuf::from));
    }

    #[test]
    fn ids_of_containers_are_told_from_other_names() {
        let id = "0123456789abcdef".repeat(4);
        assert!(holds_id(&format!("docker-{id}.scope")) && holds_id(&id));
        assert!(!holds_id("system.slice") && !holds_id(&format!("{id}0")));
    }

    #[test]
    fn a_process_s_cgroup_is_its_entry_of_hierarchy_0_below_what_is_mounted() {
        let found = Hierarchy::find().expect("cgroup2 is mounted");
        assert_eq!(found.of_process("4:memory:/x\n0::/\n"), Some(found.mount.clone()));
        assert_eq!(found.of_process("4:memory:/\n"), None);
        let inner = hierarchy(found.mount.to_str().unwrap(), "/kubepods/pod1");
        assert_eq!(inner.of_process("0::/kubepods/pod1\n"), Some(found.mount.clone()));
        assert_eq!(inner.of_process("0::/kubepods/pod2\n"), None);
    }

    #[test]
    fn what_is_not_there_is_said_with_what_is() {
        let hierarchy = Hierarchy::find().expect("cgroup2 is mounted");
        let choice = CgroupChoice::Unit("no-such-unit.service".to_owned());
        let error = hierarchy.locate(&choice, &[]).unwrap_err().to_string();
        assert!(error.contains("unit:no-such-unit.service"), "{error}");
        assert!(error.contains(hierarchy.mount.to_str().unwrap()), "{error}");
    }

    #[test]
    fn without_a_listener_everything_is_watched() {
        let hierarchy = Hierarchy::find().expect("cgroup2 is mounted");
        // Nobody can listen on it.
        let located = hierarchy.locate(&CgroupChoice::Auto, &[0]).unwrap();
        assert_eq!(located.how, How::NoListener);
        assert_eq!(located.cgroups[0].path(), hierarchy.mount);
    }
}
