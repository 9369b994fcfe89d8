//! Bounded byte queues between a device, which never waits, and the tokio side, which may.
//!
//! One end of each is a device's, on the thread that serves IOREQs; it takes a lock only for the time of a copy. The other end is
//! a task's. A full queue is back-pressure: an output queue refuses bytes and wakes the device once there is room again, an input
//! queue lets its writer wait. A queue whose far end is gone takes and drops everything, as a serial port with no cable does.

use std::collections::VecDeque;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::bus::Wake;

/// A queue for what a device sends, at most `capacity` bytes (at least 1); `wake` is called when a refused device has room again.
pub fn output_pipe(capacity: usize, wake: Arc<dyn Wake>) -> (OutputQueue, OutputReader) {
    let pipe = Pipe::new(capacity, wake);
    (OutputQueue(pipe.clone()), OutputReader { pipe, copy: None })
}

/// A queue for what a device shall receive, at most `capacity` bytes (at least 1); `wake` is called when some has come.
pub fn input_pipe(capacity: usize, wake: Arc<dyn Wake>) -> (InputWriter, InputQueue) {
    let pipe = Pipe::new(capacity, wake);
    (InputWriter(pipe.clone()), InputQueue(pipe))
}

/// The device's end of an output queue.
#[derive(Debug)]
pub struct OutputQueue(Arc<Pipe>);

impl OutputQueue {
    /// Takes `byte`, or says `false`: the queue is full, and the device will be woken when it isn't.
    #[must_use]
    pub fn push(&mut self, byte: u8) -> bool {
        let mut state = self.0.lock();
        if state.closed {
            return true;
        }
        if state.bytes.len() == self.0.capacity {
            state.device_waits = true;
            return false;
        }
        state.bytes.push_back(byte);
        let first = state.bytes.len() == 1;
        drop(state);
        if first {
            self.0.task.notify_one();
        }
        true
    }
}

impl Drop for OutputQueue {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.task.notify_one();
    }
}

/// The task's end of an output queue. Dropped, the device's bytes vanish.
#[derive(Debug)]
pub struct OutputReader {
    pipe: Arc<Pipe>,
    copy: Option<SyncSender<Vec<u8>>>,
}

impl OutputReader {
    /// The same, which hands a copy of all that it reads to `copy`, as far as there is room.
    #[must_use]
    pub fn copying(mut self, copy: SyncSender<Vec<u8>>) -> Self {
        self.copy = Some(copy);
        self
    }

    /// Appends what there is to `into`, waiting for at least one byte; returns the count, 0 once the device is gone and all was
    /// read. Cancel safe.
    pub async fn read(&mut self, into: &mut Vec<u8>) -> usize {
        loop {
            let count = self.try_read(into);
            if count > 0 || self.pipe.lock().finished() {
                return count;
            }
            self.pipe.task.notified().await;
        }
    }

    /// Appends what there is to `into` without waiting; returns the count.
    pub fn try_read(&mut self, into: &mut Vec<u8>) -> usize {
        let mut state = self.pipe.lock();
        let count = state.bytes.len();
        into.extend(state.bytes.drain(..));
        let wake = count > 0 && std::mem::take(&mut state.device_waits);
        drop(state);
        if wake {
            self.pipe.wake.wake();
        }
        if let Some(copy) = self.copy.as_ref().filter(|_| count > 0) {
            // A reader of copies that is slow, or gone, has gaps.
            let _ = copy.try_send(into[into.len() - count..].to_vec());
        }
        count
    }
}

impl Drop for OutputReader {
    fn drop(&mut self) {
        self.pipe.close();
    }
}

/// The task's end of an input queue.
#[derive(Debug)]
pub struct InputWriter(Arc<Pipe>);

/// The device behind an input queue is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the device is gone")]
pub struct Closed;

impl InputWriter {
    /// Hands all of `bytes` to the device, waiting where it has no room. Cancelled, a part of them may have been handed over.
    ///
    /// # Errors
    /// The device is gone.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), Closed> {
        loop {
            let count = self.try_write(bytes)?;
            bytes = &bytes[count..];
            if bytes.is_empty() {
                return Ok(());
            }
            self.0.task.notified().await;
        }
    }

    /// Hands over as many of `bytes` as there is room for; returns the count.
    ///
    /// # Errors
    /// The device is gone.
    pub fn try_write(&mut self, bytes: &[u8]) -> Result<usize, Closed> {
        let mut state = self.0.lock();
        if state.closed {
            return Err(Closed);
        }
        let count = bytes.len().min(self.0.capacity - state.bytes.len());
        state.bytes.extend(&bytes[..count]);
        drop(state);
        if count > 0 {
            self.0.wake.wake();
        }
        Ok(count)
    }
}

/// The device's end of an input queue.
#[derive(Debug)]
pub struct InputQueue(Arc<Pipe>);

impl InputQueue {
    /// Appends at most `count` bytes of what there is to `into`.
    pub fn take(&mut self, count: usize, into: &mut VecDeque<u8>) {
        let mut state = self.0.lock();
        let count = count.min(state.bytes.len());
        into.extend(state.bytes.drain(..count));
        drop(state);
        if count > 0 {
            self.0.task.notify_one();
        }
    }
}

impl Drop for InputQueue {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.task.notify_one();
    }
}

#[derive(Debug)]
struct Pipe {
    state: Mutex<State>,
    capacity: usize,
    /// Wakes the device's thread.
    wake: Arc<dyn Wake>,
    /// Wakes the task.
    task: Notify,
}

#[derive(Debug, Default)]
struct State {
    bytes: VecDeque<u8>,
    /// One end is gone.
    closed: bool,
    /// The device was refused and wants to hear of room.
    device_waits: bool,
}

impl State {
    fn finished(&self) -> bool {
        self.closed && self.bytes.is_empty()
    }
}

impl Pipe {
    fn new(capacity: usize, wake: Arc<dyn Wake>) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), capacity: capacity.max(1), wake, task: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // The state is whole between any two statements, whoever panicked.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The task is gone: a device that was refused may go on.
    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        let wake = std::mem::take(&mut state.device_waits);
        drop(state);
        if wake {
            self.wake.wake();
        }
    }
}
