//! An IOAPIC (Intel 82093AA), as much as payloads need: 24 pins, fixed delivery, edge and level.

use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1, kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;

const PINS: usize = 24;
const MASKED: u64 = 1 << 16;
const LEVEL: u64 = 1 << 15;
const REMOTE_IRR: u64 = 1 << 14;

/// Registers and lines.
pub(super) struct Ioapic {
    index: u8,
    entries: [u64; PINS],
    lines: [bool; PINS],
}

impl Default for Ioapic {
    fn default() -> Self {
        Ioapic { index: 0, entries: [MASKED; PINS], lines: [false; PINS] }
    }
}

impl Ioapic {
    pub(super) fn write(&mut self, offset: u64, data: &[u8], vm: &VmFd) {
        let value = data.try_into().map_or(0, u32::from_le_bytes);
        match offset {
            0 => self.index = value as u8,
            0x10 => {
                if let Some((pin, high)) = self.selected() {
                    let entry = &mut self.entries[pin];
                    *entry = if high {
                        *entry & 0xffff_ffff | u64::from(value) << 32
                    } else {
                        *entry & !0xffff_ffff | u64::from(value)
                    };
                    self.publish(vm);
                    self.deliver(pin, vm);
                }
            }
            _ => {}
        }
    }

    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            0 => self.index.into(),
            0x10 => self.selected().map_or(0, |(pin, high)| self.entries[pin] >> if high { 32 } else { 0 }),
            _ => 0,
        };
        let length = data.len().min(4);
        data[..length].copy_from_slice(&(value as u32).to_le_bytes()[..length]);
    }

    pub(super) fn set_line(&mut self, pin: u8, level: bool, vm: &VmFd) {
        let pin = usize::from(pin);
        let rises = level && !self.lines[pin];
        self.lines[pin] = level;
        if rises || self.entries[pin] & LEVEL != 0 {
            self.deliver(pin, vm);
        }
    }

    pub(super) fn end_of_interrupt(&mut self, vector: u8, vm: &VmFd) {
        for pin in 0..PINS {
            if self.entries[pin] & REMOTE_IRR != 0 && self.entries[pin] as u8 == vector {
                self.entries[pin] &= !REMOTE_IRR;
                self.deliver(pin, vm);
            }
        }
    }

    /// Sends the pin's interrupt if its line is high, and nothing of it is under way.
    fn deliver(&mut self, pin: usize, vm: &VmFd) {
        let entry = self.entries[pin];
        if !self.lines[pin] || entry & (MASKED | REMOTE_IRR) != 0 {
            return;
        }
        if entry & LEVEL != 0 {
            self.entries[pin] |= REMOTE_IRR;
        }
        let (address_lo, data) = message(entry);
        // An interrupt that KVM can't take shows in the payload, which waits for it.
        let _ = vm.signal_msi(kvm_msi { address_lo, data, ..Default::default() });
    }

    /// KVM reports the end of those level interrupts that it finds in its routing table.
    fn publish(&self, vm: &VmFd) {
        let entries: Vec<_> = (0u32..)
            .zip(&self.entries)
            .filter(|(_, entry)| **entry & MASKED == 0)
            .map(|(gsi, entry)| {
                let (address_lo, data) = message(*entry);
                kvm_irq_routing_entry {
                    gsi,
                    type_: KVM_IRQ_ROUTING_MSI,
                    u: kvm_irq_routing_entry__bindgen_ty_1 {
                        msi: kvm_irq_routing_msi { address_lo, data, ..Default::default() },
                    },
                    ..Default::default()
                }
            })
            .collect();
        if let Ok(routing) = kvm_bindings::KvmIrqRouting::from_entries(&entries) {
            let _ = vm.set_gsi_routing(&routing);
        }
    }

    fn selected(&self) -> Option<(usize, bool)> {
        let word = usize::from(self.index.checked_sub(0x10)?);
        (word / 2 < PINS).then_some((word / 2, word % 2 == 1))
    }
}

/// The message that stands for an entry: address (low half) and data.
fn message(entry: u64) -> (u32, u32) {
    let destination = (entry >> 56) as u32;
    let logical = (entry >> 11 & 1) as u32;
    // Vector, delivery mode and trigger mode stand at the same bits in both; bit 14 of the data is "assert".
    let data = entry as u32 & 0x87ff & !(1 << 11);
    (0xfee0_0000 | destination << 12 | logical << 2, data | 1 << 14)
}
