//! A chain of buffers that the driver made available (virtio 1.2 §2.7.4): read from its front, written from its front.

use super::{Lease, QueueError};

/// A piece of guest memory, not yet consumed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    addr: u64,
    len: u32,
}

/// One side of a chain: the segments, and how far they are used.
#[derive(Debug, Default)]
struct Side {
    segments: Vec<Segment>,
    /// The first segment that has bytes left.
    first: usize,
    left: u64,
}

/// A chain of buffers. Its owner keeps it from request to request, so that parsing allocates nothing in the long run.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    readable: Side,
    writable: Side,
    /// Bytes of the whole chain.
    total: u64,
}

impl Chain {
    /// The index of its first descriptor, by which it is given back.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the driver wrote for the device, not yet read.
    pub fn readable(&self) -> u64 {
        self.readable.left
    }

    /// Bytes that the driver wants written, not yet written.
    pub fn writable(&self) -> u64 {
        self.writable.left
    }

    /// Reads the next `data.len()` bytes.
    ///
    /// # Errors
    /// There are fewer, or memory can't be read.
    pub fn read(&mut self, lease: &Lease, data: &mut [u8]) -> Result<(), QueueError> {
        let mut rest = data;
        self.readable.consume(rest.len(), |addr, len| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
            rest = later;
            lease.read(addr, now)
        })
    }

    /// Passes over the next `len` bytes to read.
    ///
    /// # Errors
    /// There are fewer.
    pub(super) fn skip(&mut self, len: u64) -> Result<(), QueueError> {
        self.readable.consume(len as usize, |_, _| Ok(()))
    }

    /// Writes the next `data.len()` bytes.
    ///
    /// # Errors
    /// There is room for fewer, or memory can't be written.
    pub fn write(&mut self, lease: &Lease, data: &[u8]) -> Result<(), QueueError> {
        let mut rest = data;
        self.writable.consume(rest.len(), |addr, len| {
            let (now, later) = rest.split_at(len);
            rest = later;
            lease.write(addr, now)
        })
    }

    /// Reads the next `data.len()` bytes, which stay to be read.
    ///
    /// # Errors
    /// As [`Chain::read`].
    pub(super) fn peek(&self, lease: &Lease, data: &mut [u8]) -> Result<(), QueueError> {
        let segments = self.readable.segments[self.readable.first..].to_vec();
        let ahead = Side { segments, first: 0, left: self.readable.left };
        Self { readable: ahead, ..Self::default() }.read(lease, data)
    }

    /// Bytes of its first buffer to read, and of its last one to write; 0: there is none.
    pub(super) fn ends(&self) -> (u32, u32) {
        let first = self.readable.segments.get(self.readable.first);
        let last = self.writable.segments.last().filter(|_| self.writable.left > 0);
        (first.map_or(0, |segment| segment.len), last.map_or(0, |segment| segment.len))
    }

    /// Takes the last byte that can be written off the chain; its address.
    pub fn take_last_byte(&mut self) -> Option<u64> {
        let last = self.writable.segments[self.writable.first..].last_mut()?;
        last.len -= 1;
        let addr = last.addr + u64::from(last.len);
        if last.len == 0 {
            self.writable.segments.pop();
        }
        self.writable.left -= 1;
        Some(addr)
    }

    /// Where the bytes lie that can be written: address and length of each piece.
    pub fn writable_pieces(&self) -> impl Iterator<Item = (u64, u32)> {
        self.writable.segments[self.writable.first..].iter().map(|segment| (segment.addr, segment.len))
    }

    pub(super) fn clear(&mut self, head: u16) {
        self.head = head;
        self.total = 0;
        for side in [&mut self.readable, &mut self.writable] {
            side.segments.clear();
            (side.first, side.left) = (0, 0);
        }
    }

    /// Adds a descriptor's buffer (§2.7.5).
    pub(super) fn add(&mut self, addr: u64, len: u32, writable: bool) -> Result<(), QueueError> {
        self.total += u64::from(len);
        if self.total > u64::from(u32::MAX) {
            return Err(QueueError::Broken("a chain of more than 4 GiB"));
        }
        if addr.checked_add(len.into()).is_none() {
            return Err(QueueError::Broken("a buffer past the end of memory"));
        }
        if !writable && !self.writable.segments.is_empty() {
            return Err(QueueError::Broken("a buffer to read behind one to write"));
        }
        if len > 0 {
            let side = if writable { &mut self.writable } else { &mut self.readable };
            side.segments.push(Segment { addr, len });
            side.left += u64::from(len);
        }
        Ok(())
    }
}

impl Side {
    /// Passes over `len` bytes, piece by piece: address and length of each.
    fn consume(
        &mut self,
        len: usize,
        mut piece: impl FnMut(u64, usize) -> Result<(), QueueError>,
    ) -> Result<(), QueueError> {
        if self.left < len as u64 {
            return Err(QueueError::Broken("a chain shorter than its request"));
        }
        let mut rest = len;
        while rest > 0 {
            let segment = &mut self.segments[self.first];
            let count = rest.min(segment.len as usize);
            piece(segment.addr, count)?;
            segment.addr += count as u64;
            segment.len -= count as u32;
            self.left -= count as u64;
            rest -= count;
            if segment.len == 0 {
                self.first += 1;
            }
        }
        Ok(())
    }
}
