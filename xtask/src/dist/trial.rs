//! An archive is unpacked and tried as whoever downloads it would: the config is checked, the host looked at, a request served.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};

use super::archive::FILES;
use super::build::Target;
use crate::bench::process::{Server, free_addr};
use crate::bench::scratch::Scratch;
use crate::http;
use crate::stage::run;

/// What a static program says of the embedded ClickHouse; the words are the program's own.
const NO_ENGINE: &str = "linked statically and cannot load ClickHouse's engine";

/// What `vllm-gateway doctor` ends with where at least the proxy can run.
const CAN_RUN: [i32; 2] = [0, 10];

/// Tries it, if its programs run here.
///
/// # Errors
/// When something does not do what it is there for.
pub fn try_out(target: &Target, archive: &Path) -> Result<()> {
    let scratch = Scratch::new()?;
    run(Command::new("tar")
        .arg("-xzf")
        .arg(archive)
        .args(["--strip-components=1", "-C"])
        .arg(scratch.path()))?;
    for (_, name) in FILES {
        ensure!(
            scratch.path().join(name).exists(),
            "{name} is missing in {}",
            archive.display()
        );
    }
    if !target.runs_here() {
        println!("not tried: {target} does not run here");
        return Ok(());
    }
    let unpacked = Unpacked {
        directory: scratch.path(),
        simulator: free_addr()?,
        clients: free_addr()?,
        admin: free_addr()?,
    };
    let checked = output(unpacked.program("vllm-gateway").arg("check-config"))?;
    ensure!(
        checked.status.success(),
        "it refuses its own config.yaml: {}",
        text(&checked)
    );
    if target.is_static() {
        unpacked.says_that_it_has_no_engine()?;
    }
    unpacked.serves()
}

struct Unpacked<'d> {
    directory: &'d Path,
    simulator: SocketAddr,
    clients: SocketAddr,
    admin: SocketAddr,
}

impl Unpacked<'_> {
    fn program(&self, name: &str) -> Command {
        let mut command = Command::new(self.directory.join(name));
        command.current_dir(self.directory);
        command
    }

    /// The gateway on these ports, which keeps no rows.
    fn gateway(&self, what: &str) -> Command {
        let mut command = self.program("vllm-gateway");
        command
            .arg(what)
            .env("GATEWAY_LISTEN_ADDR", self.clients.to_string())
            .env("GATEWAY_ADMIN_ADDR", self.admin.to_string())
            .env("GATEWAY_CAPTURE", "proxy")
            .env("CLICKHOUSE_URL", "none")
            .env("VLLM_URL", format!("http://{}", self.simulator))
            .env("VLLM_EMBEDDINGS_URL", format!("http://{}", self.simulator));
        command
    }

    fn says_that_it_has_no_engine(&self) -> Result<()> {
        let mut command = self.program("vllm-gateway");
        // A `clickhouse` program of this machine would do in its place.
        command
            .args(["embedded-clickhouse", "--listen=127.0.0.1:0", "--data-dir=data"])
            .env("PATH", "");
        let done = output(&mut command)?;
        let said = text(&done);
        ensure!(
            !done.status.success() && said.contains(NO_ENGINE),
            "it should say that it has no engine: {said}"
        );
        Ok(())
    }

    fn serves(&self) -> Result<()> {
        let mut simulator = self.program("vllm-sim");
        simulator.args(["--listen", &self.simulator.to_string(), "--instant"]);
        let _simulator = Server::start("the simulator", simulator, self.simulator)?;
        let doctor = output(&mut self.gateway("doctor"))?;
        let code = doctor.status.code().unwrap_or(-1);
        ensure!(
            CAN_RUN.contains(&code),
            "doctor ends with {code}: {}",
            text(&doctor)
        );
        let log = self.directory.join("gateway.log");
        let mut gateway = self.gateway("run");
        gateway.stderr(fs::File::create(&log)?);
        let _gateway = Server::start("the gateway", gateway, self.clients)?;
        let mut load = self.program("vllm-load");
        load.args([
            "--url",
            &format!("http://{}", self.clients),
            "--model=sim",
            "--requests=20",
        ])
        .args(["--endpoints=chat=1", "--teams=1", "--no-progress"]);
        let load = output(&mut load)?;
        ensure!(
            load.status.success(),
            "requests were not answered: {}",
            text(&load)
        );
        let metrics = http::get(self.admin.port(), "/metrics")?;
        let booked = http::sum_of("gateway_requests_total", &metrics);
        ensure!(booked == 20.0, "20 requests were sent, and {booked} are booked");
        println!("it serves, and books what it serves");
        Ok(())
    }
}

fn output(command: &mut Command) -> Result<Output> {
    command
        .output()
        .with_context(|| format!("cannot start {command:?}"))
}

fn text(output: &Output) -> String {
    [&output.stdout[..], &output.stderr]
        .map(String::from_utf8_lossy)
        .concat()
}
