//! What fuzz targets share.

pub mod channel;
pub mod damage;

use arbitrary::Arbitrary;
use ioreq_ring::BusMemory;
use wire_kit::Heap;

/// What a peer stores over a word: anything, or a number near the one that stands there under any upper half.
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

/// The command line that `data` stands for: words with a NUL between them.
pub fn words(data: &[u8]) -> Vec<std::ffi::OsString> {
    use std::os::unix::ffi::OsStrExt;
    data.split(|byte| *byte == 0).map(|word| std::ffi::OsStr::from_bytes(word).to_owned()).collect()
}

/// Whether `text` is what a person gets to see of an error: one line that steers no terminal.
pub fn is_one_line(text: &str) -> bool {
    !text.is_empty() && !text.contains(char::is_control)
}
