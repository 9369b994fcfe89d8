//! A whole machine without a host: its buses, what is around them, and guest memory.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use super::super::super::media::{Cdrom, Media};
use super::super::super::shape::Shape;
use super::super::super::split::Split;
use super::super::{Machine, Parts};
use crate::ahci::TrayListener;
use crate::block::BlockBackend;
use crate::bus::{Access, Answer, Deferred, LateAnswer, RequestId, Ticket, Wake};
use crate::cli::{Invocation, RunConfig, TestDevice};
use crate::cpus::{CpuListener, Occupant};
use crate::devices::{CpuReport, IO_APIC_PINS, InputWriter, OutputReader, input_pipe, output_pipe};
use crate::flash::{Bank, FlashMemory, SECTOR};
use crate::hyperv::{Hyperv, Sint, SintRoute, SintSink};
use crate::interrupt::{LineSink, Message, MessageSink};
use crate::layout::{FOUR_GIB, MemoryLayout};
use crate::memory::test_ram::Ram;
use crate::memory::{GuestMemory, MemoryError};
use crate::pci::test_sink::TestSink;
use crate::pci::{MemoryView, Platform, Signal, Window};
use crate::persist::{Moves, StateError, States};
use crate::power::{CrashEvent, CrashSink, PowerEvent, PowerSink};
use crate::slots::{DeviceListeners, Named, SlotListener};
use crate::virtio::balloon::BalloonEvents;
use crate::virtio::block::{DiskError, DiskErrorListener};
use crate::virtio::console::PortEvents;

/// Bytes of RAM that devices reach, from 0 on.
pub(super) const RAM: usize = 1 << 20;
/// Bytes of each of the two flash chips, which end at 4 GiB: variables, code.
pub(super) const CHIP: u64 = 2 * SECTOR;
/// Room in the queues of serial port and debug console.
const ROOM: usize = 1 << 16;
/// Nothing takes longer.
const PATIENCE: Duration = Duration::from_secs(60);

/// What happens around a machine, in the order in which it happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    Power(PowerEvent),
    Crash(CrashEvent),
    Sint(Sint),
    Reported(CpuReport),
    Tray(bool),
}

/// What is around a machine.
#[derive(Default)]
pub(super) struct World {
    levels: Mutex<BTreeMap<u32, bool>>,
    events: Mutex<Vec<Event>>,
    view: Mutex<MemoryView>,
    posted: Mutex<Vec<Window>>,
    /// Arrays of flash, and whether they are shown.
    arrays: Mutex<Vec<(Vec<u8>, bool)>>,
}

impl World {
    fn note(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

impl std::fmt::Debug for World {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("World")
    }
}

impl LineSink for World {
    fn set_level(&self, gsi: u32, high: bool) {
        self.levels.lock().unwrap().insert(gsi, high);
    }
}

impl PowerSink for World {
    fn power(&self, event: PowerEvent) {
        self.note(Event::Power(event));
    }
}

impl CrashSink for World {
    fn crashed(&self, event: CrashEvent) {
        self.note(Event::Crash(event));
    }
}

impl Wake for World {
    fn wake(&self) {}
}

impl TrayListener for World {
    fn tray_moved(&self, open: bool) {
        self.note(Event::Tray(open));
    }
}

impl CpuListener for World {
    fn deleted(&self, _: Occupant) {}

    fn reported(&self, _: Option<String>, report: CpuReport) {
        self.note(Event::Reported(report));
    }
}

impl Platform for World {
    fn show(&self, view: &MemoryView, done: Option<Ticket>) {
        *self.view.lock().unwrap() = *view;
        done.into_iter().for_each(|ticket| ticket.done(0));
    }

    fn post(&self, windows: &[Window]) {
        *self.posted.lock().unwrap() = windows.to_vec();
    }

    fn signal(&self, _: &[Signal]) {}
}

impl FlashMemory for World {
    fn show_array(&self, bank: usize, on: bool, done: Option<Ticket>) {
        self.arrays.lock().unwrap()[bank].1 = on;
        done.into_iter().for_each(|ticket| ticket.done(0));
    }

    fn program(&self, bank: usize, offset: u64, bytes: &[u8]) {
        self.arrays.lock().unwrap()[bank].0[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    fn fetch(&self, bank: usize, bytes: &mut [u8]) -> Result<(), MemoryError> {
        bytes.copy_from_slice(&self.arrays.lock().unwrap()[bank].0);
        Ok(())
    }
}

struct Sints(Arc<World>);

struct Route(Arc<World>, Sint);

impl SintSink for Sints {
    fn route(&self, sint: Sint) -> Option<Box<dyn SintRoute>> {
        Some(Box::new(Route(self.0.clone(), sint)))
    }

    fn take_ended(&self) -> Vec<Sint> {
        Vec::new()
    }
}

impl SintRoute for Route {
    fn raise(&self) {
        self.0.note(Event::Sint(self.1));
    }

    fn when_ready(&self, ticket: Ticket) {
        ticket.done(0);
    }
}

impl SlotListener for World {
    fn deleted(&self, _: &str) {}
}

impl DiskErrorListener for World {
    fn failed(&self, _: DiskError) {}
}

impl PortEvents for World {
    fn guest_open(&self, _: &str, _: bool) {}
}

impl BalloonEvents for World {
    fn changed(&self, _: u64) {}
}

/// What can be told of a machine from outside, but for answers.
#[derive(Debug, PartialEq)]
pub(super) struct Outside {
    high: Vec<u32>,
    messages: Vec<Message>,
    events: Vec<Event>,
    view: MemoryView,
    posted: Vec<Window>,
    shown: Vec<bool>,
    sent: Vec<u8>,
}

impl Outside {
    /// The same where nothing happened.
    pub(super) fn quiet(self) -> Self {
        Self { messages: Vec::new(), events: Vec::new(), sent: Vec::new(), ..self }
    }
}

/// A machine and its world.
pub(super) struct Rig {
    pub(super) machine: Machine,
    pub(super) hyperv: Arc<Hyperv>,
    pub(super) world: Arc<World>,
    pub(super) ram: Arc<Ram>,
    messages: Arc<TestSink>,
    /// Messages that were looked at.
    seen: usize,
    output: [OutputReader; 2],
    _input: InputWriter,
    late: (mpsc::Sender<LateAnswer>, mpsc::Receiver<LateAnswer>),
    wake: Arc<dyn Wake>,
}

impl Rig {
    /// A machine with a drive, of which `medium` is in the tray, and with `options` of the command line.
    pub(super) fn new(options: &[&str], medium: Option<Arc<dyn BlockBackend>>) -> Self {
        let config = config(options);
        let layout = MemoryLayout::new(config.memory.size).unwrap();
        let (prepared, world) = (options.contains(&"--kernel"), Arc::new(World::default()));
        if prepared {
            // As whoever arranges the guest's memory begins.
            *world.view.lock().unwrap() = MemoryView::SHADOWED;
        }
        let (ram, messages) = (Arc::new(Ram::new(RAM)), Arc::new(TestSink::default()));
        *world.arrays.lock().unwrap() = vec![(vec![0; CHIP as usize], true); 2];
        let bank = |base, byte, read_only| Bank { base, bytes: vec![byte; CHIP as usize], read_only, store: None };
        let flash = vec![bank(FOUR_GIB - CHIP, 0x90, true), bank(FOUR_GIB - 2 * CHIP, 0xff, false)];
        let hyperv = Arc::new(Hyperv::new(4, ram.clone(), Arc::new(Sints(world.clone()))));
        let ((output, sent), (input, received)) = (output_pipe(ROOM, world.clone()), input_pipe(ROOM, world.clone()));
        let (debug, debugged) = output_pipe(ROOM, world.clone());
        let tray = world.clone();
        let pins = || (0..IO_APIC_PINS).map(|_| messages.route()).collect();
        let machine = Machine::new(Parts {
            incoming: false,
            name: "moves",
            prepared,
            platform: world.clone(),
            messages: messages.clone(),
            split: config.iommu.map(|_| Split { pins: pins(), settling: Arc::default() }),
            memory: ram.clone(),
            notify: Arc::default(),
            physical_bits: 40,
            shape: Shape::new(&config, &layout),
            cpuid: &[],
            tsc_khz: 2_000_000,
            serial: (output, received),
            debugcon: Some(debug),
            debug_exit: true,
            test_devices: &[TestDevice::Edu, TestDevice::Hyperv],
            hyperv: Some(hyperv.clone()),
            lines: world.clone(),
            power: world.clone(),
            crash: world.clone(),
            wake: world.clone(),
            balloon: None,
            media: Media {
                flash: Some(flash),
                named: Named::default(),
                devices: Vec::new(),
                cdroms: vec![Cdrom { id: "cd".into(), port: 0, medium, node: None }],
                cpus: Vec::new(),
                fw_cfg: Vec::new(),
                reserved: Arc::default(),
            },
            flash: world.clone(),
            trays: Arc::new(move |_| tray.clone()),
            listener: world.clone(),
            device_listeners: DeviceListeners { disks: world.clone(), ports: world.clone(), balloons: world.clone() },
            cpu_listener: world.clone(),
        });
        let machine = machine.unwrap();
        let (output, wake) = ([sent, debugged], world.clone());
        Self { machine, hyperv, world, ram, messages, seen: 0, output, _input: input, late: mpsc::channel(), wake }
    }

    /// One access of a vCPU, answered.
    pub(super) fn access(&mut self, memory: bool, at: u64, len: u8, data: Option<u64>) -> u64 {
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &self.late.0, &self.wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let buses = &mut self.machine.buses;
        let bus = if memory { &mut buses.memory } else { &mut buses.ports };
        let answer = match data {
            Some(data) => bus.write(at, data, &access, reply),
            None => bus.read(at, &access, reply),
        };
        let answer = match answer {
            Answer::Deferred => self.late.1.recv_timeout(PATIENCE).expect("it is answered").answer,
            answer => answer,
        };
        let Answer::Done(value) = answer else { return u64::MAX };
        value & u64::MAX >> (64 - 8 * u32::from(len))
    }

    /// The 4 bytes at an offset of a function's configuration space.
    pub(super) fn config(&mut self, function: u32, offset: u32, data: Option<u32>) -> u32 {
        self.access(false, 0xcf8, 4, Some((1 << 31 | function << 8 | offset & 0xfc).into()));
        self.access(false, 0xcfc, 4, data.map(u64::from)) as u32
    }

    pub(super) fn poll(&mut self) {
        self.machine.buses.ports.poll();
        self.machine.buses.memory.poll();
        self.hyperv.poll();
    }

    pub(super) fn reset(&mut self) {
        self.machine.buses.ports.reset();
        self.machine.buses.memory.reset();
        self.hyperv.reset();
    }

    /// Halts every device.
    pub(super) fn halt(&mut self) {
        let buses = &mut self.machine.buses;
        buses.ports.halt();
        buses.memory.halt();
        self.hyperv.halt();
        let end = Instant::now() + PATIENCE;
        while !(buses.ports.is_halted() && buses.memory.is_halted() && self.hyperv.is_halted()) {
            assert!(Instant::now() < end, "a device doesn't halt");
            std::thread::yield_now();
        }
    }

    pub(super) fn go_on(&mut self) {
        self.machine.buses.ports.go_on();
        self.machine.buses.memory.go_on();
        self.hyperv.go_on();
    }

    /// The states of the devices on the memory bus, and of PCI functions.
    pub(super) fn states_of_memory_bus(&self) -> States {
        let mut states = States::default();
        self.machine.buses.memory.save_into(&mut states);
        states
    }

    /// The states of all devices, which are halted.
    pub(super) fn states(&self) -> States {
        let mut states = self.states_of_memory_bus();
        self.machine.buses.ports.save_into(&mut states);
        self.hyperv.save_into("", &mut states);
        states
    }

    /// Takes states over.
    pub(super) fn load(&mut self, mut states: States) -> Result<(), StateError> {
        self.machine.buses.ports.load(&mut states)?;
        self.machine.buses.memory.load(&mut states)?;
        self.hyperv.load("", &mut states)?;
        states.end()
    }

    /// Takes over the guest memory of `from`.
    pub(super) fn copy_memory(&self, from: &Self) {
        self.ram.0.lock().unwrap().copy_from_slice(&from.ram.0.lock().unwrap());
        let from = from.world.arrays.lock().unwrap();
        for (to, from) in self.world.arrays.lock().unwrap().iter_mut().zip(from.iter()) {
            to.0.copy_from_slice(&from.0);
        }
    }

    /// Guest memory of both kinds.
    pub(super) fn memory(&self) -> (Vec<u8>, Vec<Vec<u8>>) {
        let arrays = self.world.arrays.lock().unwrap();
        (self.ram.0.lock().unwrap().clone(), arrays.iter().map(|(bytes, _)| bytes.clone()).collect())
    }

    /// What happened since the last call, and how everything is.
    pub(super) fn outside(&mut self) -> Outside {
        let raised = self.messages.raised();
        let messages = raised[self.seen..].to_vec();
        self.seen = raised.len();
        let mut sent = Vec::new();
        for output in &mut self.output {
            output.try_read(&mut sent);
        }
        let world = &self.world;
        let levels = world.levels.lock().unwrap();
        Outside {
            high: levels.iter().filter(|(_, high)| **high).map(|(gsi, _)| *gsi).collect(),
            messages,
            events: std::mem::take(&mut world.events.lock().unwrap()),
            view: *world.view.lock().unwrap(),
            posted: world.posted.lock().unwrap().clone(),
            shown: world.arrays.lock().unwrap().iter().map(|(_, shown)| *shown).collect(),
            sent,
        }
    }

    /// Puts bytes into guest memory.
    pub(super) fn put(&self, addr: u64, bytes: &[u8]) {
        self.ram.write(addr, bytes).expect("it is RAM");
    }
}

fn config(options: &[&str]) -> RunConfig {
    let line = ["soc-vmm", "run"].iter().chain(options).map(OsString::from);
    match Invocation::parse(line) {
        Ok(Invocation::Run(config)) => *config,
        other => panic!("{other:?}"),
    }
}
