//! Loads the kernel probe and sets it up. It is part of this program, so that nothing has to be found or built where it runs.

use super::counters::Counters;
use super::diagnostics::Diagnostics;
use super::error::TapError;
use super::link::Programs;
use super::privileges;
use super::ring::Ring;
use crate::config::Config;
use aya::maps::{Array, Map, MapError};
use aya::programs::{CgroupSkb, ProgramError};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfError, EbpfLoader, Pod};
use gateway_common::counter::{COUNTERS, DIRECTIONS};
use gateway_common::record::RING;
use gateway_common::setting::{PORTS, SETTINGS, Settings, port_bit};
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

/// The compiled probe. `cargo xtask build-ebpf` makes it; a test of xtask fails when it is not made of the sources as they are.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../gateway-ebpf/prebuilt/gateway-ebpf.o");

/// The oldest kernel on which all that is used exists: links to cgroups are from 5.7, ring buffers from 5.8, and since 5.11 maps count
/// as the cgroup's memory, not against a limit on locked memory, which is 64 KiB by default. The oldest that it is tested on is 6.1.
const OLDEST_KERNEL: (KernelVersion, &str) = (KernelVersion::new(5, 11, 0), "5.11");

/// What the probe is to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Watch {
    /// The ports that servers listen on.
    pub ports: Vec<u16>,
    /// Size of the ring: a power of two, and a multiple of a page.
    pub ring_bytes: u32,
    /// How much of each packet to a server is captured.
    pub ingress_prefix_bytes: u32,
}

impl Watch {
    /// What the config asks for.
    pub fn of(config: &Config) -> Watch {
        let bytes = |size: crate::config::ByteSize| u32::try_from(size.bytes()).unwrap_or(u32::MAX);
        Watch {
            ports: config.tap_ports(),
            ring_bytes: bytes(config.tap.ring_bytes),
            ingress_prefix_bytes: bytes(config.tap.ingress_prefix_bytes),
        }
    }
}

/// The probe in the kernel. It sees nothing until its programs are attached.
#[derive(Debug)]
pub struct Probe {
    /// To be attached to cgroups.
    pub programs: Programs,
    /// What it saw.
    pub ring: Ring,
    /// What it counted.
    pub counters: Counters,
    /// What it says of itself.
    pub diagnostics: Diagnostics,
}

impl Probe {
    /// Loads it. Takes CAP_BPF and CAP_NET_ADMIN; with CAP_PERFMON besides it writes lines about packets that should not be.
    ///
    /// # Errors
    /// [`TapError`], which says what is missing.
    pub fn load(watch: &Watch) -> Result<Probe, TapError> {
        check_kernel()?;
        privileges::check()?;
        let cpus = aya::util::nr_cpus()
            .ok()
            .and_then(|cpus| u32::try_from(cpus).ok());
        // Without a number the probe lets all processors share the first one's counters.
        let cpus = cpus.unwrap_or(1);
        let mut object = EbpfLoader::new()
            // The probe reads no kernel structure, so that it does not matter how they are laid out.
            .btf(None)
            .map_max_entries(RING, watch.ring_bytes)
            .map_max_entries(COUNTERS, cpus * DIRECTIONS)
            .load(OBJECT)
            .map_err(|source| explain_load(source, watch))?;
        set_up(&mut object, watch)?;
        // On 6.1 the verifier lets only who has CAP_PERFMON load what writes lines; the silent ones count the same.
        let (ingress, egress) = if privileges::may_log() {
            ("ingress", "egress")
        } else {
            ("ingress_silent", "egress_silent")
        };
        let programs = Programs {
            ingress: load_program(&mut object, ingress)?,
            egress: load_program(&mut object, egress)?,
        };
        let ring = Ring::open(take_map(&mut object, RING)?)?;
        let Map::Array(counters) = take_map(&mut object, COUNTERS)? else {
            return Err(TapError::Missing { part: COUNTERS });
        };
        let counters = Counters::open(&counters, cpus)?;
        Ok(Probe {
            programs,
            ring,
            counters,
            diagnostics: Diagnostics::open(&mut object)?,
        })
    }
}

fn check_kernel() -> Result<(), TapError> {
    let (oldest, needed) = OLDEST_KERNEL;
    match KernelVersion::current() {
        Ok(version) if version < oldest => Err(TapError::OldKernel {
            needed,
            found: rustix::system::uname().release().to_string_lossy().into_owned(),
        }),
        // A system that does not say which kernel it has may still have the right one.
        _ => Ok(()),
    }
}

/// Settings as the array map takes them.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct PlainSettings(Settings);

// SAFETY: two numbers without padding, for which any bytes are valid.
unsafe impl Pod for PlainSettings {}

fn set_up(object: &mut Ebpf, watch: &Watch) -> Result<(), TapError> {
    let settings = Settings {
        ingress_prefix_bytes: watch.ingress_prefix_bytes,
        reserved: 0,
    };
    let mut map = array::<PlainSettings>(object, SETTINGS)?;
    map.set(0, PlainSettings(settings), 0)
        .map_err(|source| TapError::map(SETTINGS, source))?;
    let mut words = BTreeMap::<u32, u64>::new();
    for &port in &watch.ports {
        let (word, bit) = port_bit(port);
        *words.entry(word).or_default() |= bit;
    }
    let mut map = array::<u64>(object, PORTS)?;
    words
        .into_iter()
        .try_for_each(|(word, bits)| map.set(word, bits, 0))
        .map_err(|source| TapError::map(PORTS, source))
}

fn array<'a, T: Pod>(
    object: &'a mut Ebpf,
    name: &'static str,
) -> Result<Array<&'a mut aya::maps::MapData, T>, TapError> {
    let map = object.map_mut(name).ok_or(TapError::Missing { part: name })?;
    Array::try_from(map).map_err(|source| TapError::map(name, source))
}

fn take_map(object: &mut Ebpf, name: &'static str) -> Result<Map, TapError> {
    object.take_map(name).ok_or(TapError::Missing { part: name })
}

/// Has the kernel check a program, and keeps a descriptor of it: the object can go.
fn load_program(object: &mut Ebpf, name: &'static str) -> Result<OwnedFd, TapError> {
    let program = object.program_mut(name).ok_or(TapError::Missing { part: name })?;
    let load = |program: &mut aya::programs::Program| -> Result<OwnedFd, ProgramError> {
        let program: &mut CgroupSkb = program.try_into()?;
        program.load()?;
        Ok(program.fd()?.as_fd().try_clone_to_owned()?)
    };
    load(program).map_err(|source| match source {
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } if io_error.kind() == io::ErrorKind::PermissionDenied
            && verifier_log.to_string().trim().is_empty() =>
        {
            TapError::Forbidden {
                call: format!("loading the {name} program"),
                source: io_error,
            }
        }
        ProgramError::LoadError {
            io_error,
            verifier_log,
        } => TapError::Refused {
            program: name,
            source: io_error,
            log: verifier_log.to_string(),
        },
        source => TapError::Program {
            program: name,
            source: Box::new(source),
        },
    })
}

fn explain_load(source: EbpfError, watch: &Watch) -> TapError {
    match source {
        EbpfError::MapError(MapError::CreateError { name, io_error }) => {
            if io_error.kind() == io::ErrorKind::PermissionDenied {
                TapError::Forbidden {
                    call: format!("making the map {name}"),
                    source: io_error,
                }
            } else if name == RING {
                TapError::RingSize {
                    bytes: watch.ring_bytes,
                    source: io_error,
                }
            } else {
                let source = MapError::CreateError { name, io_error };
                TapError::Load {
                    source: Box::new(source.into()),
                }
            }
        }
        source => TapError::Load {
            source: Box::new(source),
        },
    }
}
