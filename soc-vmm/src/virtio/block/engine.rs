//! What a disk does with its requests (virtio 1.2 §5.2.6): one after the other, in the order in which they came.

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::{BlockConfig, MAX_RANGE, MAX_RANGES, SECTOR};
use crate::block::{BlockBackend, BlockError};
use crate::virtio::complaint::Complaints;
use crate::virtio::{Chain, Engine, Lease, Queue, QueueError, Session, Wait};

/// Bytes that are under way at once: larger requests go in parts.
const BUFFER: usize = 256 << 10;
/// How long a finished request may wait for the next one, to share its interrupt.
const GATHER: Duration = Duration::from_micros(50);
/// Bytes of a request's header, and of a range to discard or to zero.
const HEADER: usize = 16;

/// A disk's engine.
pub struct BlockEngine {
    name: String,
    backend: Arc<dyn BlockBackend>,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    chain: Chain,
    buffer: Vec<u8>,
    complaints: Complaints,
}

/// Why a request has no success.
enum Failure {
    /// The guest is told with this status.
    Status(u32),
    /// The queue is broken, or the session over.
    Queue(QueueError),
}

impl BlockEngine {
    /// The engine of that disk.
    pub fn new(disk: BlockConfig) -> Self {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(disk.serial.bytes()) {
            *to = from;
        }
        Self {
            name: disk.name,
            backend: disk.backend,
            serial,
            chain: Chain::default(),
            buffer: vec![0; BUFFER],
            complaints: Complaints::default(),
        }
    }

    /// Carries the chain's request out and writes its status; the bytes written, from the chain's front.
    fn request(&mut self, lease: &Lease, write_through: bool) -> Result<u32, QueueError> {
        if self.chain.readable() < HEADER as u64 {
            return Err(QueueError::Broken("a request without a header"));
        }
        let status_at = self.chain.take_last_byte().ok_or(QueueError::Broken("a request without a status"))?;
        let room = self.chain.writable();
        let status = match self.carry_out(lease, write_through) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(Failure::Status(status)) => status,
            Err(Failure::Queue(error)) => return Err(error),
        };
        let written = room - self.chain.writable();
        lease.write(status_at, &[status as u8])?;
        // The status counts only where nothing before it is missing (§2.7.8.2).
        Ok((written + u64::from(written == room)) as u32)
    }

    fn carry_out(&mut self, lease: &Lease, write_through: bool) -> Result<(), Failure> {
        let mut header = [0; HEADER];
        self.chain.read(lease, &mut header)?;
        let (kind, _) = halves(&header[..8]);
        let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
        match kind {
            VIRTIO_BLK_T_IN => return self.read(lease, sector),
            VIRTIO_BLK_T_FLUSH => return self.flush(),
            VIRTIO_BLK_T_GET_ID => {
                let count = self.serial.len().min(self.chain.writable() as usize);
                return Ok(self.chain.write(lease, &self.serial[..count])?);
            }
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {}
            _ => return Err(Failure::Status(VIRTIO_BLK_S_UNSUPP)),
        }
        if self.backend.is_read_only() {
            return Err(Failure::Status(VIRTIO_BLK_S_IOERR));
        }
        if kind == VIRTIO_BLK_T_OUT {
            self.write(lease, sector)?;
        } else {
            self.ranges(lease, kind == VIRTIO_BLK_T_DISCARD)?;
        }
        if write_through { self.flush() } else { Ok(()) }
    }

    fn read(&mut self, lease: &Lease, sector: u64) -> Result<(), Failure> {
        let mut at = self.place(sector, self.chain.writable())?;
        while self.chain.writable() > 0 {
            let part = self.chain.writable().min(BUFFER as u64) as usize;
            let bytes = &mut self.buffer[..part];
            self.backend.read_at(bytes, at).map_err(|error| self.complaints.failed(&self.name, "read", &error))?;
            self.chain.write(lease, bytes)?;
            at += part as u64;
        }
        Ok(())
    }

    fn write(&mut self, lease: &Lease, sector: u64) -> Result<(), Failure> {
        let mut at = self.place(sector, self.chain.readable())?;
        while self.chain.readable() > 0 {
            let part = self.chain.readable().min(BUFFER as u64) as usize;
            let bytes = &mut self.buffer[..part];
            self.chain.read(lease, bytes)?;
            self.backend.write_at(bytes, at).map_err(|error| self.complaints.failed(&self.name, "write", &error))?;
            at += part as u64;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Failure> {
        self.backend.flush().map_err(|error| self.complaints.failed(&self.name, "flush", &error))
    }

    /// Discards or zeroes ranges: all are looked at before the first is touched.
    fn ranges(&mut self, lease: &Lease, discard: bool) -> Result<(), Failure> {
        let len = self.chain.readable();
        if len == 0 || !len.is_multiple_of(HEADER as u64) || len > u64::from(MAX_RANGES) * HEADER as u64 {
            return Err(Failure::Status(VIRTIO_BLK_S_IOERR));
        }
        let mut bytes = [0; HEADER * MAX_RANGES as usize];
        let bytes = &mut bytes[..len as usize];
        self.chain.read(lease, bytes)?;
        let known = if discard { 0 } else { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP };
        let ranges = || bytes.as_chunks::<HEADER>().0.iter().map(Range::new);
        for range in ranges() {
            if range.flags & !known != 0 {
                return Err(Failure::Status(VIRTIO_BLK_S_UNSUPP));
            }
            if range.sectors > MAX_RANGE {
                return Err(Failure::Status(VIRTIO_BLK_S_IOERR));
            }
            self.place(range.sector, u64::from(range.sectors) * SECTOR)?;
        }
        for range in ranges() {
            let (at, len) = (range.sector * SECTOR, u64::from(range.sectors) * SECTOR);
            let (what, done) = if discard {
                ("discard", self.backend.discard(at, len))
            } else {
                ("zero", self.backend.write_zeroes(at, len, range.flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0))
            };
            done.map_err(|error| self.complaints.failed(&self.name, what, &error))?;
        }
        Ok(())
    }

    /// The first byte of whole sectors that are all within the disk.
    fn place(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let at = sector.checked_mul(SECTOR).filter(|_| len.is_multiple_of(SECTOR));
        at.filter(|at| at.checked_add(len).is_some_and(|end| end <= self.backend.size()))
            .ok_or(Failure::Status(VIRTIO_BLK_S_IOERR))
    }

    /// Serves the chains that are there.
    fn drain(&mut self, queue: &mut Queue, write_through: bool) -> Result<(), QueueError> {
        let mut oldest = None;
        while queue.pop(&mut self.chain)? {
            let written = self.request(queue.lease(), write_through)?;
            queue.push(self.chain.head(), written)?;
            if oldest.get_or_insert_with(Instant::now).elapsed() >= GATHER {
                queue.publish()?;
                oldest = None;
            }
        }
        queue.publish()
    }
}

impl Engine for BlockEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        // Without flushes what is written must be durable at once (§5.2.6.2).
        let write_through = !session.has(VIRTIO_BLK_F_FLUSH);
        let Some(Some(queue)) = session.queues.first_mut() else { return Ok(Wait::KICKS) };
        queue.hold_kicks()?;
        self.drain(queue, write_through)?;
        Ok(if queue.allow_kicks()? { Wait::NOTHING } else { Wait::KICKS })
    }
}

impl Complaints {
    /// An error of the image, which the guest only sees as a status.
    fn failed(&mut self, disk: &str, what: &str, error: &BlockError) -> Failure {
        let causes = std::iter::successors(error.source(), |&cause| cause.source());
        let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
        self.say(disk, format_args!("can't {what}: {text}"));
        Failure::Status(VIRTIO_BLK_S_IOERR)
    }
}

impl From<QueueError> for Failure {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
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
