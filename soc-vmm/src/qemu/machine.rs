//! The machine itself: `-machine`, `-accel`, `-cpu`, `-m`, `-smp`, `-numa`.

use std::path::PathBuf;

use serde::Deserialize;

use super::small::stripped;
use super::{Properties, Size, Switch, Wrong, inert};
use crate::cli::{DirtyRing, ValueError};
use crate::cpuid::{CpuSpec, CpuSpecError};

/// `-machine`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachineOption {
    /// Which machine.
    pub kind: MachineKind,
    /// The object that is its memory.
    pub memory: Option<String>,
    /// The block nodes of its flash: code, variables.
    pub flash: [Option<String>; 2],
    /// Whether there are ACPI tables.
    pub acpi: bool,
    /// Its firmware's image.
    pub firmware: Option<PathBuf>,
}

/// Machines.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineKind {
    /// None: this process answers what it could do.
    None,
    /// `q35`, in any version.
    Q35,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct MachineProperties {
    accel: Option<String>,
    memory_backend: Option<String>,
    pflash0: Option<String>,
    pflash1: Option<String>,
    #[serde(default)]
    acpi: Switch,
    firmware: Option<PathBuf>,
}

impl MachineOption {
    /// Reads the value of `-machine`.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        let mut properties = stripped("-machine", text, Some("type"))?;
        let kind = match &*properties.take("type")? {
            "none" => MachineKind::None,
            "q35" => MachineKind::Q35,
            name if name.strip_prefix("pc-q35-").is_some_and(is_version) => MachineKind::Q35,
            other => {
                let other = other.escape_default();
                return Err(Wrong::new(format!("there is no machine '{other}': write q35")).at("type"));
            }
        };
        let read: MachineProperties = properties.read()?;
        if let Some(accel) = &read.accel {
            check_accel(accel).map_err(|wrong| wrong.at("accel"))?;
        }
        Ok(Self {
            kind,
            memory: read.memory_backend,
            flash: [read.pflash0, read.pflash1],
            acpi: read.acpi != Switch::Off,
            firmware: read.firmware,
        })
    }
}

fn is_version(text: &str) -> bool {
    let number = |part: &str| !part.is_empty() && part.len() <= 3 && part.bytes().all(|b| b.is_ascii_digit());
    text.split_once('.').is_some_and(|(major, minor)| number(major) && number(minor))
}

/// `Ok` if the first accelerator of a list is KVM.
pub(super) fn check_accel(list: &str) -> Result<(), Wrong> {
    match list.split(':').next() {
        Some("kvm") => Ok(()),
        _ => {
            let list = list.escape_default();
            Err(Wrong::new(format!(
                "'{list}' is not there, guests run on KVM: write kvm (in libvirt <domain type='kvm'>)"
            )))
        }
    }
}

/// Reads the value of `-accel`: what it says of dirty rings.
pub(super) fn accel(text: &str) -> Result<Option<DirtyRing>, Wrong> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields, rename_all = "kebab-case")]
    struct Accel {
        accel: String,
        dirty_ring_size: Option<String>,
    }
    let Accel { accel, dirty_ring_size } = stripped("-accel", text, Some("accel"))?.read()?;
    check_accel(&accel)?;
    let ring = dirty_ring_size
        .map(|size| size.parse().map_err(|e: ValueError| Wrong::new(e.to_string()).at("dirty-ring-size")));
    ring.transpose()
}

/// Reads the value of `-cpu`.
///
/// # Errors
/// There is no such model or feature.
pub(super) fn cpu(text: &str) -> Result<CpuSpec, Wrong> {
    let (model, switches) = text.split_once(',').map_or((text, None), |(model, switches)| (model, Some(switches)));
    let mut kept = vec![model.to_owned()];
    for switch in switches.into_iter().flat_map(|switches| switches.split(',')) {
        let (key, value) = switch.split_once('=').unwrap_or((switch, "on"));
        let known = inert::INERT.iter().find(|inert| inert.of.contains(&"-cpu") && inert.key == key);
        if known.is_some_and(|inert| inert.values.is_empty() || inert.values.contains(&value)) {
            continue;
        }
        let alone = format!("host,{switch}").parse::<CpuSpec>();
        // What the host has of these its guest sees, and it has none that the host has not: see docs/qemu-command-line.md.
        if matches!(alone, Err(CpuSpecError::Feature(crate::cpuid::NameError::OfMsr(_)))) && value == "on" {
            continue;
        }
        kept.push(switch.to_owned());
    }
    kept.join(",").parse().map_err(|e: CpuSpecError| Wrong::new(e.to_string()))
}

/// `-m`: bytes.
///
/// # Errors
/// It can't be meant, or memory could be added later.
pub(super) fn memory(text: &str) -> Result<u64, Wrong> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Memory {
        size: Size,
        slots: Option<u32>,
        maxmem: Option<Size>,
    }
    let Memory { size, slots, maxmem } = Properties::parse(text, Some("size"))?.read()?;
    if slots.is_some_and(|slots| slots > 0) || maxmem.is_some() {
        return Err(Wrong::new("memory can't be added later: leave it out").at("maxmem"));
    }
    let bytes = size.bytes_of_mib().filter(|bytes| *bytes > 0 && bytes.is_multiple_of(4096));
    bytes.ok_or_else(|| Wrong::new("a VM has whole pages of 4 KiB, as many as a host has at most").at("size"))
}

/// `-smp`, in the words of `run --cpus`.
///
/// # Errors
/// It can't be meant.
pub(super) fn processors(text: &str) -> Result<String, Wrong> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Smp {
        cpus: Option<u32>,
        maxcpus: Option<u32>,
        sockets: Option<u32>,
        cores: Option<u32>,
        threads: Option<u32>,
    }
    let Smp { cpus, maxcpus, sockets, cores, threads } = stripped("-smp", text, Some("cpus"))?.read()?;
    let product =
        [sockets, cores, threads].iter().flatten().try_fold(1u32, |product, count| product.checked_mul(*count));
    let product = product.ok_or_else(|| Wrong::new("no machine has that many processors"))?;
    let maxcpus = maxcpus.filter(|count| *count > 0);
    let cpus = cpus.filter(|count| *count > 0).or(maxcpus).unwrap_or(product);
    let others = [("maxcpus", maxcpus), ("sockets", sockets), ("cores", cores), ("threads", threads)];
    let others = others.iter().filter_map(|(key, value)| Some(format!(",{key}={}", (*value)?)));
    Ok(std::iter::once(cpus.to_string()).chain(others).collect())
}

/// `-numa node`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaOption {
    /// Its number.
    pub node: Option<u16>,
    /// Its vCPUs, as they are written.
    pub cpus: Vec<String>,
    /// The object that is its memory.
    pub memory: String,
}

impl NumaOption {
    /// Reads the value of `-numa`.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct Node {
            nodeid: Option<u16>,
            #[serde(default)]
            cpus: Vec<String>,
            memdev: String,
        }
        let mut properties = Properties::parse_lists(text, Some("type"), &["cpus"])?;
        match &*properties.take("type")? {
            "node" => {
                let Node { nodeid, cpus, memdev } = properties.read()?;
                Ok(Self { node: nodeid, cpus, memory: memdev })
            }
            other => {
                let other = other.escape_default();
                Err(Wrong::new(format!(
                    "'{other}' is not there: nodes are as far from each other as the tables' default says"
                )))
            }
        }
    }
}
