//! Invalidation requests as a guest queues them (VT-d specification §6.5.2).

use serde::{Deserialize, Serialize};

use super::tables::PAGE_MASK;

/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// What a descriptor asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Descriptor {
    /// Forget translations: of contexts or of pages. The unit forgets all.
    Translations,
    /// Forget every interrupt entry.
    AllEntries,
    /// Forget `1 << order` interrupt entries from `first` on, which is cut to a multiple of so many.
    Entries { first: u32, order: u32 },
    /// Say that all before is done.
    Wait {
        /// Write this word there.
        status: Option<(u64, u32)>,
        /// Raise the completion interrupt.
        interrupt: bool,
    },
}

impl Descriptor {
    /// None: one that the unit doesn't have.
    pub(super) fn parse(raw: u128) -> Option<Self> {
        let (low, high) = (raw as u64, (raw >> 64) as u64);
        let granularity = low >> 4 & 3;
        // The type's upper bits are those of scalable mode.
        match (low & 0xf, low >> 9 & 7) {
            (1 | 2, 0) if granularity != 0 => Some(Self::Translations),
            (4, 0) if granularity & 1 == 0 => Some(Self::AllEntries),
            (4, 0) => Some(Self::Entries { first: (low >> 32) as u32 & 0xffff, order: (low >> 27) as u32 & 0x1f }),
            (5, 0) => {
                let status = (low & 1 << 5 != 0).then_some((high & !3, (low >> 32) as u32));
                Some(Self::Wait { status, interrupt: low & 1 << 4 != 0 })
            }
            _ => None,
        }
    }

    /// Whether the wired message whose entry is `index` is meant.
    pub(super) fn is_meant(self, index: Option<u32>) -> bool {
        match (self, index) {
            (Self::AllEntries, _) => true,
            (Self::Entries { first, order }, Some(index)) => first >> order.min(31) == index >> order.min(31),
            _ => false,
        }
    }
}

/// The queue's registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct QueueRegisters {
    /// Its address (IQA).
    pub(super) address: u64,
    /// The next descriptor to be served.
    pub(super) head: u32,
    /// The first that the guest has not written yet.
    pub(super) tail: u32,
}

impl QueueRegisters {
    /// Bits of IQA that there are.
    pub(super) const ADDRESS: u64 = !0xfff | 7;
    /// The most that a queue holds.
    pub(super) const MOST: u32 = 256 << 7;

    /// How many descriptors it holds.
    fn len(&self) -> u32 {
        256 << (self.address & 7)
    }

    /// Where the next descriptor is; none: there is none. A tail that is not in the queue is an error.
    pub(super) fn next(&self) -> Result<Option<u64>, BadTail> {
        if self.tail >= self.len() || self.head >= self.len() {
            return Err(BadTail);
        }
        let at = (self.address & PAGE_MASK) + u64::from(self.head) * DESCRIPTOR;
        Ok((self.head != self.tail).then_some(at))
    }

    /// The next one is done.
    pub(super) fn advance(&mut self) {
        self.head = (self.head + 1) % self.len();
    }
}

/// The tail is beyond the queue's end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadTail;
