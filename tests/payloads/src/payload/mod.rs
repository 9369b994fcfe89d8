//! One module a payload, or a few of a kind.

pub mod balloon;
pub mod counter;
pub mod cpu_hotplug;
pub mod dirty;
pub mod hot;
pub mod interrupts;
pub mod mmio;
pub mod operated;
pub mod order;
pub mod pio;
pub mod real;
pub mod scribe;
pub mod smp;
pub mod string_io;
pub mod virtio_blk;
pub mod virtio_net;
pub mod wanderer;
pub mod watch;

use crate::{IcedError, Payload, Privilege, ports};

/// Every payload once, those for several vCPUs with `vcpus`, those with a privilege at each.
pub fn catalogue(vcpus: u8) -> Result<Vec<Payload>, IcedError> {
    const READS: u32 = 20_000;
    const ROUNDS: u32 = 5;
    let mut payloads = vec![
        balloon::balloon()?,
        real::real_mode()?,
        mmio::mmio()?,
        string_io::string_io()?,
        interrupts::msi()?,
        interrupts::level()?,
        smp::bring_up(vcpus)?,
        smp::ipi(vcpus)?,
        smp::halted(vcpus)?,
        order::order(vcpus)?,
        watch::watch(1)?,
        cpu_hotplug::come_and_go(1)?,
        operated::operated()?,
        scribe::Scribe { vcpus: 1, pages: 64, pace: 0 }.payload()?,
        wanderer::Wanderer { pages: 64, pace: None }.payload()?,
    ];
    for privilege in [Privilege::Cpl0, Privilege::Cpl3] {
        payloads.push(pio::pio(privilege)?);
        payloads.push(dirty::dirty(vcpus, privilege)?);
        payloads.push(hot::read_port(privilege, ports::DEBUG_CONSOLE, READS, ROUNDS)?);
        payloads.push(hot::busy(privilege)?);
        for each in [counter::Each::Nothing, counter::Each::PageSplit, counter::Each::String] {
            payloads.push(counter::counter(privilege, each)?);
        }
    }
    Ok(payloads)
}
