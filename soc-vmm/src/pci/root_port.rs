//! PCI Express root ports as QEMU's `pcie-root-port` is one: 1b36:000c, with a slot into which a device can be plugged while the guest
//! runs (PCI Express Base §6.7, §7.5.3).

use super::config::{CAP_EXPRESS, ConfigSpace, Identity, header};
use super::function::PciFunction;
use super::msi::Msi;
use crate::bus::{Access, Answer, Deferred};
use crate::interrupt::{InterruptLine, MessageSink};

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
    /// The power indicator: off.
    pub const INDICATOR_OFF: u16 = 3 << 8;
    /// The power indicator's bits.
    pub const INDICATOR: u16 = 3 << 8;
    /// Power is off.
    pub const POWER_OFF: u16 = 1 << 10;
    /// Interrupt: the data link's state changed.
    pub const LINK: u16 = 1 << 12;
}

/// Slot status.
mod slot_status {
    pub(super) const BUTTON: u16 = 1 << 0;
    pub(super) const PRESENCE_CHANGED: u16 = 1 << 3;
    pub(super) const COMPLETED: u16 = 1 << 4;
    pub(super) const PRESENT: u16 = 1 << 6;
    pub(super) const LINK_CHANGED: u16 = 1 << 8;
    /// Cleared by ones.
    pub(super) const EVENTS: u16 = 0x11f;
}

/// A root port.
pub struct RootPort {
    config: ConfigSpace,
    express: u16,
    msi: Msi,
    line: InterruptLine,
    /// Whether a device is in the slot.
    occupied: bool,
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
        put(SLOT_CONTROL, &slot_control::INDICATOR_OFF.to_le_bytes());
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
        // Root status: PME.
        config.allow_clear(express + 0x22, &[1, 0]);
        let msi = Msi::new(&mut config, sink);
        // Subsystem ids of a bridge have a capability of their own.
        config.add_capability(0x0d, &[0, 0, 0x36, 0x1b, 0, 0], &[]);
        Self { config, express, msi, line, occupied: false, released: false }
    }

    /// Puts a device into the slot, before the guest starts or while it runs: then it is told.
    pub fn occupy(&mut self) {
        (self.occupied, self.released) = (true, false);
        self.show_presence();
        self.event(slot_status::PRESENCE_CHANGED | slot_status::LINK_CHANGED);
    }

    /// Presses the attention button: the guest is asked to let the device go.
    pub fn press_button(&mut self) {
        self.event(slot_status::BUTTON);
    }

    /// Takes the device out, announced or not.
    pub fn vacate(&mut self) {
        (self.occupied, self.released) = (false, false);
        self.show_presence();
        self.event(slot_status::PRESENCE_CHANGED | slot_status::LINK_CHANGED);
    }

    /// Whether the guest has let the device go.
    pub fn is_released(&self) -> bool {
        self.released
    }

    fn show_presence(&mut self) {
        let powered = self.slot_control() & slot_control::POWER_OFF == 0;
        let status = self.config.u16(self.express + SLOT_STATUS) & !slot_status::PRESENT;
        let status = if self.occupied { status | slot_status::PRESENT } else { status };
        self.config.put(self.express + SLOT_STATUS, &status.to_le_bytes());
        let link = if self.occupied && powered { LINK_UP | LINK_ACTIVE } else { LINK_UP };
        self.config.put(self.express + LINK_STATUS, &link.to_le_bytes());
    }

    fn slot_control(&self) -> u16 {
        self.config.u16(self.express + SLOT_CONTROL)
    }

    /// Sets status bits, and interrupts where that was asked for.
    fn event(&mut self, bits: u16) {
        let old = self.config.u16(self.express + SLOT_STATUS);
        self.config.put(self.express + SLOT_STATUS, &(old | bits).to_le_bytes());
        if self.asserted() && !Self::is_wanted(self.slot_control(), old) && self.msi.enabled() {
            self.msi.raise();
        }
        self.update_line();
    }

    /// Whether a status bit is set whose interrupt is on.
    fn is_wanted(control: u16, status: u16) -> bool {
        use slot_control::{BUTTON, COMPLETED, INTERRUPT, LINK, PRESENCE};
        let pairs = [
            (BUTTON, slot_status::BUTTON),
            (PRESENCE, slot_status::PRESENCE_CHANGED),
            (COMPLETED, slot_status::COMPLETED),
            (LINK, slot_status::LINK_CHANGED),
        ];
        control & INTERRUPT != 0 && pairs.iter().any(|(on, bit)| control & on != 0 && status & bit != 0)
    }

    fn asserted(&self) -> bool {
        Self::is_wanted(self.slot_control(), self.config.u16(self.express + SLOT_STATUS))
    }

    fn update_line(&mut self) {
        let asserted = self.asserted() && !self.msi.enabled();
        let high = self.config.show_interrupt(asserted);
        self.line.set(high);
    }

    /// A guest's command to the slot was carried out, at once.
    fn commanded(&mut self, before: u16) {
        let now = self.slot_control();
        let indicator_off = |control: u16| control & slot_control::INDICATOR == slot_control::INDICATOR_OFF;
        if now & slot_control::POWER_OFF != 0 && indicator_off(now) && self.occupied {
            let was = before & slot_control::POWER_OFF != 0 && indicator_off(before);
            self.released |= !was;
        }
        self.show_presence();
        self.event(slot_status::COMPLETED);
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
        let before = self.slot_control();
        let was_asserted = self.asserted();
        self.config.write(offset, len, value);
        self.msi.configure(&self.config);
        let slot = self.express + SLOT_CONTROL;
        if (offset..offset + u16::from(len)).any(|at| at == slot || at == slot + 1) {
            self.commanded(before);
        } else if !was_asserted && self.asserted() && self.msi.enabled() {
            self.msi.raise();
        }
        self.update_line();
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
        self.released = false;
        // A slot that holds a device is powered.
        if self.occupied {
            self.config.put(self.express + SLOT_CONTROL, &(1u16 << 8).to_le_bytes());
        }
        self.show_presence();
        self.update_line();
    }
}

impl std::fmt::Debug for RootPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let bus = self.config.read(header::BAR0 + 8, 4);
        f.debug_struct("RootPort").field("buses", &bus).field("occupied", &self.occupied).finish_non_exhaustive()
    }
}
