//! Hyper-V's leaves and switches.

use proptest::prelude::*;

use super::*;

/// As KVM tells its Hyper-V leaves (`kvm_get_hv_cpuid`).
fn kvm_s() -> Vec<CpuidEntry> {
    vec![
        leaf(0x4000_0000, [0x4000_0082, u32::from_le_bytes(*b"Linu"), u32::from_le_bytes(*b"x KV"), 0x7648_204d]),
        leaf(0x4000_0001, [0x3123_7648, 0, 0, 0]),
        leaf(0x4000_0002, [0x3839, 0xa_0000, 0, 0]),
        leaf(0x4000_0003, [0x2aff, 0x30, 0, 0x8_4d10]),
        leaf(0x4000_0004, [0x4_6e2c, u32::MAX, 0, 0]),
        leaf(0x4000_0005, [4096, 64, 0, 0]),
        leaf(0x4000_000a, [1, 0, 0, 0]),
        leaf(0x4000_0080, [0x4000_0082, 1, 2, 3]),
    ]
}

fn given(text: &str, host: &[CpuidEntry]) -> Result<Option<Enlightenments>, String> {
    let spec: CpuSpec = text.parse().map_err(|e: CpuSpecError| e.to_string())?;
    spec.hyperv().map_or(Ok(None), |hyperv| hyperv.given(host)).map_err(|e| e.to_string())
}

/// The table of a guest with these switches.
fn guest(text: &str) -> Vec<CpuidEntry> {
    let config = CpuidConfig { tsc_khz: Some(2_000_000), ..config(Topology::flat(1).unwrap()) };
    let processor = Processor::new(&host(INTEL, 0x20), &text.parse().unwrap(), config).unwrap();
    processor.with_hyperv(given(text, &kvm_s()).unwrap()).table(0)
}

/// EAX, EBX and EDX of a leaf.
fn of(table: &[CpuidEntry], function: u32) -> (u32, u32, u32) {
    let entry = find(table, function, 0).unwrap_or_else(|| panic!("no leaf {function:#x}"));
    (entry.eax, entry.ebx, entry.edx)
}

#[test]
fn without_a_switch_there_is_no_leaf_of_it() {
    let plain = guest("host");
    assert_eq!(find(&plain, KVM_SIGNATURE, 0).unwrap().eax, HYPERVISOR_FREQUENCIES);
    for nothing in
        ["host,-hv-relaxed", "host,hv-vendor-id=abc", "host,hv-passthrough=off", "host,hv-spinlocks=0xffffffff"]
    {
        assert_eq!(guest(nothing), plain, "{nothing}");
    }
}

#[test]
fn each_switch_sets_its_bits() {
    for (switches, eax, edx, recommended) in [
        ("hv-relaxed", 0, 0, 0x20),
        ("hv_relaxed=on", 0, 0, 0x20),
        ("+hv-relaxed", 0, 0, 0x20),
        ("hv-relaxed,hv-relaxed=off,hv-runtime", 1, 0, 0),
        ("hv-vapic", 0x10, 0, 8),
        ("hv-vpindex", 0x40, 0, 0),
        ("hv-time", 0x202, 0, 0),
        ("hv-reset", 0x80, 0, 0),
        ("hv-frequencies", 0x800, 0x100, 0),
        ("hv-reenlightenment", 0x2000, 0, 0),
        ("hv-vpindex,hv-tlbflush", 0x40, 0, 0x804),
        ("hv-tlbflush-ext,hv-tlbflush,hv-vpindex", 0x40, 1 << 14, 0x804),
        ("hv-vpindex,hv-ipi", 0x40, 0, 0xc00),
        ("hv-apicv", 0, 0, 0x200),
        ("hv-xmm-input", 0, 0x10, 0),
        ("hv-synic,hv-vpindex,hv-time,hv-stimer,hv-stimer-direct", 0x24e, 1 << 19, 0),
    ] {
        let table = guest(&format!("host,{switches}"));
        let synic = if eax & 4 != 0 { 0x30 } else { 0 };
        assert_eq!(of(&table, 0x4000_0003), (eax | 0x20, synic, edx), "{switches}");
        assert_eq!(of(&table, 0x4000_0004), (recommended, u32::MAX, 0), "{switches}");
    }
}

#[test]
fn kvm_s_leaves_stand_behind() {
    let (plain, table) = (guest("host"), guest("host,hv-relaxed,hv-vendor-id=KVM Hv,hv-spinlocks=0x1fff"));
    let vendor = find(&table, 0x4000_0000, 0).unwrap();
    assert_eq!((vendor.eax, vendor.ebx), (0x4000_0005, u32::from_le_bytes(*b"KVM ")));
    assert_eq!((vendor.ecx, vendor.edx), (u32::from_le_bytes([b'H', b'v', 0, 0]), 0));
    assert_eq!(of(&table, 0x4000_0001).0, 0x3123_7648);
    assert_eq!(of(&table, 0x4000_0004).1, 0x1fff);
    let signature = find(&table, 0x4000_0100, 0).unwrap();
    assert_eq!((signature.eax, signature.ebx), (0x4000_0101, 0x4b4d_564b));
    assert_eq!(of(&table, 0x4000_0101), of(&plain, 0x4000_0001));
    // VMware's leaf has no place there.
    assert_eq!(find(&table, HYPERVISOR_FREQUENCIES, 0), None);
    let others =
        |table: &[CpuidEntry]| table.iter().filter(|entry| entry.function >> 16 != 0x4000).copied().collect::<Vec<_>>();
    assert_eq!(others(&table), others(&plain));
}

#[test]
fn passthrough_is_all_that_we_carry_of_the_host_s() {
    let table = guest("host,hv_passthrough");
    assert_eq!(of(&table, 0x4000_0003), (0x2aff, 0x30, 0x8_4110), "no crash reports, no debugger");
    assert_eq!(of(&table, 0x4000_0004), (0xe2c, u32::MAX, 0), "nothing nested");
    assert_eq!(of(&table, 0x4000_0000).1, u32::from_le_bytes(*b"Linu"));
    assert_eq!(find(&table, 0x4000_000a, 0), None);
    let less = guest("host,hv-passthrough,hv-synic=off");
    assert_eq!(of(&less, 0x4000_0003).0, 0x2aff & !0xc, "without its timers");
    assert_eq!(of(&less, 0x4000_0003).2 & 1 << 19, 0);
    assert!(given("host,hv-passthrough", &kvm_s()).unwrap().unwrap().has_synic());
    assert_eq!(given("host,hv-passthrough", &[]), Ok(None));
}

#[test]
fn what_can_t_be_is_refused_by_its_name() {
    let weaker = |function: u32, clear: u32| {
        let mut host = kvm_s();
        host.iter_mut().filter(|entry| entry.function == function).for_each(|entry| entry.eax &= !clear);
        host
    };
    for (switches, host, words) in [
        ("hv-relaxed,hv-time", vec![], "lacks hv-relaxed, hv-time;"),
        ("hv-spinlocks=8191", vec![], "lacks Hyper-V's interfaces"),
        ("hv-time,hv-vapic", weaker(0x4000_0003, 0x200), "lacks hv-time;"),
        ("hv-synic,hv-vpindex", weaker(0x4000_0003, 0x40), "lacks hv-vpindex, hv-synic;"),
        ("hv-passthrough,hv-stimer", weaker(0x4000_0003, 2), "lacks hv-stimer;"),
        ("hv-stimer", kvm_s(), "hv-stimer needs hv-time, hv-synic;"),
        ("hv-synic", kvm_s(), "hv-synic needs hv-vpindex;"),
        ("hv-ipi", kvm_s(), "hv-ipi needs hv-vpindex;"),
        ("hv-passthrough,hv-ipi,hv-vpindex=off", kvm_s(), "hv-ipi needs hv-vpindex;"),
        ("hv-relaxed=maybe", kvm_s(), "'hv-relaxed=maybe'"),
        ("hv-evmcs", kvm_s(), "'hv-evmcs' is not given"),
        ("hv-nothing", kvm_s(), "'hv-nothing'"),
        ("hv-spinlocks", kvm_s(), "hv-spinlocks: "),
        ("hv-spinlocks=0xffe", kvm_s(), "hv-spinlocks: "),
        ("hv-vendor-id=", kvm_s(), "hv-vendor-id: "),
        ("hv-vendor-id=1234567890123", kvm_s(), "hv-vendor-id: "),
    ] {
        let why = given(&format!("host,{switches}"), &host).expect_err(switches);
        assert!(why.contains(words), "{switches}: {why}");
    }
    assert!(given("host,hv-evmcs=off,hv-relaxed", &kvm_s()).is_ok());
}

proptest! {
    #[test]
    fn a_guest_is_promised_only_what_the_host_gives(
        words in prop::array::uniform8(any::<u32>()),
        switches in prop::collection::vec((0usize..16, any::<bool>()), 0..8),
        passthrough: bool,
    ) {
        const NAMES: [&str; 16] = [
            "relaxed", "vapic", "vpindex", "runtime", "time", "synic", "stimer", "stimer-direct", "reset", "frequencies",
            "reenlightenment", "tlbflush", "tlbflush-ext", "ipi", "avic", "xmm-input",
        ];
        let mut text = "host".to_owned();
        if passthrough {
            text += ",hv-passthrough";
        }
        for (which, on) in switches {
            text += &format!(",{}hv-{}", if on { '+' } else { '-' }, NAMES[which]);
        }
        let [a, b, c, d, e, f, g, h] = words;
        let host = [kvm_s()[1], leaf(0x4000_0003, [a, b, c, d]), leaf(0x4000_0004, [e, f, g, h])];
        if let Ok(Some(given)) = given(&text, &host) {
            let mut table = Vec::new();
            given.apply(&mut table);
            let (features, recommended) = (of(&table, 0x4000_0003), of(&table, 0x4000_0004));
            prop_assert_eq!(features.0 & !a & !0x20, 0);
            prop_assert_eq!(features.2 & !d, 0);
            prop_assert_eq!(recommended.0 & !e, 0);
            prop_assert_eq!(features.0 & 4 != 0, given.has_synic());
            // Timers have what they need.
            prop_assert!(features.0 & 8 == 0 || features.0 & 0x246 == 0x246);
        }
    }
}
