//! The DMA queue: fetches descriptors in order, carries each out, answers it in the done ring (docs/card.md §4).
//!
//! Short work is done at once by the thread that took the doorbell (a hand-over to another thread costs more than the
//! copy); the rest by a worker, so that a long or slowed transfer doesn't hold up the function's registers.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Duration;

use pcie_function::card::queue::{
    Descriptor, Done, ENTRIES_MAX, ENTRIES_MIN, Operation, RING_ALIGN, Transfer, flag, status,
};
use pcie_function::card::{DMA_ENABLE, DMA_ERROR_SHIFT, event, queue_error, soc_vector};
use zerocopy::{FromBytes, IntoBytes};

use crate::bus::{Refusal, Way};
use crate::function::Function;
use crate::misbehaviour::Dma;

/// The most that moves between two looks at generation and maps.
const CHUNK: usize = 64 << 10;
/// What the doorbell's thread does itself before the worker takes over.
const AT_ONCE: Budget = Budget { descriptors: 64, bytes: 256 << 10 };
/// What the worker does between two chances for others to stop the queue.
const A_TURN: Budget = Budget { descriptors: 16, bytes: 16 << 20 };

/// A function's DMA queue.
#[derive(Debug)]
pub(crate) struct Engine {
    registers: Mutex<Rings>,
    queue: Mutex<Queue>,
    tail: AtomicU32,
    head: AtomicU32,
    status: AtomicU32,
    /// Somebody waits for the queue to stop.
    stopping: AtomicBool,
    call: Mutex<Call>,
    called: Condvar,
}

/// The configuration registers.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rings {
    /// SoC IOVA of the submission ring.
    pub(crate) submission: u64,
    /// SoC IOVA of the done ring.
    pub(crate) done: u64,
    /// Entries of each.
    pub(crate) entries: u32,
}

/// What belongs to whoever is serving.
#[derive(Debug)]
struct Queue {
    rings: Rings,
    previous_ok: bool,
    buffer: Box<[u8]>,
}

/// What the worker waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Call {
    Idle,
    Work,
    Exit,
}

#[derive(Clone, Copy)]
struct Budget {
    descriptors: u32,
    bytes: u64,
}

impl Engine {
    /// A stopped queue.
    pub(crate) fn new() -> Self {
        Self {
            registers: Mutex::default(),
            queue: Mutex::new(Queue {
                rings: Rings::default(),
                previous_ok: true,
                buffer: vec![0; CHUNK].into_boxed_slice(),
            }),
            tail: AtomicU32::new(0),
            head: AtomicU32::new(0),
            status: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            call: Mutex::new(Call::Idle),
            called: Condvar::new(),
        }
    }

    /// The configuration registers, to read or to write.
    pub(crate) fn registers(&self) -> MutexGuard<'_, Rings> {
        self.registers.lock().expect("no panic under the lock")
    }

    /// `DMA_STATUS`.
    pub(crate) fn status(&self) -> u32 {
        self.status.load(Ordering::Acquire)
    }

    /// `DMA_HEAD`.
    pub(crate) fn head(&self) -> u32 {
        self.head.load(Ordering::Acquire)
    }

    /// `DMA_CONTROL` with `ENABLE` set: starts the queue, unless it runs.
    pub(crate) fn start(&self, function: &Function) {
        let mut queue = self.queue();
        if self.is_enabled() {
            return;
        }
        let rings = *self.registers();
        let aligned = rings.submission.is_multiple_of(RING_ALIGN) && rings.done.is_multiple_of(RING_ALIGN);
        let entries = (ENTRIES_MIN..=ENTRIES_MAX).contains(&rings.entries) && rings.entries.is_power_of_two();
        let bytes = u64::from(rings.entries) * size_of::<Descriptor>() as u64;
        let fits = rings.submission.checked_add(bytes).is_some() && rings.done.checked_add(bytes).is_some();
        if !(aligned && entries && fits) {
            self.fail(function, queue_error::CONFIGURATION);
            return;
        }
        queue.rings = rings;
        queue.previous_ok = true;
        self.tail.store(0, Ordering::Release);
        self.head.store(0, Ordering::Release);
        self.status.store(DMA_ENABLE, Ordering::Release);
    }

    /// `DMA_CONTROL` with `ENABLE` clear: returns when no DMA is in flight.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _queue = self.queue();
        self.status.fetch_and(!DMA_ENABLE, Ordering::AcqRel);
        self.stopping.store(false, Ordering::Release);
    }

    /// As after a reset of the SoC function.
    pub(crate) fn reset(&self) {
        self.stop();
        *self.registers() = Rings::default();
        self.status.store(0, Ordering::Release);
        self.head.store(0, Ordering::Release);
    }

    /// `DMA_TAIL`: there is work.
    pub(crate) fn submit(&self, function: &Function, tail: u32) {
        if !self.is_enabled() {
            return;
        }
        self.tail.store(tail, Ordering::Release);
        if !function.misbehaviour().dma.takes_time() {
            // Where somebody serves already, they may have looked at the tail before it changed.
            if let Ok(mut queue) = self.queue.try_lock()
                && !self.serve(function, &mut queue, AT_ONCE)
            {
                return;
            }
        }
        self.call(Call::Work);
    }

    /// The worker thread's body; returns after [`Engine::exit`].
    pub(crate) fn work(&self, function: &Function) {
        loop {
            {
                let call = self.call.lock().expect("no panic under the lock");
                let mut call =
                    self.called.wait_while(call, |call| *call == Call::Idle).expect("no panic under the lock");
                if *call == Call::Exit {
                    return;
                }
                *call = Call::Idle;
            }
            while self.serve(function, &mut self.queue(), A_TURN) {}
        }
    }

    /// Ends the worker.
    pub(crate) fn exit(&self) {
        self.call(Call::Exit);
    }

    fn call(&self, what: Call) {
        let mut call = self.call.lock().expect("no panic under the lock");
        if *call != Call::Exit {
            *call = what;
        }
        self.called.notify_one();
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no panic under the lock")
    }

    fn is_enabled(&self) -> bool {
        self.status() & DMA_ENABLE != 0
    }

    fn fail(&self, function: &Function, error: u32) {
        self.status.store(error << DMA_ERROR_SHIFT, Ordering::Release);
        function.event(event::QUEUE_ERROR);
    }

    /// Carries out what was submitted; whether more is left.
    fn serve(&self, function: &Function, queue: &mut Queue, mut budget: Budget) -> bool {
        while self.is_enabled() && !self.stopping.load(Ordering::Acquire) {
            let head = self.head();
            let waiting = self.tail.load(Ordering::Acquire).wrapping_sub(head);
            if waiting == 0 {
                return false;
            }
            if waiting > queue.rings.entries {
                self.fail(function, queue_error::OVERRUN);
                return false;
            }
            if budget.descriptors == 0 || budget.bytes == 0 {
                return true;
            }
            let Some(moved) = self.one(function, queue, head) else {
                self.fail(function, queue_error::RING_FAULT);
                return false;
            };
            self.head.store(head.wrapping_add(1), Ordering::Release);
            budget.descriptors -= 1;
            budget.bytes = budget.bytes.saturating_sub(u64::from(moved));
        }
        false
    }

    /// Carries out descriptor number `head` and answers it: bytes moved, or `None` where the rings fault.
    fn one(&self, function: &Function, queue: &mut Queue, head: u32) -> Option<u32> {
        let slot = u64::from(head % queue.rings.entries);
        let at = queue.rings.submission + slot * size_of::<Descriptor>() as u64;
        let bytes: [u8; size_of::<Descriptor>()] = function.bus().read_soc(at)?;
        let descriptor = Descriptor::read_from_bytes(&bytes).expect("as many bytes");
        let done = self.carry_out(function, queue, &descriptor);
        queue.previous_ok = done.status() == status::OK;
        function.counts.ended(done.status());
        let at = queue.rings.done + slot * size_of::<Done>() as u64;
        function.bus().write_soc(at, done.as_bytes())?;
        if descriptor.flags() & flag::INTERRUPT != 0 {
            function.raise_soc(soc_vector::DMA_DONE);
        }
        Some(done.transferred())
    }

    fn carry_out(&self, function: &Function, queue: &mut Queue, descriptor: &Descriptor) -> Done {
        let ended = |status, transferred, fault| Done::new(status, transferred, fault, descriptor.sequence());
        let Some(operation) = descriptor.operation(function.identity.vectors) else {
            return ended(status::MALFORMED, 0, 0);
        };
        if descriptor.flags() & flag::LINKED != 0 && !queue.previous_ok {
            return ended(status::SKIPPED, 0, 0);
        }
        let dma = function.misbehaviour().dma;
        if let Dma::Slow(extra) = dma {
            self.pause(extra);
        }
        let generation = descriptor.generation();
        match operation {
            Operation::RaiseVector(vector) => {
                let bus = function.bus();
                match bus.admit(generation) {
                    Ok(()) => {
                        function.raise_host(&bus, vector);
                        ended(status::OK, 0, 0)
                    }
                    Err(status) => ended(status, 0, 0),
                }
            }
            Operation::ToHost(transfer) | Operation::FromHost(transfer) => {
                let way = if matches!(operation, Operation::ToHost(_)) { Way::ToHost } else { Way::FromHost };
                let (moved, end) = self.copy(function, &mut queue.buffer, way, transfer, generation, dma);
                function.counts.moved(way, moved);
                let (status, fault) = end.err().unwrap_or((status::OK, 0));
                ended(status, moved, fault)
            }
        }
    }

    /// Bytes moved, and how it ended: status and IOVA of the fault.
    fn copy(
        &self,
        function: &Function,
        buffer: &mut [u8],
        way: Way,
        transfer: Transfer,
        generation: u32,
        dma: Dma,
    ) -> (u32, Result<(), (u32, u64)>) {
        let half = (transfer.length / 2) & !7;
        let mut moved = 0;
        while moved < transfer.length {
            if self.stopping.load(Ordering::Acquire) {
                return (moved, Err((status::ABORTED, 0)));
            }
            // A copy that misbehaves midway stops exactly there.
            let stop = if dma.is_midway() && moved < half { half } else { transfer.length };
            let chunk = &mut buffer[..(stop - moved).min(CHUNK as u32) as usize];
            let result = {
                let bus = function.bus();
                match (bus.admit(generation), dma) {
                    (Err(status), _) => Err(Refusal { status, moved: 0, fault: 0 }),
                    (Ok(()), Dma::Fault) => Err(Refusal { status: status::HOST_FAULT, moved: 0, fault: transfer.host }),
                    (Ok(()), Dma::Torn) if moved >= half => {
                        Err(Refusal { status: status::ABORTED, moved: 0, fault: 0 })
                    }
                    (Ok(()), _) => {
                        let (host, soc) = (transfer.host + u64::from(moved), transfer.soc + u64::from(moved));
                        bus.copy(way, host, soc, chunk)
                    }
                }
            };
            match result {
                Ok(()) => moved += chunk.len() as u32,
                Err(refusal) => {
                    return (moved + refusal.moved as u32, Err((refusal.status, refusal.fault)));
                }
            }
            if let Dma::Split(pause) = dma
                && moved == half
            {
                self.pause(pause);
            }
        }
        (moved, Ok(()))
    }

    /// Sleeps, unless the queue is to stop.
    fn pause(&self, duration: Duration) {
        const STEP: Duration = Duration::from_millis(5);
        let mut left = duration;
        while !left.is_zero() && !self.stopping.load(Ordering::Acquire) {
            let step = left.min(STEP);
            std::thread::sleep(step);
            left -= step;
        }
    }
}
