//! A few threads that call an image's methods, which block.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::{BlockQueue, Done, Job, Operation};
use crate::block::{BlockBackend, BlockError};

/// Threads of one disk, at most: what a system call that waits for a disk can keep under way.
const THREADS: usize = 8;

/// Threads, started when there is work for them and none idle.
pub(super) struct PoolQueue {
    desk: Arc<Desk>,
    added: Vec<Job>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads share with their owner.
struct Desk {
    image: Arc<dyn BlockBackend>,
    state: Mutex<State>,
    work: Condvar,
    /// Signalled while something is done.
    bell: EventFd,
    /// Whether something is, for those who look without the lock; who takes it has the lock.
    any_done: AtomicBool,
}

struct State {
    jobs: VecDeque<Job>,
    done: Vec<Done>,
    idle: usize,
    closed: bool,
}

impl PoolQueue {
    pub(super) fn new(image: Arc<dyn BlockBackend>, depth: usize) -> io::Result<Self> {
        let state =
            State { jobs: VecDeque::with_capacity(depth), done: Vec::with_capacity(depth), idle: 0, closed: false };
        let bell = EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let desk =
            Desk { image, state: Mutex::new(state), work: Condvar::new(), bell, any_done: AtomicBool::new(false) };
        Ok(Self { desk: Arc::new(desk), added: Vec::with_capacity(depth), threads: Vec::new() })
    }

    fn hire(&mut self) -> io::Result<()> {
        let desk = self.desk.clone();
        self.threads.push(Builder::new().name("disk".into()).spawn(move || desk.work())?);
        Ok(())
    }
}

impl BlockQueue for PoolQueue {
    fn add(&mut self, job: Job) {
        self.added.push(job);
    }

    fn commit(&mut self) -> io::Result<bool> {
        if self.added.is_empty() {
            return Ok(false);
        }
        // Nothing is handed over where there is nobody to take it: another commit may find a thread.
        let first = self.threads.is_empty();
        if first {
            self.hire()?;
        }
        let (waiting, idle) = {
            let mut state = self.desk.state();
            state.jobs.extend(self.added.drain(..));
            (state.jobs.len(), state.idle)
        };
        for _ in 0..waiting.min(idle) {
            self.desk.work.notify_one();
        }
        // Where the system has no more to give, those that there are do.
        for _ in 0..waiting.saturating_sub(idle + usize::from(first)).min(THREADS - self.threads.len()) {
            if self.hire().is_err() {
                break;
            }
        }
        Ok(true)
    }

    fn take(&mut self, done: &mut Vec<Done>) {
        let mut state = self.desk.state();
        if !state.done.is_empty() {
            // Under the lock: what is done later signals again.
            let _ = self.desk.bell.read();
            self.desk.any_done.store(false, Ordering::Relaxed);
            done.append(&mut state.done);
        }
    }

    fn has_done(&mut self) -> bool {
        self.desk.any_done.load(Ordering::Relaxed)
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.desk.bell.as_fd()
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        {
            let mut state = self.desk.state();
            state.jobs.clear();
            state.closed = true;
        }
        self.desk.work.notify_all();
        for thread in self.threads.drain(..) {
            // It doesn't panic; and if it did, the process would be ending.
            let _ = thread.join();
        }
    }
}

impl Desk {
    /// A thread's life.
    fn work(&self) {
        let mut state = self.state();
        while !state.closed {
            let Some(job) = state.jobs.pop_front() else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
                continue;
            };
            drop(state);
            let done = carry_out(&*self.image, job);
            state = self.state();
            if state.done.is_empty() {
                // It can't be full: it is read before the list is empty again.
                let _ = self.bell.write(1);
            }
            state.done.push(done);
            self.any_done.store(true, Ordering::Relaxed);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn carry_out(image: &dyn BlockBackend, job: Job) -> Done {
    let Job { token, operation, offset, len, mut buffer } = job;
    let result: Result<(), BlockError> = match operation {
        Operation::Read => image.read_at(buffer.front(len as usize), offset),
        Operation::Write => image.write_at(buffer.front(len as usize), offset),
        Operation::Flush => image.flush(),
        Operation::Discard => image.discard(offset, len),
        Operation::Zero { may_unmap } => image.write_zeroes(offset, len, may_unmap),
    };
    Done { token, buffer, result }
}
