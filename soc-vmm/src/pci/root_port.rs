//! PCI Express root ports as QEMU's `pcie-root-port` is one: 1b36:000c, with a slot into which a device can be plugged while the guest
//! runs (PCI Express Base §6.7, §7.5.3).
//!
//! A device that is put in shows itself, with a press of the attention button, and the guest switches its power on. A press of the attention button asks the guest to let it
//! go; it has done so once power and power indicator are off, which it may also do unasked.

use serde::{Deserialize, Serialize};

use super::config::{CAP_EXPRESS, ConfigSpace, ConfigState, Identity, header};
use super::function::PciFunction;
use super::msi::Msi;
use crate::bus::{Access, Answer, Deferred};
use crate::interrupt::{InterruptLine, MessageSink};
use crate::persist::{Persist, RestoreError, check};

// Offsets within the PCI Express capability.
const LINK_STATUS: u16 = 0x12;
const SLOT_CONTROL: u16 = 0x18;
const SLOT_STATUS: u16 = 0x1a;

/// PCI Express capabilities: version 2, a root port, with a slot.
const EXPRESS: u16 = 2 | 4 << 4 | 1 << 8;
/// Link capabilities: 2.5 GT/s, one lane, reports whether the data link is active.
const LINK: u32 = 1 | 1 << 4 | 1 << 20;
/// Link status: as wide and fast as it can be.
const LINK_UP: u16 = 1 | 1 << 4;
const LINK_ACTIVE: u16 = 1 << 13;
/// Slot capabilities: attention button, power controller, attention and power indicators, surprise, hot-plug; no electromechanical
/// interlock.
const SLOT: u32 = 0b111_1011;
/// Where the slot's number is.
const SLOT_NUMBER: u32 = 19;

/// Slot control.
pub mod slot_control {
    /// Interrupt: the attention button was pressed.
    pub const BUTTON: u16 = 1 << 0;
    /// Interrupt: presence changed.
    pub const PRESENCE: u16 = 1 << 3;
    /// Interrupt: a command completed.
    pub const COMPLETED: u16 = 1 << 4;
    /// The interrupts above are on.
    pub const INTERRUPT: u16 = 1 << 5;
    /// The attention indicator: off.
    pub const ATTENTION_OFF: u16 = 3 << 6;
    /// The power indicator's bits.
    pub const INDICATOR: u16 = 3 << 8;
    /// The power indicator: on.
    pub const INDICATOR_ON: u16 = 1 << 8;
    /// The power indicator: it blinks, the slot's power is about to change.
    pub const INDICATOR_BLINKS: u16 = 2 << 8;
    /// The power indicator: off.
    pub const INDICATOR_OFF: u16 = 3 << 8;
    /// Power is off.
    pub const POWER_OFF: u16 = 1 << 10;
    /// Interrupt: the data link's state changed.
    pub const LINK: u16 = 1 << 12;
}

/// Slot status.
pub mod slot_status {
    /// The attention button was pressed.
    pub const BUTTON: u16 = 1 << 0;
    /// Presence changed.
    pub const PRESENCE_CHANGED: u16 = 1 << 3;
    /// A command completed.
    pub const COMPLETED: u16 = 1 << 4;
    /// A device is in the slot.
    pub const PRESENT: u16 = 1 << 6;
    /// The data link's state changed.
    pub const LINK_CHANGED: u16 = 1 << 8;
    /// Cleared by ones.
    pub(super) const EVENTS: u16 = 0x11f;
}

/// Slot control of an empty slot, and of one whose device was there at power on.
const EMPTY: u16 = slot_control::ATTENTION_OFF | slot_control::INDICATOR_OFF | slot_control::POWER_OFF;
const POWERED: u16 = slot_control::ATTENTION_OFF | slot_control::INDICATOR_ON;

/// What became of a request to let a device go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nobody uses it: the guest has never switched its power on.
    Free,
    /// The guest is asked.
    Pressed,
    /// It was asked before, or is about to switch the slot's power: another press would take the request back.
    Busy,
}

/// A root port.
pub struct RootPort {
    /// What messages call it: its bus's name.
    name: String,
    config: ConfigSpace,
    express: u16,
    msi: Msi,
    line: InterruptLine,
    /// Whether a device is in the slot.
    occupied: bool,
    /// The guest is asked to let it go.
    asked: bool,
    /// The guest switched the slot's power off: what is in it may be taken out.
    released: bool,
}

impl RootPort {
    /// The port of the slot with that number, empty. `line` is its INTA.
    pub fn new(slot: u16, line: InterruptLine, sink: &dyn MessageSink) -> Self {
        let identity = Identity { vendor: 0x1b36, device: 0x000c, revision: 0, class: 0x06_0400, subsystem: (0, 0) };
        let mut config = ConfigSpace::bridge(&identity).with_pin();
        let mut body = vec![0; 58];
        let mut writable = vec![0; 58];
        let mut put = |at: u16, bytes: &[u8]| body[usize::from(at) - 2..][..bytes.len()].copy_from_slice(bytes);
        put(0x02, &EXPRESS.to_le_bytes());
        // Device capabilities: role-based error reporting.
        put(0x04, &(1u32 << 15).to_le_bytes());
        // The port's number is the slot's.
        put(0x0c, &(LINK | u32::from(slot & 0xff) << 24).to_le_bytes());
        put(LINK_STATUS, &LINK_UP.to_le_bytes());
        put(0x14, &(SLOT | u32::from(slot & 0x1fff) << SLOT_NUMBER).to_le_bytes());
        put(SLOT_CONTROL, &EMPTY.to_le_bytes());
        // Link capabilities 2, link control 2: 2.5 GT/s.
        put(0x2c, &2u32.to_le_bytes());
        put(0x30, &1u16.to_le_bytes());
        let mut allow = |at: u16, bytes: &[u8]| writable[usize::from(at) - 2..][..bytes.len()].copy_from_slice(bytes);
        // Device, link, slot and root control; device control 2.
        allow(0x08, &[0xff, 0x7f]);
        allow(0x10, &[0x5b, 0x00]);
        allow(SLOT_CONTROL, &[0xff, 0x17]);
        allow(0x1c, &[0x0f, 0x00]);
        allow(0x28, &[0x3f, 0x00]);
        let express = config.add_capability(CAP_EXPRESS, &body, &writable);
        config.allow_clear(express + SLOT_STATUS, &slot_status::EVENTS.to_le_bytes());
        config.own(express + SLOT_STATUS, &slot_status::PRESENT.to_le_bytes());
        config.own(express + LINK_STATUS, &LINK_ACTIVE.to_le_bytes());
        // Root status: PME.
        config.allow_clear(express + 0x22, &[1, 0]);
        let msi = Msi::new(&mut config, sink);
        // Subsystem ids of a bridge have a capability of their own.
        config.add_capability(0x0d, &[0, 0, 0x36, 0x1b, 0, 0], &[]);
        let name = format!("pci.{slot}");
        Self { name, config, express, msi, line, occupied: false, asked: false, released: false }
    }

    /// The same, whose bus has that name.
    #[must_use]
    pub fn named(self, name: &str) -> Self {
        Self { name: name.to_owned(), ..self }
    }

    /// Puts a device into the slot as if it had been there at power on.
    pub fn occupy(&mut self) {
        (self.occupied, self.asked, self.released) = (true, false, false);
        self.put_control(POWERED);
        self.show();
    }

    /// Puts a device into the slot while the guest runs, which is told.
    pub fn insert(&mut self) {
        (self.occupied, self.asked, self.released) = (true, false, false);
        // As whoever puts a card in does: Linux waits for the button where a slot has one, and not for presence.
        self.show_and_tell(slot_status::BUTTON);
    }

    /// Whether a device is in the slot.
    pub fn is_occupied(&self) -> bool {
        self.occupied
    }

    /// Asks the guest to let the device go.
    pub fn ask(&mut self) -> Asked {
        let indicator = self.slot_control() & slot_control::INDICATOR;
        if is_off(self.slot_control()) {
            return Asked::Free;
        }
        if indicator == slot_control::INDICATOR_BLINKS || self.slot_status() & slot_status::BUTTON != 0 {
            return Asked::Busy;
        }
        self.asked = true;
        self.event(slot_status::BUTTON);
        Asked::Pressed
    }

    /// Whether the guest is asked to let the device go.
    pub fn is_asked(&self) -> bool {
        self.asked
    }

    /// Whether the guest has just let the device go.
    pub fn take_released(&mut self) -> bool {
        std::mem::take(&mut self.released)
    }

    /// Takes the device out while the guest runs, which is told.
    pub fn vacate(&mut self) {
        (self.occupied, self.asked, self.released) = (false, false, false);
        self.show_and_tell(0);
    }

    /// Takes the device out as if it had not been there at power on.
    pub fn clear(&mut self) {
        (self.occupied, self.asked, self.released) = (false, false, false);
        self.put_control(EMPTY);
        self.show();
    }

    fn show_and_tell(&mut self, button: u16) {
        let link = if self.show() { slot_status::LINK_CHANGED } else { 0 };
        self.event(slot_status::PRESENCE_CHANGED | link | button);
    }

    /// Makes the registers show whether there is a device and whether it is powered; whether the link's state changed.
    fn show(&mut self) -> bool {
        let powered = self.slot_control() & slot_control::POWER_OFF == 0;
        let status = self.slot_status() & !slot_status::PRESENT;
        let status = if self.occupied { status | slot_status::PRESENT } else { status };
        self.config.put(self.express + SLOT_STATUS, &status.to_le_bytes());
        let before = self.config.u16(self.express + LINK_STATUS);
        let link = if self.occupied && powered { LINK_UP | LINK_ACTIVE } else { LINK_UP };
        self.config.put(self.express + LINK_STATUS, &link.to_le_bytes());
        before != link
    }

    fn slot_control(&self) -> u16 {
        self.config.u16(self.express + SLOT_CONTROL)
    }

    fn put_control(&mut self, control: u16) {
        self.config.put(self.express + SLOT_CONTROL, &control.to_le_bytes());
    }

    fn slot_status(&self) -> u16 {
        self.config.u16(self.express + SLOT_STATUS)
    }

    fn set_status(&mut self, bits: u16) {
        let status = self.slot_status() | bits;
        self.config.put(self.express + SLOT_STATUS, &status.to_le_bytes());
    }

    /// Sets status bits, and interrupts where that was asked for.
    fn event(&mut self, bits: u16) {
        let before = self.wants_message();
        self.set_status(bits);
        self.interrupt(before);
    }

    /// Whether a status bit is set whose interrupt is on.
    fn asserted(&self) -> bool {
        use slot_control::{BUTTON, COMPLETED, INTERRUPT, LINK, PRESENCE};
        let (control, status) = (self.slot_control(), self.slot_status());
        let pairs = [
            (BUTTON, slot_status::BUTTON),
            (PRESENCE, slot_status::PRESENCE_CHANGED),
            (COMPLETED, slot_status::COMPLETED),
            (LINK, slot_status::LINK_CHANGED),
        ];
        control & INTERRUPT != 0 && pairs.iter().any(|(on, bit)| control & on != 0 && status & bit != 0)
    }

    fn wants_message(&self) -> bool {
        self.asserted() && self.msi.enabled()
    }

    /// Interrupts after a change: a message where there was no reason for one `before` (§6.7.3.4), or the line's level.
    fn interrupt(&mut self, before: bool) {
        if !before && self.wants_message() {
            self.msi.raise();
        }
        let asserted = self.asserted() && !self.msi.enabled();
        let high = self.config.show_interrupt(asserted);
        self.line.set(high);
    }

    /// A guest's command to the slot was carried out, at once.
    fn commanded(&mut self, before: u16) {
        let now = self.slot_control();
        // Not again where both were off already: a guest that brings up what was just put in writes other bits first.
        self.released |= self.occupied && is_off(now) && !is_off(before);
        let link = if self.show() { slot_status::LINK_CHANGED } else { 0 };
        self.set_status(slot_status::COMPLETED | link);
    }
}

/// Whether power and power indicator are off.
fn is_off(control: u16) -> bool {
    control & slot_control::POWER_OFF != 0 && control & slot_control::INDICATOR == slot_control::INDICATOR_OFF
}

/// Saved state of a [`RootPort`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootPortState {
    /// Its configuration space, which has the slot's registers and MSI's.
    pub config: ConfigState,
    /// A device is in the slot.
    pub occupied: bool,
    /// The guest is asked to let it go.
    pub asked: bool,
}

impl Persist for RootPort {
    const NAME: &'static str = "pcie-root-port";
    type State = RootPortState;

    fn save(&self) -> RootPortState {
        // What is released is taken out at once.
        RootPortState { config: self.config.save(), occupied: self.occupied, asked: self.asked }
    }

    fn restore(&mut self, state: &RootPortState) -> Result<(), RestoreError> {
        let RootPortState { ref config, occupied, asked } = *state;
        if occupied != self.occupied {
            let (there, here) = if occupied { ("a device", "none") } else { ("none", "one") };
            let name = &self.name;
            let what =
                format!("behind port {name} is {there} at the source, and {here} here: give this VM the same devices");
            return Err(RestoreError::new(Self::NAME, what));
        }
        check(occupied || !asked, Self::NAME, "a device is asked for that is not there")?;
        check(self.config.restore(config), Self::NAME, "no configuration space of a port with this slot's number")?;
        (self.asked, self.released) = (asked, false);
        self.show();
        self.msi.configure(&self.config);
        // What stands was told.
        self.interrupt(self.wants_message());
        Ok(())
    }
}

impl PciFunction for RootPort {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        let (control, wanted) = (self.slot_control(), self.wants_message());
        self.config.write(offset, len, value);
        self.msi.configure(&self.config);
        let slot = self.express + SLOT_CONTROL;
        if (offset..offset + u16::from(len)).any(|at| at == slot || at == slot + 1) {
            self.commanded(control);
        }
        self.interrupt(wanted);
    }

    fn port(&mut self) -> Option<&mut RootPort> {
        Some(self)
    }

    fn read(&mut self, _: usize, _: u64, _: &Access, _: Deferred<'_>) -> Answer {
        Answer::Unclaimed
    }

    fn write(&mut self, _: usize, _: u64, _: u64, _: &Access, _: Deferred<'_>) -> Answer {
        Answer::Unclaimed
    }

    fn reset(&mut self) {
        self.config.reset();
        self.msi.configure(&self.config);
        (self.asked, self.released) = (false, false);
        // A slot that holds a device is powered.
        if self.occupied {
            self.put_control(POWERED);
        }
        self.show();
        self.interrupt(false);
    }
}

impl std::fmt::Debug for RootPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bus = self.config.read(header::BAR0 + 8, 4);
        f.debug_struct("RootPort").field("buses", &bus).field("occupied", &self.occupied).finish_non_exhaustive()
    }
}
