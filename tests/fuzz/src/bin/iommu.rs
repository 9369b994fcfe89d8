//! The IOMMU and the I/O APIC behind it against a guest that makes any access to their registers, and whose tables and queue are
//! anything, while a function's DMA and messages go through.
#![no_main]

use std::sync::{Arc, Mutex, mpsc};

use fuzz::damage::Damage;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::bus::{Access, Answer, Deferred, Device, LateAnswer, RequestId, Wake};
use soc_vmm::devices::{IO_APIC_PINS, IoApic, Persist};
use soc_vmm::interrupt::{LineSink, Message, MessageRoute, MessageSink, Settling};
use soc_vmm::iommu::{Iommu, Sender, VtdRegisters};
use soc_vmm::memory::{GuestMemory, MemoryError};
use soc_vmm::pci::Requester;
use soc_vmm::persist::{Moves, States};

/// Registers that do something, so that chance need not find them.
const REGISTERS: [u64; 20] = [
    0x18, 0x20, 0x28, 0x34, 0x38, 0x3c, 0x40, 0x80, 0x88, 0x90, 0x9c, 0xa0, 0xa4, 0xa8, 0xb8, 0xf0, 0xf8, 0x220, 0x228,
    0x22c,
];
const RAM: usize = 64 << 10;
/// Where right tables are: root, contexts, a table of each level, interrupt entries, the queue.
const ROOT: u64 = 0;
const CONTEXTS: u64 = 0x1000;
const PAGES: u64 = 0x2000;
const INTERRUPTS: u64 = 0x6000;
const QUEUE: u64 = 0x7000;
/// The function's requester ID.
const FUNCTION: u16 = 0x28;

#[derive(Arbitrary, Debug)]
enum Step {
    Register {
        which: u8,
        wide: bool,
        data: Option<u64>,
    },
    Any {
        offset: u16,
        len: u8,
        data: Option<u64>,
    },
    /// Everything on, with right tables.
    Start,
    Context(u8, u64),
    /// An entry of a right table.
    Page {
        level: u8,
        index: u8,
        to: u8,
        bits: u64,
    },
    Interrupt {
        index: u8,
        low: u64,
        high: u64,
    },
    /// Descriptors, which are submitted at once.
    Submit(Vec<(u8, u64, u64)>),
    Memory {
        at: u16,
        word: u64,
    },
    Dma {
        addr: u64,
        near: bool,
        len: u16,
        write: bool,
    },
    Set {
        route: bool,
        message: Option<(u32, u32)>,
    },
    Raise(bool),
    Place(u8),
    Pin {
        register: u8,
        value: u32,
    },
    IoApic {
        offset: u16,
        len: u8,
        data: Option<u64>,
    },
    Line(u8, bool),
    End(u8),
    Settle,
    Restore,
    Reset,
    Load(Damage),
}

#[derive(Debug)]
struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

struct Ram(Mutex<Vec<u8>>);

impl Ram {
    fn part(addr: u64, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
        let end = addr.checked_add(len as u64).filter(|end| *end <= RAM as u64);
        end.map(|end| addr as usize..end as usize).ok_or(MemoryError::NotRam { addr, len: len as u64 })
    }

    fn put(&self, addr: u64, value: u64) {
        self.write(addr, &value.to_le_bytes()).expect("it is RAM");
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        data.copy_from_slice(&self.0.lock().expect("no panic under the lock")[Self::part(addr, data.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.lock().expect("no panic under the lock")[Self::part(addr, data.len())?].copy_from_slice(data);
        Ok(())
    }
}

/// The host: it has what it was told when it is asked to settle.
#[derive(Clone)]
struct Host(Arc<Settling>);

impl MessageSink for Host {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(self.clone())
    }
}

impl MessageRoute for Host {
    fn set(&self, _: Option<Message>) {
        self.0.change();
    }

    fn raise(&self) {}
}

struct Machine {
    ram: Arc<Ram>,
    unit: VtdRegisters,
    io_apic: IoApic,
    dma: Arc<dyn GuestMemory>,
    routes: [Box<dyn MessageRoute>; 2],
    requester: Requester,
    settling: Arc<Settling>,
    tail: u64,
    deferred: usize,
    late: mpsc::Sender<LateAnswer>,
    answers: mpsc::Receiver<LateAnswer>,
    wake: Arc<dyn Wake>,
}

impl Machine {
    fn new() -> Self {
        let (settling, requester) = (Arc::<Settling>::default(), Requester::default());
        let (ram, host) = (Arc::new(Ram(Mutex::new(vec![0; RAM]))), Host(settling.clone()));
        let iommu = Iommu::new(ram.clone(), &host);
        let pins = (0..IO_APIC_PINS).map(|_| iommu.remapped(Sender::IoApic, host.route())).collect();
        let io_apic = IoApic::new(pins, settling.clone());
        let unit = VtdRegisters::new(iommu.clone(), &host, settling.clone(), Arc::new(Quiet));
        requester.place(0, FUNCTION as u8);
        let dma = iommu.memory_of(requester.clone());
        let messages = iommu.messages_of(requester.clone(), &host);
        let routes = [messages.route(), messages.route()];
        drop(messages);
        let (late, answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Quiet);
        Self { ram, unit, io_apic, dma, routes, requester, settling, tail: 0, deferred: 0, late, answers, wake }
    }

    fn access(&mut self, io_apic: bool, offset: u64, len: u8, data: Option<u64>) {
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &self.late, &self.wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let device: &mut dyn Device = if io_apic { &mut self.io_apic } else { &mut self.unit };
        let answer = match data {
            None => device.read(&access, offset, reply),
            Some(data) => device.write(&access, offset, data, reply),
        };
        match answer {
            Answer::Done(_) => {}
            Answer::Deferred => {
                assert!(data.is_some());
                self.deferred += 1;
            }
            other => panic!("{other:?}"),
        }
    }

    fn write(&mut self, offset: u64, data: u64) {
        self.access(false, offset, 8, Some(data));
    }

    fn command(&mut self, bits: u64) {
        self.access(false, 0x18, 4, Some(bits));
    }

    fn start(&mut self) {
        self.ram.put(ROOT, CONTEXTS | 1);
        self.ram.put(CONTEXTS + u64::from(FUNCTION) * 16, PAGES | 1);
        self.ram.put(CONTEXTS + u64::from(FUNCTION) * 16 + 8, 1);
        self.ram.put(PAGES, (PAGES + 0x1000) | 3);
        self.ram.put(PAGES + 0x1000, (PAGES + 0x2000) | 3);
        self.write(0x20, ROOT);
        self.write(0xb8, INTERRUPTS | 7);
        self.write(0x90, QUEUE);
        self.write(0x88, 0);
        self.tail = 0;
        self.command(1 << 30 | 1 << 24);
        self.command(1 << 31 | 1 << 26 | 1 << 25);
    }

    /// The host has all that it was told: nobody waits any more.
    fn settle(&mut self) {
        let mark = self.settling.mark();
        self.settling.settle(mark);
        self.unit.poll();
        self.io_apic.poll();
        while let Ok(LateAnswer { answer, .. }) = self.answers.try_recv() {
            assert!(matches!(answer, Answer::Done(0)), "{answer:?}");
            self.deferred -= 1;
        }
        assert_eq!(self.deferred, 0, "an access is never answered");
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Register { which, wide, data } => {
                let offset = REGISTERS[usize::from(which) % REGISTERS.len()];
                self.access(false, offset, if wide && offset % 8 == 0 { 8 } else { 4 }, data);
            }
            Step::Any { offset, len, data } => self.access(false, u64::from(offset) % 0x1000, len % 8 + 1, data),
            Step::Start => self.start(),
            Step::Context(devfn, word) => self.ram.put(CONTEXTS + u64::from(devfn) * 8, word),
            Step::Page { level, index, to, bits } => {
                let table = PAGES + u64::from(level % 3) * 0x1000;
                self.ram.put(table + u64::from(index % 16) * 8, u64::from(to % 16) << 12 | bits);
            }
            Step::Interrupt { index, low, high } => {
                self.ram.put(INTERRUPTS + u64::from(index) * 16, low);
                self.ram.put(INTERRUPTS + u64::from(index) * 16 + 8, high);
            }
            Step::Submit(descriptors) => {
                for (kind, low, high) in descriptors.into_iter().take(64) {
                    self.ram.put(QUEUE + self.tail * 16, low & !0xe0f | u64::from(kind % 8));
                    self.ram.put(QUEUE + self.tail * 16 + 8, high % RAM as u64);
                    self.tail = (self.tail + 1) % 256;
                }
                self.write(0x88, self.tail << 4);
            }
            Step::Memory { at, word } => self.ram.put(u64::from(at) & !7, word),
            Step::Dma { addr, near, len, write } => {
                let addr = if near { addr % 0x1_0000 } else { addr };
                let mut data = vec![0; len.into()];
                let _ = if write { self.dma.write(addr, &data) } else { self.dma.read(addr, &mut data) };
            }
            Step::Set { route, message } => {
                let message = message
                    .map(|(address, data)| Message { address: 0xfee0_0000 | u64::from(address & 0xf_ffff), data });
                self.routes[usize::from(route)].set(message);
            }
            Step::Raise(route) => self.routes[usize::from(route)].raise(),
            Step::Place(bus) => self.requester.place(bus % 2, FUNCTION as u8),
            Step::Pin { register, value } => {
                self.access(true, 0, 4, Some(register.into()));
                self.access(true, 0x10, 4, Some(value.into()));
            }
            Step::IoApic { offset, len, data } => self.access(true, u64::from(offset) % 0x1000, len % 8 + 1, data),
            Step::Line(pin, high) => self.io_apic.set_level(pin.into(), high),
            Step::End(vector) => self.io_apic.end(vector),
            Step::Settle => self.settle(),
            Step::Restore => {
                let (unit, chip) = (self.unit.save(), self.io_apic.save());
                self.unit.restore(&unit).expect("it was saved");
                self.io_apic.restore(&chip).expect("it was saved");
                assert_eq!((self.unit.save(), self.io_apic.save()), (unit, chip));
            }
            Step::Reset => {
                self.unit.reset();
                self.io_apic.reset();
            }
            Step::Load(damage) => {
                let mut states = States::default();
                self.unit.save_into("", &mut states);
                self.io_apic.save_into("", &mut states);
                let mut states = damage.to(states);
                // Refused, or as good as any other.
                let _ = self.unit.load("", &mut states).and_then(|()| self.io_apic.load("", &mut states));
            }
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut machine = Machine::new();
    for step in steps.into_iter().take(200) {
        machine.take(step);
    }
    machine.settle();
    // Reset is reset, whatever was before: addresses are what they are.
    machine.take(Step::Reset);
    assert_eq!(machine.unit.save(), Machine::new().unit.save());
    machine.dma.write(0x8000, &[1; 0x3000]).expect("it is RAM");
});
