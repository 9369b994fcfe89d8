use proptest::prelude::*;

use super::*;

mod hyperv;
mod models;

const INTEL: [u8; 12] = *b"GenuineIntel";
const AMD: [u8; 12] = *b"AuthenticAMD";

fn leaf(function: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidEntry {
    CpuidEntry { eax, ebx, ecx, edx, ..empty(function) }
}

fn subleaf(function: u32, index: u32, words: [u32; 4]) -> CpuidEntry {
    CpuidEntry { index, flags: INDEXED, ..leaf(function, words) }
}

/// A host with every feature bit set, so that what is cleared shows.
fn host(vendor: [u8; 12], max_leaf: u32) -> Vec<CpuidEntry> {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let all = u32::MAX;
    vec![
        leaf(0, [max_leaf, word(0), word(8), word(4)]),
        leaf(1, [0x806f8, all, all, all]),
        // Caches: L1 data, L1 code, L2, L3, end.
        subleaf(4, 0, [0xfc00_0121, 1, 2, 3]),
        subleaf(4, 1, [0xfc00_0122, 1, 2, 3]),
        subleaf(4, 2, [0xfc00_0143, 1, 2, 3]),
        subleaf(4, 3, [0xfff0_0163, 1, 2, 3]),
        subleaf(4, 4, [0; 4]),
        leaf(6, [all; 4]),
        subleaf(7, 0, [2, all, all, all]),
        subleaf(7, 1, [all, all, all, all]),
        subleaf(7, 2, [all, all, all, all]),
        subleaf(0xb, 0, [1, 2, 0x100, 77]),
        subleaf(0xb, 1, [6, 64, 0x201, 77]),
        subleaf(0xd, 0, [all, 1, 2, 3]),
        subleaf(0xd, 1, [all, 0, all, 0]),
        subleaf(0x12, 0, [all; 4]),
        subleaf(0x14, 0, [all; 4]),
        leaf(0x15, [2, 200, 24_000_000, 0]),
        leaf(KVM_SIGNATURE, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, [0x0100_7efb, 0, 0, 0]),
        leaf(0x8000_0000, [0x8000_0026, 0, 0, 0]),
        leaf(0x8000_0001, [0, all, all, all]),
        leaf(0x8000_0007, [0, 0, 0, all]),
        leaf(0x8000_0008, [0x3030, all, 0xffff_ffff, 0]),
        leaf(0x8000_000a, [all; 4]),
        subleaf(0x8000_001d, 3, [0xffc_0163, 1, 2, 3]),
        leaf(0x8000_001e, [all; 4]),
        leaf(0x8000_001f, [all; 4]),
        leaf(0x8000_0021, [all; 4]),
        subleaf(0x8000_0026, 0, [all; 4]),
    ]
}

fn config(topology: Topology) -> CpuidConfig {
    CpuidConfig { topology, tsc_khz: None, tsc_deadline: true }
}

/// The host's own processor.
fn guest_table(host: &[CpuidEntry], config: &CpuidConfig, index: u32) -> Result<Vec<CpuidEntry>, CpuidError> {
    Ok(Processor::new(host, &CpuSpec::HOST, *config)?.table(index))
}

fn table(vendor: [u8; 12], config: &CpuidConfig, index: u32) -> impl Fn(u32, u32) -> CpuidEntry + use<> {
    let table = guest_table(&host(vendor, 0x20), config, index).unwrap();
    move |function, index| find(&table, function, index).unwrap_or_else(|| panic!("no leaf {function:#x}.{index}"))
}

#[test]
fn what_is_not_carried_is_not_told() {
    // Bits by their places in the manuals, not by our table.
    const VMX: u32 = 1 << 5;
    const ALWAYS: u32 = 1 << 31 | 1 << 24 | 1 << 21;
    const SGX_AND_TRACE: u32 = 1 << 2 | 1 << 25;
    const OSPKE_AND_SGX_LC: u32 = 1 << 4 | 1 << 30;
    const SVM_AND_SKINIT: u32 = 1 << 2 | 1 << 12;
    let guest = table(INTEL, &config(Topology::flat(1).unwrap()), 0);
    let ecx = guest(1, 0).ecx;
    assert_eq!(ecx & (VMX | bits::OSXSAVE), 0);
    assert_eq!(ecx & ALWAYS, ALWAYS);
    assert_eq!(guest(7, 0).ebx & SGX_AND_TRACE, 0);
    assert_eq!(guest(7, 0).ecx & OSPKE_AND_SGX_LC, 0);
    assert_eq!(guest(7, 1).ebx, u32::MAX, "the other sub-leaves are KVM's business");
    assert_eq!(guest(0x8000_0001, 0).ecx & SVM_AND_SKINIT, 0);
    let table = guest_table(&host(AMD, 0x20), &config(Topology::flat(1).unwrap()), 0).unwrap();
    for gone in [0x12, 0x14, 0x15, 0x8000_000a, 0x8000_001f, 0x8000_0026] {
        assert!(find(&table, gone, 0).is_none(), "{gone:#x}");
    }
}

#[test]
fn the_rest_is_the_hosts() {
    let host = host(INTEL, 0x20);
    let table = guest_table(&host, &config(Topology::flat(1).unwrap()), 0).unwrap();
    for (function, index) in [(0xd, 0), (KVM_SIGNATURE, 0), (0x4000_0001, 0), (0x8000_0000, 0), (7, 1)] {
        assert_eq!(find(&table, function, index), find(&host, function, index), "{function:#x}");
    }
    let config = CpuidConfig { tsc_deadline: false, ..config(Topology::flat(1).unwrap()) };
    let table = guest_table(&host, &config, 0).unwrap();
    assert_eq!(find(&table, 1, 0).unwrap().ecx >> 24 & 1, 0);
}

#[test]
fn each_vcpu_has_its_own_ids() {
    let topology = Topology::new(2, 3, 2).unwrap();
    for vendor in [INTEL, AMD] {
        for (index, apic_id) in (0..).zip(topology.apic_ids()) {
            let guest = table(vendor, &config(topology), index);
            assert_eq!(guest(1, 0).ebx >> 24, apic_id);
            assert_eq!(guest(1, 0).ebx >> 16 & 0xff, 8);
            assert_eq!(guest(1, 0).ebx & 0xffff, 0xffff);
            assert_ne!(guest(1, 0).edx & bits::HTT, 0);
            for function in [0xb, 0x1f] {
                let levels = [0, 1, 2].map(|level| guest(function, level));
                assert_eq!(levels.map(|entry| entry.eax), [1, 3, 0]);
                assert_eq!(levels.map(|entry| entry.ebx), [2, 6, 0]);
                assert_eq!(levels.map(|entry| entry.ecx), [0x100, 0x201, 2]);
                assert_eq!(levels.map(|entry| entry.edx), [apic_id; 3]);
            }
            let place = topology.place(apic_id);
            let extended = guest(0x8000_001e, 0);
            assert_eq!((extended.eax, extended.ebx, extended.ecx), (apic_id, 0x100 | place.core, place.socket));
        }
    }
}

#[test]
fn ids_beyond_eight_bits_are_in_the_topology_leaf() {
    let guest = table(INTEL, &config(Topology::flat(1000).unwrap()), 999);
    assert_eq!(guest(0xb, 0).edx, 999);
    assert_eq!(guest(1, 0).ebx >> 24, 999 & 0xff);
    assert_eq!(guest(1, 0).ebx >> 16 & 0xff, 0xff);
    // … also of processors that don't know it.
    let table = guest_table(&host(INTEL, 4), &config(Topology::flat(1000).unwrap()), 1).unwrap();
    assert_eq!(find(&table, 0, 0).unwrap().eax, 0xb);
    assert!(find(&table, 0xb, 0).is_some() && find(&table, 0x1f, 0).is_none());
}

#[test]
fn caches_are_shared_by_core_and_package() {
    let sharing = |entry: CpuidEntry| (entry.eax >> 14 & 0xfff, entry.eax >> 26);
    let guest = table(INTEL, &config(Topology::new(1, 6, 2).unwrap()), 0);
    assert_eq!([0, 1, 2].map(|index| sharing(guest(4, index))), [(1, 7); 3]);
    assert_eq!(sharing(guest(4, 3)), (15, 7));
    assert_eq!(guest(4, 3).eax & 0x3fff, 0x163);
    assert_eq!(guest(4, 4).eax, 0, "the end of the list stays the end");
    assert_eq!(sharing(guest(0x8000_001d, 3)).0, 15);

    let single = table(INTEL, &config(Topology::flat(1).unwrap()), 0);
    assert_eq!(sharing(single(4, 3)), (0, 0));
    assert_eq!(single(1, 0).edx & bits::HTT, 0);
}

#[test]
fn amd_counts_logical_processors_in_its_own_leaves() {
    let guest = table(AMD, &config(Topology::flat(6).unwrap()), 0);
    assert_eq!(guest(0x8000_0008, 0).ecx, 0xffff_3f05);
    assert_ne!(guest(0x8000_0001, 0).ecx & bits::CMP_LEGACY, 0);
    let intel = table(INTEL, &config(Topology::flat(6).unwrap()), 0);
    assert_eq!(intel(0x8000_0008, 0).ecx, u32::MAX);
    assert_eq!(intel(0x8000_0001, 0).ecx & bits::CMP_LEGACY, 0);
    let single = table(AMD, &config(Topology::flat(1).unwrap()), 0);
    assert_eq!(single(0x8000_0001, 0).ecx & bits::CMP_LEGACY, 0);
}

#[test]
fn known_frequencies_are_told() {
    let config = CpuidConfig { tsc_khz: Some(2_400_000), ..config(Topology::flat(1).unwrap()) };
    let guest = table(INTEL, &config, 0);
    assert_eq!(guest(KVM_SIGNATURE, 0).eax, HYPERVISOR_FREQUENCIES);
    let entry = guest(HYPERVISOR_FREQUENCIES, 0);
    assert_eq!((entry.eax, entry.ebx), (2_400_000, 1_000_000));
    let entry = guest(0x15, 0);
    assert_eq!(u64::from(entry.ecx) * u64::from(entry.ebx) / u64::from(entry.eax), 2_400_000_000);
    assert_eq!(guest(0x16, 0).eax, 2400);

    let table = guest_table(&host(AMD, 0x20), &config, 0).unwrap();
    assert!(find(&table, 0x15, 0).is_none() && find(&table, HYPERVISOR_FREQUENCIES, 0).is_some());
}

#[test]
fn a_ratio_that_overflows_guests_is_not_told() {
    assert_eq!(tsc_ratio(2_400_000), Some((12, 5)));
    assert_eq!(tsc_ratio(2_893_250), None, "11573/4000");
    assert_eq!(tsc_ratio(4_294_000), Some((2147, 500)));
    assert_eq!(tsc_ratio(2_893_202), None);
    assert_eq!(tsc_ratio(0), None);
}

#[test]
fn a_host_without_its_first_leaves_is_refused() {
    let config = config(Topology::flat(1).unwrap());
    assert_eq!(guest_table(&[], &config, 0), Err(CpuidError::Incomplete { leaf: 0 }));
    assert_eq!(guest_table(&[leaf(0, [1; 4])], &config, 0), Err(CpuidError::Incomplete { leaf: 1 }));
}

#[test]
fn what_the_machine_needs_is_found() {
    let config = config(Topology::flat(1).unwrap());
    let processor = Processor::new(&host(INTEL, 0x20), &CpuSpec::HOST, config).unwrap();
    assert_eq!((processor.physical_address_bits(), processor.signature()), (48, 0x806f8));
    let bare = Processor::new(&[leaf(0, [0; 4]), leaf(1, [0; 4])], &CpuSpec::HOST, config).unwrap();
    assert_eq!((bare.physical_address_bits(), bare.signature()), (36, 0));
}

/// Leaves that are looked at, and some that are not.
fn function() -> impl Strategy<Value = u32> {
    prop_oneof![0u32..0x24, 0x4000_0000u32..0x4000_0012, 0x8000_0000u32..0x8000_0028, any::<u32>()]
}

/// Any host's table that has leaves 0 and 1.
fn any_host() -> impl Strategy<Value = Vec<CpuidEntry>> {
    let leaves = prop::collection::vec((function(), any::<[u32; 2]>(), any::<[u32; 4]>()), 0..60);
    leaves.prop_map(|leaves| {
        let mut host = vec![leaf(0, [0x1f; 4]), leaf(1, [0; 4])];
        host.extend(leaves.into_iter().map(|(function, [index, flags], words)| CpuidEntry {
            index,
            flags,
            ..leaf(function, words)
        }));
        host
    })
}

proptest! {
    /// The host may send anything.
    #[test]
    fn any_table_is_survived(
        host in any_host(),
        (sockets, cores, threads) in (1u32..9, 1u32..17, 1u32..5),
        tsc_khz in prop::option::of(any::<u32>()),
        index in 0u32..2000,
    ) {
        let topology = Topology::new(sockets, cores, threads).unwrap();
        let config = CpuidConfig { topology, tsc_khz, tsc_deadline: true };
        let table = guest_table(&host, &config, index % topology.cpus()).unwrap();
        prop_assert!(table.len() <= host.len() + 9);
    }
}
