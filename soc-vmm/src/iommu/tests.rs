use std::sync::mpsc;

use proptest::prelude::*;

use super::faults::status;
use super::registers::VtdRegisters;
use super::*;
use crate::bus::{Access, Answer, Deferred, Device, RequestId, Wake};
use crate::devices::Persist;
use crate::interrupt::Settling;
use crate::memory::test_ram::Ram;
use crate::pci::test_sink::TestSink;

mod dma;
mod interrupts;
mod queue;
mod registers;

/// Guest memory: so many bytes from 0 on.
const RAM: usize = 4 << 20;
/// Where tests put the unit's tables.
const ROOT: u64 = 0x1000;
const CONTEXTS: u64 = 0x2000;
const INTERRUPTS: u64 = 0x3000;
const QUEUE: u64 = 0x4000;
const PAGES: u64 = 0x10_0000;

/// Words of memory.
trait Words {
    fn put(&self, addr: u64, value: u64);
    fn put_entry(&self, addr: u64, entry: u128);
    fn get(&self, addr: u64) -> u64;
}

impl Words for Ram {
    fn put(&self, addr: u64, value: u64) {
        self.write(addr, &value.to_le_bytes()).unwrap();
    }

    fn put_entry(&self, addr: u64, entry: u128) {
        self.write(addr, &entry.to_le_bytes()).unwrap();
    }

    fn get(&self, addr: u64) -> u64 {
        let mut bytes = [0; 8];
        self.read(addr, &mut bytes).unwrap();
        u64::from_le_bytes(bytes)
    }
}

#[derive(Debug)]
struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

/// A unit, its memory, and a function behind it at 00:05.0.
struct Rig {
    ram: Arc<Ram>,
    iommu: Arc<Iommu>,
    unit: VtdRegisters,
    /// The unit's own interrupts.
    events: TestSink,
    settling: Arc<Settling>,
    requester: Requester,
    /// How many pages of tables were laid out.
    tables: u64,
}

/// The function's requester ID.
const FUNCTION: u16 = 5 << 3;

impl Rig {
    fn new() -> Self {
        let ram = Arc::new(Ram::new(RAM));
        let (events, settling, requester) = (TestSink::default(), Arc::<Settling>::default(), Requester::default());
        let iommu = Iommu::new(ram.clone(), &events);
        let unit = VtdRegisters::new(iommu.clone(), &events, settling.clone(), Arc::new(Quiet));
        requester.place(0, FUNCTION as u8);
        Self { ram, iommu, unit, events, settling, requester, tables: 0 }
    }

    /// One whose function has so many levels of tables, translation on.
    fn translating(levels: u64) -> Self {
        let mut rig = Self::new();
        rig.tables = 1;
        rig.ram.put_entry(ROOT, u128::from(CONTEXTS | 1));
        rig.put_context(u128::from(PAGES | 1) | u128::from(levels - 2) << 64);
        rig.write(0x20, ROOT);
        rig.command(1 << 30);
        rig.command(1 << 31);
        rig
    }

    /// One with 256 interrupt entries, remapping on.
    fn remapping() -> Self {
        let mut rig = Self::new();
        rig.write(0xb8, INTERRUPTS | 7);
        rig.command(1 << 24);
        rig.command(1 << 25);
        rig
    }

    /// One whose queue of 256 descriptors is on.
    fn queueing() -> Self {
        let mut rig = Self::remapping();
        rig.start_queue();
        rig
    }

    fn start_queue(&mut self) {
        self.write(0x90, QUEUE);
        self.command(1 << 26);
    }

    fn put_context(&self, entry: u128) {
        self.ram.put_entry(CONTEXTS + u64::from(FUNCTION) * 16, entry);
    }

    /// Maps an address to a page, at `level`, by new tables where there are none.
    fn map(&mut self, levels: u32, level: u32, from: u64, to: u64, rights: u64) {
        let mut table = PAGES;
        for at in (level..=levels).rev() {
            let entry = table + (from >> (12 + 9 * (at - 1)) & 0x1ff) * 8;
            if at == level {
                let large = if level > 1 { 0x80 } else { 0 };
                return self.ram.put(entry, to | rights | large);
            }
            if self.ram.get(entry) == 0 {
                self.ram.put(entry, (PAGES + self.tables * 0x1000) | 3);
                self.tables += 1;
            }
            table = self.ram.get(entry) & !0xfff;
        }
    }

    fn dma(&self) -> Arc<dyn GuestMemory> {
        self.iommu.memory_of(self.requester.clone())
    }

    /// Writes a register of 8 bytes.
    fn write(&mut self, offset: u64, value: u64) {
        assert!(self.access(offset, 8, Some(value)).is_some(), "{offset:#x} is not deferred");
    }

    /// Writes a register of 4 bytes.
    fn write_low(&mut self, offset: u64, value: u32) {
        assert!(self.access(offset, 4, Some(value.into())).is_some(), "{offset:#x} is not deferred");
    }

    fn read(&mut self, offset: u64) -> u64 {
        self.access(offset, 8, None).unwrap()
    }

    fn read_low(&mut self, offset: u64) -> u32 {
        self.access(offset, 4, None).unwrap() as u32
    }

    /// Gives a command on top of what is on, as drivers do.
    fn command(&mut self, bit: u32) {
        let on = self.read_low(0x1c);
        self.write_low(0x18, on & 0x96ff_ffff | bit);
        assert_eq!(self.read_low(0x1c) & bit, bit);
    }

    /// An access, unless it is deferred.
    fn access(&mut self, offset: u64, len: u8, data: Option<u64>) -> Option<u64> {
        let (late, _answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Quiet);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let answer = match data {
            None => self.unit.read(&access, offset, reply),
            Some(data) => self.unit.write(&access, offset, data, reply),
        };
        match answer {
            Answer::Done(value) => Some(value),
            Answer::Deferred => None,
            other => panic!("{other:?}"),
        }
    }

    /// The oldest fault: reason, requester, information; it is taken away.
    fn fault(&mut self) -> Option<(u8, u16, u64)> {
        let status = self.read_low(0x34);
        if status & status::PENDING == 0 {
            return None;
        }
        let at = 0x220 + 16 * u64::from(status >> 8 & 0xff);
        let (information, what) = (self.read(at), self.read(at + 8));
        self.write_low(at + 12, 1 << 31);
        Some(((what >> 32) as u8, what as u16, information))
    }
}
