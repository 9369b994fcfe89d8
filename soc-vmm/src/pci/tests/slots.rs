//! Slots: what is put in and taken out, before the guest looks and while it runs, whatever it writes meanwhile.

mod moving;

use proptest::prelude::*;

use super::*;

/// The port under test, and the device behind it once its bus is number 1.
const PORT: u32 = 8;
const BEHIND: u32 = 1 << 8;
/// Offsets: the MSI capability, slot control, link status.
const MSI: u32 = 0x7c;
const EXPRESS: u32 = 0x40;
const LINK_STATUS: u32 = EXPRESS + 0x12;
const SLOT_CONTROL: u32 = EXPRESS + 0x18;
const SLOT_STATUS: u32 = EXPRESS + 0x1a;
const LINK_ACTIVE: u64 = 1 << 13;
/// What Linux turns on: every interrupt of these.
const ALL_INTERRUPTS: u16 = slot_control::BUTTON
    | slot_control::PRESENCE
    | slot_control::COMPLETED
    | slot_control::INTERRUPT
    | slot_control::LINK;

type Emptied = Arc<Mutex<Vec<(NodeId, usize)>>>;

struct Sink(Emptied);

impl SlotSink for Sink {
    fn emptied(&self, port: NodeId, functions: Vec<Box<dyn PciFunction>>) {
        self.0.lock().unwrap().push((port, functions.len()));
    }
}

struct Slot {
    rig: Rig,
    port: NodeId,
    messages: test_sink::TestSink,
    emptied: Emptied,
}

impl Slot {
    fn new(prepared: bool) -> Self {
        let rig = Rig::new(prepared.then(|| Apertures::above(4 << 30)));
        let (messages, emptied) = (test_sink::TestSink::default(), Emptied::default());
        let pirqs = Pirqs::new(Arc::new(NoLines));
        let mut fabric = rig.fabric.lock().unwrap();
        let port = fabric.plug(None, 8, Box::new(RootPort::new(1, pirqs.wire(1), &messages))).unwrap();
        fabric.give_to(Box::new(Sink(emptied.clone())));
        fabric.prepare().unwrap();
        drop(fabric);
        Self { rig, port, messages, emptied }
    }

    fn insert(&self) -> Result<(), PlugError> {
        let device = Probe::new(7, &[(0, MEM32), (2, MEM64), (1, IO)]);
        self.rig.fabric.lock().unwrap().insert(self.port, device, Requester::default())
    }

    fn ask_out(&self) -> Result<(), PlugError> {
        self.rig.fabric.lock().unwrap().ask_out(self.port)
    }

    fn reset(&self) {
        FabricSide::both(&self.rig.fabric).iter_mut().for_each(Device::reset);
    }

    fn get(&self, at: u32) -> u64 {
        self.rig.config(PORT, at, 2, None).unwrap()
    }

    fn set(&self, at: u32, value: u16) {
        self.rig.config(PORT, at, 2, Some(value.into()));
    }

    /// What a driver does that takes the port on.
    fn drive(&self) {
        self.rig.config(PORT, 0x18, 4, Some(0x00_01_01_00));
        self.rig.config(PORT, MSI + 4, 4, Some(0xfee0_0000));
        self.set(MSI + 12, 0x41);
        self.set(MSI + 2, 1);
        self.set(SLOT_STATUS, 0xffff);
        let control = self.get(SLOT_CONTROL) as u16;
        self.command(control);
    }

    /// A command to the slot, whose completion is waited for.
    fn command(&self, control: u16) {
        self.set(SLOT_CONTROL, control | ALL_INTERRUPTS);
        assert!(self.get(SLOT_STATUS) & u64::from(slot_status::COMPLETED) != 0);
        self.set(SLOT_STATUS, slot_status::COMPLETED);
    }

    /// The messages since the last call.
    fn raised(&self, seen: &mut usize) -> usize {
        let now = self.messages.raised().len();
        now - std::mem::replace(seen, now)
    }
}

#[test]
fn a_guest_that_runs_is_told_and_switches_the_power_itself() {
    let slot = Slot::new(false);
    assert_eq!(slot.rig.config(PORT, MSI, 1, None), Some(5));
    slot.drive();
    let mut seen = slot.messages.raised().len();
    slot.insert().unwrap();
    assert_eq!(slot.insert(), Err(PlugError::Taken { devfn: 0 }));
    let (there, told) = (u64::from(slot_status::PRESENT), slot_status::PRESENCE_CHANGED | slot_status::BUTTON);
    assert_eq!((slot.get(SLOT_STATUS), slot.raised(&mut seen)), (there | u64::from(told), 1));
    assert_eq!(slot.get(LINK_STATUS) & LINK_ACTIVE, 0);
    slot.set(SLOT_STATUS, told);
    slot.command(slot_control::INDICATOR_BLINKS);
    assert_eq!(slot.ask_out(), Err(PlugError::Busy));
    slot.command(slot_control::INDICATOR_ON);
    assert_eq!((slot.get(LINK_STATUS) & LINK_ACTIVE, slot.rig.config(BEHIND, 0, 2, None)), (LINK_ACTIVE, Some(0x1af4)));
    slot.set(SLOT_STATUS, slot_status::LINK_CHANGED);

    let _ = slot.raised(&mut seen);
    slot.ask_out().unwrap();
    assert_eq!((slot.get(SLOT_STATUS) & u64::from(slot_status::BUTTON), slot.raised(&mut seen)), (1, 1));
    assert_eq!(slot.ask_out(), Err(PlugError::Busy));
    slot.set(SLOT_STATUS, slot_status::BUTTON);
    slot.command(slot_control::INDICATOR_BLINKS);
    slot.command(slot_control::INDICATOR_BLINKS | slot_control::POWER_OFF);
    assert!(slot.emptied.lock().unwrap().is_empty(), "it is still blinking");
    slot.command(slot_control::INDICATOR_OFF | slot_control::POWER_OFF);
    assert_eq!(*slot.emptied.lock().unwrap(), [(slot.port, 1)]);
    assert_eq!((slot.get(SLOT_STATUS) & there, slot.rig.config(BEHIND, 0, 2, None)), (0, Some(0xffff)));
    // Again, and away before the guest has switched its power on.
    slot.insert().unwrap();
    slot.ask_out().unwrap();
    assert_eq!((slot.emptied.lock().unwrap().len(), slot.get(SLOT_STATUS) & there), (2, 0));
    assert_eq!(slot.ask_out(), Err(PlugError::Empty));
}

#[test]
fn for_a_guest_that_has_not_looked_it_is_simply_there_or_gone() {
    let slot = Slot::new(true);
    slot.insert().unwrap();
    slot.ask_out().unwrap();
    slot.insert().unwrap();
    assert_eq!(slot.emptied.lock().unwrap().len(), 1);
    assert_eq!(slot.get(SLOT_STATUS), u64::from(slot_status::PRESENT));
    assert_eq!(slot.get(SLOT_CONTROL) & u64::from(slot_control::POWER_OFF), 0);
    // Its windows answer as if firmware had been there.
    let low = slot.rig.config(BEHIND, 0x10, 4, None).unwrap();
    assert_eq!(slot.rig.read(false, low + 4, 4), Some(4));
}

#[test]
fn a_reset_takes_out_what_the_guest_was_asked_for() {
    let slot = Slot::new(true);
    slot.drive();
    slot.insert().unwrap();
    slot.command(slot_control::INDICATOR_ON);
    slot.reset();
    assert!(slot.emptied.lock().unwrap().is_empty());
    slot.drive();
    slot.command(slot_control::INDICATOR_ON);
    slot.ask_out().unwrap();
    slot.reset();
    assert_eq!((slot.emptied.lock().unwrap().len(), slot.get(SLOT_STATUS)), (1, 0));
}

#[test]
fn a_guest_that_never_looked_at_a_bus_is_not_asked() {
    let slot = Slot::new(true);
    // Where nobody is: as it masks an 8259 that KVM has.
    let idles = || assert!(matches!(slot.rig.access(true, 0x21, 1, Some(0xff)), Answer::Unclaimed));
    idles();
    slot.insert().unwrap();
    slot.reset();
    idles();
    slot.ask_out().unwrap();
    assert_eq!(*slot.emptied.lock().unwrap(), [(slot.port, 1)]);

    slot.insert().unwrap();
    slot.reset();
    slot.get(SLOT_STATUS);
    slot.ask_out().unwrap();
    assert_eq!(slot.emptied.lock().unwrap().len(), 1, "it is up to the guest");
    slot.reset();
    assert_eq!(slot.emptied.lock().unwrap().len(), 2);
}

#[test]
fn what_needs_more_room_than_a_port_has_is_refused() {
    let slot = Slot::new(true);
    let large = Bar { size: 4 << 20, ..MEM32 };
    let device = Probe::new(7, &[(0, large)]);
    let refused = slot.rig.fabric.lock().unwrap().insert(slot.port, device, Requester::default());
    assert_eq!(refused, Err(PlugError::TooLarge));
}

#[derive(Clone, Debug)]
enum Step {
    Write { at: u32, len: u8, value: u32 },
    Insert,
    AskOut,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    let control =
        (0..4u16, 0..4u16, any::<bool>(), any::<bool>()).prop_map(|(indicator, attention, off, interrupts)| {
            let off = if off { slot_control::POWER_OFF } else { 0 };
            let interrupts = if interrupts { ALL_INTERRUPTS } else { 0 };
            Step::Write { at: SLOT_CONTROL, len: 2, value: (indicator << 8 | attention << 6 | off | interrupts).into() }
        });
    let clear = any::<u16>().prop_map(|bits| Step::Write { at: SLOT_STATUS, len: 2, value: bits.into() });
    let messages = any::<bool>().prop_map(|on| Step::Write { at: MSI + 2, len: 2, value: on.into() });
    let any = (0..0x100u32, prop::sample::select(vec![1u8, 2, 4]), any::<u32>())
        .prop_map(|(at, len, value)| Step::Write { at: at & !(u32::from(len) - 1), len, value });
    let others = prop_oneof![3 => Just(Step::Insert), 3 => Just(Step::AskOut), 1 => Just(Step::Reset)];
    prop_oneof![6 => control, 4 => clear, 1 => messages, 2 => any, 6 => others]
}

proptest! {
    /// Whatever the guest writes and whenever: what was put in is in the slot or was taken out, once; the registers tell which; and a
    /// message is sent just where there was no reason for one before.
    #[test]
    fn nothing_is_lost_whatever_a_guest_writes(prepared: bool, steps in prop::collection::vec(step(), 1..80)) {
        let slot = Slot::new(prepared);
        let (mut inserted, mut seen, mut wanted) = (0, 0, false);
        for step in steps {
            let before = inserted - slot.emptied.lock().unwrap().len();
            let quiet = matches!(step, Step::Reset);
            match step {
                Step::Write { at, len, value } => _ = slot.rig.config(PORT, at, len, Some(value.into())),
                Step::Insert => {
                    let done = slot.insert();
                    prop_assert_eq!(done.is_ok(), before == 0, "{:?}", done);
                    inserted += usize::from(done.is_ok());
                }
                Step::AskOut => prop_assert_eq!(slot.ask_out() == Err(PlugError::Empty), before == 0),
                Step::Reset => slot.reset(),
            }
            let present = inserted - slot.emptied.lock().unwrap().iter().map(|(_, functions)| functions).sum::<usize>();
            prop_assert_eq!(slot.rig.fabric.lock().unwrap().nodes().count(), 1 + present);
            // As a debugger looks, so that the guest has not.
            let mut fabric = slot.rig.fabric.lock().unwrap();
            let config = fabric.function(slot.port).unwrap().config();
            let [status, control, link] = [SLOT_STATUS, SLOT_CONTROL, LINK_STATUS].map(|at| config.u16(at as u16));
            let msi = config.u16(MSI as u16 + 2) & 1 != 0;
            drop(fabric);
            prop_assert_eq!(status & slot_status::PRESENT != 0, present == 1);
            let powered = control & slot_control::POWER_OFF == 0;
            prop_assert_eq!(u64::from(link) & LINK_ACTIVE != 0, present == 1 && powered);
            let pairs = [
                (slot_control::BUTTON, slot_status::BUTTON),
                (slot_control::PRESENCE, slot_status::PRESENCE_CHANGED),
                (slot_control::COMPLETED, slot_status::COMPLETED),
                (slot_control::LINK, slot_status::LINK_CHANGED),
            ];
            let reason = pairs.iter().any(|(on, bit)| control & on != 0 && status & bit != 0);
            let wants = msi && control & slot_control::INTERRUPT != 0 && reason;
            let raised = slot.raised(&mut seen);
            prop_assert!(raised == usize::from(wants && !wanted) || quiet && raised == 0, "{} messages", raised);
            wanted = wants;
        }
    }
}
