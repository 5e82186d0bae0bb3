//! `process_*`: what every exporter on Linux tells about its own process, read from `/proc/self` at each scrape.
//!
//! Written here rather than taken from the metrics crate, whose version brings a general parser of `/proc` with it. Elsewhere than
//! on Linux, and for a value that cannot be read, the family is absent.

use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, Gauge, Metric, MetricFamily, MetricType};
use std::collections::HashMap;
use std::fs;

/// `utime` and `stime` are in units of `USER_HZ`, which the kernel's interface fixes at 100 on every architecture that this
/// program is built for, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

type Read = fn() -> Option<f64>;

const FAMILIES: [(&str, &str, MetricType, Read); 5] = [
    (
        "process_cpu_seconds_total",
        "User and system CPU time of this process.",
        MetricType::COUNTER,
        cpu_seconds,
    ),
    (
        "process_resident_memory_bytes",
        "Memory of this process that is in RAM.",
        MetricType::GAUGE,
        || status_bytes("VmRSS:"),
    ),
    (
        "process_virtual_memory_bytes",
        "Address space of this process.",
        MetricType::GAUGE,
        || status_bytes("VmSize:"),
    ),
    (
        "process_open_fds",
        "File descriptors in use.",
        MetricType::GAUGE,
        open_descriptors,
    ),
    (
        "process_max_fds",
        "File descriptors that this process may use.",
        MetricType::GAUGE,
        max_descriptors,
    ),
];

/// The `process_*` families.
pub(super) struct Process {
    descs: Vec<Desc>,
}

impl Process {
    pub(super) fn new() -> prometheus::Result<Process> {
        let desc = |name: &str, help: &str| Desc::new(name.into(), help.into(), Vec::new(), HashMap::new());
        let descs = FAMILIES
            .iter()
            .map(|(name, help, ..)| desc(name, help))
            .collect::<Result<_, _>>()?;
        Ok(Process { descs })
    }
}

impl Collector for Process {
    fn desc(&self) -> Vec<&Desc> {
        self.descs.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        let families = FAMILIES.iter();
        families
            .filter_map(|(name, help, kind, read)| Some(family(name, help, *kind, read()?)))
            .collect()
    }
}

fn family(name: &str, help: &str, kind: MetricType, value: f64) -> MetricFamily {
    let mut metric = Metric::default();
    if kind == MetricType::COUNTER {
        let mut counter = Counter::default();
        counter.set_value(value);
        metric.set_counter(counter);
    } else {
        let mut gauge = Gauge::default();
        gauge.set_value(value);
        metric.set_gauge(gauge);
    }
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(kind);
    family.set_metric(vec![metric]);
    family
}

fn cpu_seconds() -> Option<f64> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    // The program's name, the second field, stands in parentheses and may itself hold spaces and parentheses.
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace().skip(11);
    let (user, system): (f64, f64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((user + system) / TICKS_PER_SECOND)
}

fn status_bytes(key: &str) -> Option<f64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key))?;
    let kibibytes: f64 = value.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes * 1024.0)
}

fn open_descriptors() -> Option<f64> {
    // Reading the folder takes a descriptor, which is in the list that it reads.
    Some(fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1) as f64)
}

fn max_descriptors() -> Option<f64> {
    let limits = fs::read_to_string("/proc/self/limits").ok()?;
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    soft.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn every_family_reads_a_plausible_value_of_this_very_process() {
        let ballast = vec![1u8; 32 << 20];
        let held = fs::File::open("/proc/self/stat").unwrap();
        let values: HashMap<&str, f64> = FAMILIES
            .iter()
            .map(|(name, _, _, read)| (*name, read().unwrap()))
            .collect();
        assert!(
            values["process_resident_memory_bytes"] > ballast.len() as f64,
            "{values:?}"
        );
        assert!(values["process_virtual_memory_bytes"] >= values["process_resident_memory_bytes"]);
        assert!(
            values["process_open_fds"] >= 4.0,
            "three standard streams and {held:?}: {values:?}"
        );
        assert!(values["process_open_fds"] <= values["process_max_fds"]);
        assert!(values["process_cpu_seconds_total"] < 3600.0, "{values:?}");
    }
}
