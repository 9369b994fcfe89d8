//! The PCI fabric with its chipset against a guest that makes any access to configuration space, by ports or by memory, and to what
//! answers behind it, while devices come and go.
#![no_main]

use std::sync::{Arc, Mutex, mpsc};

use fuzz::damage::Damage;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::bus::{Access, Answer, Deferred, Device, LateAnswer, RequestId, Ticket, Wake};
use soc_vmm::devices::{AcpiPm, PmTimerWidth, SystemClock};
use soc_vmm::interrupt::{InterruptLine, LineSink, Message, MessageRoute, MessageSink};
use soc_vmm::pci::{
    Apertures, Bar, ConfigSpace, Fabric, FabricSide, Identity, LPC, LpcBridge, MemoryView, Msix, MsixLayout, NodeId,
    PciFunction, Pirqs, Platform, PlugError, Requester, RootPort, Signal, Space, Window,
};
use soc_vmm::persist::{Moves, RestoreError, StateError, States};
use soc_vmm::power::{PowerEvent, PowerSink};

/// Registers that do something, so that chance need not find them.
const REGISTERS: [u16; 20] = [
    0x04, 0x10, 0x14, 0x18, 0x1c, 0x20, 0x24, 0x28, 0x30, 0x40, 0x44, 0x50, 0x58, 0x60, 0x68, 0x90, 0x94, 0x9d, 0xf0,
    0x100,
];
/// Functions that are there: host bridge, ports, LPC bridge, what is behind the ports.
const FUNCTIONS: [u16; 6] = [0, 8, 9, 0xf8, 1 << 8, 2 << 8];

#[derive(Arbitrary, Debug)]
enum Step {
    Config {
        function: u8,
        register: u8,
        off: u8,
        by_memory: bool,
        len: u8,
        data: Option<u64>,
    },
    /// Where the last window was seen.
    Window {
        off: u16,
        io: bool,
        len: u8,
        data: Option<u64>,
    },
    Any {
        at: u64,
        io: bool,
        len: u8,
        data: Option<u64>,
    },
    Poll,
    Pull,
    Plug,
    Reset,
    /// It goes on from the state that it has, or from one that came to harm.
    Load(Option<Damage>),
}

#[derive(Debug)]
struct Quiet;

impl Wake for Quiet {
    fn wake(&self) {}
}

impl LineSink for Quiet {
    fn set_level(&self, gsi: u32, _: bool) {
        assert!(gsi < 24);
    }
}

impl PowerSink for Quiet {
    fn power(&self, _: PowerEvent) {}
}

impl MessageSink for Quiet {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Self)
    }
}

impl MessageRoute for Quiet {
    fn set(&self, _: Option<Message>) {}

    fn raise(&self) {}
}

/// Does at once what is asked for.
#[derive(Default)]
struct Around(Mutex<Vec<Window>>);

impl Platform for Around {
    fn show(&self, view: &MemoryView, done: Option<Ticket>) {
        assert!(view.tseg <= 8 << 20);
        if let Some(ticket) = done {
            ticket.done(0);
        }
    }

    fn post(&self, windows: &[Window]) {
        assert!(windows.iter().all(|w| w.len != 0 && w.base.checked_add(w.len - 1).is_some()));
        *self.0.lock().expect("no panic under the lock") = windows.to_vec();
    }

    fn signal(&self, _: &[Signal]) {}
}

/// An endpoint with a window of each kind.
struct Endpoint {
    config: ConfigSpace,
    msix: Msix,
}

impl Endpoint {
    fn new() -> Self {
        let identity = Identity { vendor: 0x1af4, device: 0x1042, revision: 1, class: 0x01_0000, subsystem: (0, 0) };
        let mut config = ConfigSpace::endpoint(&identity).with_pin();
        config.add_bar(0, Bar { space: Space::Io, size: 64, prefetchable: false });
        config.add_bar(1, Bar { space: Space::Memory32, size: 4096, prefetchable: false });
        config.add_bar(4, Bar { space: Space::Memory64, size: 16384, prefetchable: true });
        let msix = Msix::new(&mut config, MsixLayout { vectors: 3, bar: 1, table: 0, pending: 0x800 }, &Quiet);
        Self { config, msix }
    }
}

impl Moves for Endpoint {
    fn save_into(&self, at: &str, states: &mut States) {
        states.put("endpoint", at, 1, &(self.config.save(), self.msix.save()));
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let (config, msix) = states.take("endpoint", at, 1)?;
        if !self.config.restore(&config) || !self.msix.restore(&msix) {
            return Err(RestoreError::new("endpoint", "it is another function").into());
        }
        self.msix.configure(&self.config);
        Ok(())
    }
}

impl PciFunction for Endpoint {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        self.msix.configure(&self.config);
    }

    fn posted(&self) -> Vec<Window> {
        self.windows().into_iter().filter(|window| window.region == 4).collect()
    }

    fn read(&mut self, region: usize, offset: u64, access: &Access, _: Deferred<'_>) -> Answer {
        assert!(offset < [64, 4096, 0, 0, 16384][region]);
        Answer::Done(if region == 1 { self.msix.read(offset, access.len) } else { 0 })
    }

    fn write(&mut self, region: usize, offset: u64, data: u64, access: &Access, _: Deferred<'_>) -> Answer {
        assert!(offset < [64, 4096, 0, 0, 16384][region]);
        if region == 1 {
            self.msix.write(offset, access.len, data);
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msix.reset();
    }
}

struct Machine {
    fabric: Arc<Mutex<Fabric>>,
    sides: [FabricSide; 2],
    around: Arc<Around>,
    port: NodeId,
    late: mpsc::Sender<LateAnswer>,
    answers: mpsc::Receiver<LateAnswer>,
    wake: Arc<dyn Wake>,
}

impl Machine {
    fn new(prepared: bool) -> Self {
        let around = Arc::<Around>::default();
        let mut fabric = Fabric::new(prepared.then(|| Apertures::above(4 << 30)), around.clone());
        let pirqs = Arc::new(Pirqs::new(Arc::new(Quiet)));
        let line = InterruptLine::new(9, Arc::new(Quiet));
        let clock = Arc::new(SystemClock);
        let (acpi, _) = AcpiPm::new(1_000_000, PmTimerWidth::Bits32, clock, line, Arc::new(Quiet), Arc::new(Quiet));
        fabric.plug(None, LPC, Box::new(LpcBridge::new(acpi, pirqs.clone(), prepared))).expect("a free place");
        let mut plug =
            |devfn| fabric.plug(None, devfn, Box::new(RootPort::new(1, pirqs.wire(1), &Quiet))).expect("a free place");
        let port = plug(8);
        plug(9);
        fabric.insert(port, Box::new(Endpoint::new()), Requester::default()).expect("a free place");
        fabric.prepare().expect("room for all windows");
        let fabric = Arc::new(Mutex::new(fabric));
        let sides = FabricSide::both(&fabric);
        let (late, answers) = mpsc::channel();
        Self { fabric, sides, around, port, late, answers, wake: Arc::new(Quiet) }
    }

    fn access(&mut self, io: bool, at: u64, len: u8, data: Option<u64>) {
        let len = if io { [1, 2, 4][usize::from(len % 3)] } else { len % 8 + 1 };
        let at = if io { at & 0xffff } else { at };
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let Self { sides, late, wake, answers, .. } = self;
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, late, wake);
        let side = &mut sides[usize::from(!io)];
        let answer = match data {
            None => side.read(&access, at, reply),
            Some(data) => side.write(&access, at, data, reply),
        };
        match answer {
            Answer::Deferred => assert!(matches!(answers.try_recv(), Ok(LateAnswer { answer: Answer::Done(_), .. }))),
            Answer::Failed(why) => panic!("{why}"),
            Answer::Done(_) | Answer::Unclaimed => {}
        }
    }

    fn config(&mut self, function: u16, offset: u16, by_memory: bool, len: u8, data: Option<u64>) {
        if by_memory {
            let base = self.fabric().host().ecam().map_or(0xb000_0000, |(base, _)| base);
            return self.access(false, base + (u64::from(function) << 12 | u64::from(offset)), len, data);
        }
        let address = 1 << 31 | u64::from(function) << 8 | u64::from(offset & 0xfc);
        self.access(true, 0xcf8, 2, Some(address));
        self.access(true, 0xcfc + u64::from(offset & 3), len, data);
    }

    fn fabric(&self) -> std::sync::MutexGuard<'_, Fabric> {
        self.fabric.lock().expect("no panic under the lock")
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Config { function, register, off, by_memory, len, data } => {
                let function = FUNCTIONS[usize::from(function) % FUNCTIONS.len()];
                let register = REGISTERS[usize::from(register) % REGISTERS.len()] + u16::from(off % 8);
                self.config(function, register, by_memory, len, data);
            }
            Step::Window { off, io, len, data } => {
                let window = self.around.0.lock().expect("no panic under the lock").first().map_or(0x1000, |w| w.base);
                self.access(io, window + u64::from(off), len, data);
            }
            Step::Any { at, io, len, data } => self.access(io, at, len, data),
            Step::Poll => self.sides[1].poll(),
            Step::Pull => {
                let outcome = self.fabric().ask_out(self.port);
                assert!(matches!(outcome, Ok(()) | Err(PlugError::Empty | PlugError::Busy)), "{outcome:?}");
            }
            Step::Plug => {
                let outcome = self.fabric().insert(self.port, Box::new(Endpoint::new()), Requester::default());
                assert!(matches!(outcome, Ok(()) | Err(PlugError::Taken { .. })), "{outcome:?}");
            }
            Step::Reset => self.sides.iter_mut().for_each(Device::reset),
            Step::Load(damage) => {
                let mut states = States::default();
                self.sides[1].save_into("", &mut states);
                let mut sent = damage.map_or_else(|| states.clone(), |damage| damage.to(states.clone()));
                let loaded = self.sides[1].load("", &mut sent);
                assert!(damage.is_some() || loaded.is_ok(), "{loaded:?}");
            }
        }
    }
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (prepared, steps) = input;
    let mut machine = Machine::new(prepared);
    for step in steps.into_iter().take(200) {
        machine.take(step);
    }
    // Reset is reset, whatever was before.
    machine.take(Step::Plug);
    machine.take(Step::Reset);
    let view = machine.fabric().host().view();
    assert_eq!(view, if prepared { MemoryView::SHADOWED } else { MemoryView::default() });
});
