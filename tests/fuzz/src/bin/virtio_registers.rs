//! A virtio function against a guest that makes any access to its registers and configuration space, with its thread behind it.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use rig::{Driver, Guest, HeapDisk, HeapNet, VERSION_1};
use soc_vmm::virtio::block::{self, BlockConfig};
use soc_vmm::virtio::net::{self, NetConfig};

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

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
}

fuzz_target!(|input: (bool, Vec<Step>)| {
    let (is_disk, steps) = input;
    let mut guest = if is_disk {
        let disk = BlockConfig::new("", Arc::new(HeapDisk::new(16)), "");
        Guest::new(|plumbing| block::new(disk, plumbing))
    } else {
        let backend = Box::new(HeapNet::new([vec![1; 60], vec![2; 1500]], 3));
        let interface = NetConfig::new(String::new(), vec![backend], [2; 6]).expect("descriptors");
        Guest::new(|plumbing| net::new(NetConfig { mtu: Some(1500), ..interface }, plumbing))
    };
    let mut driver = Driver::new(&guest.board.ram, 0x1_0000, 16);
    for step in steps.into_iter().take(100) {
        take(&mut guest, &mut driver, step);
    }
    guest.function.reset();
    assert!(guest.status() == 0 && !guest.board.pin.is_high() && guest.function.posted().is_empty());
    assert_eq!(guest.function.read_config(4, 2), 0);
});

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
    }
}
