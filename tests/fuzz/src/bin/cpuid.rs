//! The guest's CPUID from whatever table a host sends.
#![no_main]

use api_channel::call::CpuidEntry;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::cpuid::{CpuidConfig, Topology, find, guest_table, physical_address_bits, signature};

#[derive(Arbitrary, Debug)]
enum Function {
    Basic(u8),
    Kvm(u8),
    Extended(u8),
    Any(u32),
}

#[derive(Arbitrary, Debug)]
struct Leaf {
    function: Function,
    index: u8,
    flags: u32,
    words: [u32; 4],
}

#[derive(Arbitrary, Debug)]
struct Input {
    sockets: u8,
    cores: u8,
    threads: u8,
    vcpu: u32,
    tsc_khz: Option<u32>,
    tsc_deadline: bool,
    leaves: Vec<Leaf>,
}

impl From<Leaf> for CpuidEntry {
    fn from(leaf: Leaf) -> Self {
        let function = match leaf.function {
            Function::Basic(n) => n.into(),
            Function::Kvm(n) => 0x4000_0000 | u32::from(n),
            Function::Extended(n) => 0x8000_0000 | u32::from(n),
            Function::Any(n) => n,
        };
        let [eax, ebx, ecx, edx] = leaf.words;
        Self { function, index: leaf.index.into(), flags: leaf.flags, eax, ebx, ecx, edx, reserved: 0 }
    }
}

fuzz_target!(|input: Input| {
    let Input { sockets, cores, threads, vcpu, tsc_khz, tsc_deadline, leaves } = input;
    let Ok(topology) = Topology::new(sockets.into(), cores.into(), threads.into()) else { return };
    let host: Vec<CpuidEntry> = leaves.into_iter().map(Into::into).collect();
    let _ = (physical_address_bits(&host), signature(&host));
    let vcpu = vcpu % topology.cpus();
    let Ok(table) = guest_table(&host, &CpuidConfig { topology, tsc_khz, tsc_deadline }, vcpu) else { return };
    assert!(table.len() <= host.len() + 9);
    for entry in &table {
        match entry.function {
            // VMX; SVM.
            1 => assert!(entry.ecx & 1 << 5 == 0, "{entry:x?}"),
            0x8000_0001 => assert!(entry.ecx & 1 << 2 == 0, "{entry:x?}"),
            0x8000_000a | 0x12 | 0x14 => panic!("not carried: {entry:x?}"),
            0xb | 0x1f => assert_eq!(entry.edx, topology.apic_id(vcpu)),
            _ => {}
        }
    }
    assert!(find(&table, 0xb, 0).is_some_and(|leaf| leaf.eax < 32));
});
