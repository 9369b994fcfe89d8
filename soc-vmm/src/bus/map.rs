//! Which device claims an address: a sorted list of ranges that don't overlap.

use super::{Access, Answer, Deferred, Device};

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

/// One address space (ports, or memory) and the devices in it.
#[derive(Default)]
pub struct Bus {
    devices: Vec<Box<dyn Device>>,
    /// Sorted by base.
    entries: Vec<Entry>,
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
        self.devices.push(device);
        let mut at = 0;
        for claim in claims {
            self.entries.push(Entry { claim: *claim, device: index, at });
            at += claim.len;
        }
        self.entries.sort_by_key(|e| e.claim.base);
        Ok(())
    }

    /// Reads at `addr`; [`Answer::Unclaimed`] where no device claims the first byte. An access that runs past the claim's end is
    /// the device's to judge (`offset + len`).
    pub fn read(&mut self, addr: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match self.find(addr) {
            Some((device, offset)) => device.read(access, offset, reply),
            None => Answer::Unclaimed,
        }
    }

    /// Writes at `addr`, likewise.
    pub fn write(&mut self, addr: u64, data: u64, access: &Access, reply: Deferred<'_>) -> Answer {
        match self.find(addr) {
            Some((device, offset)) => device.write(access, offset, data, reply),
            None => Answer::Unclaimed,
        }
    }

    fn find(&mut self, addr: u64) -> Option<(&mut (dyn Device + '_), u64)> {
        let i = self.entries.partition_point(|e| e.claim.base <= addr).checked_sub(1)?;
        let entry = &self.entries[i];
        let within = addr - entry.claim.base;
        if within >= entry.claim.len {
            return None;
        }
        Some((&mut *self.devices[entry.device], entry.at + within))
    }
}

fn overlap(a: &Claim, b: &Claim) -> bool {
    a.base <= b.base + (b.len - 1) && b.base <= a.base + (a.len - 1)
}
