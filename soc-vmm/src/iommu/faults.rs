//! Fault recording (VT-d specification §7.3): status, records, and the interrupt that tells of them.

use serde::{Deserialize, Serialize};

use super::event::{Event, EventState};
use crate::interrupt::MessageRoute;

/// Records.
pub(super) const RECORDS: usize = 8;

/// Bits of the fault status register (§11.4.7.1).
pub(super) mod status {
    /// A fault found no free record.
    pub(in crate::iommu) const OVERFLOW: u32 = 1 << 0;
    /// There are records.
    pub(in crate::iommu) const PENDING: u32 = 1 << 1;
    /// The invalidation queue holds what the unit doesn't understand, and stands.
    pub(in crate::iommu) const QUEUE: u32 = 1 << 4;
}

/// In a record's upper half: there is a fault; it was a read.
const FAULT: u64 = 1 << 63;
const READ: u64 = 1 << 62;

/// Why a request was blocked: the specification's number for it (§7.1.3 of DMA, §5.1.4.1 of interrupts).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reason(pub(super) u8);

impl Reason {
    pub(super) const ROOT_ABSENT: Self = Self(0x1);
    pub(super) const CONTEXT_ABSENT: Self = Self(0x2);
    pub(super) const CONTEXT_INVALID: Self = Self(0x3);
    pub(super) const BEYOND_WIDTH: Self = Self(0x4);
    pub(super) const WRITE_DENIED: Self = Self(0x5);
    pub(super) const READ_DENIED: Self = Self(0x6);
    pub(super) const TABLE_UNREACHABLE: Self = Self(0x7);
    pub(super) const ROOT_UNREACHABLE: Self = Self(0x8);
    pub(super) const CONTEXT_UNREACHABLE: Self = Self(0x9);
    pub(super) const ROOT_RESERVED: Self = Self(0xa);
    pub(super) const CONTEXT_RESERVED: Self = Self(0xb);
    pub(super) const TABLE_RESERVED: Self = Self(0xc);
    pub(super) const REQUEST_RESERVED: Self = Self(0x20);
    pub(super) const INDEX_BEYOND: Self = Self(0x21);
    pub(super) const ENTRY_ABSENT: Self = Self(0x22);
    pub(super) const ENTRY_UNREACHABLE: Self = Self(0x23);
    pub(super) const ENTRY_RESERVED: Self = Self(0x24);
    pub(super) const COMPATIBLE_BLOCKED: Self = Self(0x25);
    pub(super) const REQUESTER_DENIED: Self = Self(0x26);
}

/// A blocked request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) reason: Reason,
    pub(super) requester: u16,
    /// The page asked for, or an interrupt's index from bit 48 on.
    pub(super) information: u64,
    pub(super) read: bool,
}

/// What was recorded.
pub(super) struct Faults {
    records: [[u64; 2]; RECORDS],
    /// The record that is next.
    next: usize,
    /// Overflow and queue error; whether there are records is seen from them.
    sticky: u32,
    event: Event,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct FaultsState {
    records: Vec<[u64; 2]>,
    next: usize,
    sticky: u32,
    event: EventState,
}

impl Faults {
    pub(super) fn new(route: Box<dyn MessageRoute>) -> Self {
        Self { records: [[0; 2]; RECORDS], next: 0, sticky: 0, event: Event::new(route) }
    }

    /// Records a fault, unless one of the same function waits to be seen, or there is no room.
    pub(super) fn record(&mut self, fault: &Fault) {
        let waits = |record: &[u64; 2]| record[1] & FAULT != 0;
        let same = |record: &[u64; 2]| waits(record) && record[1] as u16 == fault.requester;
        if self.sticky & status::OVERFLOW != 0 || self.records.iter().any(same) {
            return;
        }
        let quiet = self.status() != 0;
        let record = &mut self.records[self.next];
        if waits(record) {
            self.sticky |= status::OVERFLOW;
        } else {
            let read = if fault.read { READ } else { 0 };
            let reason = u64::from(fault.reason.0) << 32;
            *record = [fault.information, FAULT | read | reason | u64::from(fault.requester)];
            self.next = (self.next + 1) % RECORDS;
        }
        if !quiet {
            self.event.fire();
        }
    }

    /// The queue can't go on.
    pub(super) fn queue_stands(&mut self) {
        let quiet = self.status() != 0;
        self.sticky |= status::QUEUE;
        if !quiet {
            self.event.fire();
        }
    }

    /// The fault status register.
    pub(super) fn status(&self) -> u32 {
        // The oldest: records are taken in a circle.
        let oldest = (0..RECORDS).map(|n| (self.next + n) % RECORDS).find(|n| self.records[*n][1] & FAULT != 0);
        self.sticky | oldest.map_or(0, |index| status::PENDING | (index as u32) << 8)
    }

    /// Clears those of the sticky bits that are ones.
    pub(super) fn clear(&mut self, value: u32) {
        self.sticky &= !(value & (status::OVERFLOW | status::QUEUE));
        self.settle();
    }

    /// Word `index` of the records, four in each.
    pub(super) fn record_word(&self, index: usize) -> u32 {
        let half = self.records.get(index / 4).map_or(0, |record| record[index / 2 % 2]);
        (half >> (32 * (index % 2))) as u32
    }

    /// Writes there: a one to the topmost bit of a record frees it.
    pub(super) fn write_record_word(&mut self, index: usize, value: u32) {
        if index % 4 == 3
            && value >> 31 != 0
            && let Some(record) = self.records.get_mut(index / 4)
        {
            record[1] &= !FAULT;
            self.settle();
        }
    }

    /// The registers of the interrupt.
    pub(super) fn event(&mut self) -> &mut Event {
        &mut self.event
    }

    pub(super) fn event_word(&self, index: u64) -> u32 {
        self.event.read(index)
    }

    /// Nothing left to tell: no interrupt is owed.
    fn settle(&mut self) {
        if self.status() == 0 {
            self.event.withdraw();
        }
    }

    pub(super) fn reset(&mut self) {
        (self.records, self.next, self.sticky) = ([[0; 2]; RECORDS], 0, 0);
        self.event.reset();
    }

    pub(super) fn save(&self) -> FaultsState {
        let Self { records, next, sticky, event } = self;
        FaultsState { records: records.to_vec(), next: *next, sticky: *sticky, event: event.save() }
    }

    /// Whether the state is one.
    pub(super) fn is_sound(state: &FaultsState) -> bool {
        state.records.len() == RECORDS
            && state.next < RECORDS
            && state.sticky & !(status::OVERFLOW | status::QUEUE) == 0
    }

    /// Takes a state that is sound.
    pub(super) fn restore(&mut self, state: &FaultsState) {
        for (record, saved) in self.records.iter_mut().zip(&state.records) {
            *record = *saved;
        }
        (self.next, self.sticky) = (state.next, state.sticky);
        self.event.restore(state.event.clone());
    }
}
