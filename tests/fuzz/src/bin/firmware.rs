//! What firmware talks to (fw_cfg with its DMA, flash, pvpanic, ACPI's hot-plug registers) against a guest that makes any access, has any
//! bytes in its memory, and takes memory away.
#![no_main]

use std::sync::{Arc, Mutex, mpsc};

use fuzz::damage::Damage;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use soc_vmm::acpi::{self, AcpiConfig, PciConfig};
use soc_vmm::bus::{Access, Answer, Bus, Deferred, Device, LateAnswer, RequestId, Ticket, Wake};
use soc_vmm::devices::fw_cfg::key;
use soc_vmm::devices::{
    AcpiPm, CpuHotplug, CpuHotplugHandle, CpuReport, CpuSink, EjectSink, FwCfg, PCI_HOTPLUG_SLOTS, PciHotplug, Persist,
    PmTimerWidth, Pvpanic, SystemClock,
};
use soc_vmm::flash::{Bank, Flash, FlashMemory, SECTOR};
use soc_vmm::interrupt::{InterruptLine, LineSink};
use soc_vmm::memory::{GuestMemory, MemoryError};
use soc_vmm::persist::{Moves, States};
use soc_vmm::power::{CrashEvent, CrashSink, PowerEvent, PowerSink};

const RAM: usize = 1 << 16;
const VARIABLES: usize = 2 * SECTOR as usize;
const CODE: usize = SECTOR as usize;
/// Of the processors that there can be; the first is there from the start.
const APIC_IDS: [u32; 4] = [0, 1, 4, 0x100];

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Port {
        at: u8,
        len: Len,
        data: Option<u32>,
    },
    /// A descriptor, right but for its numbers, and the write that starts it.
    Transfer {
        key: u16,
        control: u8,
        len: u32,
        address: u64,
    },
    /// Any bytes in RAM, and a descriptor there.
    Descriptor {
        at: u16,
        bytes: &'a [u8],
    },
    Flash {
        at: u16,
        len: Len,
        data: Option<u64>,
    },
    /// A command of flash that goes through to its end, and back to the array.
    Program {
        at: u16,
        byte: u8,
    },
    Erase {
        at: u16,
    },
    /// ECAM goes there, and the machine is reset.
    Reset {
        ecam: Option<(u64, u64)>,
    },
    Inserted(u16),
    AskToEject(u16),
    InsertCpu(u8),
    AskOutCpu(u8),
    /// What was ejected is parked.
    ParkCpus,
    SaveAndRestore,
    Load(Damage),
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Len {
    One,
    Two,
    Four,
    Eight,
}

impl Len {
    fn bytes(self) -> u8 {
        match self {
            Self::One => 1,
            Self::Two => 2,
            Self::Four => 4,
            Self::Eight => 8,
        }
    }
}

/// Everything around the devices.
#[derive(Debug, Default)]
struct World {
    ram: Mutex<Vec<u8>>,
    /// The flash's arrays, and which are shown.
    arrays: Mutex<Vec<(Vec<u8>, bool)>>,
    crashes: Mutex<usize>,
}

impl GuestMemory for World {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let ram = self.ram.lock().expect("no panic under the lock");
        data.copy_from_slice(&ram[range(addr, data.len())?]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let mut ram = self.ram.lock().expect("no panic under the lock");
        ram[range(addr, data.len())?].copy_from_slice(data);
        Ok(())
    }
}

fn range(addr: u64, len: usize) -> Result<std::ops::Range<usize>, MemoryError> {
    let end = addr.checked_add(len as u64).filter(|end| *end <= RAM as u64);
    let end = end.ok_or(MemoryError::NotRam { addr, len: len as u64 })?;
    Ok(addr as usize..end as usize)
}

impl FlashMemory for World {
    fn show_array(&self, bank: usize, on: bool, done: Option<Ticket>) {
        let mut arrays = self.arrays.lock().expect("no panic under the lock");
        assert_ne!(arrays[bank].1, on);
        arrays[bank].1 = on;
        if let Some(ticket) = done {
            ticket.done(0);
        }
    }

    fn program(&self, bank: usize, offset: u64, bytes: &[u8]) {
        let at = offset as usize;
        self.arrays.lock().expect("no panic under the lock")[bank].0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn fetch(&self, bank: usize, bytes: &mut [u8]) -> Result<(), MemoryError> {
        bytes.copy_from_slice(&self.arrays.lock().expect("no panic under the lock")[bank].0);
        Ok(())
    }
}

impl CrashSink for World {
    fn crashed(&self, _: CrashEvent) {
        *self.crashes.lock().expect("no panic under the lock") += 1;
    }
}

impl EjectSink for World {
    fn ejected(&self, slot: usize) {
        assert!(slot < PCI_HOTPLUG_SLOTS);
    }
}

impl CpuSink for World {
    fn ejected(&self) {}

    fn reported(&self, report: CpuReport) {
        assert!(report.cpu < APIC_IDS.len());
    }
}

impl LineSink for World {
    fn set_level(&self, _: u32, _: bool) {}
}

impl PowerSink for World {
    fn power(&self, _: PowerEvent) {}
}

impl Wake for World {
    fn wake(&self) {}
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let world = Arc::new(World::default());
    world.ram.lock().expect("nobody panicked").resize(RAM, 0);
    *world.arrays.lock().expect("nobody panicked") = vec![(vec![0xff; VARIABLES], true), (vec![0; CODE], true)];
    let ecam = Arc::new(Mutex::new(None));
    let banks = vec![
        Bank { base: 0xffff_0000, bytes: vec![0xff; VARIABLES], read_only: false, store: None },
        Bank { base: 0xffff_f000, bytes: (0..CODE).map(|at| at as u8).collect(), read_only: true, store: None },
    ];
    let mut flash = Flash::new(banks, world.clone(), world.clone());
    flash.fill();
    let line = InterruptLine::new(9, world.clone());
    let clock = Arc::new(SystemClock);
    let (_, acpi) = AcpiPm::new(1, PmTimerWidth::Bits32, clock, line, world.clone(), world.clone());
    let (hotplug, slots) = PciHotplug::new(acpi.clone(), world.clone());
    let (processors, cpus) = CpuHotplug::new(acpi, APIC_IDS.to_vec(), 1, world.clone());
    let processors = Arc::new(Mutex::new(processors));
    let hotplug = Arc::new(Mutex::new(hotplug));
    let fw_cfg = Arc::new(Mutex::new(fw_cfg(&world, &ecam, &cpus)));
    let mut ports = Bus::default();
    ports.insert(FwCfg::RANGES.ports, Box::new(fw_cfg.clone())).expect("it is free");
    ports.insert(Pvpanic::RANGES.ports, Box::new(Pvpanic::new(world.clone()))).expect("it is free");
    ports.insert(PciHotplug::RANGES.ports, Box::new(hotplug.clone())).expect("it is free");
    ports.insert(CpuHotplug::RANGES.ports, Box::new(processors.clone())).expect("it is free");

    let (mut resets, first) = (0, lengths(&fw_cfg));
    for step in steps.into_iter().take(200) {
        match step {
            Step::Port { at, len, data } => {
                // Behind the ports of fw_cfg those of hot-plug, and pvpanic's.
                let at = match at % 48 {
                    at @ 0..12 => 0x510 + u64::from(at),
                    at @ 12..28 => 0xcc0 + u64::from(at) - 12,
                    at @ 28..40 => 0xcd8 + u64::from(at) - 28,
                    _ => 0x505,
                };
                port(&mut ports, at, len, data);
            }
            Step::Transfer { key, control, len, address } => {
                let command = u32::from(key) << 16 | u32::from(control);
                let bytes = [&command.to_be_bytes()[..], &len.to_be_bytes(), &address.to_be_bytes()].concat();
                world.write(0x40, &bytes).expect("it is RAM");
                start(&mut ports, 0x40);
            }
            Step::Descriptor { at, bytes } => {
                let bytes = &bytes[..bytes.len().min(256)];
                // Some of it may be no RAM.
                let _ = world.write(at.into(), bytes);
                start(&mut ports, at);
            }
            Step::Flash { at, len, data } => access(&mut flash, at.into(), len, data),
            Step::Program { at, byte } => {
                for data in [0x10, byte, 0xff] {
                    access(&mut flash, at.into(), Len::One, Some(data.into()));
                }
            }
            Step::Erase { at } => {
                for data in [0x20u8, 0xd0, 0xff] {
                    access(&mut flash, at.into(), Len::One, Some(data.into()));
                }
            }
            Step::Reset { ecam: to } => {
                *ecam.lock().expect("nobody panicked") = to;
                cpus.start_anew();
                flash.reset();
                ports.reset();
                resets += 1;
                assert!(world.arrays.lock().expect("nobody panicked").iter().all(|(_, shown)| *shown));
            }
            Step::Inserted(slot) => slots.inserted(slot.into()),
            Step::AskToEject(slot) => slots.ask_to_eject(slot.into()),
            Step::InsertCpu(cpu) => drop(cpus.insert(cpu.into())),
            Step::AskOutCpu(cpu) => drop(cpus.ask_out(cpu.into())),
            Step::ParkCpus => cpus.ejected().into_iter().for_each(|cpu| cpus.gone(cpu)),
            Step::SaveAndRestore => {
                let mut device = fw_cfg.lock().expect("nobody panicked");
                let state = device.save();
                device.restore(&state).expect("a state of its own");
                assert_eq!(device.save(), state);
                let mut device = hotplug.lock().expect("nobody panicked");
                let state = device.save();
                device.restore(&state).expect("a state of its own");
                let mut device = processors.lock().expect("nobody panicked");
                let state = device.save();
                device.restore(&state).expect("a state of its own");
            }
            Step::Load(damage) => {
                flash.halt();
                let mut states = States::default();
                ports.save_into(&mut states);
                flash.save_into("", &mut states);
                let mut states = damage.to(states);
                // Refused, or as good as any other. What was reported may be forgotten.
                let _ = ports.load(&mut states).and_then(|()| flash.load("", &mut states));
                ports.go_on();
                flash.go_on();
                resets += 1;
            }
        }
        assert_eq!(cpus.present().first(), Some(&0), "the first processor stays");
    }
    flash.reset();
    assert_eq!(lengths(&fw_cfg), first, "the directory told them");
    assert!(*world.crashes.lock().expect("nobody panicked") <= 2 * (resets + 1));
    let arrays = world.arrays.lock().expect("nobody panicked");
    assert!(arrays[1].0.iter().enumerate().all(|(at, byte)| *byte == at as u8), "code stays as it is");
});

fn fw_cfg(world: &Arc<World>, ecam: &Arc<Mutex<Option<(u64, u64)>>>, cpus: &CpuHotplugHandle) -> FwCfg {
    let pci = PciConfig {
        low_end: 1 << 31,
        high_end: 1 << 33,
        ecam: None,
        physical_bits: 40,
        ports: Vec::new(),
        hotplug: acpi::Hotplug::Acpi,
    };
    let config = AcpiConfig { apic_ids: APIC_IDS.to_vec(), pci: Some(pci), ..AcpiConfig::default() };
    let (ecam, now) = (ecam.clone(), cpus.clone());
    let update = move |config: &mut AcpiConfig| {
        config.pci.as_mut().expect("there is PCI").ecam = *ecam.lock().expect("nobody panicked");
        config.absent = (1..APIC_IDS.len()).filter(|cpu| !now.present().contains(cpu)).collect();
    };
    let cpus = cpus.clone();
    let builder = FwCfg::builder(world.clone()).cpus(move || cpus.present().len() as u16, 0x101);
    let builder = builder.file("opt/fixed", [1, 2, 3]).writable("opt/writable", [0; 100]);
    acpi::add_files(builder, &config, update).expect("four processors").build().expect("the names are short")
}

fn lengths(device: &Mutex<FwCfg>) -> Vec<Option<usize>> {
    let device = device.lock().expect("nobody panicked");
    (key::FIRST_FILE..key::FIRST_FILE + 8).map(|key| device.item(key).map(<[u8]>::len)).collect()
}

/// Starts the transfer of the descriptor at `at`.
fn start(ports: &mut Bus, at: u16) {
    port(ports, 0x514, Len::Four, Some(0));
    port(ports, 0x518, Len::Four, Some(u32::from(at).swap_bytes()));
}

fn port(ports: &mut Bus, at: u64, len: Len, data: Option<u32>) {
    with_reply(len, |access, reply| match data {
        Some(data) => ports.write(at, data.into(), access, reply),
        None => ports.read(at, access, reply),
    });
}

fn access(flash: &mut Flash, at: u64, len: Len, data: Option<u64>) {
    with_reply(len, |access, reply| match data {
        Some(data) => flash.write(access, at, data, reply),
        None => flash.read(access, at, reply),
    });
}

fn with_reply(len: Len, call: impl FnOnce(&Access, Deferred<'_>) -> Answer) {
    let (late, answers) = mpsc::channel::<LateAnswer>();
    let wake: Arc<dyn Wake> = Arc::new(World::default());
    let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
    let answer = call(&Access { vcpu: 0, host_tsc: 0, len: len.bytes() }, reply);
    assert_eq!(matches!(answer, Answer::Deferred), answers.try_recv().is_ok(), "what is deferred was answered");
}
