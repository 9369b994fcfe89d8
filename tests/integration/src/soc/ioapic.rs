//! An IOAPIC (Intel 82093AA) on the SoC, as much as payloads need: 24 pins, fixed delivery, edge and level.

use api_channel::call::{Call, Msi, Route, RouteKind};
use ioreq_ring::{Completion, Direction, Kind};

use super::{Answer, Seen};

const BASE: u64 = 0xfec0_0000;
const PINS: usize = 24;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;

/// Registers and lines, for a VM whose local APICs alone are in KVM.
#[derive(Debug)]
pub struct Ioapic {
    index: u8,
    entries: [u64; PINS],
    lines: [bool; PINS],
    /// Ends of interrupt that KVM told of.
    pub ends: u32,
}

impl Default for Ioapic {
    fn default() -> Self {
        Self { index: 0, entries: [MASKED; PINS], lines: [false; PINS], ends: 0 }
    }
}

impl Ioapic {
    /// Serves an access of its registers, or the notice of an end of interrupt; what the host must be told goes to `calls`.
    pub fn serve(&mut self, seen: &Seen, calls: &mut Vec<Call>) -> Option<Answer> {
        let request = &seen.request;
        if request.kind == Kind::EOI {
            self.ends += 1;
            self.end_of_interrupt(request.address as u8, calls);
            return Some(Answer::Plain(Completion::ok(0)));
        }
        let offset = request.address.checked_sub(BASE).filter(|&at| request.kind == Kind::MMIO && at < 0x1000)?;
        let value = match (offset, request.direction) {
            (0, Direction::Write) => {
                self.index = request.data as u8;
                0
            }
            (0x10, Direction::Write) => {
                self.write(request.data as u32, calls);
                0
            }
            (0, Direction::Read) => self.index.into(),
            (0x10, Direction::Read) => {
                self.selected().map_or(0, |(pin, shift)| self.entries[pin] >> shift & 0xffff_ffff)
            }
            _ => 0,
        };
        Some(Answer::Plain(Completion::ok(value)))
    }

    /// Sets the level of a pin.
    pub fn set_line(&mut self, pin: usize, high: bool, calls: &mut Vec<Call>) {
        let rises = high && !self.lines[pin];
        self.lines[pin] = high;
        if rises || self.entries[pin] & LEVEL != 0 {
            self.deliver(pin, calls);
        }
    }

    fn write(&mut self, value: u32, calls: &mut Vec<Call>) {
        if let Some((pin, shift)) = self.selected() {
            self.entries[pin] = self.entries[pin] & !(0xffff_ffff << shift) | u64::from(value) << shift;
            calls.push(Call::SetRouting(self.routes()));
            self.deliver(pin, calls);
        }
    }

    fn end_of_interrupt(&mut self, vector: u8, calls: &mut Vec<Call>) {
        for pin in 0..PINS {
            if self.entries[pin] & REMOTE_IRR != 0 && self.entries[pin] as u8 == vector {
                self.entries[pin] &= !REMOTE_IRR;
                self.deliver(pin, calls);
            }
        }
    }

    /// Sends the pin's interrupt if its line is high, and nothing of it is under way.
    fn deliver(&mut self, pin: usize, calls: &mut Vec<Call>) {
        let entry = self.entries[pin];
        if !self.lines[pin] || entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        if entry & LEVEL != 0 {
            self.entries[pin] |= REMOTE_IRR;
        }
        calls.push(Call::Msi(message(entry)));
    }

    /// KVM reports the end of those level-triggered interrupts that it finds in its routing.
    fn routes(&self) -> Vec<Route> {
        let open = (0u32..).zip(&self.entries).filter(|(_, entry)| **entry & MASKED == 0);
        open.map(|(gsi, entry)| {
            let Msi { address, data, .. } = message(*entry);
            Route { gsi, kind: RouteKind::Msi as u32, address, data, reserved: 0 }
        })
        .collect()
    }

    /// The pin that IOREGSEL names, and which half of its entry.
    fn selected(&self) -> Option<(usize, u32)> {
        let word = usize::from(self.index.checked_sub(0x10)?);
        (word / 2 < PINS).then_some((word / 2, word as u32 % 2 * 32))
    }
}

/// The message that stands for an entry.
fn message(entry: u64) -> Msi {
    let (destination, logical) = (entry >> 56, entry >> 11 & 1);
    // Vector, delivery mode and trigger mode stand at the same bits in both; bit 14 of the data is "assert".
    let data = entry as u32 & 0x87ff & !(1 << 11) | 1 << 14;
    Msi { address: 0xfee0_0000 | destination << 12 | logical << 2, data, reserved: 0 }
}
