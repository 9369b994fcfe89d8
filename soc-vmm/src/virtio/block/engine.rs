//! What a disk does with its requests (virtio 1.2 §5.2.6): many at once, in whatever order they finish.

use std::error::Error;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::Ordering::{Acquire, Relaxed};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK};

use super::handle::{DiskHandle, Shared};
use super::limits::{DiskLimits, Gate};
use super::policy::{DiskError, ErrorAction};
use super::request::{Disk, Refusal, Request, Step};
use super::{BlockConfig, SECTOR, Trouble};
use crate::block::{BlockError, BlockQueue, Buffer, Done, Job, Operation, Watcher, open_queue};
use crate::persist::{StateError, States};
use crate::virtio::complaint::Complaints;
use crate::virtio::{Config, Control, Engine, Queue, QueueError, Session, Wait};

/// Requests under way at once. More wait in their queues.
pub(super) const DEPTH: usize = 128;
/// How long a finished request may wait for others, to share its interrupt.
const GATHER: Duration = Duration::from_micros(100);

/// A disk's engine.
pub struct BlockEngine {
    config: BlockConfig,
    serial: [u8; VIRTIO_BLK_ID_BYTES as usize],
    operations: Box<dyn BlockQueue>,
    /// Of what is done, and of the handle's bell.
    epoll: Epoll,
    pub(super) shared: Arc<Shared>,
    pub(super) gate: Gate,
    complaints: Complaints,
    /// Bytes of the disk as the guest was told; none: others than there are.
    pub(super) told_size: Option<u64>,
    /// The session that all below is of.
    session: Weak<Control>,
    pub(super) requests: Vec<Request>,
    /// Those that are none.
    pub(super) free: Vec<usize>,
    /// How many the back end has.
    pub(super) under_way: usize,
    /// Those that are done, and wait for who hears of changes.
    parked: Vec<Parked>,
    /// Those that wait for the VM to go on.
    pub(super) stopped: Vec<usize>,
    /// Queue and head of those that were taken elsewhere, and are to be begun here.
    pub(super) taken: Vec<(u16, u16)>,
    /// Of each queue, the chains that were given back and not yet shown; all of them, and until when they may wait.
    unshown: Vec<u32>,
    all_unshown: usize,
    show_by: Instant,
    /// The queue that is looked at first.
    turn: usize,
    done: Vec<Done>,
}

/// A request that is done, and whose guest must not know that yet.
struct Parked {
    index: usize,
    ticket: u64,
    watcher: Arc<dyn Watcher>,
}

impl BlockEngine {
    /// The engine of that disk.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new(config: BlockConfig) -> io::Result<Self> {
        let mut serial = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in serial.iter_mut().zip(config.serial.bytes()) {
            *to = from;
        }
        let operations = open_queue(config.backend.clone(), config.aio, DEPTH)?;
        let limits = DiskLimits::from(config.limits);
        let shared = Arc::new(Shared::new(limits)?);
        let now = (config.clock)();
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(operations.fd(), EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        epoll.add(&shared.bell, EpollEvent::new(EpollFlags::EPOLLIN, 1))?;
        Ok(Self {
            serial,
            operations,
            epoll,
            shared,
            gate: Gate::new(limits, now),
            complaints: Complaints::default(),
            told_size: Some(config.backend.size()),
            session: Weak::new(),
            requests: (0..DEPTH).map(|_| Request::default()).collect(),
            free: Vec::with_capacity(DEPTH),
            under_way: 0,
            parked: Vec::new(),
            stopped: Vec::with_capacity(DEPTH),
            taken: Vec::new(),
            unshown: Vec::new(),
            all_unshown: 0,
            show_by: now,
            turn: 0,
            done: Vec::with_capacity(DEPTH),
            config,
        })
    }

    /// Bytes of the disk.
    pub(super) fn size(&self) -> u64 {
        self.config.backend.size()
    }

    /// What the VM reaches the disk by.
    pub fn handle(&self) -> DiskHandle {
        DiskHandle { backend: self.config.backend.clone(), shared: self.shared.clone() }
    }

    /// Where a session is a new one, waits for what the one before left under way.
    fn enter(&mut self, session: &Session) -> Result<(), QueueError> {
        if std::ptr::eq(self.session.as_ptr(), &*session.control) {
            return Ok(());
        }
        self.drain()?;
        self.adopt(session);
        Ok(())
    }

    /// Waits for what the back end has, which is nobody's any more.
    fn drain(&mut self) -> Result<(), QueueError> {
        while self.under_way > 0 {
            let handed_over = self.commit()?;
            if !self.take() && !handed_over {
                match poll(&mut [PollFd::new(self.operations.fd(), PollFlags::POLLIN)], PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(errno) => return Err(QueueError::NoRoom(errno)),
                }
            }
            // Nobody waits for them, but they have changed what they have.
            for done in std::mem::take(&mut self.done) {
                drop(self.tell_change(done.token));
            }
        }
        Ok(())
    }

    /// Begins with a session of which nothing is under way.
    pub(super) fn adopt(&mut self, session: &Session) {
        self.session = Arc::downgrade(&session.control);
        self.free.clear();
        self.free.extend(0..DEPTH);
        // A guest that has another driver now may never need so much again.
        self.requests.iter_mut().for_each(|request| request.buffer = Buffer::default());
        self.gate.clear();
        self.all_unshown = 0;
        self.parked.clear();
        self.stopped.clear();
        self.taken.clear();
        self.shared.set_trouble(None);
        self.unshown.clear();
        self.unshown.resize(session.queues.len(), 0);
    }

    /// Does what the handle asks for.
    fn obey(&mut self, session: &Session) {
        self.shared.answer();
        let size = self.size();
        if self.told_size != Some(size) {
            self.told_size = Some(size);
            session.config.change(0, &(size / SECTOR).to_le_bytes());
        }
        if let Some(limits) = self.shared.new_limits() {
            self.gate.change(limits, (self.config.clock)());
        }
        if self.shared.retry.swap(false, Acquire) {
            self.shared.set_trouble(None);
            while let Some(index) = self.stopped.pop() {
                self.call(index);
            }
        }
    }

    /// Takes what has finished; whether that is anything.
    fn take(&mut self) -> bool {
        self.operations.take(&mut self.done);
        self.under_way -= self.done.len();
        !self.done.is_empty()
    }

    fn commit(&mut self) -> Result<bool, QueueError> {
        let failed = |error: io::Error| QueueError::NoRoom(Errno::from_raw(error.raw_os_error().unwrap_or(0)));
        let any = self.operations.commit().map_err(failed)?;
        self.shared.counters.submissions.fetch_add(any.into(), Relaxed);
        Ok(any)
    }

    /// Goes on with the requests whose calls are done.
    fn collect(&mut self, session: &mut Session) -> Result<(), QueueError> {
        if !self.parked.is_empty() {
            let settled = self.parked.extract_if(.., |parked| parked.watcher.is_settled(parked.ticket));
            for index in settled.map(|parked| parked.index).collect::<Vec<_>>() {
                self.succeeded(index, session)?;
            }
        }
        if !self.take() {
            return Ok(());
        }
        let mut all = std::mem::take(&mut self.done);
        for Done { token, buffer, result } in all.drain(..) {
            self.requests[token].buffer = buffer;
            let parked = self.tell_change(token);
            match result.map_err(|error| self.failed(token, &error)) {
                Ok(()) | Err(ErrorAction::Ignore) => {}
                Err(ErrorAction::Report) => {
                    self.finish(token, VIRTIO_BLK_S_IOERR, session)?;
                    continue;
                }
                Err(ErrorAction::Stop) => {
                    self.stopped.push(token);
                    continue;
                }
            }
            match parked {
                Some(parked) => self.parked.push(parked),
                None => self.succeeded(token, session)?,
            }
        }
        self.done = all;
        Ok(())
    }

    /// A request's call has done what it should.
    fn succeeded(&mut self, index: usize, session: &mut Session) -> Result<(), QueueError> {
        let Some(queue) = queue_of(session, self.requests[index].queue) else { return Ok(()) };
        self.requests[index].succeeded(queue.lease())?;
        self.go_on(index, session)
    }

    /// Tells who hears of changes that a call is over, failed or not: what it has to wait for, if it has to.
    fn tell_change(&self, index: usize) -> Option<Parked> {
        let super::request::Call { operation, offset, len } = self.requests[index].call;
        if matches!(operation, Operation::Read | Operation::Flush) {
            return None;
        }
        let watcher = self.shared.watch.get()?;
        let ticket = watcher.changed(offset, len)?;
        Some(Parked { index, ticket, watcher })
    }

    /// Tells of an error; what is to be done about it.
    fn failed(&mut self, index: usize, error: &BlockError) -> ErrorAction {
        let request = &mut self.requests[index];
        let call = request.call;
        let causes = std::iter::successors(error.source(), |&cause| cause.source());
        let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
        self.complaints.say(&self.config.name, format_args!("can't {}: {text}", call.verb()));
        self.shared.counters.errors.fetch_add(1, Relaxed);
        let is_write = call.operation != Operation::Read;
        let mut action = self.config.on_error.action(is_write, error);
        // Who hears of it may look.
        if action == ErrorAction::Stop && self.config.listener.is_some() {
            self.shared.set_trouble(Some(if error.is_no_space() { Trouble::NoSpace } else { Trouble::Failed }));
        }
        match &self.config.listener {
            // Nobody would make the VM go on.
            None if action == ErrorAction::Stop => action = ErrorAction::Report,
            None => {}
            // Those that are under way then fail too: the VM stops once, and is told once why.
            Some(_) if action == ErrorAction::Stop && !self.stopped.is_empty() => {}
            Some(listener) => listener.failed(DiskError {
                disk: self.config.name.clone(),
                node: self.config.node.clone(),
                is_write,
                no_space: error.is_no_space(),
                action,
                reason: text,
            }),
        }
        if action == ErrorAction::Ignore && !is_write {
            // Nobody else's bytes.
            request.buffer.front(call.len as usize).fill(0);
        }
        action
    }

    /// Takes chains while there is room for them, from the queues in turn.
    fn admit(&mut self, session: &mut Session) -> Result<(), QueueError> {
        while let Some(index) = self.gate.next((self.config.clock)(), |index| self.requests[index].bytes()) {
            self.go_on(index, session)?;
        }
        let count = session.queues.len();
        self.turn = (self.turn + 1) % count.max(1);
        let mut empty = 0;
        for at in (self.turn..self.turn + count).cycle() {
            if empty == count || !self.has_room() {
                break;
            }
            let number = at % count;
            let (Some(&index), Some(queue)) = (self.free.last(), queue_of(session, number)) else {
                empty += 1;
                continue;
            };
            let request = &mut self.requests[index];
            if !queue.pop(&mut request.chain)? {
                empty += 1;
                continue;
            }
            empty = 0;
            self.free.pop();
            request.queue = number;
            self.begin(index, session)?;
        }
        Ok(())
    }

    /// Begins with the request of a chain that was taken.
    pub(super) fn begin(&mut self, index: usize, session: &mut Session) -> Result<(), QueueError> {
        let request = &mut self.requests[index];
        let Some(queue) = queue_of(session, request.queue) else { return Ok(()) };
        request.since = Some((self.config.clock)());
        let disk = Disk {
            size: self.config.backend.size(),
            read_only: self.config.backend.is_read_only(),
            serial: self.serial,
        };
        match request.begin(queue.lease(), &disk) {
            Ok(()) => self.pay(index, session),
            Err(Refusal::Status(status)) => self.finish(index, status, session),
            Err(Refusal::Queue(error)) => Err(error),
        }
    }

    /// Whether another chain may be taken.
    fn has_room(&self) -> bool {
        !self.free.is_empty() && self.gate.is_open() && self.stopped.is_empty()
    }

    /// Starts a request, or keeps it until its limit lets it go.
    fn pay(&mut self, index: usize, session: &mut Session) -> Result<(), QueueError> {
        let request = &self.requests[index];
        if self.gate.pass(index, request.direction(), request.bytes(), (self.config.clock)()) {
            self.go_on(index, session)?;
        }
        Ok(())
    }

    fn go_on(&mut self, index: usize, session: &mut Session) -> Result<(), QueueError> {
        // Without flushes what is written must be durable at once (§5.2.6.2).
        let through = !session.has(VIRTIO_BLK_F_FLUSH);
        let request = &mut self.requests[index];
        let Some(queue) = queue_of(session, request.queue) else { return Ok(()) };
        match request.next(queue.lease(), through)? {
            Step::Call => self.call(index),
            Step::Finished(status) => self.finish(index, status, session)?,
        }
        Ok(())
    }

    /// Has the back end carry out what the request is at.
    fn call(&mut self, index: usize) {
        let request = &mut self.requests[index];
        let super::request::Call { operation, offset, len } = request.call;
        let buffer = std::mem::take(&mut request.buffer);
        self.operations.add(Job { token: index, operation, offset, len, buffer });
        self.under_way += 1;
    }

    /// Gives a request's chain back.
    fn finish(&mut self, index: usize, status: u32, session: &mut Session) -> Result<(), QueueError> {
        let request = &mut self.requests[index];
        let Some(queue) = queue_of(session, request.queue) else { return Ok(()) };
        let written = request.finish(queue.lease(), status)?;
        queue.push(request.chain.head(), written)?;
        self.unshown[request.queue] += 1;
        let now = (self.config.clock)();
        if self.all_unshown == 0 {
            self.show_by = now + GATHER;
        }
        self.all_unshown += 1;
        self.free.push(index);
        let moved = request.moved();
        let counters = &self.shared.counters;
        counters.requests.fetch_add(1, Relaxed);
        counters.read.fetch_add(moved.0, Relaxed);
        counters.written.fetch_add(moved.1, Relaxed);
        if let Some(sort) = request.sort() {
            let counters = counters.of(sort);
            let result = if status == VIRTIO_BLK_S_OK { &counters.done } else { &counters.failed };
            result.fetch_add(1, Relaxed);
            let time = request.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
            counters.nanoseconds.fetch_add(time.as_nanos() as u64, Relaxed);
        }
        Ok(())
    }

    /// Shows the driver what it is given back, if it is time: an interrupt is for a third of the requests, unless they take long.
    fn show(&mut self, session: &mut Session) -> Result<(), QueueError> {
        let enough = self.all_unshown * 3 >= self.all_unshown + self.under_way;
        if self.all_unshown == 0 || !(enough || (self.config.clock)() >= self.show_by) {
            return Ok(());
        }
        for (queue, unshown) in session.queues.iter_mut().zip(&mut self.unshown) {
            if let Some(queue) = queue.as_mut().filter(|_| std::mem::take(unshown) > 0) {
                queue.publish()?;
                self.shared.counters.publications.fetch_add(1, Relaxed);
            }
        }
        self.all_unshown = 0;
        Ok(())
    }

    /// How long there may be nothing to do, if nothing happens.
    fn patience(&mut self) -> Option<Duration> {
        let now = (self.config.clock)();
        let show = (self.all_unshown > 0).then(|| self.show_by.saturating_duration_since(now));
        let held = self.gate.patience(now);
        show.into_iter().chain(held).min()
    }
}

impl Engine for BlockEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        self.enter(session)?;
        self.take_up(session)?;
        self.obey(session);
        for queue in session.queues.iter_mut().flatten() {
            queue.hold_kicks()?;
        }
        loop {
            self.collect(session)?;
            self.admit(session)?;
            let more = self.commit()?;
            self.show(session)?;
            if !more {
                break;
            }
        }
        if self.has_room() {
            let mut more = false;
            for queue in session.queues.iter_mut().flatten() {
                more |= queue.allow_kicks()?;
            }
            if more {
                return Ok(Wait { source: EpollFlags::EPOLLIN, timeout: Some(Duration::ZERO) });
            }
        }
        Ok(Wait { source: EpollFlags::EPOLLIN, timeout: self.patience() })
    }

    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        self.enter(session)?;
        // What it asks for comes when this goes on.
        self.shared.answer();
        loop {
            self.collect(session)?;
            if !self.commit()? {
                break;
            }
        }
        if self.under_way > 0 || !self.parked.is_empty() {
            return Ok(Some(Wait { source: EpollFlags::EPOLLIN, timeout: None }));
        }
        self.show_by = (self.config.clock)();
        self.show(session)?;
        Ok(None)
    }

    fn save_into(&self, at: &str, states: &mut States, session: Option<&Session>) {
        self.save(at, states, session.is_some());
    }

    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        self.restore(at, states, config, session)
    }

    fn settle(&mut self) {
        // A back end that takes nothing any more has nothing under way.
        let _ = self.drain();
    }

    fn is_ready(&mut self) -> Option<bool> {
        Some(self.operations.has_done() || self.shared.is_asked())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.0.as_fd())
    }
}

pub(super) fn queue_of(session: &mut Session, index: usize) -> Option<&mut Queue> {
    session.queues.get_mut(index)?.as_mut()
}
