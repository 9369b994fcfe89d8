//! The fabric as a guest sees it.

mod slots;

use std::sync::{Arc, Mutex, mpsc};

use nix::sys::eventfd::EventFd;

use super::*;
use crate::bus::{Access, Answer, Deferred, Device, LateAnswer, RequestId, Ticket, Wake};
use crate::persist::{Moves, StateError, States};

#[derive(Debug)]
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

#[derive(Default)]
struct Around {
    views: Mutex<Vec<(MemoryView, Option<Ticket>)>>,
    posted: Mutex<Vec<Window>>,
    signals: Mutex<Vec<Signal>>,
}

impl Platform for Around {
    fn show(&self, view: &MemoryView, done: Option<Ticket>) {
        self.views.lock().unwrap().push((*view, done));
    }

    fn post(&self, windows: &[Window]) {
        *self.posted.lock().unwrap() = windows.to_vec();
    }

    fn signal(&self, signals: &[Signal]) {
        *self.signals.lock().unwrap() = signals.to_vec();
    }
}

/// An endpoint that answers with where it was asked.
struct Probe(ConfigSpace, Arc<EventFd>);

impl Probe {
    fn new(device: u16, bars: &[(usize, Bar)]) -> Box<Self> {
        let identity = Identity { vendor: 0x1af4, device, revision: 1, class: 0xff_0000, subsystem: (0, 0) };
        let mut config = ConfigSpace::endpoint(&identity);
        bars.iter().for_each(|(index, bar)| config.add_bar(*index, *bar));
        Box::new(Self(config, Arc::new(EventFd::new().unwrap())))
    }
}

impl Moves for Probe {
    fn save_into(&self, at: &str, states: &mut States) {
        states.put("probe", at, 1, &self.0.save());
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        assert!(self.0.restore(&states.take("probe", at, 1)?));
        Ok(())
    }
}

impl PciFunction for Probe {
    fn config(&self) -> &ConfigSpace {
        &self.0
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.0
    }

    fn posted(&self) -> Vec<Window> {
        self.windows().into_iter().filter(|window| !window.io).collect()
    }

    fn read(&mut self, region: usize, offset: u64, _: &Access, _: Deferred<'_>) -> Answer {
        Answer::Done((region as u64) << 32 | offset)
    }

    fn write(&mut self, _: usize, _: u64, _: u64, _: &Access, _: Deferred<'_>) -> Answer {
        Answer::Done(0)
    }

    fn signals(&self) -> Vec<Signal> {
        let windows = self.windows().into_iter().filter(|window| window.region == 0);
        windows
            .map(|window| Signal { window: Window { len: 4, ..window }, event: self.1.clone(), page: None })
            .collect()
    }

    fn reset(&mut self) {
        self.0.reset();
    }
}

const MEM32: Bar = Bar { space: Space::Memory32, size: 0x1000, prefetchable: false };
const MEM64: Bar = Bar { space: Space::Memory64, size: 0x4000, prefetchable: true };
const IO: Bar = Bar { space: Space::Io, size: 0x40, prefetchable: false };

struct Rig {
    around: Arc<Around>,
    fabric: Arc<Mutex<Fabric>>,
    late: mpsc::Sender<LateAnswer>,
    _answers: mpsc::Receiver<LateAnswer>,
    wake: Arc<dyn Wake>,
}

impl Rig {
    fn new(prepared: Option<Apertures>) -> Self {
        let around = Arc::new(Around::default());
        let fabric = Arc::new(Mutex::new(Fabric::new(prepared, around.clone())));
        let (late, answers) = mpsc::channel();
        Self { around, fabric, late, _answers: answers, wake: Arc::new(NoWake) }
    }

    fn access(&self, io: bool, addr: u64, len: u8, data: Option<u64>) -> Answer {
        let [ports, memory] = FabricSide::both(&self.fabric);
        let mut side = if io { ports } else { memory };
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &self.late, &self.wake);
        match data {
            None => side.read(&access, addr, reply),
            Some(data) => side.write(&access, addr, data, reply),
        }
    }

    fn read(&self, io: bool, addr: u64, len: u8) -> Option<u64> {
        match self.access(io, addr, len, None) {
            Answer::Done(value) => Some(value),
            _ => None,
        }
    }

    /// A configuration access by ports.
    fn config(&self, bdf: u32, offset: u32, len: u8, data: Option<u64>) -> Option<u64> {
        assert!(matches!(
            self.access(true, 0xcf8, 4, Some((1 << 31 | bdf << 8 | offset & 0xfc).into())),
            Answer::Done(_)
        ));
        match self.access(true, u64::from(0xcfc + (offset & 3)), len, data) {
            Answer::Done(value) => Some(value),
            _ => None,
        }
    }
}

#[test]
fn configuration_space_is_reached_both_ways() {
    let rig = Rig::new(None);
    rig.fabric.lock().unwrap().plug(None, 3 << 3, Probe::new(0x1234, &[(0, MEM32)])).unwrap();
    assert_eq!(rig.config(0, 0, 4, None), Some(0x29c0_8086));
    assert_eq!(rig.config(3 << 3, 0, 4, None), Some(0x1234_1af4));
    assert_eq!(rig.config(3 << 3, 2, 2, None), Some(0x1234));
    assert_eq!(rig.config(4 << 3, 0, 4, None), Some(0xffff_ffff));
    assert_eq!(rig.config(1 << 8, 0, 1, None), Some(0xff));
    assert_eq!(rig.read(true, 0xcf8, 4), Some(0x8001_0000));
    // The address's lowest bits count too.
    assert!(matches!(rig.access(true, 0xcf8, 4, Some(0x8000_1802)), Answer::Done(_)));
    assert_eq!(rig.read(true, 0xcfc, 2), Some(0x1234));
    // Without the enable bit the data port is nobody's.
    assert!(matches!(rig.access(true, 0xcf8, 4, Some(0)), Answer::Done(_)));
    assert_eq!((rig.read(true, 0xcfc, 4), rig.read(true, 0xcf8, 2)), (None, None));
    assert_eq!(rig.read(false, 0xb001_8000, 4), None);
    rig.config(0, 0x60, 4, Some(0xb000_0001));
    assert_eq!(rig.read(false, 0xb001_8000, 8), Some(0x1234_1af4));
    assert_eq!(rig.read(false, 0xb001_8003, 2), Some(0x0012));
    assert_eq!(rig.read(false, 0xbfff_ffff, 8), Some(u64::MAX));
}

#[test]
fn windows_answer_where_the_guest_puts_them() {
    let rig = Rig::new(None);
    rig.fabric.lock().unwrap().plug(None, 8, Probe::new(1, &[(0, MEM32), (1, IO), (2, MEM64)])).unwrap();
    rig.config(8, 0x10, 4, Some(0xfe00_0000));
    rig.config(8, 0x14, 4, Some(0x5001));
    rig.config(8, 0x18, 4, Some(0x4000));
    rig.config(8, 0x1c, 4, Some(8));
    assert_eq!(rig.read(false, 0xfe00_0010, 4), None);
    rig.config(8, 4, 2, Some(7));
    assert_eq!(rig.read(false, 0xfe00_0010, 4), Some(0x10));
    assert_eq!(rig.read(false, 0x8_0000_4020, 4), Some(2 << 32 | 0x20));
    assert_eq!((rig.read(true, 0x503f, 1), rig.read(true, 0x5040, 1)), (Some(1 << 32 | 0x3f), None));
    assert_eq!(rig.around.posted.lock().unwrap().len(), 2);
    rig.config(8, 0x10, 4, Some(0xfd00_0000));
    assert_eq!((rig.read(false, 0xfe00_0010, 4), rig.read(false, 0xfd00_0ffc, 4)), (None, Some(0xffc)));
    assert_eq!(rig.around.posted.lock().unwrap()[0].base, 0xfd00_0000);
}

#[test]
fn a_window_s_signals_are_gone_before_the_write_that_moved_it_is_done() {
    let rig = Rig::new(None);
    rig.fabric.lock().unwrap().plug(None, 8, Probe::new(1, &[(0, MEM32)])).unwrap();
    let signals = || rig.around.signals.lock().unwrap().iter().map(|signal| signal.window.base).collect::<Vec<_>>();
    rig.config(8, 0x10, 4, Some(0xfe00_0000));
    assert_eq!(signals(), [0; 0]);
    // A new one need not be waited for.
    assert_eq!(rig.config(8, 4, 2, Some(2)), Some(0));
    assert_eq!(signals(), [0xfe00_0000]);
    assert_eq!(rig.config(8, 0x10, 4, Some(0xfd00_0000)), None);
    assert_eq!(signals(), [0xfd00_0000]);
    assert_eq!(rig.config(8, 4, 2, Some(0)), None);
    assert_eq!(signals(), [0; 0]);
    let views = rig.around.views.lock().unwrap();
    assert!(views.len() == 2 && views.iter().all(|(_, ticket)| ticket.is_some()), "{views:?}");
}

#[test]
fn a_bridge_lets_through_what_its_windows_hold() {
    let rig = Rig::new(None);
    let (port_id, id) = (Requester::default(), Requester::default());
    {
        let mut fabric = rig.fabric.lock().unwrap();
        let pirqs = Pirqs::new(Arc::new(NoLines));
        let port =
            fabric.plug(None, 8, Box::new(RootPort::new(1, pirqs.wire(1), &test_sink::TestSink::default()))).unwrap();
        let device = fabric.plug(Some(port), 0, Probe::new(7, &[(0, MEM32)])).unwrap();
        fabric.identify(port, port_id.clone());
        fabric.identify(device, id.clone());
        assert_eq!(fabric.plug(Some(port), 8, Probe::new(8, &[])), Err(PlugError::NoSlot { devfn: 8 }));
        assert_eq!(fabric.plug(Some(port), 0, Probe::new(8, &[])), Err(PlugError::Taken { devfn: 0 }));
    }
    let there = 5 << 8;
    assert_eq!(rig.config(there, 0, 2, None), Some(0xffff));
    rig.config(8, 0x18, 4, Some(0x00_06_05_00));
    assert_eq!(rig.config(there, 0, 2, None), Some(0x1af4));
    assert_eq!((port_id.id(), id.id()), (8, 5 << 8));
    rig.config(8, 0x18, 4, Some(0x00_06_06_00));
    assert_eq!(id.id(), 6 << 8);
    rig.config(8, 0x18, 4, Some(0x00_06_05_00));
    rig.config(there, 0x10, 4, Some(0xfe00_0000));
    rig.config(there, 4, 2, Some(7));
    assert_eq!(rig.read(false, 0xfe00_0000, 4), None);
    rig.config(8, 0x20, 4, Some(0xfe00_fe00));
    assert_eq!(rig.read(false, 0xfe00_0000, 4), None);
    rig.config(8, 4, 2, Some(7));
    assert_eq!(rig.read(false, 0xfe00_0000, 4), Some(0));
    rig.config(8, 0x20, 4, Some(0xfdf0_fd00));
    assert_eq!(rig.read(false, 0xfe00_0000, 4), None);
}

struct NoLines;

impl crate::interrupt::LineSink for NoLines {
    fn set_level(&self, _: u32, _: bool) {}
}

#[test]
fn a_machine_without_firmware_is_left_as_firmware_would() {
    let rig = Rig::new(Some(Apertures::above(4 << 30)));
    let mut fabric = rig.fabric.lock().unwrap();
    let pirqs = Pirqs::new(Arc::new(NoLines));
    let sink = test_sink::TestSink::default();
    let ports = [8, 9].map(|devfn| fabric.plug(None, devfn, Box::new(RootPort::new(1, pirqs.wire(1), &sink))).unwrap());
    fabric.plug(Some(ports[1]), 0, Probe::new(7, &[(0, MEM32), (2, MEM64), (1, IO)])).unwrap();
    fabric.plug(None, 0x10, Probe::new(9, &[(0, MEM32)])).unwrap();
    fabric.prepare().unwrap();
    drop(fabric);
    let look = |rig: &Rig| {
        assert_eq!(rig.config(8, 0x18, 4, None), Some(0x01_01_00));
        assert_eq!(rig.config(9, 0x18, 4, None), Some(0x02_02_00));
        let [io, low, high] = [0x14, 0x10, 0x18].map(|at| rig.config(2 << 8, at, 4, None).unwrap());
        assert_eq!((io, low, high & 0xf), (0x7001, 0xc040_0000, 0xc));
        let high = rig.config(2 << 8, 0x1c, 4, None).unwrap() << 32 | high & !0xf;
        assert_eq!(rig.read(true, 0x7000, 1), Some(1 << 32));
        assert_eq!((rig.read(false, low + 4, 4), rig.read(false, high + 4, 4)), (Some(4), Some(2 << 32 | 4)));
        assert_eq!(rig.config(8, 0x0e, 1, None), Some(0x81));
        assert_eq!(rig.read(false, 0xb001_0000, 4), Some(0x0009_1af4));
    };
    look(&rig);
    let [_, mut memory] = FabricSide::both(&rig.fabric);
    rig.config(9, 0x18, 4, Some(0));
    memory.reset();
    look(&rig);
    let mut views = rig.around.views.lock().unwrap();
    assert!(matches!(views.pop(), Some((MemoryView::SHADOWED, None))));
}

#[test]
fn of_many_bridges_the_last_go_without_ports() {
    let rig = Rig::new(Some(Apertures::above(4 << 30)));
    let mut fabric = rig.fabric.lock().unwrap();
    let pirqs = Pirqs::new(Arc::new(NoLines));
    let sink = test_sink::TestSink::default();
    let port = |devfn| (devfn, Box::new(RootPort::new(1, pirqs.wire(1), &sink)));
    for (devfn, port) in (8..40).map(port) {
        let port = fabric.plug(None, devfn, port).unwrap();
        fabric.plug(Some(port), 0, Probe::new(7, &[(0, MEM32)])).unwrap();
    }
    fabric.plug(None, 0xfa, Probe::new(9, &[(0, IO)])).unwrap();
    fabric.prepare().unwrap();
    drop(fabric);
    assert_eq!(rig.config(0xfa, 0x10, 2, None), Some(0x6001));
    for place in 0..32 {
        let window = if place < 9 { (7 + place) << 4 | (7 + place) << 12 | 0x101 } else { 0x01f1 };
        assert_eq!(rig.config(8 + place, 0x1c, 2, None), Some(window.into()), "{place}");
        let bar = rig.config((1 + place) << 8, 0x10, 4, None).unwrap();
        assert_eq!(rig.read(false, bar, 4), Some(0), "{place}");
    }
}

#[test]
fn a_write_that_changes_memory_waits_until_the_guest_sees_it() {
    let rig = Rig::new(None);
    assert_eq!(rig.config(0, 0x90, 1, Some(0x30)), None);
    assert_eq!(rig.config(0, 0x90, 1, Some(0x30)), Some(0));
    let (view, ticket) = rig.around.views.lock().unwrap().pop().unwrap();
    assert_eq!(view.shadows[12], Shadow::Ram);
    ticket.unwrap().done(0);
}
