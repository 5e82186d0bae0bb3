//! Configuration: one YAML file and the environment become one typed, validated [`Config`].

mod schema;
pub mod units;
mod values;

pub use schema::{
    AdminConfig, Capture, Config, GatewayConfig, IdentityConfig, Inject, LogConfig, LogFormat, LogLevel,
    MetricsConfig, OnUninspectable, ProxyConfig, RuntimeKind, Serves, SpoolConfig, StoreConfig,
    UpstreamConfig, UsageConfig, VllmConfig,
};
pub use units::ByteSize;
pub use values::{HeaderName, MASK, Name, Secret, StoreUrl, UpstreamUrl, ValueError};

fn host_name() -> Name {
    let node = rustix::system::uname();
    Name::from_lossy(&node.nodename().to_string_lossy()).unwrap_or_else(|| Name::from_static("gateway"))
}
