//! What is accepted and changes nothing, each with the reason: the only options, properties and values for which that is so.
//! docs/qemu-command-line.md shows the same list.

use super::{Properties, Wrong};

/// A property that changes nothing.
#[derive(Clone, Copy, Debug)]
pub struct Inert {
    /// Of which options or drivers: an option with its dash, a device's driver, an object's type.
    pub of: &'static [&'static str],
    /// The property.
    pub key: &'static str,
    /// The values for which that is so; none: for any.
    pub values: &'static [&'static str],
    /// Why.
    pub why: &'static str,
}

const fn inert(
    of: &'static [&'static str],
    key: &'static str,
    values: &'static [&'static str],
    why: &'static str,
) -> Inert {
    Inert { of, key, values, why }
}

/// Every virtio device's driver.
const VIRTIO: &[&str] = &[
    "virtio-blk-pci",
    "virtio-net-pci",
    "virtio-rng-pci",
    "virtio-balloon-pci",
    "virtio-serial-pci",
    "vhost-user-blk-pci",
    "vhost-user-fs-pci",
];
/// Objects that are memory.
const MEMORY: &[&str] = &["memory-backend-ram", "memory-backend-memfd", "memory-backend-file"];

/// Every property that changes nothing.
pub const INERT: &[Inert] = &[
    inert(&["-name"], "debug-threads", &[], "threads have names always"),
    inert(&["-machine"], "usb", &["off"], "there is no USB controller"),
    inert(&["-machine"], "dump-guest-core", &[], "guest memory is the host's: no core dump of this process has it"),
    inert(&["-machine"], "mem-merge", &["off"], "guest memory is pinned for DMA: nothing merges it"),
    inert(&["-machine"], "smm", &["off", "auto"], "there is no System Management Mode"),
    inert(&["-machine"], "vmport", &["off", "auto"], "there is no VMware port"),
    inert(&["-machine"], "kernel_irqchip", &["on"], "the interrupt controllers are KVM's"),
    inert(&["-machine"], "kernel-irqchip", &["on"], "the interrupt controllers are KVM's"),
    inert(&["-machine"], "hpet", &["off"], "there is no HPET"),
    inert(&["-machine"], "nvdimm", &["off"], "there are no NVDIMMs"),
    inert(&["-machine"], "hmat", &["off"], "there is no HMAT"),
    inert(&["-machine"], "graphics", &["off", "on"], "there is no display"),
    inert(&["-machine"], "i8042", &["on"], "the keyboard controller is there always"),
    inert(&["-machine"], "pit", &["on"], "the PIT is there always"),
    inert(&["-machine"], "pic", &["on", "auto"], "the PICs are there always"),
    inert(&["-machine"], "sata", &["on"], "the AHCI controller is there always"),
    inert(&["-machine"], "suppress-vmdesc", &[], "a migration stream is soc-vmm's own"),
    inert(&["-cpu"], "migratable", &["on"], "a guest gets no feature whose state is not carried"),
    inert(&["-cpu"], "check", &[], "a feature that the host lacks is refused"),
    inert(&["-cpu"], "enforce", &[], "a feature that the host lacks is refused"),
    inert(&["-cpu"], "kvm", &["on"], "KVM is there always"),
    inert(&["-cpu"], "l3-cache", &["on"], "caches are told as the host has them"),
    inert(&["-cpu"], "host-cache-info", &[], "caches are told as the host has them"),
    inert(&["-overcommit"], "mem-lock", &[], "the host pins guest memory"),
    inert(&["-overcommit"], "cpu-pm", &["off"], "the host's vCPUs halt in KVM"),
    inert(&["-rtc"], "driftfix", &["none", "slew"], "the clock's ticks are computed, none is lost"),
    inert(&["-rtc"], "clock", &["host"], "the clock follows the system's"),
    inert(&["-msg"], "timestamp", &[], "log lines have a time always"),
    inert(&["-msg"], "guest-name", &[], "log lines are of one VM"),
    inert(&["-boot"], "splash", &[], "there is no display"),
    inert(&["-mon"], "pretty", &["off"], "replies are one line each"),
    inert(&["-smp"], "dies", &["1"], "a socket is one die"),
    inert(&["-smp"], "clusters", &["1"], "a die is one cluster"),
    inert(&["-accel"], "kernel-irqchip", &["on"], "the interrupt controllers are KVM's"),
    inert(MEMORY, "x-use-canonical-path-for-ramblock-id", &[], "a migration stream is soc-vmm's own"),
    inert(MEMORY, "prealloc-threads", &[], "one thread takes the memory"),
    inert(MEMORY, "share", &[], "guest memory is in files that vhost-user back ends on the same machine may map"),
    inert(MEMORY, "dump", &[], "guest memory is the host's: no core dump of this process has it"),
    inert(MEMORY, "merge", &["off"], "guest memory is pinned for DMA: nothing merges it"),
    inert(MEMORY, "reserve", &["on"], "the host reserves what it allocates"),
    inert(MEMORY, "seal", &[], "the host seals its memory's files"),
    inert(MEMORY, "discard-data", &[], "memory goes back to the host at the VM's end"),
    inert(VIRTIO, "disable-legacy", &["on"], "virtio is 1.2 only"),
    inert(VIRTIO, "disable-modern", &["off"], "virtio is 1.2 only"),
    inert(VIRTIO, "iommu_platform", &["off"], "virtio's DMA goes past an IOMMU"),
    inert(VIRTIO, "ats", &["off"], "there are no translation services"),
    inert(VIRTIO, "packed", &["off"], "queues are split"),
    inert(VIRTIO, "event_idx", &["on"], "VIRTIO_F_EVENT_IDX is offered always"),
    inert(VIRTIO, "indirect_desc", &["on"], "VIRTIO_F_INDIRECT_DESC is offered always"),
    inert(VIRTIO, "page-per-vq", &[], "each queue's doorbell has a place that a page of the function can serve"),
    inert(VIRTIO, "vectors", &[], "there is a vector for each queue"),
    inert(VIRTIO, "romfile", &[""], "devices have no ROM"),
    inert(VIRTIO, "rombar", &["0", "1"], "devices have no ROM"),
    inert(VIRTIO, "acpi-index", &[], "names of interfaces follow their place"),
    inert(VIRTIO, "failover", &["off"], "no device stands in for another"),
    inert(VIRTIO, "x-pcie-flr-init", &[], "devices can be reset alone"),
    inert(&["virtio-blk-pci"], "scsi", &["off"], "there are no SCSI commands"),
    inert(&["virtio-blk-pci"], "config-wce", &["off", "on"], "the guest can't switch the write cache"),
    inert(&["virtio-blk-pci"], "share-rw", &["off"], "who writes an image has it for himself"),
    inert(&["virtio-blk-pci"], "discard", &["on"], "discards are passed on"),
    inert(&["virtio-blk-pci"], "write-zeroes", &["on"], "zeroing is passed on"),
    inert(&["virtio-blk-pci"], "queue-size", &["256"], "queues have 256 entries"),
    inert(&["virtio-blk-pci"], "logical_block_size", &["512"], "sectors have 512 bytes"),
    inert(
        &["virtio-blk-pci"],
        "physical_block_size",
        &["512", "4096"],
        "disks say that 4 KiB are best written as a whole",
    ),
    inert(&["virtio-net-pci"], "rx_queue_size", &["256"], "queues have 256 entries"),
    inert(&["virtio-net-pci"], "tx_queue_size", &["256"], "queues have 256 entries"),
    inert(&["virtio-net-pci"], "tx", &["timer", "bh"], "frames are sent when the guest says so"),
    inert(&["vhost-user-blk-pci"], "config-wce", &["off", "on"], "the guest can't switch the write cache"),
    inert(&["vhost-user-fs-pci"], "queue-size", &[], "queues have the length that the back end serves"),
    inert(&["virtio-serial-pci"], "max_ports", &[], "a device has room for 15 ports"),
    inert(&["pcie-root-port"], "port", &[], "a port's number is its slot's"),
    inert(&["pcie-root-port"], "multifunction", &[], "a slot with several functions says so"),
    inert(&["pcie-root-port"], "hotplug", &["on"], "what is in a port can be taken out"),
    inert(&["pcie-root-port"], "io-reserve", &["0"], "windows are placed as devices need them"),
    inert(&["pcie-root-port"], "mem-reserve", &[], "windows are placed as devices need them"),
    inert(&["pcie-root-port"], "pref64-reserve", &[], "windows are placed as devices need them"),
    inert(&["isa-serial"], "iobase", &["0x3f8", "1016"], "COM1 is at 0x3f8"),
    inert(&["isa-serial"], "irq", &["4"], "COM1 has IRQ 4"),
    inert(&["pvpanic"], "ioport", &["0x505", "1285"], "pvpanic is at 0x505"),
    inert(&["-blockdev"], "auto-read-only", &[], "who opens an image says whether it is written"),
    inert(&["-blockdev"], "force-share", &["off"], "who writes an image has it for himself"),
    inert(&["-blockdev"], "locking", &["auto", "on"], "images are locked as QEMU locks them"),
    inert(&["-blockdev"], "preallocation", &["off"], "images grow as they are written"),
    inert(&["-netdev"], "script", &["no"], "no script is run"),
    inert(&["-netdev"], "downscript", &["no"], "no script is run"),
    inert(&["-netdev"], "vhostforce", &["off"], "frames don't pass through vhost-net"),
    inert(&["-netdev"], "vnet_hdr", &["on", "off"], "an interface is asked whether it has headers"),
    inert(&["-netdev"], "sndbuf", &["0"], "the interface's own buffer is the bound"),
    inert(&["-chardev"], "reconnect", &[], "a peer that left is looked for again always"),
    inert(&["-chardev"], "mux", &["off"], "each has one user"),
    inert(&["-chardev"], "delay", &["on", "off"], "UNIX sockets have no delay"),
    inert(&["-chardev"], "nodelay", &["on", "off"], "UNIX sockets have no delay"),
    inert(&["-chardev"], "signal", &["on", "off"], "Ctrl-A x ends a VM on a terminal"),
    inert(&["iothread"], "poll-max-ns", &[], "each device has a thread of its own, which adapts"),
    inert(&["iothread"], "poll-grow", &[], "each device has a thread of its own, which adapts"),
    inert(&["iothread"], "poll-shrink", &[], "each device has a thread of its own, which adapts"),
    inert(&["iothread"], "aio-max-batch", &[], "each device has a thread of its own, which adapts"),
    inert(&["iothread"], "thread-pool-min", &[], "each device has a thread of its own, which adapts"),
    inert(&["iothread"], "thread-pool-max", &[], "each device has a thread of its own, which adapts"),
];

/// Options that change nothing, whatever they say: the option, the values for which that is so (none: any, or it has none), the reason.
pub const INERT_OPTIONS: &[(&str, &[&str], &str)] = &[
    ("-no-user-config", &[], "there are no configuration files"),
    ("-no-hpet", &[], "there is no HPET"),
    ("-display", &["none"], "there is no display"),
    ("-vga", &["none"], "there is no display"),
    ("-parallel", &["none"], "there is no parallel port"),
    ("-monitor", &["none"], "the human monitor is not there"),
    ("-enable-kvm", &[], "guests run on KVM"),
    ("-watchdog-action", &[], "there is no watchdog"),
];

/// Values of `-global` that change nothing, and the reason.
pub const INERT_GLOBALS: &[(&str, &str)] = &[
    ("ICH9-LPC.disable_s3=1", "the ACPI tables offer no S3"),
    ("ICH9-LPC.disable_s4=1", "the ACPI tables offer no S4"),
    ("ICH9-LPC.disable_s4=0", "what a guest saves of itself to disk is its own matter"),
    ("kvm-pit.lost_tick_policy=delay", "the PIT is KVM's, which delivers late ticks"),
    ("ICH9-LPC.noreboot=off", "there is no watchdog"),
    ("ICH9-LPC.noreboot=on", "there is no watchdog"),
];

/// Takes away what changes nothing of `of`.
///
/// # Errors
/// A property would change something with the value that it has: what could be said instead.
pub(super) fn strip(of: &str, properties: &mut Properties) -> Result<(), Wrong> {
    for inert in INERT.iter().filter(|inert| inert.of.contains(&of)) {
        let Some(value) = properties.word(inert.key) else { continue };
        if !inert.values.is_empty() && !inert.values.contains(&value.as_str()) {
            let value = value.escape_default();
            let can = inert.values.join(" or ");
            return Err(Wrong::new(format!("'{value}' is not there ({}): write {can}, or leave it out", inert.why))
                .at(inert.key));
        }
        properties.remove(inert.key);
    }
    Ok(())
}
