//! A machine of its own, for containers whose images cannot be built and for a unit of a systemd that does not run: namespaces for its network and its mounts, a root directory that is made of
//! this machine's programs, and names of hosts that all lead to it.
//!
//! What is as in containers: names, ports, paths, users, no capabilities, nothing that can be written but volumes. What is not: all of them share
//! one root directory and one loopback interface, so that each service needs ports of its own; and libraries are this machine's.
#![allow(dead_code, reason = "no test uses all of it")]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::symlink;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use rustix::process::{Pid, Signal, kill_process};

/// Where an image of Debian or Alpine looks for programs.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Makes the namespaces' inside, says so, and lives on until its input ends, as it does when the test does. `$1` is the root, `$2` a directory with
/// programs; then come pairs of source and target.
const SCRIPT: &str = r#"
root=$1 programs=$2
shift 2
mount --make-rprivate /
ip link set lo up
mount -t tmpfs -o mode=755 tmpfs "$root"
for name in usr bin sbin lib lib64 dev proc sys; do
    if [ -L "/$name" ]; then
        cp -P "/$name" "$root/$name"
    elif [ -e "/$name" ]; then
        mkdir "$root/$name"
        mount --rbind "/$name" "$root/$name"
    fi
done
# Seen and read, and no more, as in containers and under ProtectControlGroups=.
for point in $(awk '/ - cgroup2 /{print $5}' /proc/self/mountinfo); do
    case $point in "$root"/*) mount -o remount,bind,ro "$point" ;; esac
done
mount --bind "$programs" "$root/usr/local/bin"
mkdir -m 755 "$root/etc" "$root/tmp" "$root/run"
cp "$programs/hosts" "$root/etc/hosts"
while [ $# -gt 0 ]; do
    target=$root$2
    if [ -d "$1" ]; then mkdir -p "$target"; else mkdir -p "${target%/*}"; : >"$target"; fi
    mount --bind "$1" "$target"
    shift 2
done
echo ready
exec cat
"#;

pub struct Host {
    init: Child,
    root: PathBuf,
    logs: PathBuf,
}

/// How a process of a container is started.
#[derive(Clone, Debug, Default)]
pub struct Process {
    pub words: Vec<String>,
    pub environment: BTreeMap<String, String>,
    /// Numbers of user and group.
    pub user: String,
    pub working_directory: String,
    /// As setpriv(1) names them; all others are out of reach.
    pub capabilities: Vec<String>,
}

/// A process that is ended with the test.
pub struct Running(pub Child);

impl Host {
    /// Makes one in `directory`, with these programs, names of hosts, and mounts of files or directories.
    pub fn start(
        directory: &Path,
        programs: &[PathBuf],
        names: &[&str],
        mounts: &[(PathBuf, String)],
    ) -> Host {
        let (root, bin) = (directory.join("root"), directory.join("bin"));
        for path in [&root, &bin] {
            fs::create_dir_all(path).expect("a writable directory");
        }
        for program in programs {
            let name = program.file_name().expect("a name");
            // A copy would take seconds. A link to a file of this file system stays right in a mount of its directory.
            fs::hard_link(program, bin.join(name))
                .expect("the tests' directory and the programs' are on one disk");
        }
        // The images' `wget` is busybox's.
        symlink("/bin/busybox", bin.join("wget")).expect("a link");
        let hosts = names
            .iter()
            .fold("127.0.0.1 localhost\n".to_owned(), |mut hosts, name| {
                writeln!(hosts, "127.0.0.1 {name}").expect("a string takes it");
                hosts
            });
        fs::write(bin.join("hosts"), hosts).expect("a writable directory");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--net", "sh", "-euc", SCRIPT, "sh"])
            .args([&root, &bin])
            .args(
                mounts
                    .iter()
                    .flat_map(|(source, target)| [source.as_os_str(), target.as_ref()]),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut init = command.spawn().expect("unshare starts");
        let mut line = String::new();
        let stdout = init.stdout.take().expect("a pipe");
        BufReader::new(stdout).read_line(&mut line).expect("text");
        assert_eq!(
            line, "ready\n",
            "namespaces take root, as the tests of the kernel probe do"
        );
        Host {
            init,
            root,
            logs: directory.to_owned(),
        }
    }

    /// The command that runs a process in there.
    fn command(&self, process: &Process) -> Command {
        let (user, group) = process.user.split_once(':').expect("user and group");
        let capabilities = process
            .capabilities
            .iter()
            .fold("-all".to_owned(), |all, capability| {
                format!("{all},+{capability}")
            });
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.id().to_string(), "--net", "--mount"])
            .args(["chroot".as_ref(), self.root.as_os_str()])
            .args(["setpriv", "--reuid", user, "--regid", group, "--clear-groups"])
            .args(
                ["--inh-caps", "--ambient-caps", "--bounding-set"].map(|set| format!("{set}={capabilities}")),
            )
            .args(["--no-new-privs", "--pdeathsig", "KILL"])
            .args(["env", "-i", "-C", &process.working_directory])
            .arg(format!("PATH={PATH}"))
            .args(
                process
                    .environment
                    .iter()
                    .map(|(name, value)| format!("{name}={value}")),
            )
            .args(&process.words)
            .stdin(Stdio::null());
        command
    }

    /// Starts a process; what it says goes into a file of this name.
    pub fn spawn(&self, name: &str, process: &Process) -> Running {
        let log = File::create(self.logs.join(format!("{name}.log"))).expect("a writable directory");
        let mut command = self.command(process);
        command.stdout(log.try_clone().expect("a descriptor")).stderr(log);
        Running(command.spawn().expect("nsenter starts"))
    }

    /// Runs a process to its end. Returns what it said, if it was content.
    pub fn run(&self, process: &Process) -> Option<String> {
        let done = self.command(process).output().expect("nsenter starts");
        done.status
            .success()
            .then(|| String::from_utf8(done.stdout).expect("text"))
    }

    /// A page, as whoever is on the network gets it.
    pub fn page(&self, url: &str, headers: &[&str]) -> Option<String> {
        let mut words = vec!["wget", "-q", "-O", "-"];
        for header in headers {
            words.extend(["--header", header]);
        }
        words.push(url);
        self.run(&Process {
            words: words.into_iter().map(str::to_owned).collect(),
            user: "65534:65534".to_owned(),
            working_directory: "/".to_owned(),
            ..Process::default()
        })
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = self.init.kill();
        let _ = self.init.wait();
    }
}

impl Running {
    pub fn has_ended(&mut self) -> Option<ExitStatus> {
        self.0.try_wait().expect("a child")
    }

    /// As an engine ends a container.
    pub fn terminate(&self) {
        kill_process(Pid::from_child(&self.0), Signal::TERM).expect("it runs");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a process ended by itself, and well.
pub fn is_clean(status: ExitStatus) -> bool {
    status.success() && status.signal().is_none()
}
