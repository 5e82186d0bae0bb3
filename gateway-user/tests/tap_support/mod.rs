//! A server in a cgroup of its own, under a test's command, and what the kernel probe says of its connections.
//!
//! The server is this very program, started again: the test binary must run where nothing else of the project is.
#![allow(dead_code, reason = "each test program uses its own part")]

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
use socket2::{Domain, Protocol, Socket, Type};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tracing_subscriber::EnvFilter;
use vllm_gateway::config::Config;
use vllm_gateway::tap::Tap;
use vllm_gateway::tap::cgroup::{Cgroup, Hierarchy};
use vllm_gateway::tap::link::Links;
use vllm_gateway::tap::probe::{Probe, Watch};
use vllm_gateway::tap::segment::Segment;
use vllm_gateway::wire::connection::Direction;

/// The variable that says which part a process plays: the name of a role, and the cgroup it moves to.
const ROLE: &str = "TAP_PROBE_ROLE";

/// Kernels under emulation are slow; where all is well nobody waits that long.
pub const DEADLINE: Duration = Duration::from_secs(20);

/// What was logged and not looked at yet.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

/// Appends to what was logged.
struct KeptLog;

impl Write for KeptLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap_or_else(PoisonError::into_inner).write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Keeps the log for [`Stage::lines`]. It is installed as the gateway installs its own.
pub fn keep_log() {
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("info"))
        .with_writer(|| KeptLog)
        .with_ansi(false)
        .init();
}

/// Waits for a condition.
#[track_caller]
pub fn within_deadline(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// `CLOCK_MONOTONIC`, in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).expect("after the start") * 1_000_000_000
        + u64::try_from(now.tv_nsec).expect("a fraction")
}

/// A cgroup of a test's own, below the root of cgroup2.
pub struct TestCgroup {
    path: PathBuf,
}

impl TestCgroup {
    pub fn make() -> TestCgroup {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        TestCgroup::named(&format!("tap-probe-{}-{number}", std::process::id()))
    }

    /// One with a name of its own, below another one.
    pub fn inside(outer: &TestCgroup, name: &str) -> TestCgroup {
        let name = outer
            .path
            .file_name()
            .expect("a name")
            .to_string_lossy()
            .into_owned()
            + "/"
            + name;
        TestCgroup::named(&name)
    }

    fn named(name: &str) -> TestCgroup {
        let hierarchy = Hierarchy::find().expect("cgroup2 is mounted");
        let path = hierarchy.mount().join(name);
        fs::create_dir(&path).expect("a cgroup; these tests run as root");
        TestCgroup { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn open(&self) -> Cgroup {
        Cgroup::open(&self.path).expect("it is there")
    }

    /// How many programs are attached to it, in each direction.
    pub fn attached(&self) -> [u32; 2] {
        let directory = fs::File::open(&self.path).expect("it is there");
        // `BPF_CGROUP_INET_INGRESS` and `BPF_CGROUP_INET_EGRESS`.
        [0, 1].map(|attach_type| count_programs(&directory, attach_type))
    }
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        // The kernel is done with a process a little after it was waited for.
        let deadline = Instant::now() + DEADLINE;
        while fs::remove_dir(&self.path).is_err() && Instant::now() < deadline {
            std::thread::yield_now();
        }
    }
}

/// `bpf(BPF_PROG_QUERY)`: the number of programs attached to a cgroup.
fn count_programs(cgroup: impl AsFd, attach_type: u32) -> u32 {
    const BPF_PROG_QUERY: libc::c_int = 16;
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        ids: u64,
        count: u32,
        padding: u32,
        more: [u64; 4],
    }
    let mut query = Query {
        target: cgroup.as_fd().as_raw_fd().cast_unsigned(),
        attach_type,
        ..Query::default()
    };
    // SAFETY: the structure is as long as said, and without room for ids only the count is written.
    let failed = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_QUERY, &raw mut query, size_of::<Query>()) };
    assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
    query.count
}

/// This program once more, in another part. It is killed when this is dropped.
pub struct Actor {
    child: Child,
    said: BufReader<UnixStream>,
}

impl Actor {
    /// Starts `role` in `cgroup`.
    pub fn start(role: &str, cgroup: Option<&TestCgroup>) -> Actor {
        let cgroup = cgroup.map_or("-".to_owned(), |cgroup| cgroup.path.display().to_string());
        Actor::spawn(Command::new("/proc/self/exe"), format!("{role} {cgroup}"))
    }

    /// Starts `role` by a command that comes to this program.
    pub fn start_by(command: Command, role: &str) -> Actor {
        Actor::spawn(command, format!("{role} -"))
    }

    fn spawn(mut command: Command, role: String) -> Actor {
        let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
        ours.set_read_timeout(Some(DEADLINE)).expect("a timeout");
        let command = command.env(ROLE, role).stdin(Stdio::from(OwnedFd::from(theirs)));
        Actor {
            child: command.spawn().expect("this program"),
            said: BufReader::new(ours),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives an order, and returns the answer.
    #[track_caller]
    pub fn ask(&mut self, order: &str) -> String {
        writeln!(self.said.get_mut(), "{order}").expect("it listens");
        let mut answer = String::new();
        self.said.read_line(&mut answer).expect("an answer in time");
        assert!(answer.ends_with('\n'), "it ended while it did: {order}");
        answer.trim_end().to_owned()
    }

    /// As [`Actor::ask`], for answers that are numbers.
    #[track_caller]
    pub fn numbers<const N: usize>(&mut self, order: &str) -> [u64; N] {
        let answer = self.ask(order);
        let numbers: Vec<u64> = answer
            .split(' ')
            .map(|number| number.parse().expect("a number"))
            .collect();
        numbers.try_into().expect("as many as expected")
    }

    pub fn kill(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        let _ = kill_process(pid.expect("a process"), Signal::KILL);
        let _ = self.child.wait();
    }
}

impl Drop for Actor {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The roles that talk otherwise than by orders.
const ATTACHER: &str = "attacher";
const STATUS: &str = "status";

/// Attaches for another process, or shows its own capabilities, if it was started for that.
pub fn play_attacher(serve: fn() -> std::io::Result<()>) {
    match std::env::var(ROLE).as_deref() {
        Ok(ATTACHER) => serve().expect("a gateway on standard input"),
        Ok(STATUS) => print!(
            "{} {}",
            capabilities("self", "CapEff"),
            capabilities("self", "CapPrm")
        ),
        _ => return,
    }
    std::process::exit(0);
}

/// What an actor does with an order; the answer is one line.
pub trait Part {
    fn act(&mut self, words: &[&str]) -> String;
}

/// A part's name, and how it begins.
pub type Role<'n> = (&'n str, fn() -> Box<dyn Part>);

/// Plays the part that this process was started for, if any, and then ends.
pub fn play(roles: &[Role<'_>]) {
    let Ok(said) = std::env::var(ROLE) else { return };
    let (role, cgroup) = said.split_once(' ').expect("a role and a cgroup");
    if cgroup != "-" {
        // 0 is whoever writes.
        fs::write(Path::new(cgroup).join("cgroup.procs"), "0").expect("a cgroup to move to");
    }
    let (_, part) = roles
        .iter()
        .find(|(name, _)| *name == role)
        .expect("a known role");
    let mut part = part();
    let orders = BufReader::new(std::io::stdin());
    let mut answers = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned().expect("a socket"));
    for order in orders.lines().map_while(Result::ok) {
        let words: Vec<&str> = order.split(' ').collect();
        let answer = part.act(&words);
        if writeln!(answers, "{answer}").is_err() {
            break;
        }
    }
    std::process::exit(0);
}

/// A server with one connection at a time.
#[derive(Default)]
pub struct Server {
    listener: Option<TcpListener>,
    connection: Option<TcpStream>,
}

impl Server {
    fn connection(&mut self) -> &mut TcpStream {
        self.connection.as_mut().expect("a connection")
    }
}

impl Part for Server {
    fn act(&mut self, words: &[&str]) -> String {
        let number = |index: usize| words[index].parse::<usize>().expect("a number");
        match words[0] {
            "listen" => {
                let ip: IpAddr = words[1].parse().expect("an address");
                let port = words.get(2).map_or(0, |port| port.parse().expect("a port"));
                let listener = self
                    .listener
                    .insert(TcpListener::bind((ip, port)).expect("a port"));
                listener.local_addr().expect("an address").port().to_string()
            }
            "accept" => {
                let listener = self.listener.as_ref().expect("a listener");
                let (connection, _) = listener.accept().expect("a client");
                connection.set_nodelay(true).expect("an option");
                self.connection = Some(connection);
                "ok".to_owned()
            }
            // Reads so many bytes, and says when it had them.
            "read" => {
                let mut bytes = vec![0; number(1)];
                self.connection().read_exact(&mut bytes).expect("bytes");
                monotonic_ns().to_string()
            }
            // Writes so many bytes of a pattern, so many at a time, and says when it began.
            "write" => {
                let bytes = pattern(number(1));
                let began = monotonic_ns();
                for piece in bytes.chunks(number(2)) {
                    self.connection().write_all(piece).expect("a client that reads");
                }
                began.to_string()
            }
            "close" => {
                self.connection = None;
                "ok".to_owned()
            }
            "reset" => {
                let connection = Socket::from(self.connection.take().expect("a connection"));
                connection.set_linger(Some(Duration::ZERO)).expect("an option");
                "ok".to_owned()
            }
            // Sends so many TCP headers from a port to itself, with a length of their own, in fours of bytes, that says less than they have.
            "misstate" => {
                send_tcp_headers(
                    words[1].parse().expect("a port"),
                    words[2].parse().expect("a length"),
                    number(3),
                );
                "ok".to_owned()
            }
            other => panic!("no such order: {other}"),
        }
    }
}

/// Sends `count` packets over loopback, with an IPv4 header that the kernel makes and a TCP header (RFC 9293 §3.1) from and to `port`.
fn send_tcp_headers(port: u16, offset_words: u8, count: usize) {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::TCP))
        .expect("a raw socket; these tests run as root");
    let mut header = [0; 20];
    header[..2].copy_from_slice(&port.to_be_bytes());
    header[2..4].copy_from_slice(&port.to_be_bytes());
    header[12] = offset_words << 4;
    for _ in 0..count {
        let sent = socket.send_to(&header, &SocketAddr::from(([127, 0, 0, 1], 0)).into());
        assert_eq!(sent.expect("a packet that leaves"), header.len());
    }
}

/// A tap as the gateway opens it, in a process of its own.
#[derive(Default)]
pub struct TapProcess {
    tap: Option<Tap>,
}

impl TapProcess {
    fn tap(&mut self) -> &mut Tap {
        self.tap.as_mut().expect("it is open")
    }

    fn located(&mut self) -> String {
        let tap = self.tap();
        let paths: Vec<String> = tap
            .attachment
            .paths()
            .map(|path| path.display().to_string())
            .collect();
        format!("{} {:?}", paths.join(","), tap.attachment.located().how)
    }
}

impl Part for TapProcess {
    fn act(&mut self, words: &[&str]) -> String {
        match words[0] {
            "open" => {
                let mut config = Config::default();
                config.tap.ports = vec![words[1].parse().expect("a port")];
                config.tap.reattach = words[2] == "true";
                let mut helper = Command::new("/proc/self/exe");
                helper.env(ROLE, ATTACHER);
                match Tap::open(&config, helper) {
                    Ok(tap) => {
                        self.tap = Some(tap);
                        self.located()
                    }
                    Err(error) => error.to_string().replace('\n', " "),
                }
            }
            "located" => self.located(),
            "check" => match self.tap().attachment.check() {
                Ok(change) => format!("{change:?}"),
                Err(error) => error.to_string(),
            },
            "counts" => {
                let counters = &self.tap().counters;
                let (ingress, egress) = (counters.ingress(), counters.egress());
                format!(
                    "{} {}",
                    ingress.submitted + egress.submitted,
                    ingress.lost() + egress.lost()
                )
            }
            "drain" => {
                let mut records = 0;
                while self.tap().ring.drain(64, &mut |_| records += 1) == 64 {}
                records.to_string()
            }
            // Only what the documentation asks for.
            "restrict" => {
                let kept = CapabilitySet::BPF | CapabilitySet::NET_ADMIN;
                let sets = CapabilitySets {
                    effective: kept,
                    permitted: kept,
                    inheritable: CapabilitySet::empty(),
                };
                set_capabilities(None, sets).expect("fewer can always be had");
                capabilities("self", "CapEff")
            }
            // Effective, permitted, inheritable and ambient ones.
            "capabilities" => ["CapEff", "CapPrm", "CapInh", "CapAmb"]
                .map(|set| capabilities("self", set))
                .join(" "),
            "run" => {
                let status = Command::new("/proc/self/exe")
                    .env(ROLE, STATUS)
                    .output()
                    .expect("this program");
                String::from_utf8(status.stdout).expect("text")
            }
            // What the helper holds.
            "helper" => {
                let own = std::process::id();
                let children = fs::read_to_string(format!("/proc/self/task/{own}/children")).expect("a list");
                children
                    .split_ascii_whitespace()
                    .next()
                    .map_or("none".to_owned(), |child| capabilities(child, "CapPrm"))
            }
            other => panic!("no such order: {other}"),
        }
    }
}

/// A set of a process's capabilities, in hexadecimal.
fn capabilities(process: &str, set: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("it runs");
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(set))
        .expect("Linux says so");
    let digits = line.trim_start_matches([':', '\t', '0']);
    if digits.is_empty() {
        "0".to_owned()
    } else {
        digits.to_owned()
    }
}

/// How many segments this machine sent again so far.
pub fn retransmitted() -> u64 {
    let table = fs::read_to_string("/proc/net/snmp").expect("a table");
    let mut lines = table.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let mut columns = names.split(' ').zip(values.split(' '));
    let (_, value) = columns
        .find(|(name, _)| *name == "RetransSegs")
        .expect("a column");
    value.parse().expect("a number")
}

/// A connection whose packets have an extension header, as RFC 8200 §4.6 defines it, before TCP's.
pub fn connect_with_options(addr: SocketAddr) -> TcpStream {
    const IPV6_DSTOPTS: libc::c_int = 59;
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None).expect("a socket");
    // The next header, which the kernel fills in; no further eight bytes; and an option (PadN) of four bytes of padding.
    let header: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
    // SAFETY: the header is as long as said and lives until the call is over.
    let failed = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IPV6,
            IPV6_DSTOPTS,
            header.as_ptr().cast(),
            header.len() as libc::socklen_t,
        )
    };
    assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
    socket.connect(&addr.into()).expect("a connection");
    socket.into()
}

/// Bytes of which each run of some length is where it is and nowhere else.
pub fn pattern(len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len + 8);
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    while bytes.len() < len {
        // Steele, Lea, Flood: "Fast splittable pseudorandom number generators".
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 27)).to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// A segment that outlives the ring's memory.
#[derive(Clone, Debug)]
pub struct Seen {
    pub at_ns: u64,
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub direction: Direction,
    pub syn: bool,
    pub fin: bool,
    pub rst: bool,
    pub sequence: u32,
    pub len_bytes: u32,
    pub captured: Vec<u8>,
}

impl Seen {
    pub fn of(segment: Segment<'_>) -> Seen {
        Seen {
            at_ns: segment.at.0,
            client: segment.client,
            server: segment.server,
            direction: segment.direction,
            syn: segment.syn,
            fin: segment.fin,
            rst: segment.rst,
            sequence: segment.sequence,
            len_bytes: segment.len_bytes,
            captured: segment.captured.to_vec(),
        }
    }
}

/// A server whose cgroup is watched.
pub struct Stage {
    pub server: Actor,
    pub addr: SocketAddr,
    pub probe: Probe,
    pub seen: Vec<Seen>,
    _links: Links,
    // The last to go, since a process is in it.
    pub cgroup: TestCgroup,
}

impl Stage {
    pub fn set(ip: &str, watch: Watch) -> Stage {
        let cgroup = TestCgroup::make();
        let mut server = Actor::start("server", Some(&cgroup));
        let port = server.ask(&format!("listen {ip}")).parse().expect("a port");
        let watch = Watch {
            ports: [vec![port], watch.ports].concat(),
            ..watch
        };
        let probe = Probe::load(&watch).unwrap_or_else(|error| panic!("{error}"));
        let links = probe
            .programs
            .attach(&cgroup.open())
            .unwrap_or_else(|error| panic!("{error}"));
        Stage {
            server,
            addr: SocketAddr::new(ip.parse().expect("an address"), port),
            probe,
            seen: Vec::new(),
            _links: links,
            cgroup,
        }
    }

    pub fn connect(&mut self) -> TcpStream {
        let client = TcpStream::connect(self.addr).expect("a connection");
        client.set_nodelay(true).expect("an option");
        self.server.ask("accept");
        client
    }

    /// The lines that the probe has written since the last time, if [`keep_log`] came first.
    pub fn lines(&mut self) -> Vec<String> {
        self.probe.diagnostics.flush();
        let mut log = LOG.lock().unwrap_or_else(PoisonError::into_inner);
        let text = String::from_utf8(std::mem::take(&mut *log)).expect("text");
        text.lines()
            .filter(|line| line.contains("gateway_ebpf"))
            .map(str::to_owned)
            .collect()
    }

    /// Reads the ring to its end.
    pub fn drain(&mut self) {
        let seen = &mut self.seen;
        while self
            .probe
            .ring
            .drain(256, &mut |segment| seen.push(Seen::of(segment)))
            == 256
        {}
    }

    /// Reads the ring until what was seen is enough.
    #[track_caller]
    pub fn until(&mut self, what: &str, enough: impl Fn(&[Seen]) -> bool) {
        let deadline = Instant::now() + DEADLINE;
        loop {
            self.drain();
            if enough(&self.seen) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "not in time: {what}; seen: {:?}",
                self.seen
            );
            std::thread::yield_now();
        }
    }

    pub fn of(&self, direction: Direction) -> Vec<&Seen> {
        self.seen
            .iter()
            .filter(|seen| seen.direction == direction)
            .collect()
    }

    /// What [`place`] makes of the segments of one direction.
    pub fn stream(&self, direction: Direction) -> (Vec<Option<u8>>, usize) {
        place(&self.of(direction), self.addr)
    }
}

/// The bytes of one direction in their places, and how many of them were not captured. Bytes that came twice must be the same.
pub fn place(segments: &[&Seen], server: SocketAddr) -> (Vec<Option<u8>>, usize) {
    let first = match segments.iter().find(|seen| seen.syn) {
        Some(syn) => syn.sequence.wrapping_add(1),
        // Older kernels (6.1 does) show no filter the answer to a SYN over IPv6. The first byte of a response opens it then.
        None => {
            let opening = segments.first().expect("a response");
            assert!(
                server.is_ipv6() && opening.direction == Direction::ToClient,
                "no beginning"
            );
            opening.sequence
        }
    };
    let mut bytes: Vec<Option<u8>> = Vec::new();
    for seen in segments {
        let start = seen
            .sequence
            .wrapping_add(u32::from(seen.syn))
            .wrapping_sub(first) as usize;
        bytes.resize(bytes.len().max(start + seen.len_bytes as usize), None);
        for (place, byte) in bytes[start..].iter_mut().zip(&seen.captured) {
            assert!(place.is_none_or(|other| other == *byte), "one place, two bytes");
            *place = Some(*byte);
        }
    }
    let holes = bytes.iter().filter(|byte| byte.is_none()).count();
    (bytes, holes)
}

/// Runs the tests whose names contain one of the words that the program was given, all without any, one after another, and
/// reports as other test programs do.
pub fn run(tests: &[(&str, fn())]) {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with('-'))
        .collect();
    let chosen: Vec<_> = tests
        .iter()
        .filter(|(name, _)| wanted.is_empty() || wanted.iter().any(|word| name.contains(word.as_str())))
        .collect();
    println!("\nrunning {} tests", chosen.len());
    let started = Instant::now();
    let mut failed = 0;
    for (name, test) in &chosen {
        let passed = std::panic::catch_unwind(test).is_ok();
        println!("test {name} ... {}", if passed { "ok" } else { "FAILED" });
        failed += usize::from(!passed);
    }
    println!(
        "\ntest result: {}. {} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if failed == 0 { "ok" } else { "FAILED" },
        chosen.len() - failed,
        tests.len() - chosen.len(),
        started.elapsed().as_secs_f64()
    );
    if failed > 0 {
        std::process::exit(101);
    }
}
