//! What fuzz targets share.

use arbitrary::Arbitrary;
use heap::Heap;
use ioreq_ring::BusMemory;

#[path = "../../../ioreq-ring/tests/heap/mod.rs"]
pub mod heap;

/// What a peer stores over a word: anything, or a sequence number near the one that stands there under any upper half.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Word {
    Any(u64),
    Near { step: i8, upper: u32 },
}

impl Word {
    /// Stores it over word `index` of `memory`, counted around its end.
    pub fn store(self, memory: &Heap, index: u16) {
        let offset = usize::from(index) * 8 % memory.len();
        let word = match self {
            Self::Any(word) => word,
            Self::Near { step, upper } => {
                let low = (memory.load(offset) as u32).wrapping_add_signed(step.into());
                u64::from(upper) << 32 | u64::from(low)
            }
        };
        memory.store(offset, word);
    }
}
