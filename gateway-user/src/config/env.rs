//! Environment variables that override the file, for containers that share one.
//!
//! An empty value counts as unset, since Compose and Kubernetes pass `${X:-}` as an empty string.

use std::ffi::OsString;

use super::{
    error::{Place, Problem},
    read::Findings,
    schema::{AdminToken, Config, UpstreamConfig},
    setting::Setting,
    token::{TokenDigest, TokenScope},
    values::{Name, Secret},
    words::Serves,
};

/// How the environment is looked up; in the program, `std::env::var_os`.
pub type Env<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Every variable that is read, in the order in which they are documented.
pub const VARIABLES: [&str; 18] = [
    "GATEWAY_LISTEN_ADDR",
    "GATEWAY_ADMIN_ADDR",
    "GATEWAY_ADMIN_TOKEN",
    "GATEWAY_WORKERS",
    "GATEWAY_CAPTURE",
    "GATEWAY_TAP_CGROUP",
    "GATEWAY_SECRET",
    "SPOOL_DIR",
    "VLLM_URL",
    "VLLM_EMBEDDINGS_URL",
    "VLLM_METRICS_SCRAPE_INTERVAL",
    "CLICKHOUSE_URL",
    "CLICKHOUSE_DATABASE",
    "CLICKHOUSE_USERNAME",
    "CLICKHOUSE_PASSWORD",
    "CLICKHOUSE_LISTEN_ADDR",
    "CLICKHOUSE_DATA_DIR",
    "METRICS_EMIT_INTERVAL",
];

/// Puts the environment's values over the file's.
pub(super) fn apply(env: Env<'_>, findings: &mut Findings<'_>, config: &mut Config) {
    let mut from = Override { env, findings };
    from.set(
        "GATEWAY_LISTEN_ADDR",
        "gateway.listen",
        &mut config.gateway.listen,
    );
    from.set("GATEWAY_ADMIN_ADDR", "admin.listen", &mut config.admin.listen);
    from.add_admin_token("GATEWAY_ADMIN_TOKEN", &mut config.admin.tokens);
    from.set("GATEWAY_WORKERS", "gateway.workers", &mut config.gateway.workers);
    from.set("GATEWAY_CAPTURE", "capture", &mut config.capture);
    from.set("GATEWAY_TAP_CGROUP", "tap.cgroup", &mut config.tap.cgroup);
    from.set("GATEWAY_SECRET", "gateway.secret", &mut config.gateway.secret);
    from.set("SPOOL_DIR", "spool.dir", &mut config.spool.dir);
    from.set_upstreams("VLLM_URL", Serves::Generate, "chat", &mut config.upstreams);
    from.set_upstreams(
        "VLLM_EMBEDDINGS_URL",
        Serves::Embeddings,
        "embeddings",
        &mut config.upstreams,
    );
    from.set(
        "VLLM_METRICS_SCRAPE_INTERVAL",
        "vllm.scrape_interval",
        &mut config.vllm.scrape_interval,
    );
    from.set("CLICKHOUSE_URL", "store.url", &mut config.store.url);
    from.set(
        "CLICKHOUSE_DATABASE",
        "store.database",
        &mut config.store.database,
    );
    from.set(
        "CLICKHOUSE_USERNAME",
        "store.username",
        &mut config.store.username,
    );
    from.set(
        "CLICKHOUSE_PASSWORD",
        "store.password",
        &mut config.store.password,
    );
    from.set(
        "CLICKHOUSE_LISTEN_ADDR",
        "store.embedded_listen",
        &mut config.store.embedded_listen,
    );
    from.set(
        "CLICKHOUSE_DATA_DIR",
        "store.embedded_dir",
        &mut config.store.embedded_dir,
    );
    from.set(
        "METRICS_EMIT_INTERVAL",
        "metrics.emit_interval",
        &mut config.metrics.emit_interval,
    );
}

struct Override<'e, 'f, 'a> {
    env: Env<'e>,
    findings: &'f mut Findings<'a>,
}

impl Override<'_, '_, '_> {
    fn set<T: Setting>(&mut self, variable: &'static str, path: &str, into: &mut T) {
        if let Some(text) = self.text(variable)
            && let Some(value) = self.findings.read_text(variable, path, &text)
        {
            *into = value;
        }
    }

    /// One more token of scope admin, behind those of the file: the token itself, so that a container and what scrapes it can share one secret.
    fn add_admin_token(&mut self, variable: &'static str, tokens: &mut Vec<AdminToken>) {
        let Some(text) = self.text(variable) else { return };
        let path = format!("admin.tokens[{}].sha256", tokens.len());
        let Some(secret) = self.findings.read_text::<Secret>(variable, &path, &text) else {
            return;
        };
        let bytes = secret.expose().as_bytes();
        if bytes.len() < AdminToken::BYTES_MIN || !bytes.iter().all(u8::is_ascii_graphic) {
            let message = format!(
                "expected at least {} visible ASCII characters without a space, found others: `openssl rand -hex 32` makes a good one",
                AdminToken::BYTES_MIN
            );
            self.findings.refuse(&path, message);
            return;
        }
        tokens.push(AdminToken {
            name: Name::from_static(variable),
            sha256: TokenDigest::of(bytes),
            scope: TokenScope::Admin,
        });
    }

    /// The first upstream of a kind gets the first address; each further one becomes a replica of it, named after it, at
    /// the end of the list, so that the places known from the file stay right.
    fn set_upstreams(
        &mut self,
        variable: &'static str,
        serves: Serves,
        name: &'static str,
        upstreams: &mut Vec<UpstreamConfig>,
    ) {
        let Some(text) = self.text(variable) else { return };
        let pattern_at = upstreams.iter().position(|upstream| upstream.serves == serves);
        let first_at = pattern_at.unwrap_or(upstreams.len());
        for (number, text) in (1..).zip(text.split(',')) {
            let index = if number == 1 { first_at } else { upstreams.len() };
            let path = format!("upstreams[{index}]");
            let Some(url) = self
                .findings
                .read_text(variable, &format!("{path}.url"), text.trim())
            else {
                return;
            };
            if index < upstreams.len() {
                upstreams[index].url = url;
            } else if number == 1 {
                upstreams.push(UpstreamConfig::new(Name::from_static(name), url, serves));
            } else {
                let name = format!("{}-{number}", upstreams[first_at].name);
                let Some(name) = self.findings.read_text(variable, &format!("{path}.name"), &name) else {
                    return;
                };
                upstreams.push(UpstreamConfig {
                    name,
                    url,
                    ..upstreams[first_at].clone()
                });
            }
        }
    }

    fn text(&mut self, variable: &'static str) -> Option<String> {
        let value = (self.env)(variable).filter(|value| !value.is_empty())?;
        let text = value.into_string().ok();
        if text.is_none() {
            let message = "expected text in UTF-8, found other bytes".to_owned();
            self.findings.problems.push(Problem {
                place: Place::Env(variable),
                message,
            });
        }
        text
    }
}
