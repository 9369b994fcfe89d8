//! The AHCI controller and a CD-ROM drive against a guest that makes any access, and issues any command.
#![no_main]

use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::{Arc, OnceLock};

use fuzz::damage::Damage;
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{CI, DATA, Rig, port};
use soc_vmm::ahci::{CdDrive, PORTS};
use soc_vmm::block::{self, BlockBackend, ImageSpec};
use soc_vmm::memory::GuestMemory;
use soc_vmm::pci::PciFunction;
use soc_vmm::persist::{Moves, States};

#[allow(dead_code, reason = "shared with the controller's own tests")]
#[path = "../../../../soc-vmm/tests/ahci/rig.rs"]
mod rig;

/// Sectors of the disc.
const SECTORS: u8 = 100;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// An access of any width, to the registers or by the pair of ports.
    Access {
        by_ports: bool,
        offset: u16,
        len: u8,
        data: Option<u64>,
    },
    /// A register of a port.
    Register {
        port: u8,
        register: u8,
        value: u32,
    },
    Config {
        offset: u16,
        len: u8,
        value: u32,
    },
    /// Bytes in guest memory: lists, tables.
    Fill {
        addr: u64,
        bytes: &'a [u8],
    },
    /// A packet command, its regions near where data belongs or anywhere.
    Packet {
        slot: u8,
        packet: [u8; 12],
        features: u8,
        regions: [(bool, u64, u32); 3],
        count: u8,
    },
    /// Any FIS.
    Fis {
        slot: u8,
        kind: Option<u8>,
        fis: [u8; 20],
    },
    Eject(bool),
    Close,
    Change,
    Reset,
    Start,
    /// It halts, and goes on from the state that it has, or from one that came to harm.
    Load(Option<Damage>),
}

fn disc() -> Arc<dyn BlockBackend> {
    static DISC: OnceLock<Arc<dyn BlockBackend>> = OnceLock::new();
    let open = || {
        let name = c"disc";
        let fd = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC).expect("a memfd");
        let mut file = std::fs::File::from(fd);
        for sector in 0..SECTORS {
            file.write_all(&[sector; 2048]).expect("a memfd is written");
        }
        let spec = ImageSpec::read_only(format!("/proc/self/fd/{}", file.as_raw_fd()));
        block::open(&spec).expect("a disc")
    };
    DISC.get_or_init(open).clone()
}

fuzz_target!(|steps: Vec<Step<'_>>| {
    let mut rig = Rig::new(CdDrive { medium: Some(disc()), ..CdDrive::default() });
    rig.start();
    for step in steps.into_iter().take(100) {
        take(&mut rig, step);
        rig.ahci.poll();
    }
    // Reset is reset, whatever was before.
    rig.ahci.reset();
    assert!(!rig.line.is_high());
    rig.start();
    let _ = rig.drive().change(disc(), true);
    assert_eq!(rig.sense(&[0]), [6, 0x28, 0]);
    assert_eq!(rig.data(&[0x28, 0, 0, 0, 0, 2, 0, 0, 1, 0]), [2; 2048]);
});

fn take(rig: &mut Rig, step: Step<'_>) {
    match step {
        Step::Access { by_ports, offset, len, data } => {
            let (region, size) = if by_ports { (4, 32) } else { (5, 4096) };
            rig.access(region, u64::from(offset) % size, len % 8 + 1, data);
        }
        Step::Register { port: index, register, value } => {
            rig.set(port(usize::from(index) % PORTS, u64::from(register % 32) * 4), value);
        }
        // As the fabric makes it: within one word.
        Step::Config { offset, len, value } => {
            let (offset, len) = (offset % 0x100, len % 4 + 1);
            rig.ahci.write_config(offset, len.min(4 - (offset % 4) as u8), value);
        }
        Step::Fill { addr, bytes } => drop(rig.memory.write(addr % (2 << 20), bytes)),
        Step::Packet { slot, packet, features, regions, count } => {
            let region = |(near, addr, len): (bool, u64, u32)| {
                let (addr, len) = if near { (DATA + addr % 0x4_0000, len % 8192) } else { (addr, len % (1 << 22)) };
                (addr, len + 1)
            };
            let regions = regions.map(region);
            rig.prepare((slot % 32).into(), &[0x27, 0x80, 0xa0, features], &packet, &regions[..(count % 4).into()]);
            rig.set(port(0, CI), 1 << (slot % 32));
        }
        Step::Fis { slot, kind, mut fis } => {
            fis[0] = kind.unwrap_or(0x27);
            rig.prepare((slot % 32).into(), &fis, &[], &[(DATA, 512)]);
            rig.set(port(0, CI), 1 << (slot % 32));
        }
        Step::Eject(force) => drop(rig.drive().eject(force)),
        Step::Close => rig.drive().close_tray(),
        Step::Change => drop(rig.drive().change(disc(), false)),
        Step::Reset => rig.ahci.reset(),
        Step::Start => rig.start(),
        Step::Load(damage) => {
            rig.ahci.halt();
            rig.until(|rig| rig.ahci.is_halted());
            let mut states = States::default();
            rig.ahci.save_into("", &mut states);
            let mut sent = damage.map_or_else(|| states.clone(), |damage| damage.to(states.clone()));
            let loaded = rig.ahci.load("", &mut sent);
            assert!(damage.is_some() || loaded.is_ok(), "{loaded:?}");
            rig.ahci.go_on();
        }
    }
}
