//! Memory that both ends share, as one of them uses it.

use std::sync::Arc;

use super::counts::Crossings;
use super::link::{End, Side};
use super::queue::{Landing, Posted};
use crate::{BusError, BusMemory, Windowed};

/// A window whose crossings are counted, and take as long as the function's link says.
#[derive(Clone, Debug)]
pub struct ModelledWindow<W> {
    inner: W,
    crossings: Arc<Crossings>,
    /// Who uses it, if it is across the bus from there. What is local costs nothing.
    across: Option<Side>,
    path: Path,
}

/// How an access gets to the memory.
#[derive(Clone, Debug)]
enum Path {
    /// The link takes no time.
    Direct,
    /// The memory is at this end: what the other side sent lands in it before a look.
    Near(End),
    /// The memory is at the other end.
    Far(End, Arc<dyn Landing>),
}

impl<W: Windowed> ModelledWindow<W> {
    /// Memory local to whoever holds `end`.
    pub(super) fn near(inner: W, crossings: Arc<Crossings>, end: Option<End>) -> Self {
        Self { inner, crossings, across: None, path: end.map_or(Path::Direct, Path::Near) }
    }

    /// Memory across the bus from `side`, which holds `end`.
    pub(super) fn far(inner: W, crossings: Arc<Crossings>, side: Side, end: Option<End>) -> Self {
        let path = end.map_or(Path::Direct, |end| Path::Far(end, Arc::new(inner.clone())));
        Self { inner, crossings, across: Some(side), path }
    }

    fn look<T>(&self, words: usize, len: usize, look: impl FnOnce(&W) -> T) -> T {
        if let Some(side) = self.across {
            self.crossings.read(side, words as u64, len);
        }
        match &self.path {
            Path::Direct => look(&self.inner),
            Path::Near(end) => {
                end.arrivals();
                look(&self.inner)
            }
            Path::Far(end, _) => {
                let times = if self.across == Some(Side::Host) { words } else { 1 };
                end.read(times as u64, || look(&self.inner))
            }
        }
    }

    fn count_write(&self, words: usize, len: usize) {
        if let Some(side) = self.across {
            self.crossings.wrote(side, words as u64, len);
        }
    }

    /// # Panics
    /// The words are not all within. Who stores is told, not who lets it land.
    fn within(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len.next_multiple_of(8));
        let inside = end.is_some_and(|end| end <= self.inner.len());
        assert!(inside && offset.is_multiple_of(8), "{len} bytes at {offset:#x} outside their window");
    }
}

impl<W: Windowed> Windowed for ModelledWindow<W> {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let inner = self.inner.cut(offset, len)?;
        let path = match &self.path {
            Path::Far(end, _) => Path::Far(end.clone(), Arc::new(inner.clone())),
            path => path.clone(),
        };
        Some(Self { inner, crossings: self.crossings.clone(), across: self.across, path })
    }
}

impl<W: Windowed> BusMemory for ModelledWindow<W> {
    fn len(&self) -> usize {
        self.inner.len()
    }

    fn load(&self, offset: usize) -> u64 {
        self.look(1, 8, |inner| inner.load(offset))
    }

    fn store(&self, offset: usize, word: u64) {
        match self.path {
            Path::Far(..) => self.store_line(offset, &[word]),
            _ => {
                self.count_write(1, 8);
                self.inner.store(offset, word);
            }
        }
    }

    fn store_line(&self, offset: usize, line: &[u64]) {
        let (count, len) = (line.len(), line.len() * 8);
        self.count_write(count, len);
        match &self.path {
            Path::Far(end, to) => {
                assert!(offset % 64 + len <= 64, "a line crosses 64 bytes at {offset:#x}");
                self.within(offset, len);
                let mut words = [0; 8];
                words[..count].copy_from_slice(line);
                end.write(Posted::Line { to: to.clone(), offset, words, count });
            }
            _ => self.inner.store_line(offset, line),
        }
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.count_write(data.len().div_ceil(8), data.len());
        match &self.path {
            Path::Far(end, to) => {
                self.within(offset, data.len());
                end.write(Posted::Bytes { to: to.clone(), offset, data: data.into() });
            }
            _ => self.inner.copy_in(offset, data),
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.look(data.len().div_ceil(8), data.len(), |inner| inner.copy_out(offset, data));
    }

    fn fence(&self) {
        self.inner.fence();
    }

    fn flush(&self) -> Result<(), BusError> {
        match (&self.path, self.across) {
            // One load across the bus.
            (_, Some(Side::Host)) => self.look(1, 8, W::flush),
            // The done record of the DMA queue.
            (Path::Far(end, _), _) => {
                end.flush();
                self.inner.flush()
            }
            _ => self.inner.flush(),
        }
    }
}
