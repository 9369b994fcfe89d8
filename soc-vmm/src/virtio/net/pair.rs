//! One pair of queues and its part of the network (virtio 1.2 §5.1.6). Nothing here waits for the peer or for the guest: what has no room
//! is dropped and counted, as a network does.

use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use super::NetCounters;
use super::announce::announcement;
use super::filter::{ADDRESS, Filter};
use super::header::Header;
use crate::net::{HEADER, MAX_FRAME, NetBackend, NetError, Offloads};
use crate::virtio::limit::{Limiter, RateLimits};
use crate::virtio::{Chain, Queue, QueueError};

/// Frames of each direction before the other one has its turn.
const TURN: usize = 64;
/// Buffers over which a frame may be spread.
const MAX_MERGED: usize = 64;
/// Bytes of a frame at most that is copied behind its header: what fits a wire without jumbo frames.
const COPIED: usize = 2048;
/// How long a frame waits for a buffer of the guest's.
const PATIENCE: Duration = Duration::from_millis(100);

/// A pair of queues.
pub(super) struct Pair {
    pub(super) backend: Box<dyn NetBackend>,
    peer: Peer,
    /// Why the network went, until somebody asks.
    news: Option<NetError>,
    starved: Starved,
    sends: Limiter,
    receives: Limiter,
    /// Frames are to be waited for, and how long at most.
    receiving: bool,
    timeout: Option<Duration>,
}

/// The other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Peer {
    There,
    /// Gone. It is looked for then, if at all.
    Gone(Option<Instant>),
}

/// Whether the guest has buffers for what comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Starved {
    /// It had one for the last frame.
    No,
    /// A frame waits since then.
    Since(Instant),
    /// It was waited for in vain: frames are dropped until there are buffers.
    Dropping,
}

/// What became of a frame for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Delivery {
    Done,
    /// There are no more buffers.
    NoBuffers,
    /// It is too long for the buffers that the guest gives.
    TooLong,
}

/// What holds for all pairs while they are served.
pub(super) struct Round<'a> {
    pub(super) now: Instant,
    /// The cable is in.
    pub(super) plugged: bool,
    pub(super) mergeable: bool,
    /// What the guest may leave to its network.
    pub(super) host: Offloads,
    pub(super) filter: &'a Filter,
    pub(super) counters: &'a NetCounters,
    pub(super) scratch: &'a mut Scratch,
}

/// What is used again and again, so that frames allocate nothing.
pub(super) struct Scratch {
    pub(super) chains: Vec<Chain>,
    packet: Vec<u8>,
}

impl Scratch {
    pub(super) fn new() -> Self {
        Self { chains: vec![Chain::default()], packet: vec![0; HEADER + MAX_FRAME] }
    }
}

impl Pair {
    pub(super) fn new(backend: Box<dyn NetBackend>, limits: RateLimits, now: Instant) -> Self {
        Self {
            backend,
            peer: Peer::There,
            news: None,
            starved: Starved::No,
            sends: Limiter::new(limits, now),
            receives: Limiter::new(limits, now),
            receiving: false,
            timeout: None,
        }
    }

    /// Its network is there.
    pub(super) fn is_connected(&self) -> bool {
        self.peer == Peer::There
    }

    /// Why its network went, once.
    pub(super) fn take_news(&mut self) -> Option<NetError> {
        self.news.take()
    }

    /// Makes the network what the driver has said.
    pub(super) fn configure(&mut self, active: bool, guest: Offloads, now: Instant) {
        if self.is_connected() {
            let done = self.backend.set_active(active).and_then(|()| self.backend.set_guest_offloads(guest));
            self.check(done, now);
        }
    }

    /// Forgets what the last driver left.
    pub(super) fn restart(&mut self) {
        self.starved = Starved::No;
    }

    /// Before it is served: looks for a peer that went, if it is time; whether it is there again.
    pub(super) fn begin(&mut self, now: Instant) -> bool {
        (self.receiving, self.timeout) = (false, None);
        let Peer::Gone(Some(then)) = self.peer else { return false };
        if then <= now {
            if self.backend.reconnect() {
                self.peer = Peer::There;
                return true;
            }
            self.peer = self.gone(now);
        }
        if let Peer::Gone(Some(then)) = self.peer {
            self.wake_after(then.saturating_duration_since(now));
        }
        false
    }

    /// For what its network is to be watched, and how long at most.
    pub(super) fn wait(&self) -> (EpollFlags, Option<Duration>) {
        let flags = match (self.peer, self.receiving) {
            (Peer::Gone(_), _) => EpollFlags::empty(),
            (Peer::There, false) => self.backend.sending(),
            (Peer::There, true) => self.backend.sending() | EpollFlags::EPOLLIN,
        };
        (flags, self.timeout)
    }

    /// Goes on with what could not be sent at once.
    pub(super) fn flush(&mut self, now: Instant) {
        if self.is_connected() {
            let done = self.backend.flush();
            self.check(done, now);
        }
    }

    /// Sends what the guest has; whether there is more.
    pub(super) fn transmit(&mut self, queue: &mut Queue, round: &mut Round<'_>) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if let Some(time) = self.sends.wait(round.now) {
                self.wake_after(time);
                queue.publish()?;
                return Ok(false);
            }
            let chain = &mut round.scratch.chains[0];
            if !queue.pop(chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            let head = chain.head();
            let len = read_packet(chain, queue, &mut round.scratch.packet)?;
            let sent = len.is_some_and(|len| self.send(len, round));
            round.counters.count_sent(sent);
            queue.push(head, 0)?;
        }
        queue.publish()?;
        Ok(true)
    }

    /// Sends what was read; whether it was taken.
    fn send(&mut self, len: usize, round: &mut Round<'_>) -> bool {
        let Some((header, frame)) = round.scratch.packet[..len].split_first_chunk_mut::<HEADER>() else { return false };
        let Some(todo) = Header::read(header, frame, round.host) else { return false };
        if !round.plugged || !self.is_connected() {
            return false;
        }
        self.sends.take(todo.frames(frame.len()), frame.len() as u64);
        let sent = if self.backend.offloads().is_some() {
            *header = todo.bytes();
            self.backend.send(&round.scratch.packet[..len])
        } else {
            self.backend.send(frame)
        };
        self.check(sent, round.now).unwrap_or(false)
    }

    /// Tells the network where `mac` is. A frame that isn't taken is one of several.
    pub(super) fn announce(&mut self, mac: [u8; ADDRESS], now: Instant) {
        if !self.is_connected() {
            return;
        }
        let packet = [vec![0; HEADER], announcement(mac)].concat();
        let header = if self.backend.offloads().is_some() { 0 } else { HEADER };
        let sent = self.backend.send(&packet[header..]);
        self.check(sent, now);
    }

    /// Hands the guest what came; whether there is more.
    pub(super) fn receive(&mut self, queue: &mut Queue, round: &mut Round<'_>) -> Result<bool, QueueError> {
        if !self.is_connected() {
            return Ok(false);
        }
        if self.starved == Starved::No {
            queue.hold_kicks()?;
        }
        let with_header = self.backend.offloads().is_some();
        for _ in 0..TURN {
            if let Some(time) = self.receives.wait(round.now) {
                self.wake_after(time);
                queue.publish()?;
                return Ok(false);
            }
            let packet = match self.backend.receive() {
                Ok(Some(packet)) => packet,
                Ok(None) => {
                    self.receiving = true;
                    queue.publish()?;
                    return Ok(false);
                }
                Err(error) => {
                    self.check::<()>(Err(error), round.now);
                    queue.publish()?;
                    return Ok(false);
                }
            };
            let frame = if with_header { &packet[HEADER..] } else { packet };
            if !round.plugged || !round.filter.accepts(frame) {
                if round.plugged {
                    round.counters.count_unwanted();
                } else {
                    round.counters.count_received(false);
                }
                self.backend.consume();
                continue;
            }
            let len = frame.len();
            let segment = if with_header { u16::from_le_bytes([packet[4], packet[5]]) } else { 0 };
            match round.scratch.deliver(queue, packet, with_header, round.mergeable)? {
                Delivery::Done => {
                    self.starved = Starved::No;
                    self.receives.take(segments(len, segment), len as u64);
                    round.counters.count_received(true);
                }
                Delivery::NoBuffers => {
                    queue.publish()?;
                    if queue.allow_kicks()? {
                        continue;
                    }
                    match self.starved {
                        Starved::No => self.starved = Starved::Since(round.now),
                        Starved::Since(since) if round.now.duration_since(since) >= PATIENCE => {
                            self.starved = Starved::Dropping;
                        }
                        _ => {}
                    }
                    if let Starved::Since(since) = self.starved {
                        // The frame that waits is behind what its network would tell.
                        self.wake_after(PATIENCE.saturating_sub(round.now.duration_since(since)));
                        return Ok(false);
                    }
                    round.counters.count_received(false);
                }
                Delivery::TooLong => round.counters.count_received(false),
            }
            self.backend.consume();
        }
        queue.publish()?;
        Ok(true)
    }

    /// What a call gave; none: its network is gone.
    fn check<T>(&mut self, result: Result<T, NetError>, now: Instant) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.peer = self.gone(now);
                self.news = Some(error);
                if let Some(time) = self.backend.retry_after() {
                    self.wake_after(time);
                }
                None
            }
        }
    }

    fn gone(&self, now: Instant) -> Peer {
        Peer::Gone(self.backend.retry_after().map(|time| now + time))
    }

    fn wake_after(&mut self, time: Duration) {
        self.timeout = Some(self.timeout.map_or(time, |other| other.min(time)));
    }
}

/// How many frames of the network's a frame stands for: about, since its headers are counted with it.
fn segments(len: usize, segment: u16) -> u64 {
    if segment == 0 { 1 } else { len.div_ceil(segment.into()) as u64 }
}

/// Copies a frame and its header out of their chain; their length, or none where they are none.
fn read_packet(chain: &mut Chain, queue: &Queue, packet: &mut [u8]) -> Result<Option<usize>, QueueError> {
    if chain.readable() < HEADER as u64 {
        return Err(QueueError::Broken("a frame without a header"));
    }
    let len = chain.readable() as usize;
    if !(HEADER + 1..=packet.len()).contains(&len) {
        return Ok(None);
    }
    chain.read(queue.lease(), &mut packet[..len])?;
    Ok(Some(len))
}

impl Scratch {
    /// Writes a frame, before which its header may stand, into the next buffer, or over as many as it takes.
    fn deliver(
        &mut self,
        queue: &mut Queue,
        packet: &[u8],
        with_header: bool,
        mergeable: bool,
    ) -> Result<Delivery, QueueError> {
        let mut header = [0; HEADER];
        let frame = match packet.split_first_chunk::<HEADER>() {
            Some((its, frame)) if with_header => {
                header = *its;
                frame
            }
            _ => packet,
        };
        let needed = (HEADER + frame.len()) as u64;
        let most = if mergeable { MAX_MERGED } else { 1 };
        let (mut count, mut room) = (0, 0);
        while room < needed {
            if count == most {
                queue.put_back(count as u16);
                return Ok(Delivery::TooLong);
            }
            if count == self.chains.len() {
                self.chains.push(Chain::default());
            }
            let chain = &mut self.chains[count];
            if !queue.pop(chain)? {
                queue.put_back(count as u16);
                return Ok(Delivery::NoBuffers);
            }
            if chain.readable() > 0 || chain.writable() < HEADER as u64 {
                return Err(QueueError::Broken("a buffer for frames that can't hold a header"));
            }
            room += chain.writable();
            count += 1;
        }
        header[10..].copy_from_slice(&(count as u16).to_le_bytes());
        // One transfer where header and frame are one, or are made one for less than a transfer.
        let mut rest = if with_header && packet.starts_with(&header) {
            packet
        } else if frame.len() <= COPIED {
            let whole = &mut self.packet[..HEADER + frame.len()];
            whole[..HEADER].copy_from_slice(&header);
            whole[HEADER..].copy_from_slice(frame);
            whole
        } else {
            self.chains[0].write(queue.lease(), &header)?;
            frame
        };
        let mut before = needed as usize - rest.len();
        for chain in &mut self.chains[..count] {
            let (now, later) = rest.split_at(rest.len().min(chain.writable() as usize));
            chain.write(queue.lease(), now)?;
            rest = later;
            queue.push(chain.head(), (now.len() + std::mem::take(&mut before)) as u32)?;
        }
        Ok(Delivery::Done)
    }
}
