//! ClickHouse: the embedded engine, or a server. No request waits for it, so that nothing about it stops the proxy.

use super::upstream::shown;
use super::{Check, spool};
use crate::config::{StoreConfig, StoreUrl};
use crate::net::{BindError, Owner, bind_listener};
use crate::store::embedded::{EmbeddedOptions, EmbeddedServer, find_library, find_program};
use crate::store::{migrate, sender};
use clickhouse::Client;
use clickhouse::error::Error;
use std::ffi::OsString;
use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::timeout;

/// For one answer of ClickHouse, which takes milliseconds where it is up.
const ANSWER_LIMIT: Duration = Duration::from_secs(4);

/// For the embedded engine to come up: a second where nothing else runs.
const START_LIMIT: Duration = Duration::from_secs(8);

/// ClickHouse's error for a user that it does not know, or a password that is wrong (`ErrorCodes::AUTHENTICATION_FAILED`).
const AUTHENTICATION_FAILED: &str = "Code: 516";

/// Where the engine's data is set.
const DATA_SETTING: &str = "store.embedded_dir (CLICKHOUSE_DATA_DIR)";

pub(super) async fn checks(config: StoreConfig, variable: fn(&str) -> Option<OsString>) -> Vec<Check> {
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
            spool::directory_check("store", &dir, DATA_SETTING),
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

    #[test]
    fn a_schema_is_judged_by_its_version() {
        let known = migrate::known_version();
        let of = |found| schema_check("db", Ok(found)).state;
        assert_eq!([of(None), of(Some(known)), of(Some(1))], [State::Ok; 3]);
        assert_eq!(of(Some(known + 1)), State::Problem);
        assert_eq!(schema_check("db", Err(Error::TimedOut)).state, State::Unknown);
    }
}
