//! The guest's CPUID from whatever table a host sends.
#![no_main]

use api_channel::call::CpuidEntry;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::cpuid::{CpuSpec, CpuidConfig, Processor, Topology, find, model_names};

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
    /// The host's own, or which of the models.
    model: u8,
    /// What follows the model on the command line.
    switches: String,
    sockets: u8,
    cores: u8,
    threads: u8,
    vcpu: u32,
    tsc_khz: Option<u32>,
    tsc_deadline: bool,
    leaves: Vec<Leaf>,
    /// Of Hyper-V's.
    hyperv: Vec<Leaf>,
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

/// The `--cpu` of an input, if it is one.
fn spec(model: u8, switches: &str) -> Option<CpuSpec> {
    let models: Vec<_> = std::iter::once("host").chain(model_names()).collect();
    let name = models[usize::from(model) % models.len()];
    let text = if switches.is_empty() { name.to_owned() } else { format!("{name},{switches}") };
    text.parse().ok()
}

fuzz_target!(|input: Input| {
    let Input { model, switches, sockets, cores, threads, vcpu, tsc_khz, tsc_deadline, leaves, hyperv } = input;
    let Ok(topology) = Topology::new(sockets.into(), cores.into(), threads.into()) else { return };
    let Some(spec) = spec(model, &switches) else { return };
    let host: Vec<CpuidEntry> = leaves.into_iter().map(Into::into).collect();
    let vcpu = vcpu % topology.cpus();
    let Ok(processor) = Processor::new(&host, &spec, CpuidConfig { topology, tsc_khz, tsc_deadline }) else { return };
    let hyperv: Vec<CpuidEntry> = hyperv.into_iter().map(Into::into).collect();
    let Ok(given) = spec.hyperv().map_or(Ok(None), |wanted| wanted.given(&hyperv)) else { return };
    let processor = processor.with_hyperv(given);
    let _ = (processor.physical_address_bits(), processor.signature());
    let table = processor.table(vcpu);
    assert!(table.len() <= host.len() + 32);
    let had = |function, index| find(&host, function, index).unwrap_or(CpuidEntry { function, index, ..NOTHING });
    for entry in &table {
        match entry.function {
            1 => {
                // x2APIC, TSC deadline, hypervisor; HTT.
                assert_eq!(entry.ecx & !(had(1, 0).ecx | 1 << 21 | 1 << 24 | 1 << 31), 0, "{entry:x?}");
                assert_eq!(entry.edx & !(had(1, 0).edx | 1 << 28), 0, "{entry:x?}");
                // VMX.
                assert!(entry.ecx & 1 << 5 == 0, "{entry:x?}");
            }
            // SVM.
            0x8000_0001 => assert!(entry.ecx & 1 << 2 == 0, "{entry:x?}"),
            0x8000_000a | 0x12 | 0x14 => panic!("not carried: {entry:x?}"),
            0xb | 0x1f => assert_eq!(entry.edx, topology.apic_id(vcpu)),
            // Features and recommendations of Hyper-V's; hypercalls come with any.
            0x4000_0003 | 0x4000_0004 if given.is_some() => {
                let had = find(&hyperv, entry.function, 0).unwrap_or(NOTHING);
                assert_eq!(entry.eax & !(had.eax | 1 << 5) | entry.edx & !had.edx, 0, "{entry:x?} of {had:x?}");
            }
            _ => {}
        }
    }
    for index in 0..3 {
        let (Some(guest), host) = (find(&table, 7, index), had(7, index)) else { continue };
        assert_eq!(guest.ebx & !host.ebx | guest.ecx & !host.ecx | guest.edx & !host.edx, 0, "{guest:x?} of {host:x?}");
    }
    assert!(find(&table, 0xb, 0).is_some_and(|leaf| leaf.eax < 32));
});

const NOTHING: CpuidEntry = CpuidEntry { function: 0, index: 0, flags: 0, eax: 0, ebx: 0, ecx: 0, edx: 0, reserved: 0 };
