//! Operations on a raw file by io_uring: one system call hands over all that was added, and neighbours on the disk are one read or write.
//!
//! The kernel reads and writes buffers after the call that named them has returned. That is why this module opts in to unsafe code: it
//! keeps each buffer, which doesn't move, until the kernel has said that it is done with it.
#![allow(unsafe_code)]

mod running;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue};
use nix::errno::Errno;
use nix::libc;

use super::{BlockQueue, Done, Job, Operation};
use crate::block::raw::RawFile;
use crate::block::{BlockError, check_range};
use running::{Next, Running, Transfer};

/// What the operations need of the kernel (Linux 5.6).
const NEEDED: [u8; 6] = [
    opcode::Read::CODE,
    opcode::Write::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
];
/// Bytes of a call that several jobs share, at most: more would keep a disk from working on parts of it at once.
const JOINED: usize = 1 << 20;
/// How often a kernel without memory is asked again, and after what time.
const PATIENCE: (usize, Duration) = (1000, Duration::from_millis(1));

/// A ring of the kernel's.
pub(super) struct UringQueue {
    ring: IoUring,
    file: Arc<RawFile>,
    /// By token. While the kernel has one its buffer stays as it is.
    jobs: Vec<Option<Running>>,
    /// Those that wait for their next call.
    waiting: Vec<usize>,
    sheet: Sheet,
    /// Calls in the ring that the kernel has not taken.
    pushed: usize,
    /// Calls that the kernel has.
    in_kernel: usize,
    /// What needed no kernel.
    ready: Vec<Done>,
}

/// What calls are made out of.
struct Sheet {
    /// The transfers that jobs wait for, for a moment, and the job of each.
    transfers: Vec<(Transfer, usize)>,
    /// The memory of calls that are shared, until the kernel has taken them. There is room for that of every job.
    vectors: Vec<libc::iovec>,
}

// SAFETY: it points at memory of the queue's jobs and at what is static, which go where the queue goes.
unsafe impl Send for Sheet {}

impl UringQueue {
    /// None: the kernel has no io_uring, or not enough of it, or doesn't let this process have it.
    pub(super) fn new(file: Arc<RawFile>, depth: usize) -> Option<Self> {
        let ring = IoUring::new(u32::try_from(depth).ok()?).ok()?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).ok()?;
        // Without NODROP (5.5) answers could be lost; without SUBMIT_STABLE (5.5) vectors had to outlive the system call.
        let has_features = ring.params().is_feature_nodrop() && ring.params().is_feature_submit_stable();
        let enough = has_features && NEEDED.iter().all(|code| probe.is_supported(*code));
        enough.then(|| Self {
            ring,
            file,
            jobs: (0..depth).map(|_| None).collect(),
            waiting: Vec::with_capacity(depth),
            sheet: Sheet { transfers: Vec::with_capacity(depth), vectors: Vec::with_capacity(depth) },
            pushed: 0,
            in_kernel: 0,
            ready: Vec::with_capacity(depth),
        })
    }

    /// Whether the disk has what the job asks for, as a back end sees to it.
    fn check(&self, job: &Job) -> Result<(), BlockError> {
        if !matches!(job.operation, Operation::Read | Operation::Flush) && self.file.is_read_only() {
            return Err(BlockError::ReadOnly);
        }
        check_range(job.offset, job.len, self.file.size())
    }

    /// Puts the calls that jobs wait for into the ring, which is empty.
    fn fill(&mut self) {
        let mut waiting = std::mem::take(&mut self.waiting);
        let mut transfers = std::mem::take(&mut self.sheet.transfers);
        for token in waiting.drain(..) {
            let Some(running) = &mut self.jobs[token] else { continue };
            match running.transfer(&self.file) {
                Some(transfer) => transfers.push((transfer, token)),
                None => {
                    let order = running.order(&self.file);
                    self.push(order, token);
                }
            }
        }
        self.waiting = waiting;
        transfers.sort_unstable_by_key(|(transfer, _)| (transfer.writes, transfer.at));
        self.sheet.vectors.clear();
        let mut rest = transfers.as_slice();
        while !rest.is_empty() {
            let (call, others) = rest.split_at(together(rest));
            self.push_call(call);
            rest = others;
        }
        transfers.clear();
        self.sheet.transfers = transfers;
    }

    /// One call for transfers that follow each other.
    fn push_call(&mut self, call: &[(Transfer, usize)]) {
        let (first, token) = call[0];
        if call.len() == 1 {
            return self.push(first.entry(), token);
        }
        let vectors = &mut self.sheet.vectors;
        let start = vectors.len();
        vectors.extend(call.iter().map(|(t, _)| libc::iovec { iov_base: t.memory.cast(), iov_len: t.len }));
        let entry = first.joined_entry(&vectors[start..]);
        for pair in call.windows(2) {
            if let Some(running) = &mut self.jobs[pair[0].1] {
                running.behind = Some(pair[1].1);
            }
        }
        self.push(entry, token);
    }

    fn push(&mut self, entry: squeue::Entry, token: usize) {
        let entry = entry.user_data(token as u64);
        // SAFETY: buffers belong to `jobs`, where nothing touches them until the answer is there; they are on the heap, and their place
        // doesn't change with the job's. Vectors stay where they are until the kernel has taken the call: there is room for all of them,
        // and the next ones come into an empty ring. The file is open as long as `self`, and so are zeros, which are static.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        // A job has one call at a time, and the ring an entry for each job.
        pushed.expect("room in the ring");
        self.pushed += 1;
    }

    /// Looks at the kernel's answers.
    fn collect(&mut self) {
        loop {
            let answer = self.ring.completion().next();
            let Some(answer) = answer else { return };
            self.in_kernel -= 1;
            let (token, count) = (answer.user_data() as usize, answer.result());
            match &self.jobs[token] {
                Some(Running { behind: Some(_), .. }) => self.share_out(token, count),
                Some(_) => self.answered(token, count),
                None => {}
            }
        }
    }

    /// Goes on with a job.
    fn answered(&mut self, token: usize, answer: i32) {
        let Some(running) = &mut self.jobs[token] else { return };
        match running.next(answer, &self.file) {
            Next::Call => self.waiting.push(token),
            Next::Finished(result) => self.finish(token, result),
        }
    }

    /// Gives each of the jobs that shared a call, from the first one on, the bytes that are its own.
    fn share_out(&mut self, first: usize, answer: i32) {
        let mut left = u64::try_from(answer).unwrap_or(0);
        let mut next = Some(first);
        while let Some(token) = next {
            let Some(running) = &mut self.jobs[token] else { return };
            next = running.behind.take();
            let share = left.min(running.rest());
            left -= share;
            if share > 0 {
                self.answered(token, share as i32);
            } else {
                if answer <= 0 {
                    running.leave_alone();
                }
                self.waiting.push(token);
            }
        }
    }

    fn finish(&mut self, token: usize, result: Result<(), BlockError>) {
        if let Some(Running { job, .. }) = self.jobs[token].take() {
            self.ready.push(Done { token, buffer: job.buffer, result });
        }
    }

    /// Hands over what was added, and waits for `want` answers.
    fn enter(&mut self, want: usize) -> io::Result<()> {
        let (times, pause) = PATIENCE;
        for _ in 0..times {
            let error = match self.ring.submitter().submit_and_wait(want) {
                Ok(count) => {
                    self.pushed -= count;
                    self.in_kernel += count;
                    return Ok(());
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EAGAIN | libc::EBUSY) => sleep(pause),
                _ => return Err(error),
            }
        }
        Err(Errno::EAGAIN.into())
    }
}

impl BlockQueue for UringQueue {
    fn add(&mut self, job: Job) {
        let (token, checked) = (job.token, self.check(&job));
        let nothing = if job.operation == Operation::Flush { self.file.is_read_only() } else { job.len == 0 };
        self.jobs[token] = Some(Running::new(job));
        if checked.is_err() || nothing {
            self.finish(token, checked);
        } else {
            self.waiting.push(token);
        }
    }

    fn commit(&mut self) -> io::Result<bool> {
        let any = self.pushed > 0 || !self.waiting.is_empty() || !self.ready.is_empty();
        if self.pushed == 0 {
            self.fill();
        }
        while self.pushed > 0 {
            self.enter(0)?;
        }
        Ok(any)
    }

    fn take(&mut self, done: &mut Vec<Done>) {
        self.collect();
        done.append(&mut self.ready);
    }

    fn has_done(&mut self) -> bool {
        !self.ready.is_empty() || !self.ring.completion().is_empty()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the ring's descriptor is open as long as the ring, which `self` holds.
        unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) }
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        while self.in_kernel > 0 {
            if self.enter(1).is_err() {
                // It may yet write to the buffers: they are left to it.
                std::mem::forget(std::mem::take(&mut self.jobs));
                return;
            }
            while self.ring.completion().next().is_some() {
                self.in_kernel -= 1;
            }
        }
    }
}

/// How many of the first transfers are one call.
fn together(transfers: &[(Transfer, usize)]) -> usize {
    let mut bytes = transfers[0].0.len;
    let follows = |pair: &[(Transfer, usize)]| {
        bytes += pair[1].0.len;
        pair[0].0.is_followed_by(&pair[1].0) && bytes <= JOINED
    };
    1 + transfers.windows(2).map(follows).take_while(|follows| *follows).count()
}

#[cfg(test)]
mod tests;
