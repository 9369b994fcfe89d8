//! The I/O APIC (Intel 82093AA; version 0x20 with its EOI register: ICH9 datasheet §13.5) of a machine whose host has none.
//!
//! A pin's redirection entry becomes a message, which goes to the host by the pin's own route. A level-triggered pin is delivered once,
//! then waits for the end of its interrupt: the host reports it by vector, or the guest writes it to the EOI register; a pin that is
//! high then is delivered again. The host knows which vectors to report by the pins' routes, so a write that changed one is finished
//! once the host has it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::interrupt::{LineSink, Message, MessageRoute, Settling, Waiters};
use crate::layout::IO_APIC;

/// Pins: GSIs from 0 on.
pub const IO_APIC_PINS: usize = 24;

// Registers in memory.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

// Registers behind the window.
const ID: u8 = 0;
const VERSION: u8 = 1;
const ARBITRATION: u8 = 2;
const ENTRIES: u8 = 0x10;

/// The version register: the last pin, and 0x20, which has an EOI register.
const VERSION_VALUE: u32 = (IO_APIC_PINS as u32 - 1) << 16 | 0x20;
/// Bits of the ID register that there are.
const ID_MASK: u32 = 0x0f00_0000;

// Bits of an entry.
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// All but delivery status, remote IRR and what is reserved.
const WRITABLE: u64 = 0xffff_0000_0001_afff;

/// Where messages go: the local APICs.
const MESSAGES: u64 = 0xfee0_0000;
/// A message's data: level-triggered, asserted.
const DATA_LEVEL: u32 = 0xc000;

/// The I/O APIC. Clones are the same chip: on the bus, at the ends of lines, and where the host reports ends of interrupts.
#[derive(Clone)]
pub struct IoApic(Arc<Mutex<Chip>>);

struct Chip {
    registers: Registers,
    routes: Vec<Pin>,
    /// Writes that wait for the host to know their routes.
    waiters: Waiters,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Registers {
    select: u8,
    id: u32,
    /// Levels of the pins.
    levels: u32,
    entries: [u64; IO_APIC_PINS],
}

/// A pin's way to the host.
struct Pin {
    route: Box<dyn MessageRoute>,
    routed: Option<Message>,
}

/// All that a guest can tell of the chip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    select: u8,
    id: u32,
    levels: u32,
    entries: Vec<u64>,
}

impl IoApic {
    /// What the chip claims.
    pub const RANGES: Ranges = Ranges::memory(&[claim(IO_APIC, 0x1000)]);

    /// A chip whose pins go to `routes`, from pin 0 on; `settling` says when the host knows them.
    pub fn new(routes: Vec<Box<dyn MessageRoute>>, settling: Arc<Settling>) -> Self {
        let routes = routes.into_iter().take(IO_APIC_PINS).map(|route| Pin { route, routed: None }).collect();
        Self(Arc::new(Mutex::new(Chip { registers: Registers::new(0), routes, waiters: Waiters::new(settling) })))
    }

    /// A processor ended the interrupt with this vector.
    pub fn end(&self, vector: u8) {
        self.chip().end(vector);
    }

    fn chip(&self) -> MutexGuard<'_, Chip> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Registers {
    /// As after power on, with the pins at these levels.
    fn new(levels: u32) -> Self {
        Self { select: 0, id: 0, levels, entries: [MASKED; IO_APIC_PINS] }
    }

    fn read(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            _ => self.entry().map_or(0, |(pin, shift)| (self.entries[pin] >> shift) as u32),
        }
    }

    /// The selected half of an entry.
    fn entry(&self) -> Option<(usize, u32)> {
        let half = usize::from(self.select.checked_sub(ENTRIES)?);
        (half / 2 < IO_APIC_PINS).then_some((half / 2, if half % 2 == 0 { 0 } else { 32 }))
    }

    /// Writes the selected register; the pin whose entry it was.
    fn write(&mut self, value: u32) -> Option<usize> {
        if self.select == ID {
            self.id = value & ID_MASK;
        }
        let (pin, shift) = self.entry()?;
        let mask = WRITABLE & u64::from(u32::MAX) << shift;
        let entry = &mut self.entries[pin];
        *entry = *entry & !mask | u64::from(value) << shift & mask;
        // An edge has no end to wait for: who turns a stuck pin into one and back sets it free.
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        Some(pin)
    }

    fn is_high(&self, pin: usize) -> bool {
        self.levels >> pin & 1 != 0
    }

    /// The entry's bits as they go to the bus: in both of its formats the upper 16 are the address's from bit 4 on, and the
    /// destination mode is its bit 2 (Intel VT-d §5.1.2.1).
    fn message(&self, pin: usize) -> Message {
        let entry = self.entries[pin];
        let address = MESSAGES | (entry >> 48) << 4 | (entry >> 11 & 1) << 2;
        let level = if entry & LEVEL != 0 { DATA_LEVEL } else { 0 };
        Message { address, data: (entry & 0x7ff) as u32 | level }
    }
}

impl Chip {
    /// A pin's entry was written.
    fn entry_changed(&mut self, pin: usize) {
        // A pin that is masked keeps its route: its last interrupt may not be at its end.
        if self.registers.entries[pin] & MASKED == 0 {
            self.route(pin);
            self.deliver_level(pin);
        }
    }

    /// Every entry is another one. Of a pin that is masked amid its interrupt the host must know the vector, to report its end.
    fn entries_restored(&mut self) {
        for pin in 0..IO_APIC_PINS {
            if self.registers.entries[pin] & (MASKED | REMOTE_IRR) != MASKED {
                self.route(pin);
                self.deliver_level(pin);
            }
        }
    }

    fn route(&mut self, pin: usize) {
        let message = Some(self.registers.message(pin));
        let Some(way) = self.routes.get_mut(pin) else { return };
        if way.routed != message {
            way.routed = message;
            way.route.set(message);
        }
    }

    /// Delivers a level-triggered pin that is high and not being served.
    fn deliver_level(&mut self, pin: usize) {
        let high = self.registers.is_high(pin);
        let entry = &mut self.registers.entries[pin];
        if high && *entry & (LEVEL | MASKED | REMOTE_IRR) == LEVEL {
            *entry |= REMOTE_IRR;
            self.raise(pin);
        }
    }

    fn raise(&self, pin: usize) {
        if let Some(way) = self.routes.get(pin) {
            way.route.raise();
        }
    }

    fn set_level(&mut self, pin: usize, high: bool) {
        let rises = high && !self.registers.is_high(pin);
        self.registers.levels = self.registers.levels & !(1 << pin) | u32::from(high) << pin;
        let entry = self.registers.entries[pin];
        if entry & LEVEL != 0 {
            self.deliver_level(pin);
        } else if rises && entry & MASKED == 0 {
            // An edge at a masked pin is lost.
            self.raise(pin);
        }
    }

    fn end(&mut self, vector: u8) {
        for pin in 0..IO_APIC_PINS {
            let entry = &mut self.registers.entries[pin];
            if *entry as u8 == vector && *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
                *entry &= !REMOTE_IRR;
                self.deliver_level(pin);
            }
        }
    }

    fn reset(&mut self) {
        // What drives the pins is reset by itself.
        self.registers = Registers::new(self.registers.levels);
        for way in &mut self.routes {
            if way.routed.take().is_some() {
                way.route.set(None);
            }
        }
    }
}

impl LineSink for IoApic {
    fn set_level(&self, gsi: u32, high: bool) {
        if (gsi as usize) < IO_APIC_PINS {
            self.chip().set_level(gsi as usize, high);
        }
    }
}

impl Device for IoApic {
    fn read(&mut self, _: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let chip = self.chip();
        Answer::Done(match offset {
            SELECT => chip.registers.select.into(),
            WINDOW => chip.registers.read().into(),
            _ => 0,
        })
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        let mut chip = self.chip();
        match offset {
            SELECT => chip.registers.select = data as u8,
            WINDOW if access.len >= 4 => {
                let before = chip.waiters.mark();
                if let Some(pin) = chip.registers.write(data as u32) {
                    chip.entry_changed(pin);
                }
                return chip.waiters.answer(before, reply);
            }
            EOI if access.len >= 4 => chip.end(data as u8),
            _ => {}
        }
        Answer::Done(0)
    }

    fn poll(&mut self) {
        self.chip().waiters.poll();
    }

    fn reset(&mut self) {
        self.chip().reset();
    }
}

impl Persist for IoApic {
    const NAME: &'static str = "io-apic";
    type State = IoApicState;

    fn save(&self) -> IoApicState {
        let Registers { select, id, levels, entries } = self.chip().registers.clone();
        IoApicState { select, id, levels, entries: entries.to_vec() }
    }

    fn restore(&mut self, state: &IoApicState) -> Result<(), RestoreError> {
        const NAME: &str = "I/O APIC";
        let IoApicState { select, id, levels, ref entries } = *state;
        let Ok(entries) = <[u64; IO_APIC_PINS]>::try_from(&entries[..]) else {
            return check(false, NAME, "not 24 entries");
        };
        let sound = |entry: &u64| entry & !(WRITABLE | REMOTE_IRR) == 0 && entry & (LEVEL | REMOTE_IRR) != REMOTE_IRR;
        check(entries.iter().all(sound), NAME, "an entry that can't be written")?;
        check(id & !ID_MASK == 0 && levels >> IO_APIC_PINS == 0, NAME, "bits that there are not")?;
        let mut chip = self.chip();
        chip.reset();
        chip.registers = Registers { select, id, levels, entries };
        chip.entries_restored();
        Ok(())
    }
}

impl std::fmt::Debug for IoApic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("IoApic").field(&self.chip().registers).finish()
    }
}

#[cfg(test)]
mod tests;
