//! Many operations on one image, under way at once.
//!
//! A [`BlockQueue`] takes [`Job`]s, each with its buffer, and gives them back [`Done`], in whatever order they finish. Between
//! [`BlockQueue::add`] and [`BlockQueue::commit`] nothing is started, so that what was added together is handed over together. Of the two
//! there are, [`open_queue`] takes the one that fits: io_uring where the kernel has it and the image is a raw file, else a few threads
//! that call the image's [`BlockBackend`].
//!
//! imago, which reads qcow2, has an asynchronous interface as well; built for that it takes tokio, and what it awaits at the bottom is a
//! read or a write of its own that blocks, so its futures would need the same threads under them. The threads call it directly.

mod buffer;
mod pool;
mod uring;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

pub use buffer::{BUFFER_ALIGN, Buffer};

use super::{BlockBackend, BlockError};
use pool::PoolQueue;
use uring::UringQueue;

/// How operations are carried out, in the words of QEMU's `aio=`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Aio {
    /// By io_uring, where the kernel has it and the image is raw; else by threads.
    #[default]
    IoUring,
    /// By threads.
    Threads,
}

/// What is done to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills the buffer: [`BlockBackend::read_at`].
    Read,
    /// Writes the buffer: [`BlockBackend::write_at`].
    Write,
    /// [`BlockBackend::flush`]. What it covers are the writes that were done before it was added.
    Flush,
    /// [`BlockBackend::discard`].
    Discard,
    /// [`BlockBackend::write_zeroes`].
    Zero {
        /// They need no room afterwards.
        may_unmap: bool,
    },
}

/// An operation to carry out.
#[derive(Debug)]
pub struct Job {
    /// By which its owner knows it: below the queue's depth, and of no other job that is under way.
    pub token: usize,
    /// What to do.
    pub operation: Operation,
    /// The first byte of the disk.
    pub offset: u64,
    /// Bytes. Those of a read or a write are the front of the buffer.
    pub len: u64,
    /// What is written, or filled.
    pub buffer: Buffer,
}

/// An operation that was carried out, or failed.
#[derive(Debug)]
pub struct Done {
    /// The job's.
    pub token: usize,
    /// The job's, which after a failed read may hold anything.
    pub buffer: Buffer,
    /// As the [`BlockBackend`]'s method gives it.
    pub result: Result<(), BlockError>,
}

/// Operations under way on an image. Dropped, it waits for them.
pub trait BlockQueue: Send {
    /// Takes a job, which starts with the next [`BlockQueue::commit`].
    fn add(&mut self, job: Job);

    /// Starts what was added, and goes on with what [`BlockQueue::take`] found done in part. Whether there was anything to start: if not,
    /// all there is to do is to wait for [`BlockQueue::fd`].
    ///
    /// # Errors
    /// The system takes nothing more.
    fn commit(&mut self) -> io::Result<bool>;

    /// Appends what has finished.
    fn take(&mut self, done: &mut Vec<Done>);

    /// Whether [`BlockQueue::take`] would find something. It costs no system call and no lock.
    fn has_done(&mut self) -> bool;

    /// Readable where [`BlockQueue::take`] finds something.
    fn fd(&self) -> BorrowedFd<'_>;
}

/// A queue for `depth` jobs at once on an image.
///
/// # Errors
/// This process can have no more descriptors.
pub fn open_queue(image: Arc<dyn BlockBackend>, aio: Aio, depth: usize) -> io::Result<Box<dyn BlockQueue>> {
    if aio == Aio::IoUring
        && let Some(raw) = image.raw()
        && let Some(queue) = UringQueue::new(raw, depth)
    {
        return Ok(Box::new(queue));
    }
    Ok(Box::new(PoolQueue::new(image, depth)?))
}

#[cfg(test)]
mod tests;
