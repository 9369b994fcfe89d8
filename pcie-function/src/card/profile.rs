//! What differs between cards: who they are on PCI, and which BAR is what.
//!
//! What a BAR's registers mean is docs/card.md's; whether a completion pushes posted writes the card says itself (`FEATURES`).

use super::{bar, id};
use crate::header::Role;

/// A card as its two sides find it.
#[derive(Debug)]
pub struct Profile {
    /// Its name, for messages.
    pub name: &'static str,
    /// Vendor id.
    pub vendor: u16,
    /// Device ids of its functions.
    pub devices: &'static [(u16, Side, Role)],
    /// The BAR with registers and doorbells.
    pub registers: u32,
    /// The BAR with card memory.
    pub memory: u32,
    /// The BAR with notify pages, where the card has any.
    pub notify: u32,
}

/// A side of a card.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The host server's.
    Host,
    /// The SoC's.
    Soc,
}

impl std::fmt::Display for Side {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if *self == Self::Host { "host" } else { "SoC" })
    }
}

/// Every card that is known.
pub const PROFILES: &[Profile] = &[Profile {
    name: "Outboard software card",
    vendor: id::VENDOR,
    devices: &[
        (id::HOST_VM, Side::Host, Role::Vm),
        (id::HOST_HOST, Side::Host, Role::Host),
        (id::SOC_VM, Side::Soc, Role::Vm),
        (id::SOC_HOST, Side::Soc, Role::Host),
    ],
    registers: bar::REGISTERS,
    memory: bar::MEMORY,
    notify: bar::NOTIFY,
}];

impl Profile {
    /// The card that a function with these ids belongs to, the side that it is of, and what it is for.
    pub fn find(vendor: u16, device: u16) -> Option<(&'static Self, Side, Role)> {
        PROFILES.iter().filter(|profile| profile.vendor == vendor).find_map(|profile| {
            profile.devices.iter().find(|(id, _, _)| *id == device).map(|(_, side, role)| (profile, *side, *role))
        })
    }
}
