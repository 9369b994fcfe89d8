//! Memory that any file can be read into, past the page cache too.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Alignment of every buffer: what no device or file system asks more than (open(2), O_DIRECT).
pub const BUFFER_ALIGN: usize = 4096;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4096))]
pub(super) struct Page(pub(super) [u8; BUFFER_ALIGN]);

/// Bytes, aligned to 4096. An empty one takes no memory, and one that has grown stays as large.
#[derive(Default)]
pub struct Buffer(Vec<Page>);

impl Buffer {
    /// Its first `len` bytes; it grows where it has fewer. New ones are zeros.
    pub fn front(&mut self, len: usize) -> &mut [u8] {
        let pages = len.div_ceil(BUFFER_ALIGN);
        if self.0.len() < pages {
            self.0.resize(pages, Page([0; BUFFER_ALIGN]));
        }
        &mut self.0.as_mut_slice().as_mut_bytes()[..len]
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} pages)", self.0.len())
    }
}
