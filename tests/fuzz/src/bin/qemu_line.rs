//! QEMU's command line: what is accepted is possible, what is refused is one line.
#![no_main]

use arbitrary::Arbitrary;
use fuzz::is_one_line;
use libfuzzer_sys::fuzz_target;
use soc_vmm::cli::{ExitStatus, Invocation};
use soc_vmm::qemu::DeviceKind;

/// Options with a value, beside any text.
const OPTIONS: [&str; 24] = [
    "-name",
    "-machine",
    "-accel",
    "-cpu",
    "-m",
    "-smp",
    "-numa",
    "-uuid",
    "-object",
    "-chardev",
    "-mon",
    "-qmp",
    "-serial",
    "-rtc",
    "-boot",
    "-blockdev",
    "-netdev",
    "-device",
    "-add-fd",
    "-drive",
    "-smbios",
    "-fw_cfg",
    "-sandbox",
    "-global",
];

#[derive(Debug, Arbitrary)]
enum Word {
    Option(u8, String),
    /// Properties: a device, an object or a node, as the option says.
    Properties(u8, Vec<(u8, u8)>),
    Any(String),
}

/// Parts of properties that mean something somewhere.
const PARTS: [&str; 40] = [
    "q35",
    "none",
    "virtio-blk-pci",
    "virtio-net-pci",
    "pcie-root-port",
    "ide-cd",
    "virtserialport",
    "virtio-serial-pci",
    "isa-serial",
    "socket",
    "pty",
    "file",
    "raw",
    "tap",
    "user",
    "vhost-user",
    "iothread",
    "memory-backend-memfd",
    "rng-builtin",
    "throttle-group",
    "id",
    "bus",
    "addr",
    "drive",
    "netdev",
    "chardev",
    "node-name",
    "filename",
    "size",
    "server",
    "wait",
    "on",
    "off",
    "a",
    "b",
    "pcie.0",
    "0x1.0x2",
    "1G",
    "1",
    "kvm",
];

fuzz_target!(|words: Vec<Word>| {
    let part = |index: u8| PARTS[usize::from(index) % PARTS.len()];
    let option = |index: u8| OPTIONS[usize::from(index) % OPTIONS.len()].to_owned();
    let mut args = vec!["soc-vmm".to_owned(), "-S".to_owned()];
    for word in words {
        match word {
            Word::Option(index, text) => args.extend([option(index), text]),
            Word::Properties(index, parts) => {
                let parts: Vec<_> =
                    parts.iter().map(|(key, value)| format!("{}={}", part(*key), part(*value))).collect();
                let text = parts.join(",");
                args.extend([option(index), text.split_once('=').map_or(text.clone(), |(_, text)| text.to_owned())]);
            }
            Word::Any(text) => args.push(text),
        }
    }
    match Invocation::parse(args.into_iter().map(Into::into)) {
        Ok(Invocation::Run(config)) => {
            assert!(config.cpus > 0 && u32::from(config.cpus) <= config.topology.cpus());
            assert!(config.memory.size != 0 && config.memory.size.is_multiple_of(4096));
            let hardware = config.hardware.expect("QEMU's command line has it");
            assert!(hardware.monitors.iter().all(|id| hardware.chardevs.iter().any(|chardev| chardev.id == *id)));
            for device in &hardware.devices {
                assert!(!device.is_pci() || device.bus.is_some() && device.address.is_some());
                assert!(!matches!(device.kind, DeviceKind::RootPort(_) | DeviceKind::Serial(_)));
            }
            assert!(hardware.boot_order().is_sorted_by_key(|place| place.index));
        }
        Ok(_) => {}
        Err(failure) => {
            assert_eq!(failure.status(), ExitStatus::Usage);
            assert!(is_one_line(&failure.to_string()), "{failure:?}");
        }
    }
});
