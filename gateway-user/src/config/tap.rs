//! Section `tap`: what the kernel probe watches.

use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

use serde::{Serialize, Serializer};

use super::{
    schema::Config,
    units::{ByteSize, serialize_duration},
    values::ValueError,
};

/// Section `tap`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TapConfig {
    /// Ports that are watched; empty (default): those of the upstreams, see [`Config::tap_ports`].
    pub ports: Vec<u16>,
    /// Whose sockets are watched. Default `auto`.
    pub cgroup: CgroupChoice,
    /// Size of the ring between kernel and gateway, a power of two. Default 16 MiB: at 50 000 records a second (an event of
    /// a stream has some 300 bytes, and takes 584 in the ring) the gateway may be held up for half a second and still loses none.
    pub ring_bytes: ByteSize,
    /// How much of each packet to a server is captured; its true length is always known. Default 16 KiB: whole heads, and small bodies.
    pub ingress_prefix_bytes: ByteSize,
    /// Whether a helper process keeps the capabilities to attach again when a server comes back in another cgroup. Default true.
    pub reattach: bool,
    /// Time between two looks into the ring. Default 2 ms; times come from the kernel, so that it costs no accuracy.
    #[serde(serialize_with = "serialize_duration")]
    pub poll_interval: Duration,
}

impl TapConfig {
    /// Smallest ring: it must hold some records of the largest size.
    pub const RING_MIN: ByteSize = ByteSize::from_kib(64);

    /// Largest ring: it is memory of the kernel that cannot be swapped out.
    pub const RING_MAX: ByteSize = ByteSize::from_mib(1024);
}

impl Default for TapConfig {
    fn default() -> Self {
        Self {
            ports: Vec::new(),
            cgroup: CgroupChoice::Auto,
            ring_bytes: ByteSize::from_mib(16),
            ingress_prefix_bytes: ByteSize::from_kib(16),
            reattach: true,
            poll_interval: Duration::from_millis(2),
        }
    }
}

impl Config {
    /// The ports that the kernel probe watches: the configured ones, or else those of all upstreams, each once.
    pub fn tap_ports(&self) -> Vec<u16> {
        let mut ports = self.tap.ports.clone();
        if ports.is_empty() {
            ports = self
                .upstreams
                .iter()
                .map(|upstream| upstream.url.port())
                .collect();
        }
        ports.sort_unstable();
        ports.dedup();
        ports
    }
}

/// The cgroup whose sockets are watched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CgroupChoice {
    /// That of the socket that listens on the watched ports, and the root while there is none.
    Auto,
    /// A directory: absolute, or below the mount of cgroup2.
    Path(PathBuf),
    /// That of a systemd unit, such as `vllm.service`.
    Unit(String),
    /// That of a container, by its id or the beginning of it.
    Container(String),
}

impl CgroupChoice {
    /// Shortest beginning of a container's id, as `docker ps` prints it.
    const CONTAINER_ID_MIN: usize = 12;
}

impl fmt::Display for CgroupChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Path(path) => path.display().fmt(f),
            Self::Unit(unit) => write!(f, "unit:{unit}"),
            Self::Container(id) => write!(f, "container:{id}"),
        }
    }
}

impl Serialize for CgroupChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for CgroupChoice {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let refuse = |reason: &str| Err(ValueError(reason.into()));
        if text.contains(char::is_control) {
            return refuse("it has a line end or another control character in it");
        }
        if let Some(unit) = text.strip_prefix("unit:") {
            return match unit.rsplit_once('.') {
                Some((name, "service" | "scope" | "slice")) if !name.is_empty() && !unit.contains('/') => {
                    Ok(Self::Unit(unit.to_owned()))
                }
                _ => refuse("a unit is named as in unit:vllm.service (or .scope, .slice)"),
            };
        }
        if let Some(id) = text.strip_prefix("container:") {
            let is_id = id.len() >= Self::CONTAINER_ID_MIN
                && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
            return if is_id {
                Ok(Self::Container(id.to_owned()))
            } else {
                refuse("a container is given by at least 12 digits of its id, as `docker ps` prints it")
            };
        }
        match text {
            "auto" => Ok(Self::Auto),
            path if path.starts_with('/') => Ok(Self::Path(path.into())),
            _ => refuse("it must be the word auto, or begin with /, unit: or container:"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_choice_reads_back_as_it_is_written() {
        for text in [
            "auto",
            "/sys/fs/cgroup/vllm.slice",
            "unit:vllm@0.service",
            "container:0123456789ab",
        ] {
            let choice: CgroupChoice = text.parse().unwrap();
            assert_eq!(choice.to_string(), text);
        }
    }

    #[test]
    fn what_names_no_cgroup_is_refused() {
        for text in [
            "",
            "root",
            "vllm.slice",
            "unit:vllm",
            "unit:.service",
            "unit:a/b.service",
            "container:0123456789",
            "container:vllm-container",
            "/a\nb",
        ] {
            assert!(text.parse::<CgroupChoice>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn ports_are_those_of_the_upstreams_unless_they_are_said() {
        let mut config = Config::default();
        assert_eq!(config.tap_ports(), [8000, 8001]);
        let again = config.upstreams[0].clone();
        config.upstreams.push(again);
        assert_eq!(config.tap_ports(), [8000, 8001]);
        config.tap.ports = vec![9000, 80, 9000];
        assert_eq!(config.tap_ports(), [80, 9000]);
    }
}
