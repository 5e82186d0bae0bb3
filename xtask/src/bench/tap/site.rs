//! What runs while something is measured: a server, and a gateway that watches its port or another.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::cgroup::Cgroup;
use anyhow::{Context, Result, ensure};

use crate::bench::load::{Load, Programs};
use crate::bench::process::{Server, free_addr};
use crate::http;

/// How long after a load the reader is let finish: many times its poll interval.
const SETTLED_AFTER: Duration = Duration::from_millis(200);

/// Where programs come from and files go to.
pub struct Site<'s> {
    /// The load and its servers.
    pub programs: &'s Programs,
    release: PathBuf,
}

/// nginx in a cgroup of its own.
pub struct Nginx {
    /// Its process.
    pub server: Server,
    /// A second port, which nobody asks for anything.
    pub other: SocketAddr,
    /// Behind the process, which must be gone before it.
    pub cgroup: Cgroup,
}

/// vllm-sim in a cgroup of its own.
pub struct Sim {
    /// Its process.
    pub server: Server,
    /// As for [`Nginx`].
    pub cgroup: Cgroup,
}

/// A gateway with the tap alone.
pub struct Tapped {
    /// Its process.
    pub gateway: Server,
    admin: SocketAddr,
}

/// What the tap has counted, and the CPU time of all of its process.
#[derive(Clone, Copy, Debug)]
pub struct Counted {
    /// Records in the ring.
    pub records: f64,
    /// Records that are not.
    pub lost: f64,
    /// Exchanges of clients that ended; the gateway's own looks at the server's health are not among them.
    pub exchanges: f64,
    /// Those of them that were not seen whole.
    pub incomplete: f64,
    /// Connections that are followed now.
    pub connections: f64,
    /// User and system.
    pub cpu_time: Duration,
}

impl<'s> Site<'s> {
    /// With programs in `release`.
    pub fn new(programs: &'s Programs, release: &Path) -> Site<'s> {
        Site {
            programs,
            release: release.to_owned(),
        }
    }

    /// nginx with a page in memory, in one process without a master, so that its CPU time is all there is.
    pub fn nginx(&self) -> Result<Nginx> {
        let (addr, other) = (free_addr()?, free_addr()?);
        ensure!(addr != other, "expected two free ports, found {addr} twice");
        let dir = self.dir("pages", addr)?;
        let config = dir.join("config");
        write(&config, &nginx_config(addr, other))?;
        let mut command = Command::new("nginx");
        command
            .args(["-e", "stderr", "-p"])
            .arg(&dir)
            .arg("-c")
            .arg(&config);
        let cgroup = Cgroup::make("nginx")?;
        let mut command = cgroup.within(&command);
        command.stdout(Stdio::null());
        Ok(Nginx {
            server: Server::start("nginx", command, addr)?,
            other,
            cgroup,
        })
    }

    /// vllm-sim for this load.
    pub fn sim(&self, load: Load) -> Result<Sim> {
        let (addr, cgroup) = (free_addr()?, Cgroup::make("sim")?);
        let mut command = cgroup.within(&self.programs.sim(load, addr));
        command.stdout(Stdio::null());
        Ok(Sim {
            server: Server::start("vllm-sim", command, addr)?,
            cgroup,
        })
    }

    /// A gateway whose tap watches the port of `server`, which is in `cgroup`: it finds that by itself, by `tap.cgroup: auto`.
    ///
    /// # Errors
    /// When it does not start, or watches anything else.
    pub fn tapped_in(&self, cgroup: &Cgroup, server: SocketAddr) -> Result<Tapped> {
        let tapped = self.tapped(server)?;
        let attached_to = tapped.gateway.attached_to()?;
        ensure!(
            attached_to == [cgroup.id()],
            "expected the tap to watch the server's cgroup, number {}, found {attached_to:?}",
            cgroup.id()
        );
        Ok(tapped)
    }

    /// A gateway whose tap watches the port of `server`.
    pub fn tapped(&self, server: SocketAddr) -> Result<Tapped> {
        let admin = free_addr()?;
        let mut command = Command::new(self.programs.gateway());
        command.env_clear().env("GATEWAY_CAPTURE", "tap");
        command.args(["run", "--config"]).arg(self.config(server, admin)?);
        command.stdout(Stdio::null());
        Ok(Tapped {
            gateway: Server::start("vllm-gateway", command, admin)?,
            admin,
        })
    }

    /// What only reads the ring, for the port of `server`.
    pub fn drainer(&self, server: SocketAddr) -> Result<Command> {
        let mut command = Command::new(self.release.join("examples/tap_drain"));
        command
            .arg("--config")
            .arg(self.config(server, free_addr()?)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        Ok(command)
    }

    fn config(&self, server: SocketAddr, admin: SocketAddr) -> Result<PathBuf> {
        let config = self.dir("tapped", admin)?.join("config.yaml");
        write(&config, &gateway_config(server, admin))?;
        Ok(config)
    }

    fn dir(&self, name: &str, addr: SocketAddr) -> Result<PathBuf> {
        let dir = self.programs.scratch().join(format!("{name}-{}", addr.port()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }
}

impl Tapped {
    /// What it has counted once it has read what is there.
    ///
    /// # Errors
    /// When it has ended, or its metrics cannot be read.
    pub fn counted(&mut self) -> Result<Counted> {
        thread::sleep(SETTLED_AFTER);
        self.gateway.check_alive()?;
        let cpu_time = self.gateway.cpu_time()?;
        let page = http::get(self.admin.port(), "/metrics")?;
        let sum = |family: &str| -> Result<f64> {
            ensure!(
                page.contains(family),
                "expected {family} among the gateway's metrics, found none"
            );
            Ok(http::sum_of(family, &page))
        };
        Ok(Counted {
            records: sum("gateway_tap_records_total")?,
            lost: sum("gateway_tap_lost_records_total")?,
            exchanges: value_of("gateway_tap_exchanges_total{whose=\"direct\"}", &page),
            incomplete: sum("gateway_tap_incomplete_exchanges_total")?,
            connections: sum("gateway_tap_connections")?,
            cpu_time,
        })
    }

    /// What it has counted once it follows no connection any more, or after `within`.
    ///
    /// # Errors
    /// As [`Tapped::counted`].
    pub fn counted_at_rest(&mut self, within: Duration) -> Result<Counted> {
        let deadline = Instant::now() + within;
        loop {
            let counted = self.counted()?;
            if counted.connections == 0.0 || Instant::now() > deadline {
                return Ok(counted);
            }
        }
    }
}

impl Counted {
    /// What was counted since `before`; connections are those of now.
    pub fn since(self, before: Counted) -> Counted {
        Counted {
            records: self.records - before.records,
            lost: self.lost - before.lost,
            exchanges: self.exchanges - before.exchanges,
            incomplete: self.incomplete - before.incomplete,
            connections: self.connections,
            cpu_time: self.cpu_time - before.cpu_time,
        }
    }

    /// CPU time for one record, in microseconds.
    pub fn cpu_us_a_record(&self) -> f64 {
        self.cpu_time.as_secs_f64() * 1e6 / self.records
    }
}

/// One series of a family; 0 when it is not there.
fn value_of(series: &str, page: &str) -> f64 {
    let found = page
        .lines()
        .find_map(|line| line.strip_prefix(series)?.trim().parse().ok());
    found.unwrap_or(0.0)
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}

/// Without the helper: it would be left attached for a moment when the gateway has ended, and the next measurement is one without.
fn gateway_config(server: SocketAddr, admin: SocketAddr) -> String {
    format!(
        "admin:\n  listen: {admin}\n\
         tap:\n  reattach: false\n\
         upstreams:\n  - name: server\n    url: http://{server}\n    serves: generate\n\
         store:\n  url: none\n\
         log:\n  level: error\n"
    )
}

fn nginx_config(listen: SocketAddr, other: SocketAddr) -> String {
    format!(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           access_log off;\n\
           client_body_temp_path body;\n  proxy_temp_path proxy;\n  fastcgi_temp_path f;\n  uwsgi_temp_path u;\n  scgi_temp_path s;\n\
           keepalive_requests 1000000000;\n  default_type text/plain;\n\
           server {{\n    listen {listen};\n    listen {other};\n    location / {{ return 200 \"a page as small as pages get\\n\"; }}\n  }}\n}}\n"
    )
}
