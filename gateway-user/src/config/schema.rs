//! The shape of the config and its defaults: one struct a section, one field a key of `config.yaml`.
//!
//! Every default is right for one gateway before one vLLM on the same machine, and safe elsewhere. The structs hold
//! validated values only when they come from [`Config::load`](super::Config::load).

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use serde::Serialize;

use super::{
    limits::LimitsConfig,
    tap::TapConfig,
    token::{TokenDigest, TokenScope},
    units::{ByteSize, serialize_duration},
    values::{HeaderName, Name, Secret, StoreUrl, UpstreamUrl},
    words::{
        Capture, Fsync, IdleTo, Inject, LogFormat, LogLevel, OnUninspectable, RuntimeKind, Serves, WhenFull,
    },
};
use crate::identity::WithoutTeam;
use crate::ledger::{Method, Millionths, Price, Rate, Weights};

/// Everything that can be configured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Config {
    /// The gateway as a server and as a process.
    pub gateway: GatewayConfig,
    /// Where requests are seen. Default `auto`.
    pub capture: Capture,
    /// The address for operators.
    pub admin: AdminConfig,
    /// What the kernel probe watches.
    pub tap: TapConfig,
    /// Who a request is for.
    pub identity: IdentityConfig,
    /// The servers that requests go to; never empty. Default: `chat` on port 8000 and `embeddings` on port 8001.
    pub upstreams: Vec<UpstreamConfig>,
    /// Limits and timeouts of the data path.
    pub proxy: ProxyConfig,
    /// How token counts are asked for.
    pub usage: UsageConfig,
    /// What Prometheus sees.
    pub metrics: MetricsConfig,
    /// What is read from vLLM itself.
    pub vllm: VllmConfig,
    /// Where events are stored.
    pub store: StoreConfig,
    /// Where events wait until they are stored.
    pub spool: SpoolConfig,
    /// How costs are shared out.
    pub ledger: LedgerConfig,
    /// When a difference to the engines' own counters is told.
    pub reconciliation: ReconciliationConfig,
    /// What requests are charged by their tokens, by model and date. Default: one rate for all models, see [`Rate::ASSUMED`].
    pub rates: Vec<Rate>,
    /// How much each team may take. Default: as much as it likes.
    pub limits: LimitsConfig,
    /// The gateway's own log.
    pub log: LogConfig,
}

/// Section `gateway`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GatewayConfig {
    /// Address for clients. Default `0.0.0.0:8080`: they are on other machines, and in a container a gateway that
    /// listens on loopback cannot be reached.
    pub listen: SocketAddr,
    /// Threads that serve clients; 0 (default) is one a core.
    pub workers: u32,
    /// How those threads share the work. Default `shared`.
    pub runtime: RuntimeKind,
    /// Name of this gateway in events and request ids; two gateways need two names. Default: the host name, see
    /// [`GatewayConfig::id_or_host_name`].
    pub id: Option<Name>,
    /// Key of the gateway request id's MAC, at least [`GatewayConfig::SECRET_BYTES_MIN`] long. Gateways that share one
    /// recognise each other's ids. Default: random at each start.
    pub secret: Option<Secret>,
    /// How long running requests may take to end after SIGTERM. Default 30 s, as in Kubernetes.
    #[serde(serialize_with = "serialize_duration")]
    pub drain_timeout: Duration,
}

/// Section `admin`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdminConfig {
    /// Address of `/metrics`, `/health`, `/ready` and the console. Default `127.0.0.1:9464`: it shows every team's
    /// figures, so that it is opened to a network only on purpose.
    pub listen: SocketAddr,
    /// Who may read it; none (default): whoever is on this machine.
    pub tokens: Vec<AdminToken>,
}

/// One entry of `admin.tokens`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct AdminToken {
    /// What the log calls it; unique.
    pub name: Name,
    /// What the token is known by.
    pub sha256: TokenDigest,
    /// What its holder may see.
    pub scope: TokenScope,
}

impl AdminToken {
    /// Least length of one that the environment gives: nobody guesses 16 random bytes, and a word is no token. Of one in the file only the digest
    /// is known, which tells no length.
    pub const BYTES_MIN: usize = 16;
}

/// Section `identity`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct IdentityConfig {
    /// Header that names the team; a request without it is refused. Default `X-Team-ID`.
    pub team_header: HeaderName,
    /// Header that names the project, optional in a request. Default `X-Project`.
    pub project_header: HeaderName,
    /// Header that names the user, optional in a request. Default `X-User-ID`.
    pub user_header: HeaderName,
    /// Whether what a client says of itself is believed. Default true; false is refused until there are keys or tokens.
    pub trust_headers: bool,
    /// Whether the upstream gets to see the three headers. Default false.
    pub forward_headers: bool,
    /// What becomes of a request without a team: no key of the file, since only `vllm-gateway try` takes it.
    #[serde(skip)]
    pub without_team: WithoutTeam,
}

/// One entry of `upstreams`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UpstreamConfig {
    /// Its name in metrics and events, unique.
    pub name: Name,
    /// Its address.
    pub url: UpstreamUrl,
    /// Which requests it can answer.
    pub serves: Serves,
    /// The models it serves, as requests name them; empty (default): any.
    pub models: Vec<String>,
    /// Path whose answer 200 means that it is up. Default `/health`.
    pub health_path: String,
    /// Most connections to it at a time; 0 (default): no cap of its own.
    pub max_connections: u32,
    /// Whether it is scaled to zero at times, so that nobody there is no outage. Default false.
    pub scale_to_zero: bool,
    /// Whether KV caches that come from outside are a cache of its own, and no prefill of another server's. Default false.
    pub external_kv_is_cache: bool,
    /// What it costs, by date; none of it costs nothing. Default: one GPU at 2.50 USD an hour, see [`Price::ASSUMED`].
    pub price: Vec<Price>,
}

/// Section `proxy`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProxyConfig {
    /// Request bodies up to this size are held until whole and routed by their model. Default 4 MiB.
    pub inspect_max: ByteSize,
    /// What becomes of a request whose body cannot be inspected. Default `pass`.
    pub on_uninspectable: OnUninspectable,
    /// Larger request bodies are refused. Default 1 GiB, for audio.
    pub max_body: ByteSize,
    /// Larger request or response heads are refused. Default 64 KiB.
    pub max_head: ByteSize,
    /// How long a client may take to send a head once it has begun. Default 10 s.
    #[serde(serialize_with = "serialize_duration")]
    pub head_timeout: Duration,
    /// How long a client's connection may stay idle between requests. Default 75 s.
    #[serde(serialize_with = "serialize_duration")]
    pub idle_timeout: Duration,
    /// How long connecting to an upstream may take. Default 2 s.
    #[serde(serialize_with = "serialize_duration")]
    pub connect_timeout: Duration,
    /// How long an upstream may take until its response begins. Default 10 min: an unstreamed response begins only when
    /// the generation has ended.
    #[serde(serialize_with = "serialize_duration")]
    pub response_head_timeout: Duration,
    /// How long an upstream may be silent within a response. Default 5 min.
    #[serde(serialize_with = "serialize_duration")]
    pub stream_idle_timeout: Duration,
    /// How long a client may take none of the bytes that wait for it. Default 60 s.
    #[serde(serialize_with = "serialize_duration")]
    pub client_write_timeout: Duration,
    /// Idle connections to an upstream are dropped after this. Default 4 s, since vLLM closes them at 5 s and a request
    /// sent in that moment would be lost.
    #[serde(serialize_with = "serialize_duration")]
    pub upstream_idle: Duration,
    /// How long the upstream is still read after its client has gone, to learn what the request had used. Default 200 ms.
    #[serde(serialize_with = "serialize_duration")]
    pub abort_drain: Duration,
    /// Most client connections at a time; more wait in the kernel's queue. Default 20 000.
    pub max_connections: u32,
    /// Whether clients reach vLLM's administration routes, such as `/v1/load_lora_adapter`. Default false.
    pub allow_admin_routes: bool,
    /// Time between two health checks of an upstream. Default 2 s.
    #[serde(serialize_with = "serialize_duration")]
    pub health_interval: Duration,
}

/// Section `usage`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct UsageConfig {
    /// What the gateway asks vLLM to report on streams. Default `auto`.
    pub inject: Inject,
}

/// Section `metrics`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MetricsConfig {
    /// Teams with metric series of their own; the others share `__other__`. Default 1000. Events keep every team.
    pub max_teams: u32,
    /// Time between two cycles of the ledger. Default 15 s, the length of its windows, which is fixed.
    #[serde(serialize_with = "serialize_duration")]
    pub emit_interval: Duration,
}

/// Section `vllm`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct VllmConfig {
    /// Time between two reads of each upstream's `/metrics`. Default 15 s.
    #[serde(serialize_with = "serialize_duration")]
    pub scrape_interval: Duration,
}

/// Section `store`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StoreConfig {
    /// Which ClickHouse. Default `embedded`.
    pub url: StoreUrl,
    /// Its database. Default `vllm_attribution`.
    pub database: String,
    /// Its user; default: none, and the server's own default user.
    pub username: Option<String>,
    /// That user's password; default: none.
    pub password: Option<Secret>,
    /// A cluster that the tables are made on, replicated; default: none, and plain tables.
    pub cluster: Option<Name>,
    /// Days that raw rows are kept. Default 90: a bill can be questioned for a quarter.
    pub raw_days: u32,
    /// Days that the ledger is kept. Default 1100: three years, as accounts are.
    pub ledger_days: u32,
    /// Where the embedded engine listens. Default `127.0.0.1:8123`.
    pub embedded_listen: SocketAddr,
    /// Where the embedded engine keeps its data. Default `./clickhouse`.
    #[serde(serialize_with = "serialize_path")]
    pub embedded_dir: PathBuf,
}

/// Section `spool`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SpoolConfig {
    /// Directory, made if it is missing. It must outlive a restart: in a container, a volume. Default `./spool`.
    #[serde(serialize_with = "serialize_path")]
    pub dir: PathBuf,
    /// Most bytes of rows that wait. Default 10 GiB: a day of outage at a hundred requests a second, of which each takes some 1.2 kB.
    pub max_bytes: ByteSize,
    /// What becomes of rows beyond that. Default `drop_newest`: a row that was once kept is never given up again.
    pub when_full: WhenFull,
    /// What a power loss can take. Default `interval`.
    pub fsync: Fsync,
    /// Time between two flushes under `interval`. Default 1 s.
    #[serde(serialize_with = "serialize_duration")]
    pub fsync_interval: Duration,
    /// Size of a file. Default 4 MiB: some thousand rows, far less than ClickHouse takes as one block.
    pub segment_bytes: ByteSize,
    /// How long a row waits for its file to fill before it can be sent. Default 1 s.
    #[serde(serialize_with = "serialize_duration")]
    pub seal_after: Duration,
}

/// Section `ledger`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LedgerConfig {
    /// Share of a busy moment that goes by work, the rest by presence. Default 0.5, see [`Method::THETA_ASSUMED`].
    pub theta: Millionths,
    /// What is how much work. Default 1, 4 and 0.04, see [`Weights::ASSUMED`].
    pub weights: Weights,
    /// Who pays for idle time. Default `separate`: what nobody used is seen as such.
    pub idle: IdleTo,
    /// How long after its end a window still waits for segments. Default 15 min: a request that runs is known within
    /// `proxy.response_head_timeout`, and its rows have some minutes to arrive. What comes later still is restated.
    #[serde(serialize_with = "serialize_duration")]
    pub settle_after: Duration,
}

/// Section `reconciliation`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ReconciliationConfig {
    /// Which part of what the engine counted must be attributed to nobody for that to be told. Default 0.05: requests are told when they end or
    /// with their window, so that half a minute of what runs is missing when traffic begins, and that is looked at 15 minutes later first.
    pub gap_share: Millionths,
    /// How many tokens it must be at least. Default 10 000: a share of next to nothing is next to nothing.
    pub gap_tokens: u32,
    /// How far is looked back, besides `ledger.settle_after`. Default 1 h.
    #[serde(serialize_with = "serialize_duration")]
    pub window: Duration,
}

/// Section `log`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LogConfig {
    /// What is logged: `error`, `warn`, `info` (default), `debug`, `trace`.
    pub level: LogLevel,
    /// How it is written. Default `text`.
    pub format: LogFormat,
}

/// serde refuses paths that are not UTF-8; no config has one, but a struct can.
fn serialize_path<S: serde::Serializer>(path: &std::path::Path, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&path.display())
}

impl GatewayConfig {
    /// Shortest key of the request id's MAC: 128 bits if it is random bytes in hex or better.
    pub const SECRET_BYTES_MIN: usize = 16;

    /// The configured name, else the host name, else `gateway`.
    pub fn id_or_host_name(&self) -> Name {
        self.id.clone().unwrap_or_else(super::host_name)
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            gateway: GatewayConfig::default(),
            capture: Capture::Auto,
            admin: AdminConfig::default(),
            tap: TapConfig::default(),
            identity: IdentityConfig::default(),
            upstreams: vec![
                UpstreamConfig::local("chat", 8000, Serves::Generate),
                UpstreamConfig::local("embeddings", 8001, Serves::Embeddings),
            ],
            proxy: ProxyConfig::default(),
            usage: UsageConfig { inject: Inject::Auto },
            metrics: MetricsConfig {
                max_teams: 1000,
                emit_interval: Duration::from_secs(15),
            },
            vllm: VllmConfig {
                scrape_interval: Duration::from_secs(15),
            },
            store: StoreConfig::default(),
            spool: SpoolConfig::default(),
            ledger: LedgerConfig::default(),
            reconciliation: ReconciliationConfig::default(),
            rates: vec![Rate::ASSUMED],
            limits: LimitsConfig::default(),
            log: LogConfig {
                level: LogLevel::Info,
                format: LogFormat::Text,
            },
        }
    }
}

impl Default for GatewayConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080)),
            workers: 0,
            runtime: RuntimeKind::Shared,
            id: None,
            secret: None,
            drain_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for AdminConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 9464)),
            tokens: Vec::new(),
        }
    }
}

impl Default for IdentityConfig {
    fn default() -> Self {
        Self {
            team_header: HeaderName::from_static("X-Team-ID"),
            project_header: HeaderName::from_static("X-Project"),
            user_header: HeaderName::from_static("X-User-ID"),
            trust_headers: true,
            forward_headers: false,
            without_team: WithoutTeam::Refuse,
        }
    }
}

impl UpstreamConfig {
    /// An upstream with every other setting at its default.
    pub fn new(name: Name, url: UpstreamUrl, serves: Serves) -> Self {
        Self {
            name,
            url,
            serves,
            models: Vec::new(),
            health_path: "/health".to_owned(),
            max_connections: 0,
            scale_to_zero: false,
            external_kv_is_cache: false,
            price: vec![Price::ASSUMED],
        }
    }

    fn local(name: &'static str, port: u16, serves: Serves) -> Self {
        Self::new(Name::from_static(name), UpstreamUrl::local(port), serves)
    }
}

impl Default for ReconciliationConfig {
    fn default() -> Self {
        Self {
            gap_share: Millionths::new(50_000),
            gap_tokens: 10_000,
            window: Duration::from_secs(3600),
        }
    }
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self {
            inspect_max: ByteSize::from_mib(4),
            on_uninspectable: OnUninspectable::Pass,
            max_body: ByteSize::from_mib(1024),
            max_head: ByteSize::from_kib(64),
            head_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(75),
            connect_timeout: Duration::from_secs(2),
            response_head_timeout: Duration::from_secs(10 * 60),
            stream_idle_timeout: Duration::from_secs(5 * 60),
            client_write_timeout: Duration::from_secs(60),
            upstream_idle: Duration::from_secs(4),
            abort_drain: Duration::from_millis(200),
            max_connections: 20_000,
            allow_admin_routes: false,
            health_interval: Duration::from_secs(2),
        }
    }
}

impl Default for SpoolConfig {
    fn default() -> Self {
        Self {
            dir: PathBuf::from("./spool"),
            max_bytes: ByteSize::from_mib(10 * 1024),
            when_full: WhenFull::DropNewest,
            fsync: Fsync::Interval,
            fsync_interval: Duration::from_secs(1),
            segment_bytes: ByteSize::from_mib(4),
            seal_after: Duration::from_secs(1),
        }
    }
}

impl Default for StoreConfig {
    fn default() -> Self {
        Self {
            url: StoreUrl::Embedded,
            database: "vllm_attribution".to_owned(),
            username: None,
            password: None,
            cluster: None,
            raw_days: 90,
            ledger_days: 1100,
            embedded_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 8123)),
            embedded_dir: PathBuf::from("./clickhouse"),
        }
    }
}

impl Default for LedgerConfig {
    fn default() -> Self {
        Self {
            theta: Method::THETA_ASSUMED,
            weights: Weights::ASSUMED,
            idle: IdleTo::Separate,
            settle_after: Duration::from_secs(15 * 60),
        }
    }
}
