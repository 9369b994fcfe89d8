//! ACPI's registers for PCI hot-plug, which only our own AML drives (it is in the DSDT beside the devices of the slots); made like those
//! of QEMU (docs/specs/acpi_pci_hotplug.rst).
//!
//! | port | read | written |
//! | --- | --- | --- |
//! | 0xcc0 | slots of the bank into which something was put | ones clear |
//! | 0xcc4 | slots of the bank whose device should be let go | ones clear |
//! | 0xcc8 | zero | ones eject what is in the slot |
//! | 0xccc | the bank: 32 slots | selects it |
//!
//! Slots are numbered as the root ports stand in [`crate::acpi::PciConfig::ports`]. Each register takes 4 bytes at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use super::{AcpiHandle, Persist, Ranges, RestoreError, claim};
use crate::bus::{Access, Answer, Deferred, Device};

/// First port.
pub const PCI_HOTPLUG_PORT: u16 = 0xcc0;
/// Ports from there on.
pub const PCI_HOTPLUG_LEN: u8 = 16;
/// The general-purpose event that tells of a change.
pub const PCI_HOTPLUG_GPE: u8 = 1;
/// Slots of a bank.
pub const BANK: usize = 32;

const BANKS: usize = 8;
/// The most slots.
pub const PCI_HOTPLUG_SLOTS: usize = BANK * BANKS;

// Offsets.
const INSERTED: u64 = 0;
const LEAVING: u64 = 4;
const EJECT: u64 = 8;
const SELECT: u64 = 12;

/// Hears that the guest let go of a slot. Called on the thread that serves IOREQs.
pub trait EjectSink: Send + Sync {
    /// The guest has ejected what is in `slot`; it counts on it being gone when it goes on.
    fn ejected(&self, slot: usize);
}

/// The registers.
pub struct PciHotplug {
    slots: Arc<Slots>,
    bank: u32,
    sink: Arc<dyn EjectSink>,
}

/// Saved state of a [`PciHotplug`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciHotplugState {
    /// Slots into which something was put, 32 a word.
    pub inserted: [u32; BANKS],
    /// Slots whose device should be let go.
    pub leaving: [u32; BANKS],
    /// The selected bank.
    pub bank: u32,
}

#[derive(Debug, Default)]
struct Slots {
    inserted: [AtomicU32; BANKS],
    leaving: [AtomicU32; BANKS],
}

/// The outside of a [`PciHotplug`], for any thread.
#[derive(Clone, Debug)]
pub struct PciHotplugHandle {
    slots: Arc<Slots>,
    acpi: AcpiHandle,
}

impl PciHotplugHandle {
    /// Tells the guest that something was put into `slot`, below [`PCI_HOTPLUG_SLOTS`].
    pub fn inserted(&self, slot: usize) {
        self.tell(&self.slots.inserted, slot);
    }

    /// Asks the guest to let go of what is in `slot`; [`EjectSink::ejected`] tells when it did.
    pub fn ask_to_eject(&self, slot: usize) {
        self.tell(&self.slots.leaving, slot);
    }

    fn tell(&self, words: &[AtomicU32; BANKS], slot: usize) {
        if let Some(word) = words.get(slot / BANK) {
            word.fetch_or(1 << (slot % BANK), Ordering::AcqRel);
            self.acpi.raise_gpe(PCI_HOTPLUG_GPE);
        }
    }
}

impl PciHotplug {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(PCI_HOTPLUG_PORT as u64, PCI_HOTPLUG_LEN as u64)]);

    /// The registers, with every slot as it is. `acpi` raises their event.
    pub fn new(acpi: AcpiHandle, sink: Arc<dyn EjectSink>) -> (Self, PciHotplugHandle) {
        let slots = Arc::new(Slots::default());
        let handle = PciHotplugHandle { slots: slots.clone(), acpi };
        (Self { slots, bank: 0, sink }, handle)
    }
}

impl Device for PciHotplug {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        if access.len != 4 {
            return Answer::Done(u64::MAX);
        }
        let word =
            |words: &[AtomicU32; BANKS]| words.get(self.bank as usize).map_or(0, |word| word.load(Ordering::Acquire));
        Answer::Done(match offset {
            INSERTED => word(&self.slots.inserted).into(),
            LEAVING => word(&self.slots.leaving).into(),
            SELECT => self.bank.into(),
            _ => 0,
        })
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        let bits = data as u32;
        match (offset, access.len) {
            (SELECT, 4) => self.bank = bits,
            (INSERTED | LEAVING | EJECT, 4) => {
                let (bank, slots) = (self.bank as usize, &self.slots);
                let Some((inserted, leaving)) = slots.inserted.get(bank).zip(slots.leaving.get(bank)) else {
                    return Answer::Done(0);
                };
                if offset != LEAVING {
                    inserted.fetch_and(!bits, Ordering::AcqRel);
                }
                if offset != INSERTED {
                    leaving.fetch_and(!bits, Ordering::AcqRel);
                }
                if offset == EJECT {
                    let ejected = (0..BANK).filter(|slot| bits & 1 << slot != 0);
                    ejected.for_each(|slot| self.sink.ejected(bank * BANK + slot));
                }
            }
            _ => {}
        }
        Answer::Done(0)
    }

    /// A guest that starts anew looks into every slot.
    fn reset(&mut self) {
        self.bank = 0;
        for word in self.slots.inserted.iter().chain(&self.slots.leaving) {
            word.store(0, Ordering::Release);
        }
    }
}

impl Persist for PciHotplug {
    const NAME: &'static str = "pci-hotplug";
    type State = PciHotplugState;

    fn save(&self) -> PciHotplugState {
        let words = |words: &[AtomicU32; BANKS]| std::array::from_fn(|n| words[n].load(Ordering::Acquire));
        PciHotplugState { inserted: words(&self.slots.inserted), leaving: words(&self.slots.leaving), bank: self.bank }
    }

    fn restore(&mut self, state: &PciHotplugState) -> Result<(), RestoreError> {
        self.bank = state.bank;
        for (words, saved) in [(&self.slots.inserted, &state.inserted), (&self.slots.leaving, &state.leaving)] {
            words.iter().zip(saved).for_each(|(word, saved)| word.store(*saved, Ordering::Release));
        }
        Ok(())
    }
}

impl std::fmt::Debug for PciHotplug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { slots, bank, .. } = self;
        f.debug_struct("PciHotplug").field("slots", slots).field("bank", bank).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use proptest::prelude::*;

    use super::*;
    use crate::devices::AcpiPm;
    use crate::devices::acpi_bench::{Sci, access, acpi};

    #[derive(Debug, Default)]
    struct Ejected(Mutex<Vec<usize>>);

    impl EjectSink for Ejected {
        fn ejected(&self, slot: usize) {
            self.0.lock().unwrap().push(slot);
        }
    }

    struct Rig {
        ejected: Arc<Ejected>,
        sci: Arc<Sci>,
        pm: AcpiPm,
        device: PciHotplug,
        handle: PciHotplugHandle,
    }

    fn rig() -> Rig {
        let ejected = Arc::new(Ejected::default());
        let (sci, pm, acpi) = acpi();
        let (device, handle) = PciHotplug::new(acpi, ejected.clone());
        Rig { ejected, sci, pm, device, handle }
    }

    #[test]
    fn a_change_is_an_event_and_stands_until_it_is_cleared() {
        let Rig { ejected, sci, mut pm, mut device, handle } = rig();
        // SCI on, its event on.
        access(&mut pm, 0x80, 1, Some(2));
        access(&mut pm, 0x28, 1, Some(1 << PCI_HOTPLUG_GPE));
        assert!(!sci.is_high());
        handle.inserted(3);
        handle.ask_to_eject(33);
        handle.inserted(PCI_HOTPLUG_SLOTS);
        pm.poll();
        assert!(sci.is_high());
        assert_eq!([0, 4, 8, 12].map(|at| access(&mut device, at, 4, None)), [8, 0, 0, 0]);
        access(&mut device, 0, 4, Some(8));
        access(&mut device, 12, 4, Some(1));
        assert_eq!([0, 4, 8, 12].map(|at| access(&mut device, at, 4, None)), [0, 2, 0, 1]);
        access(&mut device, 8, 4, Some(2));
        assert_eq!(access(&mut device, 4, 4, None), 0);
        assert_eq!(*ejected.0.lock().unwrap(), [33]);
    }

    proptest! {
        #[test]
        fn any_access_is_answered(accesses in prop::collection::vec(
            (0..16u64, prop::sample::select(vec![1u8, 2, 4, 8]), any::<Option<u32>>(), 0..300usize), 0..50,
        )) {
            let Rig { ejected, mut device, handle, .. } = rig();
            for (at, len, data, slot) in accesses {
                handle.inserted(slot);
                handle.ask_to_eject(slot);
                access(&mut device, at, len, data.map(u64::from));
                let state = device.save();
                device.restore(&state).unwrap();
                prop_assert_eq!(device.save(), state);
            }
            prop_assert!(ejected.0.lock().unwrap().iter().all(|slot| *slot < PCI_HOTPLUG_SLOTS));
            device.reset();
            prop_assert_eq!(device.save(), PciHotplugState::default());
        }
    }
}
