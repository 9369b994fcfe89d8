//! Whether a guest that has seen one table can go on with another.

use api_channel::call::CpuidEntry;

use super::feature::FeatureSet;
use super::{HYPERVISOR_FREQUENCIES, INDEXED};

/// Leaves that tell frequencies, which two hosts of one kind measure a little differently: who moves a guest compares those themselves.
const FREQUENCIES: [u32; 3] = [0x15, 0x16, HYPERVISOR_FREQUENCIES];

/// What a guest of a vCPU with the table `seen` would miss or find changed with `ours`, in words; none: nothing.
pub fn difference(seen: &[CpuidEntry], ours: &[CpuidEntry]) -> Option<String> {
    let [theirs, here] = [seen, ours].map(FeatureSet::of_table);
    let (lost, new) = (theirs.without(here), here.without(theirs));
    if !lost.is_empty() {
        return Some(format!("it lacks {}", lost.names().join(", ")));
    }
    if !new.is_empty() {
        return Some(format!("it has {} too", new.names().join(", ")));
    }
    let key = |entry: &CpuidEntry| (entry.function, if entry.flags & INDEXED == 0 { 0 } else { entry.index });
    // How large the XSAVE area is for what the guest has enabled: KVM keeps that itself.
    let enabled = |entry: &CpuidEntry| entry.function == 0xd && entry.index < 2;
    let ebx = |entry: &CpuidEntry| if enabled(entry) { 0 } else { entry.ebx };
    let words = |entry: &CpuidEntry| [entry.eax, ebx(entry), entry.ecx, entry.edx];
    let compared = |entry: &&CpuidEntry| !FREQUENCIES.contains(&entry.function);
    // A leaf that isn't there is one of zeros.
    let value = |table: &[CpuidEntry], at| table.iter().find(|entry| key(entry) == at).map_or([0; 4], words);
    let mut all: Vec<_> = seen.iter().chain(ours).filter(compared).map(key).collect();
    all.sort_unstable();
    let differs = all.into_iter().find(|at| value(seen, *at) != value(ours, *at));
    differs.map(|(leaf, subleaf)| {
        let [was, is] = [seen, ours].map(|table| value(table, (leaf, subleaf)));
        format!("its CPUID leaf {leaf:#x}, subleaf {subleaf:#x}, is {is:x?} instead of {was:x?}")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, ecx: u32) -> CpuidEntry {
        CpuidEntry { function, index: 0, flags: 0, eax: 1, ebx: 2, ecx, edx: 4, reserved: 0 }
    }

    #[test]
    fn features_are_named_and_frequencies_are_not_compared() {
        const SSE3: u32 = 1;
        let seen = [entry(1, SSE3), entry(0x15, 9), entry(0x8000_0008, 7)];
        let ours = [entry(1, SSE3), entry(0x15, 8), entry(0x8000_0008, 7)];
        assert_eq!(difference(&seen, &ours), None);
        let without = [entry(1, 0), ours[1], ours[2]];
        assert_eq!(difference(&seen, &without).as_deref(), Some("it lacks pni"));
        assert_eq!(difference(&without, &seen).as_deref(), Some("it has pni too"));
        let other = difference(&seen, &ours[..2]).unwrap();
        assert_eq!(other, "its CPUID leaf 0x80000008, subleaf 0x0, is [0, 0, 0, 0] instead of [1, 2, 7, 4]");
    }
}
