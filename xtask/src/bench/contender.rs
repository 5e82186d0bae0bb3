//! Who is measured, and with which configuration.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;

use anyhow::{Context, Result};

use super::load::Programs;
use super::process::free_addr;

/// A proxy between the load and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    /// Ours.
    Gateway {
        /// `gateway.runtime`.
        runtime: &'static str,
        /// `gateway.workers`; 0 is one a core.
        workers: u32,
        /// How it is called in the table.
        name: &'static str,
    },
    /// nginx as a plain reverse proxy.
    Nginx,
}

impl Contender {
    /// Ours, with as many workers as nginx gets.
    pub const GATEWAY: Contender = Contender::Gateway {
        runtime: "shared",
        workers: 1,
        name: "gateway",
    };
    /// Ours, one scheduler for all cores.
    pub const GATEWAY_SHARED: Contender = Contender::Gateway {
        runtime: "shared",
        workers: 0,
        name: "gateway shared",
    };
    /// Ours, a scheduler for each core.
    pub const GATEWAY_PER_CORE: Contender = Contender::Gateway {
        runtime: "per_core",
        workers: 0,
        name: "gateway per_core",
    };

    /// How it is called in the table.
    pub fn name(self) -> &'static str {
        match self {
            Contender::Gateway { name, .. } => name,
            Contender::Nginx => "nginx",
        }
    }

    /// What starts it, listening on `addr` in front of `upstream`. Its configuration is written to the scratch directory.
    pub fn command(self, programs: &Programs, addr: SocketAddr, upstream: SocketAddr) -> Result<Command> {
        let dir = programs
            .scratch()
            .join(format!("{}-{}", self.name().replace(' ', "-"), addr.port()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let config = dir.join("config");
        let (text, mut command) = match self {
            Contender::Gateway { runtime, workers, .. } => {
                let mut command = Command::new(programs.gateway());
                // Variables of this shell would override the file.
                command
                    .env_clear()
                    // Alone: as root the default would have the kernel probe beside it, which is measured on its own.
                    .env("GATEWAY_CAPTURE", "proxy")
                    .current_dir(&dir)
                    .args(["run", "--config"])
                    .arg(&config);
                (
                    gateway_config(runtime, workers, addr, free_addr()?, upstream),
                    command,
                )
            }
            Contender::Nginx => {
                let mut command = Command::new("nginx");
                command
                    .args(["-e", "stderr", "-p"])
                    .arg(&dir)
                    .arg("-c")
                    .arg(&config);
                (nginx_config(addr, upstream), command)
            }
        };
        fs::write(&config, text).with_context(|| format!("cannot write {}", config.display()))?;
        command.stdout(std::process::Stdio::null());
        Ok(command)
    }
}

fn gateway_config(
    runtime: &str,
    workers: u32,
    listen: SocketAddr,
    admin: SocketAddr,
    upstream: SocketAddr,
) -> String {
    format!(
        "gateway:\n  listen: {listen}\n  workers: {workers}\n  runtime: {runtime}\n\
         admin:\n  listen: {admin}\n\
         upstreams:\n  - name: sim\n    url: http://{upstream}\n    serves: generate\n\
         store:\n  url: none\n\
         log:\n  level: warn\n"
    )
}

/// One process without a master, so that its CPU time is all there is. The upstream's idle connections end before the server's
/// keep-alive of 5 s does, as the gateway's do; a limit of requests to a connection would only make nginx reconnect.
fn nginx_config(listen: SocketAddr, upstream: SocketAddr) -> String {
    format!(
        "daemon off;\nmaster_process off;\npid nginx.pid;\nerror_log stderr warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{\n\
           access_log off;\n\
           client_body_temp_path body;\n  proxy_temp_path proxy;\n  fastcgi_temp_path f;\n  uwsgi_temp_path u;\n  scgi_temp_path s;\n\
           keepalive_requests 1000000000;\n\
           upstream sim {{\n    server {upstream};\n    keepalive 512;\n    keepalive_requests 1000000000;\n    keepalive_timeout 4s;\n  }}\n\
           server {{\n    listen {listen};\n\
             location / {{\n      proxy_pass http://sim;\n      proxy_http_version 1.1;\n\
               proxy_set_header Connection \"\";\n      proxy_buffering off;\n    }}\n  }}\n}}\n"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_listen_where_they_should_in_front_of_the_same_server() {
        let (listen, admin) = (
            SocketAddr::from(([127, 0, 0, 1], 1)),
            SocketAddr::from(([127, 0, 0, 1], 2)),
        );
        let upstream = SocketAddr::from(([127, 0, 0, 1], 3));
        let gateway = gateway_config("shared", 1, listen, admin, upstream);
        assert!(
            gateway.contains("  listen: 127.0.0.1:1\n  workers: 1\n  runtime: shared\n"),
            "{gateway}"
        );
        assert!(gateway.contains("url: http://127.0.0.1:3\n"), "{gateway}");
        let nginx = nginx_config(listen, upstream);
        assert!(
            nginx.contains("listen 127.0.0.1:1;") && nginx.contains("server 127.0.0.1:3;"),
            "{nginx}"
        );
        assert_eq!(nginx.matches('{').count(), nginx.matches('}').count(), "{nginx}");
    }
}
