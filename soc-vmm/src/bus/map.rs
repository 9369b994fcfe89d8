//! Which device claims an address: a sorted list of ranges that don't overlap.

use std::time::Instant;

use super::{Access, Answer, Deferred, Device};
use crate::persist::{StateError, States};

/// A claim of `len` addresses from `base`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claim {
    /// First address.
    pub base: u64,
    /// Number of addresses, at least 1.
    pub len: u64,
}

/// Why a claim was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum MapError {
    /// Empty, or past the end of the address space.
    #[error("{0:#x?} is no range of addresses")]
    Range(Claim),
    /// Another device has some of it.
    #[error("{new:#x?} overlaps {old:#x?}, which another device has")]
    Overlap {
        /// What was asked for.
        new: Claim,
        /// Who is there.
        old: Claim,
    },
}

struct Entry {
    claim: Claim,
    device: usize,
    /// Where the claim starts within the device's own offsets.
    at: u64,
}

struct Slot {
    device: Box<dyn Device>,
    deadline: Option<Instant>,
}

/// One address space (ports, or memory) and the devices in it.
#[derive(Default)]
pub struct Bus {
    devices: Vec<Slot>,
    /// The earliest of the devices' deadlines.
    deadline: Option<Instant>,
    /// Sorted by base.
    entries: Vec<Entry>,
    /// The device that is asked for every address that no claim covers.
    rest: Option<usize>,
    /// No device does anything by itself: none is polled.
    still: bool,
}

impl Bus {
    /// Puts `device` behind every one of `claims`; its offsets run through the claims in their order: the second claim's first
    /// address has the offset of the first claim's length.
    ///
    /// # Errors
    /// A claim that is no range, or that overlaps another: nothing is added then.
    pub fn insert(&mut self, claims: &[Claim], device: Box<dyn Device>) -> Result<(), MapError> {
        for (i, claim) in claims.iter().enumerate() {
            if claim.len == 0 || claim.base.checked_add(claim.len - 1).is_none() {
                return Err(MapError::Range(*claim));
            }
            let taken = self.entries.iter().map(|e| e.claim).chain(claims[..i].iter().copied());
            if let Some(old) = taken.into_iter().find(|old| overlap(claim, old)) {
                return Err(MapError::Overlap { new: *claim, old });
            }
        }
        let index = self.devices.len();
        self.devices.push(Slot { device, deadline: None });
        let mut at = 0;
        for claim in claims {
            self.entries.push(Entry { claim: *claim, device: index, at });
            at += claim.len;
        }
        self.entries.sort_by_key(|e| e.claim.base);
        self.note_deadline(index);
        Ok(())
    }

    /// Puts `device` behind every address that is not claimed; its offsets are the addresses.
    pub fn insert_rest(&mut self, device: Box<dyn Device>) {
        let index = self.devices.len();
        self.devices.push(Slot { device, deadline: None });
        self.rest = Some(index);
        self.note_deadline(index);
    }

    /// Reads at `addr`; [`Answer::Unclaimed`] where no device claims the first byte. An access that runs past the claim's end is
    /// the device's to judge (`offset + len`).
    pub fn read(&mut self, addr: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match self.find(addr) {
            Some((index, offset)) => {
                let answer = self.devices[index].device.read(access, offset, reply);
                self.note_deadline(index);
                answer
            }
            None => Answer::Unclaimed,
        }
    }

    /// Writes at `addr`, likewise.
    pub fn write(&mut self, addr: u64, data: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match self.find(addr) {
            Some((index, offset)) => {
                let answer = self.devices[index].device.write(access, offset, data, reply);
                self.note_deadline(index);
                answer
            }
            None => Answer::Unclaimed,
        }
    }

    /// Polls every device: after a wake-up, and once [`Bus::deadline`] has passed. Between [`Bus::is_halted`] and [`Bus::go_on`] it does
    /// nothing: what comes from outside meanwhile waits.
    pub fn poll(&mut self) {
        if self.still {
            return;
        }
        for index in 0..self.devices.len() {
            self.devices[index].device.poll();
            self.note_deadline(index);
        }
    }

    /// When [`Bus::poll`] must be called at the latest; none: not before a wake-up.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline.filter(|_| !self.still)
    }

    /// Resets every device.
    pub fn reset(&mut self) {
        for index in 0..self.devices.len() {
            self.devices[index].device.reset();
            self.note_deadline(index);
        }
    }

    /// See [`Moves::halt`](crate::persist::Moves::halt).
    pub fn halt(&mut self) {
        self.devices.iter_mut().for_each(|slot| slot.device.halt());
    }

    /// Whether every device is halted, which they are until [`Bus::go_on`] then.
    pub fn is_halted(&mut self) -> bool {
        // Each is asked: what one has to do for it needn't wait for another.
        let moving = self.devices.iter_mut().filter_map(|slot| (!slot.device.is_halted()).then_some(())).count();
        self.still = moving == 0;
        self.still
    }

    /// Why a device can't be moved, if one can't.
    pub fn blocker(&self) -> Option<String> {
        self.devices.iter().find_map(|slot| slot.device.blocker())
    }

    /// See [`Moves::go_on`](crate::persist::Moves::go_on).
    pub fn go_on(&mut self) {
        self.still = false;
        self.devices.iter_mut().for_each(|slot| slot.device.go_on());
        self.poll();
    }

    /// Puts every device's state into `states`.
    pub fn save_into(&self, states: &mut States) {
        self.devices.iter().for_each(|slot| slot.device.save_into("", states));
    }

    /// Takes every device's state out of `states`, in the order in which they were put on the bus. They do nothing by themselves until
    /// [`Bus::go_on`].
    ///
    /// # Errors
    /// See [`StateError`]: some devices have taken theirs.
    pub fn load(&mut self, states: &mut States) -> Result<(), StateError> {
        self.still = true;
        self.devices.iter_mut().try_for_each(|slot| slot.device.load("", states))
    }

    fn note_deadline(&mut self, index: usize) {
        let deadline = self.devices[index].device.deadline();
        if self.devices[index].deadline != deadline {
            self.devices[index].deadline = deadline;
            self.deadline = self.devices.iter().filter_map(|slot| slot.deadline).min();
        }
    }

    /// The device behind `addr`, and the offset in it.
    fn find(&self, addr: u64) -> Option<(usize, u64)> {
        let entry = self.entries.partition_point(|e| e.claim.base <= addr).checked_sub(1).map(|i| &self.entries[i]);
        match entry {
            Some(entry) if addr - entry.claim.base < entry.claim.len => {
                Some((entry.device, entry.at + (addr - entry.claim.base)))
            }
            _ => self.rest.map(|device| (device, addr)),
        }
    }
}

fn overlap(a: &Claim, b: &Claim) -> bool {
    a.base <= b.base + (b.len - 1) && b.base <= a.base + (a.len - 1)
}
