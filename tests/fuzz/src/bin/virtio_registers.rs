//! A virtio function against a guest that makes any access to its registers and configuration space, with its thread behind it, and a peer
//! that sends the states of the machine that it came from, damaged or not.
#![no_main]

use std::sync::Arc;

use hurt::{Damage, hurt};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{Board, Driver, Guest, HeapDisk, HeapNet, VERSION_1, eventually};
use soc_vmm::pci::PciFunction;
use soc_vmm::persist::States;
use soc_vmm::virtio::Plumbing;
use soc_vmm::virtio::block::{self, BlockConfig};
use soc_vmm::virtio::net::{self, NetConfig};

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

#[path = "../../../../soc-vmm/tests/virtio/hurt.rs"]
mod hurt;

const REQUEST: u64 = 0x8_0000;

#[derive(Arbitrary, Debug)]
enum Step {
    /// An access to the common configuration, where most registers are.
    Common {
        offset: u8,
        len: u8,
        data: Option<u64>,
    },
    Access {
        region: u8,
        offset: u16,
        len: u8,
        data: Option<u64>,
    },
    Config {
        offset: u16,
        len: u8,
        data: Option<u32>,
    },
    /// What a good driver does, up to DRIVER_OK.
    Start {
        features: u64,
        size: u8,
    },
    /// A chain to queue 0, good or not.
    Add {
        short: bool,
    },
    Kick(u8),
    Poke {
        at: u16,
        data: u64,
    },
    Reset,
    /// It halts and goes on.
    Halt,
    /// It goes to another machine, if that takes it.
    Move(Vec<Damage>),
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (is_disk, steps) = input;
    let mut guest = Guest::new(|plumbing| plug(is_disk, plumbing));
    let mut driver = Driver::new(&guest.board.ram, 0x1_0000, 16);
    for step in steps.into_iter().take(100) {
        match step {
            Step::Halt => {
                halt(&mut guest);
                guest.function.go_on();
            }
            Step::Move(damages) => travel(&mut guest, is_disk, &damages),
            step => take(&mut guest, &mut driver, step),
        }
    }
    halt(&mut guest);
    guest.function.go_on();
    guest.function.reset();
    assert!(guest.status() == 0 && !guest.board.pin.is_high() && guest.function.posted().is_empty());
    assert_eq!(guest.function.read_config(4, 2), 0);
});

fn plug(is_disk: bool, plumbing: Plumbing<'_>) -> std::io::Result<Box<dyn PciFunction>> {
    if is_disk {
        return block::new(BlockConfig::new("", Arc::new(HeapDisk::new(16)), ""), plumbing);
    }
    let backend = Box::new(HeapNet::new([vec![1; 60], vec![2; 1500]], 3));
    let interface = NetConfig::new(String::new(), vec![backend], [2; 6]).expect("descriptors");
    net::new(NetConfig { mtu: Some(1500), ..interface }, plumbing)
}

fn halt(guest: &mut Guest) {
    guest.function.halt();
    eventually(|| guest.function.is_halted().then_some(()));
}

fn travel(guest: &mut Guest, is_disk: bool, damages: &[Damage]) {
    halt(guest);
    let mut states = States::default();
    guest.function.save_into("", &mut states);
    let mut states = hurt(states, damages);
    let Board { ram, memory, .. } = &guest.board;
    let board = Board { ram: ram.clone(), memory: memory.clone(), ..Board::default() };
    let mut other = Guest::on(board, |plumbing| plug(is_disk, plumbing));
    match other.function.load("", &mut states) {
        Ok(()) => *guest = other,
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
    guest.function.go_on();
}

fn take(guest: &mut Guest, driver: &mut Driver, step: Step) {
    let width = |len: u8| len % 8 + 1;
    match step {
        Step::Common { offset, len, data } => {
            guest.access(4, u64::from(offset % 0x40), width(len), data);
        }
        Step::Access { region, offset, len, data } => {
            let (region, size) = [(1, 0x1000), (4, 0x4000)][usize::from(region % 2)];
            guest.access(region, u64::from(offset) % size, width(len), data);
        }
        Step::Config { offset, len, data } => {
            // As the fabric makes them: within a word, mostly where capabilities are.
            let offset = if offset & 0x8000 == 0 { offset & 0xff } else { offset & 0xfff };
            let len = (len % 4 + 1).min(4 - (offset & 3) as u8);
            match data {
                Some(data) => guest.function.write_config(offset, len, data),
                None => {
                    guest.function.read_config(offset, len);
                }
            }
        }
        Step::Start { features, size } => {
            let features = features & guest.offered() | VERSION_1;
            guest.negotiate(features);
            *driver = guest.queue(0, 1 << (size % 9));
            guest.go();
        }
        Step::Add { short } => {
            guest.board.ram.set(REQUEST, &[0; 16]);
            let len = if short { 15 } else { 16 };
            driver.add(&[(REQUEST, len, false), (REQUEST + 512, 512, true), (REQUEST + 16, 1, true)]);
            guest.kick(0);
        }
        Step::Kick(queue) => guest.kick(u16::from(queue)),
        Step::Poke { at, data } => guest.board.ram.set(0x1_0000 + u64::from(at % 0x8000), &data.to_le_bytes()),
        Step::Reset => guest.function.reset(),
        Step::Halt | Step::Move(_) => {}
    }
}
