//! One ring of the channel: 64-byte slots, one producer, one consumer, counts that only grow.

use ioreq_ring::BusMemory;

use crate::message::{ChannelError, HEADER, Header, MOST_PAYLOAD, SLOT};

/// The writing end. `W` holds ring and tail, `R` the head that the reader gives back.
#[derive(Debug)]
pub(crate) struct Producer<W, R> {
    pub(crate) ring: W,
    pub(crate) tail_word: (W, usize),
    pub(crate) head_word: (R, usize),
    pub(crate) tail: u64,
}

impl<W: BusMemory, R: BusMemory> Producer<W, R> {
    /// How far the reader says that it has read.
    pub(crate) fn head(&self) -> u64 {
        self.head_word.0.load(self.head_word.1)
    }

    /// Writes one message: header, payload, then the tail. The reader has read up to `head`.
    pub(crate) fn send(&mut self, header: &Header, payload: &[u8], head: u64) -> Result<(), ChannelError> {
        if payload.len() > MOST_PAYLOAD {
            return Err(ChannelError::TooLong(payload.len()));
        }
        let capacity = (self.ring.len() / SLOT) as u64;
        let slots = (HEADER + payload.len()).div_ceil(SLOT) as u64;
        let used = self.tail.wrapping_sub(head);
        if used > capacity {
            return Err(ChannelError::Head { head, tail: self.tail });
        }
        if capacity - used < slots {
            return Err(ChannelError::Full);
        }
        let mut bytes = Vec::with_capacity(slots as usize * SLOT);
        bytes.extend_from_slice(&header.to_bytes());
        bytes.extend_from_slice(payload);
        bytes.resize(slots as usize * SLOT, 0);
        let at = (self.tail % capacity) as usize * SLOT;
        let first = bytes.len().min(self.ring.len() - at);
        self.ring.copy_in(at, &bytes[..first]);
        if first < bytes.len() {
            self.ring.copy_in(0, &bytes[first..]);
        }
        self.tail += slots;
        self.tail_word.0.store(self.tail_word.1, self.tail);
        Ok(())
    }
}

/// The reading end. `R` holds ring and tail, `W` the head that it gives back.
#[derive(Debug)]
pub(crate) struct Consumer<R, W> {
    pub(crate) ring: R,
    pub(crate) tail_word: (R, usize),
    pub(crate) head_word: (W, usize),
    pub(crate) head: u64,
}

impl<R: BusMemory, W: BusMemory> Consumer<R, W> {
    /// The most messages that can wait at once. Who takes so many at a look and leaves the rest to the next is kept busy by no peer.
    pub(crate) fn most_waiting(&self) -> usize {
        self.ring.len() / SLOT
    }

    /// Takes the next message, copied out whole before anything of it is believed.
    pub(crate) fn receive(&mut self) -> Result<Option<(Header, Vec<u8>)>, ChannelError> {
        let capacity = (self.ring.len() / SLOT) as u64;
        let tail = self.tail_word.0.load(self.tail_word.1);
        let waiting = tail.wrapping_sub(self.head);
        if waiting == 0 {
            return Ok(None);
        }
        if waiting > capacity {
            return Err(ChannelError::Tail { head: self.head, tail });
        }
        let mut first = [0; SLOT];
        self.ring.copy_out((self.head % capacity) as usize * SLOT, &mut first);
        let header = Header::parse(first[..HEADER].try_into().expect("a slot holds a header"))?;
        let len = header.length as usize;
        let slots = (HEADER + len).div_ceil(SLOT) as u64;
        if len > MOST_PAYLOAD || slots > waiting {
            return Err(ChannelError::Length(header.length));
        }
        let mut payload = Vec::with_capacity(slots as usize * SLOT);
        payload.extend_from_slice(&first[HEADER..]);
        for slot in 1..slots {
            let mut next = [0; SLOT];
            self.ring.copy_out(((self.head + slot) % capacity) as usize * SLOT, &mut next);
            payload.extend_from_slice(&next);
        }
        payload.truncate(len);
        self.head += slots;
        self.head_word.0.store(self.head_word.1, self.head);
        Ok(Some((header, payload)))
    }
}
