use proptest::prelude::*;

use super::*;
use crate::devices::acpi_bench::{Sci, access, acpi};
use crate::devices::{AcpiPm, SystemClock};
use crate::interrupt::InterruptLine;

#[derive(Debug, Default)]
struct World {
    ejections: Mutex<usize>,
    reports: Mutex<Vec<CpuReport>>,
}

impl CpuSink for World {
    fn ejected(&self) {
        *self.ejections.lock().unwrap() += 1;
    }

    fn reported(&self, report: CpuReport) {
        self.reports.lock().unwrap().push(report);
    }
}

struct Rig {
    world: Arc<World>,
    sci: Arc<Sci>,
    pm: AcpiPm,
    device: CpuHotplug,
    handle: CpuHotplugHandle,
}

/// APIC IDs as of a topology with gaps.
const IDS: [u32; 6] = [0, 1, 2, 4, 5, 0x106];

fn rig(present: usize) -> Rig {
    let world = Arc::new(World::default());
    let (sci, pm, acpi) = acpi();
    let (device, handle) = CpuHotplug::new(acpi, IDS.to_vec(), present, world.clone());
    Rig { world, sci, pm, device, handle }
}

impl Rig {
    fn select(&mut self, cpu: u64) {
        access(&mut self.device, SELECT, 4, Some(cpu));
    }

    fn flags(&mut self) -> u64 {
        access(&mut self.device, FLAGS, 1, None)
    }

    fn set_flags(&mut self, flags: u8) {
        access(&mut self.device, FLAGS, 1, Some(flags.into()));
    }

    fn command(&mut self, command: u8) -> u64 {
        access(&mut self.device, COMMAND, 1, Some(command.into()));
        access(&mut self.device, DATA, 4, None)
    }

    fn report(&mut self, source: u32, status: u32) {
        for (command, data) in [(command::OST_SOURCE, source), (command::OST_STATUS, status)] {
            access(&mut self.device, COMMAND, 1, Some(command.into()));
            access(&mut self.device, DATA, 4, Some(data.into()));
        }
    }
}

/// As OVMF does it (its PlatformInitLib).
#[test]
fn firmware_counts_what_is_there_and_what_can_be() {
    for present in 1..=IDS.len() {
        let mut rig = rig(present);
        rig.select(0);
        rig.select(0);
        assert_eq!(rig.command(command::NEXT), 0);
        assert_eq!(access(&mut rig.device, SELECT, 4, None), 0, "the modern interface");
        rig.select(0);
        let (mut there, mut possible) = (0, 0);
        loop {
            there += rig.flags() & 1;
            possible += 1;
            rig.select(possible);
            let selected = access(&mut rig.device, DATA, 4, None);
            assert!(selected == possible || selected == 0);
            if selected == 0 {
                break;
            }
        }
        assert_eq!((there, possible), (present as u64, IDS.len() as u64));
    }
}

#[test]
fn a_selected_processor_tells_its_apic_id() {
    let mut rig = rig(1);
    for (n, id) in (0..).zip(IDS) {
        rig.select(n);
        assert_eq!((rig.command(command::ARCH_ID), access(&mut rig.device, SELECT, 4, None)), (id.into(), 0));
    }
    rig.select(IDS.len() as u64);
    assert_eq!(access(&mut rig.device, DATA, 4, None), 0);
}

#[test]
fn a_processor_comes_and_goes() {
    let mut rig = rig(1);
    // SCI on, its event on.
    access(&mut rig.pm, 0x80, 1, Some(2));
    access(&mut rig.pm, 0x28, 1, Some(1 << CPU_HOTPLUG_GPE));
    assert!(rig.handle.insert(4) && !rig.handle.insert(4) && !rig.handle.insert(IDS.len()));
    rig.pm.poll();
    assert!(rig.sci.is_high());
    assert_eq!(rig.command(command::NEXT), 4);
    assert_eq!(rig.flags(), 0b011);
    rig.set_flags(flag::INSERTING);
    rig.report(1, 0);
    assert_eq!((rig.flags(), rig.handle.present()), (0b001, vec![0, 4]));
    access(&mut rig.pm, 0x20, 1, Some(1 << CPU_HOTPLUG_GPE));
    assert!(!rig.sci.is_high());

    assert!(rig.handle.ask_out(4) && !rig.handle.ask_out(3));
    rig.pm.poll();
    assert!(rig.sci.is_high());
    rig.select(0);
    assert_eq!(rig.command(command::NEXT), 4);
    assert_eq!(rig.flags(), 0b101);
    rig.set_flags(flag::REMOVING);
    rig.report(3, 0x84);
    rig.set_flags(flag::EJECT);
    rig.report(3, 0);
    assert_eq!((rig.flags(), *rig.world.ejections.lock().unwrap()), (0, 1));
    assert!(rig.handle.present() == [0] && rig.handle.ejected() == [4] && !rig.handle.insert(4));
    rig.handle.gone(4);
    assert!(rig.handle.ejected().is_empty() && rig.handle.insert(4));
    let report = |source, status| CpuReport { cpu: 4, source, status };
    assert_eq!(*rig.world.reports.lock().unwrap(), [report(1, 0), report(3, 0x84), report(3, 0)]);
}

#[test]
fn the_first_processor_stays() {
    let mut rig = rig(2);
    assert!(!rig.handle.ask_out(0));
    rig.select(0);
    rig.set_flags(0xff);
    rig.handle.gone(0);
    assert_eq!((rig.flags(), *rig.world.ejections.lock().unwrap()), (1, 0));
}

#[test]
fn a_reset_takes_what_was_asked_for_unless_the_guest_refused() {
    for (refused, left) in [(None, vec![0, 2]), (Some(0x84), vec![0, 2]), (Some(0x81), vec![0, 1, 2])] {
        let mut rig = rig(3);
        assert!(rig.handle.ask_out(1));
        rig.select(1);
        rig.set_flags(flag::REMOVING);
        refused.into_iter().for_each(|status| rig.report(3, status));
        rig.handle.start_anew();
        rig.device.reset();
        assert_eq!(rig.handle.present(), left);
        rig.select(1);
        assert_eq!(rig.flags() & 0b110, 0);
    }
}

#[test]
fn a_guest_reports_so_often_and_then_is_not_heard_until_asked_again() {
    let mut rig = rig(2);
    rig.select(1);
    (0..100).for_each(|status| rig.report(3, status));
    assert_eq!(rig.world.reports.lock().unwrap().len(), usize::from(REPORTS));
    assert!(rig.handle.ask_out(1));
    rig.report(3, 0x81);
    assert_eq!(rig.world.reports.lock().unwrap().last(), Some(&CpuReport { cpu: 1, source: 3, status: 0x81 }));
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let good = rig(3).device.save();
    let with = |change: &dyn Fn(&mut CpuHotplugState)| {
        let mut state = good.clone();
        change(&mut state);
        rig(3).device.restore(&state).is_ok()
    };
    assert!(with(&|state| state.selector = u32::MAX));
    assert!(with(&|state| state.cpus[5].standing = Standing::Ejected));
    assert!(!with(&|state| state.command = 4));
    assert!(!with(&|state| state.cpus.truncate(5)));
    assert!(!with(&|state| state.cpus[0].standing = Standing::Absent));
    assert!(!with(&|state| state.cpus[0].asked_out = true));
    assert!(!with(&|state| state.cpus[5].inserting = true));
    assert!(!with(&|state| state.cpus[1].reports = u8::MAX));
}

#[test]
fn processors_are_those_of_the_source() {
    let mut source = rig(1);
    assert!(source.handle.insert(4) && source.handle.insert(2));
    source.select(2);
    source.set_flags(flag::EJECT);
    let state = source.device.save();
    let says = |rig: &mut Rig, words: &str| {
        let error = rig.device.restore(&state).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    says(&mut rig(1), "processor 4 is there at the source, and not here");
    let mut same = rig(1);
    assert!(same.handle.insert(4) && same.handle.insert(5));
    says(&mut same, "processor 5 is here, and not at the source");
    // What is just leaving may be here or not.
    for (and, ejected) in [(None, vec![]), (Some(2), vec![2])] {
        let mut other = rig(1);
        assert!(other.handle.insert(4) && and.is_none_or(|cpu| other.handle.insert(cpu)));
        other.device.restore(&state).unwrap();
        assert_eq!((other.handle.present(), other.handle.ejected()), (vec![0, 4], ejected));
        other.select(4);
        assert_eq!(other.flags(), 0b011);
    }
}

/// What is done to the machine.
#[derive(Clone, Debug)]
enum Step {
    Insert(usize),
    AskOut(usize),
    Park,
    StartAnew,
    Access(u64, u8, Option<u32>),
    Save,
}

fn step() -> impl Strategy<Value = Step> {
    let cpu = 0..IDS.len() + 1;
    // Mostly what AML does, so that it gets somewhere.
    let aml = prop_oneof![
        (0..7u32).prop_map(|cpu| (SELECT, 4, Some(cpu))),
        (0..32u32).prop_map(|flags| (FLAGS, 1, Some(flags))),
        (0..6u32).prop_map(|command| (COMMAND, 1, Some(command))),
        prop::sample::select(vec![0, 1, 3, 0x81, 0x84, 0x103]).prop_map(|data| (DATA, 4, Some(data))),
    ];
    let any = (0..u64::from(CPU_HOTPLUG_LEN), prop::sample::select(vec![1u8, 2, 4]), any::<Option<u32>>());
    prop_oneof![
        2 => cpu.clone().prop_map(Step::Insert),
        2 => cpu.prop_map(Step::AskOut),
        1 => Just(Step::Park),
        1 => Just(Step::StartAnew),
        8 => prop_oneof![4 => aml, 1 => any].prop_map(|(at, len, data)| Step::Access(at, len, data)),
        1 => Just(Step::Save),
    ]
}

proptest! {
    /// Whatever the guest writes, a processor goes round its states one way, and the first one stays.
    #[test]
    fn processors_go_round_their_states(present in 1..=IDS.len(), steps in prop::collection::vec(step(), 0..200)) {
        use Standing::{Absent, Ejected, Present};
        let Rig { world, mut device, handle, .. } = rig(present);
        let standing = |device: &CpuHotplug| device.save().cpus.into_iter().map(|cpu| cpu.standing).collect::<Vec<_>>();
        for step in steps {
            let before = standing(&device);
            let mut inserted = None;
            match &step {
                Step::Insert(cpu) => inserted = handle.insert(*cpu).then_some(*cpu),
                Step::AskOut(cpu) => {
                    let is_there = before.get(*cpu) == Some(&Present) && *cpu != 0;
                    prop_assert_eq!(handle.ask_out(*cpu), is_there);
                }
                Step::Park => handle.ejected().into_iter().for_each(|cpu| handle.gone(cpu)),
                Step::StartAnew => {
                    handle.start_anew();
                    device.reset();
                }
                Step::Access(at, len, data) => drop(access(&mut device, *at, *len, data.map(u64::from))),
                Step::Save => {
                    let state = device.save();
                    device.restore(&state).unwrap();
                    prop_assert_eq!(device.save(), state);
                }
            }
            let after = standing(&device);
            prop_assert_eq!(after[0], Present);
            for (cpu, pair) in before.into_iter().zip(after).enumerate() {
                let expected = match (&step, pair.0) {
                    (Step::Park, Ejected) => vec![Absent],
                    (Step::StartAnew, Present) | (Step::Access(FLAGS, 1, Some(_)), Present) => vec![Present, Ejected],
                    (_, Absent) if inserted == Some(cpu) => vec![Present],
                    (_, same) => vec![same],
                };
                prop_assert!(expected.contains(&pair.1), "{cpu}: {pair:?} by {step:?}");
            }
        }
        prop_assert!(world.reports.lock().unwrap().iter().all(|report| report.cpu < IDS.len()));
    }
}

/// SeaBIOS waits for as many processors as CMOS RAM and fw_cfg tell, whichever tells more (its `qemu_get_present_cpus_count`).
#[test]
fn firmware_that_asks_fw_cfg_and_cmos_ram_counts_what_is_there_after_a_reset() {
    use crate::devices::fw_cfg::{key, test_guest};
    use crate::devices::{Cmos, Rtc};

    let Rig { sci, handle, mut device, .. } = rig(1);
    let cmos = Cmos { ram_below_4g: 1 << 30, ram_above_4g: 0, cpus: 1, boot: [None; 3] };
    let line = InterruptLine::new(Rtc::GSI, sci);
    let mut rtc = Rtc::new(&cmos, Arc::new(SystemClock), line).counting(handle.clone());
    let counted = handle.clone();
    let mut fw_cfg = test_guest::Guest::new(|builder| builder.cpus(move || counted.present().len() as u16, 0x107));
    let mut counts = |reset: bool| {
        if reset {
            handle.start_anew();
            device.reset();
            rtc.reset();
            fw_cfg.device.reset();
        }
        access(&mut rtc, 0, 1, Some(0x5f));
        let beside_the_first = access(&mut rtc, 1, 1, None) as u8;
        fw_cfg.select(key::CPUS);
        (fw_cfg.read(2), beside_the_first)
    };
    assert_eq!(counts(false), (vec![1, 0], 0));
    assert!(handle.insert(3) && handle.insert(5));
    assert_eq!(counts(false), (vec![1, 0], 0), "as it was when the guest began");
    assert_eq!(counts(true), (vec![3, 0], 2));
    assert!(handle.ask_out(3));
    assert_eq!(counts(true), (vec![2, 0], 1));
}
