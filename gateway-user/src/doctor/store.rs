//! Spool and ClickHouse. A request never waits for ClickHouse, so that nothing about it stops the proxy; a spool that cannot be written does.

use super::upstream::shown;
use super::{Check, Part};
use crate::config::{ByteSize, SpoolConfig, StoreConfig, StoreUrl};
use crate::net::{BindError, Owner, bind_listener};
use crate::store::embedded::{EmbeddedOptions, EmbeddedServer, find_library, find_program};
use crate::store::segment::Segment;
use crate::store::{directory, migrate, sender};
use clickhouse::Client;
use clickhouse::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::time::timeout;

/// For one answer of ClickHouse, which takes milliseconds where it is up.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);

/// For the embedded engine to come up: a second where nothing else runs.
const START_LIMIT: Duration = Duration::from_secs(8);

/// Size of the file that is made to try a directory.
const TRIED_BYTES: usize = 64 * 1024;

/// ClickHouse's error for a user that it does not know, or a password that is wrong (`ErrorCodes::AUTHENTICATION_FAILED`).
const AUTHENTICATION_FAILED: &str = "Code: 516";

/// Where a directory is, what it is called in the config.
const SPOOL_SETTING: &str = "spool.dir (SPOOL_DIR)";
const DATA_SETTING: &str = "store.embedded_dir (CLICKHOUSE_DATA_DIR)";

pub(super) fn spool_checks(config: &SpoolConfig, gateway: &str) -> Vec<Check> {
    let mut checks = vec![directory_check("spool", &config.dir, SPOOL_SETTING)];
    if let Some(holder) = directory::user_of(&config.dir.join(gateway)) {
        checks.push(
            Check::warning("spool", "in use", format!("{holder} uses it as gateway {gateway}")).advise(
                "nothing to do if that gateway is to go on running; a second one needs another name (gateway.id) or directory (SPOOL_DIR)",
            ),
        );
    }
    checks.push(room(config));
    checks
}

/// Makes a file in it as the spool does, reserved and mapped, and locks it; what is missing of the directory would be made there too.
fn directory_check(group: &str, dir: &Path, setting: &str) -> Check {
    let place = existing(dir);
    let made = if place == dir { "" } else { ", made at start" };
    let stops = |check: Check| {
        if group == "spool" {
            check.stops(Part::Proxy)
        } else {
            check
        }
    };
    match try_directory(&place) {
        Ok(()) => match volatile(&place) {
            None => Check::ok(
                group,
                "directory",
                format!(
                    "{}{made}: writable, files can be mapped and locked",
                    dir.display()
                ),
            ),
            Some(what) => Check::warning(
                group,
                "directory",
                format!("{}{made} is in {what}", dir.display()),
            )
            .advise(format!(
                "what waits there must outlive a restart: mount a volume there, or set {setting}"
            )),
        },
        Err(error) => stops(
            Check::problem(group, "directory", format!("{}{made}: {error}", dir.display())).advise(format!(
                "set {setting} to a directory on a local disk that this user may write to"
            )),
        ),
    }
}

/// The nearest directory above that is there.
fn existing(dir: &Path) -> PathBuf {
    let named = dir.ancestors().find(|place| place.exists());
    match named {
        // A relative path ends in the empty one, which is the current directory.
        Some(place) if !place.as_os_str().is_empty() => place.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn try_directory(dir: &Path) -> Result<(), String> {
    let path = dir.join(format!(".doctor-{}", std::process::id()));
    let tried = Segment::create(&path, TRIED_BYTES)
        .map_err(|error| format!("no file can be made and mapped there: {error}"))
        .and_then(|_| try_lock(&path).map_err(|error| format!("files cannot be locked there: {error}")));
    // If it could not be made, it is not there.
    let _ = fs::remove_file(&path);
    tried
}

/// Two descriptors of one file must not both have its lock.
fn try_lock(path: &Path) -> io::Result<()> {
    let open = || File::options().read(true).write(true).open(path);
    let (first, second) = (open()?, open()?);
    first.try_lock().map_err(io::Error::from)?;
    match second.try_lock() {
        Err(TryLockError::WouldBlock) => Ok(()),
        Err(TryLockError::Error(error)) => Err(error),
        Ok(()) => Err(io::Error::other("a second lock was given beside the first one")),
    }
}

/// A file system that a restart of the container, or of the machine, empties.
#[cfg(target_os = "linux")]
fn volatile(dir: &Path) -> Option<&'static str> {
    // The magic numbers of linux/magic.h.
    match rustix::fs::statfs(dir).ok()?.f_type as u32 {
        0x794c_7630 => Some("a container's own layer (overlayfs), which is gone with the container"),
        0x0102_1994 => Some("memory (tmpfs), which is gone with the machine's next start"),
        _ => None,
    }
}

#[cfg(not(target_os = "linux"))]
fn volatile(_: &Path) -> Option<&'static str> {
    None
}

/// Whether what may wait fits on the disk, beside what waits already.
fn room(config: &SpoolConfig) -> Check {
    let free_bytes = match rustix::fs::statvfs(existing(&config.dir)) {
        Ok(found) => found.f_bavail.saturating_mul(found.f_frsize),
        Err(error) => {
            return Check::unknown("spool", "room", format!("the file system does not say: {error}"));
        }
    };
    let waiting_bytes = waiting(&config.dir);
    let found = format!(
        "{} free, {} wait already; spool.max_bytes is {}",
        rounded(free_bytes),
        rounded(waiting_bytes),
        config.max_bytes
    );
    if free_bytes.saturating_add(waiting_bytes) < config.max_bytes.bytes() {
        return Check::warning("spool", "room", found).advise(
            "in a long outage of ClickHouse the disk would be full before the spool is, and rows be lost: lower spool.max_bytes, or give it room",
        );
    }
    Check::ok("spool", "room", found)
}

/// Bytes of all gateways' files.
fn waiting(dir: &Path) -> u64 {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten();
    entries(dir)
        .flat_map(|gateway| entries(&gateway.path()).collect::<Vec<_>>())
        .filter_map(|file| file.metadata().ok().filter(fs::Metadata::is_file))
        .map(|file| file.len())
        .sum()
}

/// In the largest unit of which there is at least one, rounded down.
fn rounded(bytes: u64) -> ByteSize {
    let unit = [40, 30, 20, 10]
        .into_iter()
        .find(|shift| bytes >> shift > 0)
        .unwrap_or(0);
    ByteSize::from_bytes(bytes >> unit << unit)
}

pub(super) async fn clickhouse_checks(
    config: StoreConfig,
    variable: fn(&str) -> Option<OsString>,
) -> Vec<Check> {
    match &config.url {
        StoreUrl::None => vec![Check::ok(
            "store",
            "clickhouse",
            "none: metrics only, no request is kept (store.url)",
        )],
        StoreUrl::Server(url) => ask(&config, url).await,
        StoreUrl::Embedded => embedded_checks(&config, variable).await,
    }
}

/// The engine's library, its data, its address; and whether it runs at all, if a gateway does not run it already.
async fn embedded_checks(config: &StoreConfig, variable: fn(&str) -> Option<OsString>) -> Vec<Check> {
    let (dir, listen) = (config.embedded_dir.clone(), config.embedded_listen);
    let looked = tokio::task::spawn_blocking(move || {
        (
            library(variable),
            directory_check("store", &dir, DATA_SETTING),
            address(listen),
        )
    });
    let Ok((library, data, address)) = looked.await else {
        return vec![super::broken("store")];
    };
    let mut checks = vec![data];
    match address {
        Address::Taken(check) => checks.extend([library, check]),
        // A gateway that runs has its engine there.
        Address::Gateway => checks.extend(ask(config, &format!("http://{listen}")).await),
        Address::Free => {
            let is_there = library.state == super::State::Ok;
            checks.extend([
                library,
                Check::ok("store", "address", format!("{listen} is free")),
            ]);
            if is_there {
                checks.push(try_engine(config, variable).await);
            }
        }
    }
    checks
}

fn library(variable: fn(&str) -> Option<OsString>) -> Check {
    if let Some(program) = find_program(variable("PATH")) {
        return Check::ok(
            "store",
            "engine",
            format!("ClickHouse itself, {}", program.display()),
        );
    }
    match find_library(None, &variable) {
        Ok(library) => Check::ok("store", "engine", library.display().to_string()),
        Err(error) => Check::problem("store", "engine", error.to_string())
            .advise("until then rows wait in the spool; the proxy runs all the same"),
    }
}

enum Address {
    Free,
    Gateway,
    Taken(Check),
}

fn address(listen: SocketAddr) -> Address {
    match bind_listener(
        listen,
        "ClickHouse",
        "store.embedded_listen or CLICKHOUSE_LISTEN_ADDR",
    ) {
        Ok(_) => Address::Free,
        Err(BindError::InUse {
            owner: Owner::Process { name, .. },
            ..
        }) if name == super::ports::PROGRAM => Address::Gateway,
        Err(error) => Address::Taken(
            Check::problem("store", "address", error.to_string())
                .advise("if that is a ClickHouse server, set store.url (CLICKHOUSE_URL) to its address"),
        ),
    }
}

/// Starts the engine on an empty directory, asks it one thing, and ends it: a library that is there can still be for another machine.
async fn try_engine(config: &StoreConfig, variable: fn(&str) -> Option<OsString>) -> Check {
    let Ok(program) = std::env::current_exe() else {
        return Check::unknown("store", "start", "the program's own file is not known");
    };
    let scratch = Scratch(std::env::temp_dir().join(format!("vllm-gateway-doctor-{}", std::process::id())));
    let options = EmbeddedOptions {
        program,
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        data_dir: scratch.0.clone(),
        libchdb: None,
        user: config.username.clone(),
        password: config.password.clone(),
    };
    let engine = match EmbeddedServer::spawn(options, &variable) {
        Ok(engine) => engine,
        Err(error) => return Check::problem("store", "start", error.to_string()),
    };
    let check = match engine.ready(START_LIMIT).await {
        Ok(address) => match version(&sender::client(config, &format!("http://{address}"))).await {
            Ok(version) => Check::ok("store", "start", format!("the engine starts, and is ClickHouse {}", shown(&version))),
            Err(error) => Check::problem("store", "start", format!("the engine starts, and does not answer: {}", shown(&error.to_string()))),
        },
        Err(_) => Check::problem("store", "start", format!("the engine does not come up within {} s", START_LIMIT.as_secs()))
            .advise("`vllm-gateway embedded-clickhouse --data-dir DIRECTORY` shows why; until then rows wait in the spool"),
    };
    engine.stop().await;
    check
}

/// A directory that is removed with this.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What a server is, whether it lets us in, and which schema it has.
async fn ask(config: &StoreConfig, url: &str) -> Vec<Check> {
    let client = sender::client(config, url);
    let version = match version(&client).await {
        Ok(version) => version,
        Err(error) => return vec![unanswered(url, &error)],
    };
    let user = config.username.as_deref().unwrap_or("default");
    let server = Check::ok(
        "store",
        "clickhouse",
        format!("ClickHouse {} at {url} lets {user} in", shown(&version)),
    );
    let schema = timeout(ANSWER_LIMIT, migrate::found_version(&client, &config.database));
    let schema = schema.await.unwrap_or(Err(Error::TimedOut));
    vec![server, schema_check(&config.database, schema)]
}

async fn version(client: &Client) -> Result<String, Error> {
    let asked = timeout(
        ANSWER_LIMIT,
        client.query("SELECT version()").fetch_one::<String>(),
    )
    .await;
    asked.unwrap_or(Err(Error::TimedOut))
}

fn unanswered(url: &str, error: &Error) -> Check {
    match error {
        Error::BadResponse(said) if said.contains(AUTHENTICATION_FAILED) => {
            Check::problem("store", "clickhouse", format!("{url} refuses the user or the password"))
                .advise("set store.username and store.password (CLICKHOUSE_USERNAME, CLICKHOUSE_PASSWORD); rows wait in the spool until then")
        }
        Error::BadResponse(said) => {
            Check::problem("store", "clickhouse", format!("{url} answers: {}", shown(said.trim())))
                .advise("check that store.url (CLICKHOUSE_URL) is ClickHouse's HTTP interface, mostly port 8123")
        }
        error => Check::problem("store", "clickhouse", format!("{url} does not answer: {}", shown(&causes(error))))
            .advise("start it, or correct store.url (CLICKHOUSE_URL); rows wait in the spool until then"),
    }
}

/// An error and what it comes from: of a connection, the outermost says only that there is none.
fn causes(error: &dyn std::error::Error) -> String {
    let innermost = std::iter::successors(Some(error), |error| error.source()).last();
    innermost.unwrap_or(error).to_string()
}

fn schema_check(database: &str, found: Result<Option<u32>, Error>) -> Check {
    let known = migrate::known_version();
    match found {
        Ok(None) => Check::ok(
            "store",
            "schema",
            format!("database {database} has none yet; the gateway makes it at start"),
        ),
        Ok(Some(found)) if found > known => Check::problem(
            "store",
            "schema",
            format!("database {database} has version {found}, this program knows versions up to {known}"),
        )
        .advise(
            "run a gateway at least as new as the one that wrote it, or set store.database to another one",
        ),
        Ok(Some(found)) if found < known => Check::ok(
            "store",
            "schema",
            format!("version {found}; the gateway brings it to {known} at start"),
        ),
        Ok(Some(found)) => Check::ok("store", "schema", format!("version {found}, up to date")),
        Err(error) => Check::unknown("store", "schema", shown(&error.to_string()))
            .advise("the user must be allowed to read system.tables, and to make tables in its database"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;
    use crate::store::directory::DirLock;

    fn config(dir: &Path) -> SpoolConfig {
        SpoolConfig {
            dir: dir.to_owned(),
            ..SpoolConfig::default()
        }
    }

    fn scratch(name: &str) -> Scratch {
        let dir =
            std::env::temp_dir().join(format!("vllm-gateway-doctor-test-{name}-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        Scratch(dir)
    }

    #[test]
    fn a_directory_that_works_is_left_as_it_was() {
        let dir = scratch("works");
        let missing = dir.0.join("spool/deeper");
        let check = directory_check("spool", &missing, SPOOL_SETTING);
        assert!(matches!(check.state, State::Ok | State::Warning), "{check:?}");
        assert!(check.found.contains("made at start"), "{check:?}");
        assert_eq!(fs::read_dir(&dir.0).unwrap().count(), 0, "nothing is left");
    }

    #[test]
    fn a_file_in_its_place_stops_the_proxy() {
        let dir = scratch("file");
        let file = dir.0.join("spool");
        fs::write(&file, "").unwrap();
        let check = directory_check("spool", &file, SPOOL_SETTING);
        assert_eq!((check.state, check.stops), (State::Problem, Some(Part::Proxy)));
        assert!(check.advice.contains("SPOOL_DIR"), "{check:?}");
        assert_eq!(directory_check("store", &file, DATA_SETTING).stops, None);
    }

    #[test]
    fn a_spool_that_a_gateway_uses_is_told_with_its_process() {
        let dir = scratch("used");
        let held = DirLock::acquire(&dir.0.join("gw")).unwrap();
        let checks = spool_checks(&config(&dir.0), "gw");
        let used = checks.iter().find(|check| check.name == "in use").unwrap();
        assert!(
            used.found.contains(&format!("process {}", std::process::id())),
            "{used:?}"
        );
        drop(held);
        assert!(
            spool_checks(&config(&dir.0), "gw")
                .iter()
                .all(|check| check.name != "in use")
        );
    }

    #[test]
    fn a_limit_beyond_the_disk_is_a_warning_and_what_waits_counts() {
        let dir = scratch("room");
        let of = |max_bytes| {
            room(&SpoolConfig {
                max_bytes: ByteSize::from_bytes(max_bytes),
                ..config(&dir.0)
            })
        };
        assert_eq!(of(u64::MAX).state, State::Warning);
        assert_eq!(of(1).state, State::Ok);
        fs::create_dir(dir.0.join("gw")).unwrap();
        fs::write(dir.0.join("gw/a.jsonl"), [0; 3 * 1024]).unwrap();
        assert!(of(1).found.contains("3KiB wait already"), "{:?}", of(1));
    }

    #[test]
    fn a_schema_is_judged_by_its_version() {
        let known = migrate::known_version();
        let of = |found| schema_check("db", Ok(found)).state;
        assert_eq!([of(None), of(Some(known)), of(Some(1))], [State::Ok; 3]);
        assert_eq!(of(Some(known + 1)), State::Problem);
        assert_eq!(schema_check("db", Err(Error::TimedOut)).state, State::Unknown);
    }

    #[test]
    fn sizes_are_told_in_one_unit() {
        let text = |bytes| rounded(bytes).to_string();
        assert_eq!([text(0), text(1_023), text(1_025)], ["0B", "1023B", "1KiB"]);
        assert_eq!(text((5 << 30) + 1), "5GiB");
    }
}
