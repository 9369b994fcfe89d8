//! Bus memory on the heap: both sides see every store at once. Fuzz targets use it too.
#![allow(unreachable_pub, reason = "each crate that includes this file sees another part of it")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use ioreq_ring::{BusError, BusMemory};

/// A window of heap memory. Clones share it.
#[derive(Clone, Debug)]
pub struct Heap {
    words: Arc<[AtomicU64]>,
}

impl Heap {
    /// Zeroed memory of `len` bytes.
    pub fn new(len: usize) -> Self {
        Self { words: (0..len / 8).map(|_| AtomicU64::new(0)).collect() }
    }

    fn word(&self, offset: usize) -> &AtomicU64 {
        assert!(offset.is_multiple_of(8), "word {offset:#x} is misaligned");
        &self.words[offset / 8]
    }
}

impl BusMemory for Heap {
    fn len(&self) -> usize {
        self.words.len() * 8
    }

    fn load(&self, offset: usize) -> u64 {
        self.word(offset).load(Ordering::Acquire)
    }

    fn store(&self, offset: usize, word: u64) {
        self.word(offset).store(word, Ordering::Release);
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        assert!(offset % 64 + words.len() * 8 <= 64, "a line crosses 64 bytes at {offset:#x}");
        for (i, word) in words.iter().enumerate() {
            self.store(offset + i * 8, *word);
        }
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        for (i, some) in data.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..some.len()].copy_from_slice(some);
            self.store(offset + i * 8, u64::from_le_bytes(word));
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        for (i, some) in data.chunks_mut(8).enumerate() {
            some.copy_from_slice(&self.load(offset + i * 8).to_le_bytes()[..some.len()]);
        }
    }

    fn fence(&self) {}

    fn flush(&self) -> Result<(), BusError> {
        Ok(())
    }
}
