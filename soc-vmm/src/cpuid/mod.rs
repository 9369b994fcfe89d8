//! The CPUID table of each vCPU, from what the host's KVM supports (Intel SDM volume 2A "CPUID"; AMD APM volume 3 appendix E; KVM
//! api.rst §4.46 and §4.20).
//!
//! First a model makes a [`Processor`] of it: `host` is whatever the host's processor and KVM can do, less what we can't carry; a named
//! one is the same on every host that can give it. Then each vCPU gets its topology and identity.

use api_channel::call::CpuidEntry;

mod compare;
mod feature;
mod host;
mod hyperv;
mod models;
mod processor;
mod spec;
mod topology;
mod words;

pub use compare::difference;
pub use feature::NameError;
pub use host::{HostCpu, ModelDefinition, ModelExpansion};
pub use hyperv::{Enlightenments, HypervSpec};
pub use models::model_names;
pub use processor::Processor;
pub use spec::{CpuSpec, CpuSpecError};
pub use topology::{MAX_CPUS, Place, Topology, TopologyError};

/// Frequency of the local APIC timer that KVM emulates: a nanosecond a tick.
const APIC_KHZ: u32 = 1_000_000;
/// [`CpuidEntry::flags`]: the index counts (`KVM_CPUID_FLAG_SIGNIFCANT_INDEX`).
const INDEXED: u32 = 1;
/// KVM's signature leaf (KVM cpuid.rst).
const KVM_SIGNATURE: u32 = 0x4000_0000;
/// Frequencies of TSC and APIC timer; VMware's leaf, which guests of every hypervisor know.
const HYPERVISOR_FREQUENCIES: u32 = 0x4000_0010;

/// Feature bits that follow what the guest does, or its topology.
mod bits {
    /// Leaf 1 ECX.
    pub(super) const OSXSAVE: u32 = 1 << 27;
    /// Leaf 1 EDX: the package has more than one logical processor.
    pub(super) const HTT: u32 = 1 << 28;
    /// Leaf 7 ECX.
    pub(super) const OSPKE: u32 = 1 << 4;
    /// Leaf 0x80000001 ECX.
    pub(super) const CMP_LEGACY: u32 = 1 << 1;
}

/// What beside the model decides about the guest's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuidConfig {
    /// Sockets, cores, threads.
    pub topology: Topology,
    /// The guest's TSC frequency in kHz, if it is known and constant.
    pub tsc_khz: Option<u32>,
    /// Whether the local APIC timer has its TSC-deadline mode (`KVM_CAP_TSC_DEADLINE_TIMER`, or the bit in the host's table).
    pub tsc_deadline: bool,
}

impl Processor {
    /// The table of the vCPU with `index`, which counts from 0.
    pub fn table(&self, index: u32) -> Vec<CpuidEntry> {
        let guest = Guest {
            config: &self.config,
            apic_id: self.config.topology.apic_id(index),
            // The topology leaf is needed for APIC IDs beyond 8 bits, however old the processor.
            max_leaf: find(&self.base, 0, 0).map_or(0, |basic| basic.eax).max(0xb),
            amd: self.amd,
        };
        let mut table: Vec<_> = self.base.iter().filter(|entry| guest.keeps(entry.function)).copied().collect();
        for entry in &mut table {
            guest.adapt(entry);
        }
        guest.add_own(&mut table);
        if let Some(hyperv) = &self.hyperv {
            hyperv.apply(&mut table);
        }
        table
    }
}

/// The entry of a leaf; `index` counts where the leaf has sub-leaves.
pub fn find(table: &[CpuidEntry], function: u32, index: u32) -> Option<CpuidEntry> {
    table
        .iter()
        .find(|entry| entry.function == function && (entry.flags & INDEXED == 0 || entry.index == index))
        .copied()
}

/// Why there is no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuidError {
    /// Not a table of an x86 processor.
    #[error("the host's CPUID table lacks leaf {leaf:#x}: its shim or its KVM is broken, restart or update the host")]
    Incomplete {
        /// The leaf.
        leaf: u32,
    },
    /// The host has not what was asked for: the sentence says what, and what to do.
    #[error("{0}")]
    Lacks(String),
    /// Too many vCPUs for the first APIC.
    #[error("--cpu: APIC ids beyond 254 need x2apic: leave it on, or give the guest fewer vCPUs")]
    NeedsX2apic,
}

/// One vCPU's view.
struct Guest<'a> {
    config: &'a CpuidConfig,
    apic_id: u32,
    max_leaf: u32,
    amd: bool,
}

impl Guest<'_> {
    /// Whether an entry of the host goes over. The others are made anew, or what they describe is not carried.
    fn keeps(&self, function: u32) -> bool {
        !matches!(
            function,
            // Extended topology, V1 and V2.
            0xb | 0x1f
            // SGX, processor trace.
            | 0x12 | 0x14
            // Frequencies.
            | 0x15 | 0x16 | HYPERVISOR_FREQUENCIES
            // Nested virtualization, memory encryption, AMD's own extended topology.
            | 0x8000_000a | 0x8000_001f | 0x8000_0026
        )
    }

    /// Makes a host's entry the guest's.
    fn adapt(&self, entry: &mut CpuidEntry) {
        let topology = &self.config.topology;
        let per_package = topology.cpus_per_package();
        match entry.function {
            0 => entry.eax = self.max_leaf,
            1 => {
                entry.ebx = entry.ebx & 0xffff | capped(1 << topology.package_bits(), 0xff) << 16 | self.apic_id << 24;
                entry.ecx &= !bits::OSXSAVE;
                set(&mut entry.edx, bits::HTT, per_package > 1);
            }
            4 => {
                self.share_cache(entry);
                if entry.eax & 0x1f != 0 {
                    let cores = 1 << (topology.package_bits() - topology.thread_bits());
                    entry.eax = entry.eax & !(0x3f << 26) | capped(cores - 1, 0x3f) << 26;
                }
            }
            7 if entry.index == 0 => entry.ecx &= !bits::OSPKE,
            KVM_SIGNATURE if self.config.tsc_khz.is_some() => entry.eax = entry.eax.max(HYPERVISOR_FREQUENCIES),
            0x8000_0001 => set(&mut entry.ecx, bits::CMP_LEGACY, self.amd && per_package > 1),
            0x8000_0008 if self.amd => {
                let id_bits = capped(topology.package_bits(), 0xf);
                entry.ecx = entry.ecx & !0xf0ff | capped(per_package - 1, 0xff) | id_bits << 12;
            }
            0x8000_001d => self.share_cache(entry),
            0x8000_001e => {
                let place = topology.place(self.apic_id);
                entry.eax = self.apic_id;
                entry.ebx = capped(topology.threads() - 1, 0xff) << 8 | place.core & 0xff;
                // One node a processor.
                entry.ecx = place.socket & 0xff;
                entry.edx = 0;
            }
            _ => {}
        }
    }

    /// Says who shares a cache (leaves 4 and 0x8000001d): the threads of a core, or from level 3 on the package.
    fn share_cache(&self, entry: &mut CpuidEntry) {
        if entry.eax & 0x1f == 0 {
            return;
        }
        let level = entry.eax >> 5 & 7;
        let topology = &self.config.topology;
        let bits = if level >= 3 { topology.package_bits() } else { topology.thread_bits() };
        entry.eax = entry.eax & !(0xfff << 14) | capped((1 << bits) - 1, 0xfff) << 14;
    }

    /// Adds the leaves that are made anew.
    fn add_own(&self, table: &mut Vec<CpuidEntry>) {
        let topology = &self.config.topology;
        let levels = [
            // Level types: 1 threads of a core, 2 cores of a package, 0 the end.
            (topology.thread_bits(), topology.threads(), 1),
            (topology.package_bits(), topology.cpus_per_package(), 2),
            (0, 0, 0),
        ];
        let leaves = [0xb, 0x1f].into_iter().filter(|leaf| *leaf <= self.max_leaf);
        for function in leaves {
            for (index, (shift, count, kind)) in (0u32..).zip(levels) {
                let ecx = kind << 8 | index;
                let entry = CpuidEntry {
                    index,
                    flags: INDEXED,
                    eax: shift,
                    ebx: count,
                    ecx,
                    edx: self.apic_id,
                    ..empty(function)
                };
                table.push(entry);
            }
        }

        let Some(tsc_khz) = self.config.tsc_khz else { return };
        if find(table, KVM_SIGNATURE, 0).is_some() {
            table.push(CpuidEntry { eax: tsc_khz, ebx: APIC_KHZ, ..empty(HYPERVISOR_FREQUENCIES) });
        }
        if !self.amd
            && self.max_leaf >= 0x15
            && let Some((numerator, denominator)) = tsc_ratio(tsc_khz)
        {
            table.push(CpuidEntry { eax: denominator, ebx: numerator, ecx: APIC_KHZ * 1000, ..empty(0x15) });
        }
        if !self.amd && self.max_leaf >= 0x16 {
            const BUS_MHZ: u32 = 100;
            let mhz = tsc_khz / 1000;
            table.push(CpuidEntry { eax: mhz, ebx: mhz, ecx: BUS_MHZ, ..empty(0x16) });
        }
    }
}

/// TSC to crystal as a fraction (leaf 0x15), the crystal being the clock of the local APIC timer, because guests take it for that.
/// `None` where the fraction is too large for guests that multiply it by the crystal's kHz in 32 bits, as Linux does: they measure
/// then, or ask the other leaf.
fn tsc_ratio(tsc_khz: u32) -> Option<(u32, u32)> {
    let divisor = greatest_common_divisor(tsc_khz, APIC_KHZ);
    let (numerator, denominator) = (tsc_khz / divisor, APIC_KHZ / divisor);
    (numerator != 0 && numerator.checked_mul(APIC_KHZ).is_some()).then_some((numerator, denominator))
}

fn greatest_common_divisor(mut a: u32, mut b: u32) -> u32 {
    while b != 0 {
        (a, b) = (b, a % b);
    }
    a
}

/// Whether the vendor string is one of those whose processors follow AMD's manual.
fn is_amd(basic: &CpuidEntry) -> bool {
    let vendor = [basic.ebx, basic.edx, basic.ecx].map(u32::to_le_bytes).concat();
    matches!(&vendor[..], b"AuthenticAMD" | b"HygonGenuine")
}

fn empty(function: u32) -> CpuidEntry {
    CpuidEntry { function, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0, reserved: 0 }
}

fn set(word: &mut u32, bit: u32, on: bool) {
    *word = if on { *word | bit } else { *word & !bit };
}

/// `value`, or the most that its field holds.
fn capped(value: u32, most: u32) -> u32 {
    value.min(most)
}

#[cfg(test)]
mod tests;
