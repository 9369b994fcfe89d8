//! The controller as a PCI function.

use std::sync::{Arc, Condvar, Mutex};
use std::{io, thread};

use super::cdrom::{Drive, Medium, TrayListener};
use super::dma::Dma;
use super::handle::CdHandle;
use super::hba::{Hba, Wish};
use super::port::Port;
use super::registers::PORTS;
use super::{Shared, worker};
use crate::bus::{Access, Answer, Deferred, Wake};
use crate::interrupt::{InterruptLine, MessageSink};
use crate::memory::GuestMemory;
use crate::pci::{Bar, ConfigSpace, Identity, Msi, PciFunction, Space, command};

/// Where the controller sits: slot × 8 + function.
pub const AHCI: u8 = 0x1f << 3 | 2;

/// BARs: index and data ports, and the registers.
const INDEX_BAR: usize = 4;
const REGISTER_BAR: usize = 5;
const INDEX_BAR_LEN: u64 = 32;
const REGISTER_BAR_LEN: u64 = 4096;
/// The index register's bits.
pub(super) const INDEX_BITS: u32 = REGISTER_BAR_LEN as u32 - 4;
/// Offsets of the index and the data register in their BAR.
const INDEX: u64 = 0x10;
const DATA: u64 = 0x14;
/// Capability: Serial ATA (Serial ATA AHCI 1.3.1 §2.4), version 1.0; the index register is 4 words from the beginning of BAR 4.
const CAP_SATA: u8 = 0x12;
const SATA: [u8; 6] = [0x10, 0, 0x48, 0, 0, 0];
/// The chipset's own register: all ports are AHCI's (ICH9 datasheet §14.1.27).
const MAP: u16 = 0x90;
const MAP_AHCI: u8 = 0x40;

/// A CD-ROM drive on a port.
#[derive(Default)]
pub struct CdDrive {
    /// What messages call it.
    pub name: String,
    /// What is in it.
    pub medium: Option<Medium>,
    /// Hears of its tray.
    pub listener: Option<Arc<dyn TrayListener>>,
}

/// What a controller is connected to.
pub struct Plumbing<'a> {
    /// For DMA.
    pub memory: Arc<dyn GuestMemory>,
    /// For MSI.
    pub messages: &'a dyn MessageSink,
    /// Its INTA.
    pub line: InterruptLine,
    /// Wakes the thread that serves IOREQs.
    pub wake: Arc<dyn Wake>,
}

/// The controller.
pub struct Ahci {
    pub(super) config: ConfigSpace,
    msi: Msi,
    pub(super) line: InterruptLine,
    pub(super) shared: Arc<Shared>,
    /// The index register of the pair in BAR 4.
    pub(super) index: u32,
    /// Ports whose interrupt was told by a message.
    pub(super) told: u32,
    /// The line's level.
    pub(super) high: bool,
}

impl Ahci {
    /// A controller with these drives, and a handle for each.
    ///
    /// # Errors
    /// Its thread can't be started.
    pub fn new(
        drives: [Option<CdDrive>; PORTS],
        plumbing: Plumbing<'_>,
    ) -> io::Result<(Self, [Option<CdHandle>; PORTS])> {
        let identity =
            Identity { vendor: 0x8086, device: 0x2922, revision: 2, class: 0x01_0601, subsystem: (0x1af4, 0x1100) };
        let mut config = ConfigSpace::endpoint(&identity).with_pin();
        config.add_bar(INDEX_BAR, Bar { space: Space::Io, size: INDEX_BAR_LEN, prefetchable: false });
        config.add_bar(REGISTER_BAR, Bar { space: Space::Memory32, size: REGISTER_BAR_LEN, prefetchable: false });
        config.set(MAP, &[MAP_AHCI]);
        let msi = Msi::new(&mut config, plumbing.messages);
        config.add_capability(CAP_SATA, &SATA, &[]);
        let mut index = 0;
        let ports = drives.map(|drive| {
            index += 1;
            Port::new(drive.map(|drive| Drive::new(drive.name, drive.medium, format!("OB{index:05}"), drive.listener)))
        });
        let present = ports.each_ref().map(|port| port.drive.is_some());
        let shared = Arc::new(Shared {
            hba: Mutex::new(Hba::new(ports)),
            work: Condvar::new(),
            dma: Dma::new(plumbing.memory),
            wake: plumbing.wake,
        });
        let of_thread = shared.clone();
        thread::Builder::new().name("ahci".into()).spawn(move || worker::run(&of_thread))?;
        let mut port = 0;
        let handles = present.map(|present| {
            port += 1;
            present.then(|| CdHandle::new(shared.clone(), port - 1))
        });
        Ok((Self { config, msi, line: plumbing.line, shared, index: 0, told: 0, high: false }, handles))
    }

    /// Reads `len` bytes at `offset` of the registers.
    fn read_registers(&self, offset: u64, len: u8) -> u64 {
        let hba = self.shared.hba();
        let bytes = (offset..).take(len.into()).enumerate();
        bytes.fold(0, |value, (n, at)| {
            let byte = hba.read(at & !3) >> (8 * (at & 3)) & 0xff;
            value | u64::from(byte) << (8 * n)
        })
    }

    /// Writes the low `len` bytes of `data` there.
    fn write_registers(&mut self, offset: u64, len: u8, data: u64) {
        // At most 8 bytes, in at most three registers: each with the bits that are written.
        let mut parts: [Option<(u64, u32, u32)>; 3] = [None; 3];
        for (n, at) in (offset..).take(len.into()).enumerate() {
            let shift = 8 * (at & 3);
            let part = parts[((at >> 2) - (offset >> 2)) as usize].get_or_insert((at & !3, 0, 0));
            part.1 |= ((data >> (8 * n)) as u32 & 0xff) << shift;
            part.2 |= 0xff << shift;
        }
        let mut hba = self.shared.hba();
        for (register, value, mask) in parts.into_iter().flatten() {
            let Wish { kick, acknowledged } = hba.write(register, value, mask, &self.shared.dma);
            if kick {
                self.shared.work.notify_one();
            }
            if acknowledged {
                self.told = 0;
            }
        }
        drop(hba);
        self.interrupt();
    }

    /// Interrupts the guest as the registers stand.
    fn interrupt(&mut self) {
        let pending = self.shared.hba().interrupts();
        self.told &= pending;
        if self.msi.enabled() && pending != self.told && self.config.command() & command::BUS_MASTER != 0 {
            self.told = pending;
            self.msi.raise();
        }
        let high = self.config.show_interrupt(pending != 0 && !self.msi.enabled());
        if high != self.high {
            self.high = high;
            self.line.set(high);
        }
    }

    /// Looks at configuration space again.
    fn configure(&mut self) {
        self.connect();
        self.interrupt();
    }

    /// Makes messages and DMA go as configuration space says.
    pub(super) fn connect(&mut self) {
        self.msi.configure(&self.config);
        let bus_master = self.config.command() & command::BUS_MASTER != 0;
        self.shared.dma.set_bus_master(bus_master);
        self.shared.hba().bus_master = bus_master;
        self.shared.work.notify_one();
    }
}

impl PciFunction for Ahci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        self.configure();
    }

    fn read(&mut self, region: usize, offset: u64, access: &Access, _: Deferred<'_>) -> Answer {
        Answer::Done(match (region, offset) {
            (REGISTER_BAR, _) => self.read_registers(offset, access.len),
            (_, INDEX) => self.index.into(),
            (_, DATA) => self.read_registers(self.index.into(), access.len),
            _ => 0,
        })
    }

    fn write(&mut self, region: usize, offset: u64, data: u64, access: &Access, _: Deferred<'_>) -> Answer {
        match (region, offset) {
            (REGISTER_BAR, _) => self.write_registers(offset, access.len, data),
            (_, INDEX) => self.index = data as u32 & INDEX_BITS,
            (_, DATA) => self.write_registers(self.index.into(), access.len, data),
            _ => {}
        }
        Answer::Done(0)
    }

    fn poll(&mut self) {
        self.interrupt();
    }

    fn reset(&mut self) {
        self.config.reset();
        {
            let mut hba = self.shared.hba();
            hba.reset(&self.shared.dma);
            for port in &mut hba.ports {
                port.power_on();
            }
        }
        self.index = 0;
        self.configure();
    }
}

impl Drop for Ahci {
    /// The thread ends once it is done with its medium, which may take long: nobody waits for it, and it reaches no memory any more.
    fn drop(&mut self) {
        self.shared.dma.set_bus_master(false);
        self.shared.hba().ended = true;
        self.shared.work.notify_one();
    }
}

impl std::fmt::Debug for Ahci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ahci").field("told", &self.told).field("high", &self.high).finish_non_exhaustive()
    }
}
