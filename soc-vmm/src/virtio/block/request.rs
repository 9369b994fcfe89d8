//! A request of the driver's (virtio 1.2 §5.2.6), step by step.

use super::limits::Direction;
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{MAX_RANGE, MAX_RANGES, SECTOR, Sort};
use crate::block::{Buffer, Operation};
use crate::virtio::{Chain, Lease, QueueError};

/// Bytes of a request that are under way at once: larger ones go in parts.
pub(super) const PART: u64 = 256 << 10;
/// Bytes of a request's header, and of a range to discard or to zero.
const HEADER: usize = 16;

/// What a request is judged by.
pub(super) struct Disk {
    pub(super) size: u64,
    pub(super) read_only: bool,
    pub(super) serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
}

/// A request, kept for the next one when it is finished, with its memory.
#[derive(Debug)]
pub(super) struct Request {
    /// The queue that it came by.
    pub(super) queue: usize,
    pub(super) chain: Chain,
    /// When it was taken.
    pub(super) since: Option<Instant>,
    /// What it reads into or writes from; away while that is under way.
    pub(super) buffer: Buffer,
    /// The call that is under way, or was the last.
    pub(super) call: Call,
    kind: Kind,
    /// Where the next part is on the disk.
    at: u64,
    /// Where it began.
    first: u64,
    status_at: u64,
    /// Bytes that could be written before the status.
    room: u64,
    flushed: bool,
    ranges: [u8; HEADER * MAX_RANGES as usize],
    /// Of those, the bytes that are used, and those that are done.
    ranges_len: usize,
    ranges_done: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    Zero,
    Identify,
}

/// What the back end is asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call {
    pub(super) operation: Operation,
    pub(super) offset: u64,
    pub(super) len: u64,
}

impl Call {
    /// What the log calls it.
    pub(super) fn verb(&self) -> &'static str {
        match self.operation {
            Operation::Read => "read",
            Operation::Write => "write",
            Operation::Flush => "flush",
            Operation::Discard => "discard",
            Operation::Zero { .. } => "zero",
        }
    }
}

/// What a request comes to next.
pub(super) enum Step {
    /// Its `call` is to be made.
    Call,
    /// It is over, with this status.
    Finished(u32),
}

/// Why a request comes to nothing.
pub(super) enum Refusal {
    /// The guest is told with this status.
    Status(u32),
    /// The queue is broken, or the session over.
    Queue(QueueError),
}

impl From<QueueError> for Refusal {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

const FAILED: Refusal = Refusal::Status(VIRTIO_BLK_S_IOERR);
const UNKNOWN: Refusal = Refusal::Status(VIRTIO_BLK_S_UNSUPP);

impl Default for Request {
    fn default() -> Self {
        Self {
            queue: 0,
            since: None,
            chain: Chain::default(),
            buffer: Buffer::default(),
            call: Call { operation: Operation::Flush, offset: 0, len: 0 },
            kind: Kind::Identify,
            at: 0,
            first: 0,
            status_at: 0,
            room: 0,
            flushed: false,
            ranges: [0; HEADER * MAX_RANGES as usize],
            ranges_len: 0,
            ranges_done: 0,
        }
    }
}

impl Request {
    /// Reads what the chain asks for.
    pub(super) fn begin(&mut self, lease: &Lease, disk: &Disk) -> Result<(), Refusal> {
        if self.chain.readable() < HEADER as u64 {
            return Err(QueueError::Broken("a request without a header").into());
        }
        self.status_at = self.chain.take_last_byte().ok_or(QueueError::Broken("a request without a status"))?;
        self.room = self.chain.writable();
        (self.flushed, self.ranges_len, self.ranges_done) = (false, 0, 0);
        let mut header = [0; HEADER];
        self.chain.read(lease, &mut header)?;
        let (kind, _) = halves(&header[..8]);
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        self.kind = Kind::Identify;
        self.kind = match kind {
            VIRTIO_BLK_T_IN => Kind::Read,
            VIRTIO_BLK_T_OUT => Kind::Write,
            VIRTIO_BLK_T_FLUSH => Kind::Flush,
            VIRTIO_BLK_T_DISCARD => Kind::Discard,
            VIRTIO_BLK_T_WRITE_ZEROES => Kind::Zero,
            VIRTIO_BLK_T_GET_ID => Kind::Identify,
            _ => return Err(UNKNOWN),
        };
        if disk.read_only && matches!(self.kind, Kind::Write | Kind::Discard | Kind::Zero) {
            return Err(FAILED);
        }
        (self.at, self.first) = (0, 0);
        match self.kind {
            Kind::Read | Kind::Write => {
                self.first = place(sector, self.bytes(), disk.size)?;
                self.at = self.first;
            }
            Kind::Discard | Kind::Zero => self.read_ranges(lease, disk.size)?,
            Kind::Flush => {}
            Kind::Identify => {
                let count = disk.serial.len().min(self.chain.writable() as usize);
                self.chain.write(lease, &disk.serial[..count])?;
            }
        }
        Ok(())
    }

    /// Bytes that it is to move. What a part has moved doesn't count any more.
    pub(super) fn bytes(&self) -> u64 {
        match self.kind {
            Kind::Read => self.chain.writable(),
            Kind::Write => self.chain.readable(),
            _ => 0,
        }
    }

    /// Whose limits it is held to.
    pub(super) fn direction(&self) -> Direction {
        if matches!(self.kind, Kind::Read) { Direction::Read } else { Direction::Write }
    }

    /// Bytes that it has moved to the guest, and from it.
    pub(super) fn moved(&self) -> (u64, u64) {
        match self.kind {
            Kind::Read => (self.room - self.chain.writable(), 0),
            Kind::Write => (0, self.at - self.first),
            _ => (0, 0),
        }
    }

    /// As what it is counted, if it is.
    pub(super) fn sort(&self) -> Option<Sort> {
        match self.kind {
            Kind::Read => Some(Sort::Read),
            Kind::Write | Kind::Zero => Some(Sort::Write),
            Kind::Flush => Some(Sort::Flush),
            Kind::Discard => Some(Sort::Discard),
            Kind::Identify => None,
        }
    }

    /// What to do next, once the call before is done. `through`: what it changes is durable before it is over.
    pub(super) fn next(&mut self, lease: &Lease, through: bool) -> Result<Step, QueueError> {
        let part = self.bytes().min(PART);
        let call = match self.kind {
            Kind::Read | Kind::Write if part > 0 => {
                let memory = self.buffer.front(part as usize);
                let operation = if self.kind == Kind::Write {
                    self.chain.read(lease, memory)?;
                    Operation::Write
                } else {
                    Operation::Read
                };
                let offset = self.at;
                self.at += part;
                Call { operation, offset, len: part }
            }
            Kind::Discard | Kind::Zero if self.ranges_done < self.ranges_len => {
                let bytes = &self.ranges[self.ranges_done..][..HEADER];
                let range = Range::new(bytes.try_into().expect("16 bytes"));
                self.ranges_done += HEADER;
                let may_unmap = range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
                let operation =
                    if self.kind == Kind::Discard { Operation::Discard } else { Operation::Zero { may_unmap } };
                Call { operation, offset: range.sector * SECTOR, len: u64::from(range.sectors) * SECTOR }
            }
            Kind::Read | Kind::Identify => return Ok(Step::Finished(VIRTIO_BLK_S_OK)),
            kind if !self.flushed && (through || kind == Kind::Flush) => {
                self.flushed = true;
                Call { operation: Operation::Flush, offset: 0, len: 0 }
            }
            _ => return Ok(Step::Finished(VIRTIO_BLK_S_OK)),
        };
        self.call = call;
        Ok(Step::Call)
    }

    /// Takes what a call has brought.
    pub(super) fn succeeded(&mut self, lease: &Lease) -> Result<(), QueueError> {
        if self.call.operation == Operation::Read {
            self.chain.write(lease, self.buffer.front(self.call.len as usize))?;
        }
        Ok(())
    }

    /// Writes the status; the bytes written, from the chain's front.
    pub(super) fn finish(&mut self, lease: &Lease, status: u32) -> Result<u32, QueueError> {
        let written = self.room - self.chain.writable();
        lease.write(self.status_at, &[status as u8])?;
        // The status counts only where nothing before it is missing (§2.7.8.2).
        Ok((written + u64::from(written == self.room)) as u32)
    }

    /// Reads ranges to discard or zero: all are looked at before the first is touched.
    fn read_ranges(&mut self, lease: &Lease, size: u64) -> Result<(), Refusal> {
        let len = self.chain.readable();
        if len == 0 || !len.is_multiple_of(HEADER as u64) || len > self.ranges.len() as u64 {
            return Err(FAILED);
        }
        self.ranges_len = len as usize;
        let bytes = &mut self.ranges[..len as usize];
        self.chain.read(lease, bytes)?;
        let known = if self.kind == Kind::Discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        for range in bytes.as_chunks::<HEADER>().0.iter().map(Range::new) {
            if range.flags & !known != 0 {
                return Err(UNKNOWN);
            }
            if range.sectors > MAX_RANGE {
                return Err(FAILED);
            }
            place(range.sector, u64::from(range.sectors) * SECTOR, size)?;
        }
        Ok(())
    }
}

/// The first byte of whole sectors that are all within a disk of `size` bytes.
fn place(sector: u64, len: u64, size: u64) -> Result<u64, Refusal> {
    let at = sector.checked_mul(SECTOR).filter(|_| len.is_multiple_of(SECTOR));
    at.filter(|at| at.checked_add(len).is_some_and(|end| end <= size)).ok_or(FAILED)
}

/// A range to discard or to zero.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Range {
    fn new(bytes: &[u8; HEADER]) -> Self {
        let (sectors, flags) = halves(&bytes[8..]);
        Self { sector: u64::from_le_bytes(*bytes.first_chunk().expect("8 of 16")), sectors, flags }
    }
}

/// The two little-endian numbers of 4 bytes in the first 8 of `bytes`.
fn halves(bytes: &[u8]) -> (u32, u32) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    (word(0), word(4))
}
