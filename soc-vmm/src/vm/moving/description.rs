//! What a machine is, as far as a guest that goes on in another one can tell: compared before its first page moves.

use std::collections::BTreeMap;

use api_channel::call::CpuidEntry;
use serde::{Deserialize, Serialize};

use crate::cpuid;
use crate::persist::{Fact, Facts, Saved, States};

/// How far the TSC may run off, in millionths: what KVM counts as the same frequency (its parameter `tsc_tolerance_ppm`).
const TSC_TOLERANCE: u64 = 250;

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(in crate::vm) struct Description {
    /// Bytes of RAM.
    pub(in crate::vm) memory: u64,
    /// RAM and ROM, by allocation: pages.
    pub(in crate::vm) regions: BTreeMap<u32, u64>,
    /// Sockets, cores of each, threads of each.
    pub(in crate::vm) topology: [u32; 3],
    /// The processors that are there.
    pub(in crate::vm) processors: Vec<usize>,
    /// The boot processor's CPUID: leaf, subleaf, flags, EAX, EBX, ECX, EDX.
    pub(in crate::vm) cpuid: Vec<[u32; 7]>,
    /// The TSC's frequency.
    pub(in crate::vm) tsc_khz: u32,
    /// Whether the I/O APIC is this side's, and not the host's.
    pub(in crate::vm) split: bool,
    /// The version of each device's state, by the device's name.
    pub(in crate::vm) devices: BTreeMap<String, u32>,
    /// What they were made with. What only one side tells is for the other one's state to refuse.
    #[serde(default)]
    pub(in crate::vm) facts: BTreeMap<String, Facts>,
}

/// Why a machine can't go on as another.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(in crate::vm) enum Difference {
    #[error(
        "what the source says of its machine can't be read ({0}): it is of another version of soc-vmm; upgrade the older side"
    )]
    Unreadable(String),
    #[error("the source's guest has {theirs} MiB of RAM, this one {ours}: start it with --memory {theirs}")]
    Memory { theirs: u64, ours: u64 },
    #[error(
        "the source's guest can have {theirs} vCPUs (sockets, cores, threads), this one {ours}: start it with the same --cpus"
    )]
    Topology { theirs: String, ours: String },
    #[error("the source's guest has the vCPUs {theirs}, this one {ours}: start it with the same ones")]
    Processors { theirs: String, ours: String },
    #[error(
        "this host's processor is another one for the guest: {0}; start both sides with a --cpu model that both hosts can give"
    )]
    Processor(String),
    #[error(
        "the source's TSC runs at {theirs} kHz, this host's at {ours}: the guest's clock would run wrong here; take another host"
    )]
    Tsc { theirs: u32, ours: u32 },
    #[error("the source has {theirs}, this VM has {ours}: start it with the same --iommu")]
    Iommu { theirs: &'static str, ours: &'static str },
    #[error(
        "the source's ROM and RAM are of other sizes than this VM's: start it with the same --memory, --numa and --firmware"
    )]
    Regions,
    #[error("the source has {0}, which this VM doesn't have: start it with the devices of the source, in their places")]
    Lacks(String),
    #[error("this VM has {0}, which the source doesn't have: start it with the devices of the source, in their places")]
    Superfluous(String),
    #[error(
        "the state of {name} is of version {theirs}, this soc-vmm knows version {ours}: use one as old as the source's"
    )]
    Version { name: String, theirs: u32, ours: u32 },
    #[error(
        "{name} has {theirs} {what} at the source, {ours} here{}: start this VM with the device as it is there",
        if *.may_be_more { ", which may be more but not less" } else { "" }
    )]
    Fact { name: String, what: String, theirs: u64, ours: u64, may_be_more: bool },
}

impl Description {
    /// The table as it is compared.
    pub(in crate::vm) fn words(table: &[CpuidEntry]) -> Vec<[u32; 7]> {
        table.iter().map(|e| [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx]).collect()
    }

    /// The versions of these states, and what their devices were made with.
    pub(in crate::vm) fn of_devices(states: States) -> (BTreeMap<String, u32>, BTreeMap<String, Facts>) {
        let facts = states.facts().clone();
        (states.into_iter().map(|(name, Saved { version, .. })| (name, version)).collect(), facts)
    }

    /// The first thing that a device has otherwise here.
    fn other_fact(&self, source: &Self) -> Option<Difference> {
        let mut facts =
            source.facts.iter().flat_map(|(name, facts)| facts.iter().map(move |(what, fact)| (name, what, fact)));
        facts.find_map(|(name, what, theirs)| {
            let (theirs, ours, may_be_more) = match (theirs, self.facts.get(name)?.get(what)?) {
                (&Fact::Is(theirs), &Fact::Is(ours)) if theirs != ours => (theirs, ours, false),
                (&Fact::AtLeast(theirs), &Fact::AtLeast(ours)) if theirs > ours => (theirs, ours, true),
                _ => return None,
            };
            Some(Difference::Fact { name: name.clone(), what: what.clone(), theirs, ours, may_be_more })
        })
    }

    fn table(&self) -> Vec<CpuidEntry> {
        let entry = |&[function, index, flags, eax, ebx, ecx, edx]: &[u32; 7]| CpuidEntry {
            function,
            index,
            flags,
            eax,
            ebx,
            ecx,
            edx,
            reserved: 0,
        };
        self.cpuid.iter().map(entry).collect()
    }

    /// Whether a guest of the machine `source` can go on in this one.
    ///
    /// # Errors
    /// The first thing that it would find changed, and what to do.
    pub(in crate::vm) fn check(&self, source: &[u8]) -> Result<(), Difference> {
        let source: Self = serde_json::from_slice(source).map_err(|e| Difference::Unreadable(e.to_string()))?;
        let mib = |bytes: u64| bytes >> 20;
        let iommu = |split| if split { "an IOMMU" } else { "no IOMMU" };
        if source.memory != self.memory {
            return Err(Difference::Memory { theirs: mib(source.memory), ours: mib(self.memory) });
        }
        if source.topology != self.topology {
            let said = |[sockets, cores, threads]: [u32; 3]| format!("{sockets}×{cores}×{threads}");
            return Err(Difference::Topology { theirs: said(source.topology), ours: said(self.topology) });
        }
        if source.processors != self.processors {
            let said = |list: &[usize]| list.iter().map(usize::to_string).collect::<Vec<_>>().join(", ");
            return Err(Difference::Processors { theirs: said(&source.processors), ours: said(&self.processors) });
        }
        if let Some(what) = cpuid::difference(&source.table(), &self.table()) {
            return Err(Difference::Processor(what));
        }
        let apart = u64::from(source.tsc_khz.abs_diff(self.tsc_khz));
        if apart * 1_000_000 > TSC_TOLERANCE * u64::from(source.tsc_khz) {
            return Err(Difference::Tsc { theirs: source.tsc_khz, ours: self.tsc_khz });
        }
        if source.split != self.split {
            return Err(Difference::Iommu { theirs: iommu(source.split), ours: iommu(self.split) });
        }
        if source.regions != self.regions {
            return Err(Difference::Regions);
        }
        if let Some(name) = only_in(&source.devices, &self.devices) {
            return Err(Difference::Lacks(name));
        }
        if let Some(name) = only_in(&self.devices, &source.devices) {
            return Err(Difference::Superfluous(name));
        }
        let other = source.devices.iter().find(|(name, version)| self.devices[*name] != **version);
        if let Some((name, &theirs)) = other {
            return Err(Difference::Version { name: name.clone(), theirs, ours: self.devices[name] });
        }
        self.other_fact(&source).map_or(Ok(()), Err)
    }
}

/// A device that is there and not here: rather one that was asked for than the port that came with it.
fn only_in(there: &BTreeMap<String, u32>, here: &BTreeMap<String, u32>) -> Option<String> {
    let comes_with_others = |name: &str| ["pcie-root-port", "virtio-pci"].iter().any(|port| name.starts_with(port));
    let missing = there.keys().filter(|name| !here.contains_key(*name));
    missing.min_by_key(|name| comes_with_others(name)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ours() -> Description {
        Description {
            memory: 512 << 20,
            regions: BTreeMap::from([(0, 512 << 8)]),
            topology: [1, 2, 1],
            processors: vec![0, 1],
            cpuid: vec![[1, 0, 0, 0x800f12, 0, 1, 2]],
            tsc_khz: 2_400_000,
            split: false,
            devices: BTreeMap::from([("serial".into(), 1), (DISK.into(), 1)]),
            facts: BTreeMap::from([(DISK.into(), facts(4, 1 << 20))]),
        }
    }

    const DISK: &str = "virtio-blk@01.0/00.0";

    fn facts(queues: u64, sectors: u64) -> Facts {
        [("queues".into(), Fact::Is(queues)), ("sectors".into(), Fact::AtLeast(sectors))].into()
    }

    #[test]
    fn the_first_difference_is_told_in_words() {
        let said = |change: &dyn Fn(&mut Description)| {
            let mut source = ours();
            change(&mut source);
            ours().check(&serde_json::to_vec(&source).unwrap()).map_err(|e| e.to_string())
        };
        assert_eq!(said(&|_| {}), Ok(()));
        assert_eq!(said(&|s| s.tsc_khz += 500), Ok(()));
        assert_eq!(said(&|s| _ = s.facts.insert(DISK.into(), facts(4, 1 << 19))), Ok(()));
        // One that tells less, and one that tells more.
        assert_eq!(said(&|s| s.facts.clear()), Ok(()));
        assert_eq!(said(&|s| _ = s.facts.get_mut(DISK).unwrap().insert("more".into(), Fact::Is(1))), Ok(()));
        for (change, part) in [
            (&(|s: &mut Description| s.memory <<= 1) as &dyn Fn(&mut Description), "1024 MiB of RAM, this one 512"),
            (&|s| s.topology = [2, 1, 1], "2×1×1 vCPUs"),
            (&|s| s.processors = vec![0], "the vCPUs 0, this one 0, 1"),
            (&|s| s.cpuid[0][5] = 3, "it lacks pclmulqdq"),
            (&|s| s.tsc_khz = 2_500_000, "2500000 kHz"),
            (&|s| s.split = true, "the source has an IOMMU, this VM has no IOMMU"),
            (&|s| s.regions = BTreeMap::new(), "other sizes"),
            (&|s| _ = s.devices.insert("virtio-net@02.0/00.0".into(), 1), "the source has virtio-net@02.0/00.0"),
            (&|s| _ = s.devices.remove("serial"), "this VM has serial"),
            (&|s| _ = s.devices.insert("serial".into(), 2), "state of serial is of version 2"),
            (&|s| _ = s.facts.insert(DISK.into(), facts(1, 1 << 20)), "has 1 queues at the source, 4 here: start"),
            (
                &|s| _ = s.facts.insert(DISK.into(), facts(4, 2 << 20)),
                "2097152 sectors at the source, 1048576 here, which",
            ),
        ] {
            let why = said(change).unwrap_err();
            assert!(why.contains(part), "{why}");
        }
        assert!(ours().check(b"{").unwrap_err().to_string().contains("can't be read"));
    }
}
