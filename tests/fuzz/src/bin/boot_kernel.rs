//! Kernel images of any bytes: what is accepted lies in RAM, each piece by itself.
#![no_main]

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::acpi::{AcpiConfig, AcpiTables};
use soc_vmm::boot::Plan;
use soc_vmm::layout::MemoryLayout;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// MiB of RAM beyond the first two.
    ram: u8,
    initrd: Option<u64>,
    cmdline: u16,
    image: &'a [u8],
}

fuzz_target!(|input: Input<'_>| {
    let Input { ram, initrd, cmdline, image } = input;
    let layout = MemoryLayout::new((u64::from(ram) + 2) << 20).expect("MiB are pages");
    let config = AcpiConfig { apic_ids: vec![0, 1], serial_ports: 1, keyboard: true, ..AcpiConfig::default() };
    let acpi = AcpiTables::new(&config, layout.low_end()).expect("2 MiB have room for tables");
    let cmdline = "x".repeat(cmdline.into());
    let Ok(plan) = Plan::for_kernel(image, initrd, &cmdline, &layout, &acpi) else { return };
    let mut pieces: Vec<_> = plan.pieces().filter(|(_, len)| *len != 0).collect();
    pieces.sort_unstable();
    for (at, len) in &pieces {
        assert!(layout.is_low_ram(*at, *len), "{at:#x}+{len:#x} is not RAM");
    }
    for pair in pieces.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{pieces:x?} overlap");
    }
});
