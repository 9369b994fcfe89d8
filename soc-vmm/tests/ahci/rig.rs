//! A controller between a driver and a disc: guest memory, its interrupts, and the accesses of a vCPU.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use soc_vmm::ahci::{Ahci, CdDrive, CdHandle, PORTS, Plumbing};
use soc_vmm::block::{self, BlockBackend, ImageSpec};
use soc_vmm::bus::{Access, Answer, Deferred, RequestId, Wake};
use soc_vmm::interrupt::{InterruptLine, LineSink, Message, MessageRoute, MessageSink};
use soc_vmm::memory::{GuestMemory, MemoryError};
use soc_vmm::pci::PciFunction;

/// Bytes of RAM, from address 0 on.
pub(crate) const RAM: usize = 1 << 20;
/// No test waits so long for what happens.
const PATIENCE: Duration = Duration::from_secs(60);

// Where the driver has its things, a page a port.
const LIST: u64 = 0x1_0000;
const RECEIVED: u64 = 0x2_0000;
const TABLE: u64 = 0x3_0000;
/// Where data goes.
pub(crate) const DATA: u64 = 0x4_0000;

/// BAR 5, and registers there.
pub(crate) const REGISTERS: usize = 5;
pub(crate) const GHC: u64 = 0x04;
pub(crate) const IS: u64 = 0x08;
pub(crate) const CLB: u64 = 0x00;
pub(crate) const FB: u64 = 0x08;
pub(crate) const PXIS: u64 = 0x10;
pub(crate) const PXIE: u64 = 0x14;
pub(crate) const CMD: u64 = 0x18;
pub(crate) const TFD: u64 = 0x20;
pub(crate) const SIG: u64 = 0x24;
pub(crate) const SSTS: u64 = 0x28;
pub(crate) const SCTL: u64 = 0x2c;
pub(crate) const SERR: u64 = 0x30;
pub(crate) const CI: u64 = 0x38;

/// A port's register.
pub(crate) fn port(index: usize, register: u64) -> u64 {
    0x100 + 0x80 * index as u64 + register
}

/// Guest memory.
pub(crate) struct Ram(Mutex<Vec<u8>>);

impl Ram {
    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(addr, &mut bytes).expect("a test looks at RAM");
        bytes
    }

    pub(crate) fn put(&self, addr: u64, bytes: &[u8]) {
        self.write(addr, bytes).expect("a test writes RAM");
    }

    fn range(addr: u64, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let end = addr.checked_add(len as u64).filter(|end| *end <= RAM as u64);
        end.map(|end| addr as usize..end as usize).ok_or(MemoryError::NotRam { addr, len: len as u64 })
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        data.copy_from_slice(&self.0.lock().unwrap()[Self::range(addr, data.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.lock().unwrap()[Self::range(addr, data.len())?].copy_from_slice(data);
        Ok(())
    }
}

#[derive(Default)]
pub(crate) struct Line(AtomicBool);

impl LineSink for Line {
    fn set_level(&self, _: u32, high: bool) {
        assert_ne!(self.0.swap(high, Ordering::SeqCst), high, "only changes are told");
    }
}

impl Line {
    pub(crate) fn is_high(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Keeps messages.
#[derive(Clone, Default)]
struct Messages(Arc<Mutex<Vec<Message>>>);

struct Route(Messages, Mutex<Option<Message>>);

impl MessageSink for Messages {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Route(self.clone(), Mutex::default()))
    }
}

impl MessageRoute for Route {
    fn set(&self, message: Option<Message>) {
        *self.1.lock().unwrap() = message;
    }

    fn raise(&self) {
        self.0.0.lock().unwrap().extend(*self.1.lock().unwrap());
    }
}

#[derive(Debug)]
struct Woken(Sender<()>);

impl Wake for Woken {
    fn wake(&self) {
        let _ = self.0.send(());
    }
}

/// A disc whose sectors are filled with their number.
pub(crate) fn disc(dir: &Path, sectors: u8) -> Arc<dyn BlockBackend> {
    let path = dir.join(format!("{sectors}.iso"));
    let bytes: Vec<u8> = (0..sectors).flat_map(|sector| [sector; 2048]).collect();
    std::fs::write(&path, bytes).unwrap();
    block::open(&ImageSpec::read_only(path)).unwrap()
}

pub(crate) struct Rig {
    pub(crate) ahci: Ahci,
    pub(crate) drives: [Option<CdHandle>; PORTS],
    pub(crate) memory: Arc<Ram>,
    pub(crate) line: Arc<Line>,
    messages: Messages,
    wake: Arc<dyn Wake>,
    woken: Receiver<()>,
}

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Status in the low byte, error above it.
    pub(crate) task_file: u32,
    /// Interrupts that happened.
    pub(crate) interrupts: u32,
    /// Bytes that the list says were moved.
    pub(crate) moved: u32,
}

impl Rig {
    /// A controller with a drive at port 0, and no driver yet.
    pub(crate) fn new(drive: CdDrive) -> Self {
        let mut drives = [const { None }; PORTS];
        drives[0] = Some(drive);
        let memory = Arc::new(Ram(Mutex::new(vec![0; RAM])));
        let line = Arc::new(Line::default());
        let messages = Messages::default();
        let (wake, woken) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Woken(wake));
        let plumbing = Plumbing {
            memory: memory.clone(),
            messages: &messages,
            line: InterruptLine::new(16, line.clone()),
            wake: wake.clone(),
        };
        let (ahci, drives) = Ahci::new(drives, plumbing).unwrap();
        Self { ahci, drives, memory, line, messages, wake, woken }
    }

    pub(crate) fn drive(&self) -> &CdHandle {
        self.drives[0].as_ref().expect("there is a drive")
    }

    pub(crate) fn messages(&self) -> usize {
        self.messages.0.lock().unwrap().len()
    }

    /// One access of a vCPU.
    pub(crate) fn access(&mut self, region: usize, offset: u64, len: u8, data: Option<u64>) -> u64 {
        let (late, _answers) = mpsc::channel();
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &self.wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let answer = match data {
            Some(data) => self.ahci.write(region, offset, data, &access, reply),
            None => self.ahci.read(region, offset, &access, reply),
        };
        let Answer::Done(value) = answer else { panic!("{answer:?}") };
        value
    }

    pub(crate) fn get(&mut self, register: u64) -> u32 {
        self.access(REGISTERS, register, 4, None) as u32
    }

    pub(crate) fn set(&mut self, register: u64, value: u32) {
        self.access(REGISTERS, register, 4, Some(value.into()));
    }

    /// Lets the thread that serves IOREQs run until `done`.
    pub(crate) fn until(&mut self, mut done: impl FnMut(&mut Self) -> bool) {
        loop {
            self.ahci.poll();
            if done(self) {
                // What it saw may have come after the look before: so may the interrupt.
                self.ahci.poll();
                return;
            }
            self.woken.recv_timeout(PATIENCE).expect("the controller wakes who waits for it");
        }
    }

    /// What a driver does before its first command, with INTx.
    pub(crate) fn start(&mut self) {
        self.ahci.write_config(4, 2, 0b111);
        self.set(GHC, 0x8000_0002);
        self.start_port(0);
    }

    pub(crate) fn start_port(&mut self, index: usize) {
        let page = 0x1000 * index as u64;
        self.set(port(index, CLB), (LIST + page) as u32);
        self.set(port(index, FB), (RECEIVED + page) as u32);
        self.set(port(index, SERR), u32::MAX);
        self.set(port(index, PXIS), u32::MAX);
        self.set(port(index, PXIE), u32::MAX);
        self.set(port(index, CMD), 0x10);
        self.set(port(index, CMD), 0x11);
    }

    pub(crate) fn stop_port(&mut self, index: usize) {
        self.set(port(index, CMD), 0x10);
        self.set(port(index, CMD), 0);
        assert_eq!(self.get(port(index, CMD)) & 0xc000, 0);
    }

    /// A received FIS.
    pub(crate) fn received(&self, offset: u64) -> Vec<u8> {
        self.memory.bytes(RECEIVED + offset, 20)
    }

    /// Writes a command into the list and its table; `regions` are addresses and bytes.
    pub(crate) fn prepare(&mut self, slot: u32, fis: &[u8], packet: &[u8], regions: &[(u64, u32)]) {
        let table = TABLE + 0x1000 * u64::from(slot % 8);
        let header = LIST + 32 * u64::from(slot);
        let flags = 5 | 1 << 5 | (regions.len() as u32) << 16;
        self.memory.put(header, &flags.to_le_bytes());
        self.memory.put(header + 4, &[0; 4]);
        self.memory.put(header + 8, &table.to_le_bytes());
        self.memory.put(table, &[0; 0x80]);
        self.memory.put(table, fis);
        self.memory.put(table + 0x40, packet);
        for (n, (addr, len)) in regions.iter().enumerate() {
            let region = [&addr.to_le_bytes()[..], &[0; 4], &(len - 1).to_le_bytes()].concat();
            self.memory.put(table + 0x80 + 16 * n as u64, &region);
        }
    }

    /// Issues what was prepared, and waits for its end.
    pub(crate) fn issue(&mut self, slot: u32) -> Ended {
        self.set(port(0, CI), 1 << slot);
        self.until(|rig| {
            rig.get(port(0, CI)) & (1 << slot) == 0 || rig.get(port(0, PXIS)) & 0x7d00_0000 & !(1 << 24) != 0
        });
        let interrupts = self.get(port(0, PXIS));
        self.set(port(0, PXIS), interrupts);
        self.set(IS, 1);
        let moved = self.memory.bytes(LIST + 32 * u64::from(slot) + 4, 4);
        let moved = u32::from_le_bytes([moved[0], moved[1], moved[2], moved[3]]);
        Ended { task_file: self.get(port(0, TFD)), interrupts, moved }
    }

    /// An ATA command with room for a sector of data.
    pub(crate) fn ata(&mut self, command: u8, features: u8, count: u8) -> Ended {
        let mut fis = [0; 20];
        (fis[0], fis[1], fis[2], fis[3], fis[12]) = (0x27, 0x80, command, features, count);
        self.prepare(0, &fis, &[], &[(DATA, 512)]);
        self.issue(0)
    }

    /// A packet command by DMA, with so much room for data.
    pub(crate) fn packet(&mut self, packet: &[u8], room: u32) -> Ended {
        let regions: &[_] = if room == 0 { &[] } else { &[(DATA, room)] };
        let ended = self.packet_to(packet, 1, regions);
        if ended.task_file & 1 != 0 {
            // As after every error, the driver starts the port again.
            self.set(port(0, CMD), 0x10);
            self.set(port(0, CMD), 0x11);
        }
        ended
    }

    pub(crate) fn packet_to(&mut self, packet: &[u8], features: u8, regions: &[(u64, u32)]) -> Ended {
        let mut fis = [0; 20];
        (fis[0], fis[1], fis[2], fis[3]) = (0x27, 0x80, 0xa0, features);
        self.prepare(0, &fis, packet, regions);
        self.issue(0)
    }

    /// Data that a packet command gives.
    pub(crate) fn data(&mut self, packet: &[u8]) -> Vec<u8> {
        let ended = self.packet(packet, 4096);
        assert_eq!(ended.task_file, 0x50, "{packet:x?}: {ended:x?}");
        self.memory.bytes(DATA, ended.moved as usize)
    }

    /// Sense key, code and qualifier of a packet command that fails.
    pub(crate) fn sense(&mut self, packet: &[u8]) -> [u8; 3] {
        let ended = self.packet(packet, 4096);
        assert_eq!(ended.task_file & 0xff, 0x41, "{packet:x?}: {ended:x?}");
        let sense = self.data(&[3, 0, 0, 0, 18]);
        assert_eq!(ended.task_file >> 12, u32::from(sense[2]));
        [sense[2], sense[12], sense[13]]
    }
}
