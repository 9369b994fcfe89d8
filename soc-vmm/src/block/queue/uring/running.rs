//! One job of an io_uring, call by call.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::types::{Fd, FsyncFlags};
use io_uring::{opcode, squeue};
use nix::errno::Errno;
use nix::libc;

use super::super::buffer::Page;
use super::super::{Job, Operation};
use crate::block::BlockError;
use crate::block::raw::RawFile;

/// Bytes of one call, since the kernel counts them in 32 bits and moves less than that at once.
const PART: u64 = 1 << 30;
/// What is written where nothing can make zeros.
static ZEROS: [Page; 16] = [Page([0; 4096]); 16];

/// A job, and how far it is.
pub(super) struct Running {
    pub(super) job: Job,
    step: Step,
    /// Bytes of it that are done.
    done: u64,
    /// The job whose bytes follow this one's in the same call.
    pub(super) behind: Option<usize>,
    /// It shares no call any more, since one that it shared failed: whose fault that was shows when each is asked alone.
    alone: bool,
}

/// A part of the disk that is moved to or from memory.
#[derive(Clone, Copy)]
pub(super) struct Transfer {
    pub(super) writes: bool,
    pub(super) file: RawFd,
    pub(super) at: u64,
    pub(super) memory: *mut u8,
    pub(super) len: usize,
    /// It shares no call.
    pub(super) alone: bool,
}

impl Transfer {
    /// Whether the other one can go on in the same call.
    pub(super) fn is_followed_by(&self, other: &Self) -> bool {
        (self.writes, self.file, self.at + self.len as u64) == (other.writes, other.file, other.at)
            && !(self.alone || other.alone)
    }

    /// The call for this alone.
    pub(super) fn entry(&self) -> squeue::Entry {
        let (file, len) = (Fd(self.file), self.len as u32);
        if self.writes {
            opcode::Write::new(file, self.memory, len).offset(self.at).build()
        } else {
            opcode::Read::new(file, self.memory, len).offset(self.at).build()
        }
    }

    /// The call for this and those that follow it on the disk. The vectors, which stay as they are until the kernel has taken the call,
    /// name the memory of all.
    pub(super) fn joined_entry(&self, vectors: &[libc::iovec]) -> squeue::Entry {
        let (file, first, count) = (Fd(self.file), vectors.as_ptr(), vectors.len() as u32);
        if self.writes {
            opcode::Writev::new(file, first, count).offset(self.at).build()
        } else {
            opcode::Readv::new(file, first, count).offset(self.at).build()
        }
    }
}

/// What the kernel is asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Read,
    Write,
    Sync,
    /// `fallocate(2)`: a hole that may stay as it is, a hole instead of zeros, zeros.
    Hole,
    HoleOfZeros,
    AllocatedZeros,
    WriteZeros,
}

/// What follows an answer of the kernel's.
pub(super) enum Next {
    /// Another call.
    Call,
    Finished(Result<(), BlockError>),
}

impl Running {
    pub(super) fn new(job: Job) -> Self {
        let step = match job.operation {
            Operation::Read => Step::Read,
            Operation::Write => Step::Write,
            Operation::Flush => Step::Sync,
            Operation::Discard => Step::Hole,
            Operation::Zero { may_unmap: true } => Step::HoleOfZeros,
            Operation::Zero { may_unmap: false } => Step::AllocatedZeros,
        };
        Self { job, step, done: 0, behind: None, alone: false }
    }

    /// Bytes of it that are not done.
    pub(super) fn rest(&self) -> u64 {
        self.job.len - self.done
    }

    /// Where the next of them is.
    fn at(&self) -> u64 {
        self.job.offset + self.done
    }

    /// Has it share no call any more.
    pub(super) fn leave_alone(&mut self) {
        self.alone = true;
    }

    /// What is moved next between its buffer and the disk, where it is at that.
    pub(super) fn transfer(&mut self, file: &RawFile) -> Option<Transfer> {
        let (at, rest) = (self.at(), self.rest());
        let (memory, len) = match self.step {
            Step::Read | Step::Write => {
                let part = rest.min(PART) as usize;
                let memory = &mut self.job.buffer.front(self.job.len as usize)[self.done as usize..][..part];
                (memory.as_mut_ptr(), part)
            }
            // The kernel only reads it.
            Step::WriteZeros => (ZEROS.as_ptr().cast_mut().cast(), rest.min(size_of_val(&ZEROS) as u64) as usize),
            _ => return None,
        };
        let writes = self.step != Step::Read;
        let file = file.file_for(memory, at, len).as_raw_fd();
        Some(Transfer { writes, file, at, memory, len, alone: self.alone })
    }

    /// The next call, where that moves nothing.
    pub(super) fn order(&self, file: &RawFile) -> squeue::Entry {
        let fd = Fd(file.file().as_raw_fd());
        let mode = match self.step {
            Step::Hole | Step::HoleOfZeros => libc::FALLOC_FL_PUNCH_HOLE,
            Step::AllocatedZeros => libc::FALLOC_FL_ZERO_RANGE,
            _ => return opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
        };
        opcode::Fallocate::new(fd, self.rest()).offset(self.at()).mode(mode | libc::FALLOC_FL_KEEP_SIZE).build()
    }

    /// Takes the kernel's answer: bytes, or an error below 0.
    pub(super) fn next(&mut self, answer: i32, file: &RawFile) -> Next {
        let Ok(count) = u64::try_from(answer) else { return self.refused(Errno::from_raw(-answer), file) };
        match self.step {
            Step::Read if count == 0 => {
                let at = self.at();
                let (done, len) = (self.done as usize, self.job.len as usize);
                self.job.buffer.front(len)[done..].fill(0);
                return Next::Finished(file.check_end(at));
            }
            // A write of no bytes that is no error goes on for ever.
            Step::Write | Step::WriteZeros if count == 0 => {
                return Next::Finished(Err(file.write_failed(io::Error::from(io::ErrorKind::WriteZero))));
            }
            Step::Read | Step::Write | Step::WriteZeros => self.done += count,
            Step::Sync | Step::Hole | Step::HoleOfZeros | Step::AllocatedZeros => self.done = self.job.len,
        }
        if self.done < self.job.len { Next::Call } else { Next::Finished(Ok(())) }
    }

    fn refused(&mut self, errno: Errno, file: &RawFile) -> Next {
        match (self.step, errno) {
            (_, Errno::EINTR | Errno::EAGAIN) => return Next::Call,
            (Step::Hole, errno) if RawFile::cant_allocate(errno) => return Next::Finished(Ok(())),
            (Step::HoleOfZeros, errno) if RawFile::cant_allocate(errno) => self.step = Step::AllocatedZeros,
            (Step::AllocatedZeros, errno) if RawFile::cant_allocate(errno) => self.step = Step::WriteZeros,
            (Step::Read, errno) => return Next::Finished(Err(file.read_failed(errno))),
            (_, errno) => return Next::Finished(Err(file.write_failed(errno))),
        }
        Next::Call
    }
}
