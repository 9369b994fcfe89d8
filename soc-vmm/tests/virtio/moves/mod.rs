//! Devices that halt in the middle of their work, and go on where they were or in another machine over the same memory.

mod damage;
mod disk;
mod function;
mod golden;
mod vhost;

use std::io;

use soc_vmm::pci::PciFunction;
use soc_vmm::persist::{Saved, StateError, States};
use soc_vmm::virtio::Plumbing;

use super::rig::{Board, Guest, RAM, eventually};

/// Where the device is.
const PLACE: &str = "01.0/00.0";

/// Halts the device; from then on guest memory stays as it is.
pub(crate) fn halt(guest: &mut Guest) {
    guest.function.halt();
    eventually(|| guest.function.is_halted().then_some(()));
}

/// The device's states, as they come out of a stream.
pub(crate) fn save(guest: &Guest) -> States {
    let mut states = States::default();
    guest.function.save_into(PLACE, &mut states);
    let mut copies = States::default();
    for (name, Saved { version, state }) in states {
        let value: serde_json::Value = serde_json::from_slice(&state).unwrap();
        let state = serde_json::to_vec(&value).unwrap();
        copies.add(&name, Saved { version, state }).unwrap();
    }
    copies
}

/// The same guest's memory with another machine around it, in which nothing has run.
pub(crate) fn elsewhere(board: &Board) -> Board {
    Board { ram: board.ram.clone(), memory: board.memory.clone(), ..Board::default() }
}

pub(crate) fn load(guest: &mut Guest, mut states: States) -> Result<(), StateError> {
    guest.function.load(PLACE, &mut states)?;
    states.end()
}

/// Halts the device and has it go on.
pub(crate) fn stay(guest: &mut Guest) {
    halt(guest);
    let before = guest.board.ram.get(0, RAM);
    save(guest);
    assert!(guest.board.ram.get(0, RAM) == before, "it doesn't stand still");
    guest.function.go_on();
}

/// Moves the device to another machine, in which it is made by `plug`.
pub(crate) fn travel(guest: &mut Guest, plug: impl FnOnce(Plumbing<'_>) -> io::Result<Box<dyn PciFunction>>) {
    halt(guest);
    let before = guest.board.ram.get(0, RAM);
    let mut other = Guest::on(elsewhere(&guest.board), plug);
    load(&mut other, save(guest)).unwrap();
    // The source ends before the other one begins.
    *guest = other;
    assert!(guest.board.ram.get(0, RAM) == before, "it doesn't stand still");
    guest.function.go_on();
}

/// To go on here, or elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Stay,
    Travel,
}

impl Way {
    pub(crate) const BOTH: [Self; 2] = [Self::Stay, Self::Travel];

    pub(crate) fn take(self, guest: &mut Guest, plug: impl FnOnce(Plumbing<'_>) -> io::Result<Box<dyn PciFunction>>) {
        match self {
            Self::Stay => stay(guest),
            Self::Travel => travel(guest, plug),
        }
    }
}
