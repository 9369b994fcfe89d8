//! What an interface does with its queues (virtio 1.2 §5.1.6). Nothing here waits for the peer or for the guest: what has no room is
//! dropped and counted, as a network does.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::{NetConfig, NetCounters, RECEIVE, STATUS, TRANSMIT};
use crate::net::{MAX_FRAME, NetBackend, NetError};
use crate::virtio::session::Config;
use crate::virtio::{Chain, Engine, Queue, QueueError, Session, Wait};

/// Bytes before each frame (§5.1.6.1).
const HEADER: usize = 12;
/// Frames of each direction before the other one has its turn.
const TURN: usize = 64;
/// Buffers over which a frame may be spread.
const MAX_MERGED: usize = 64;
/// How long a frame waits for a buffer of the guest's.
const PATIENCE: Duration = Duration::from_millis(100);

/// An interface's engine.
pub struct NetEngine {
    name: String,
    backend: Box<dyn NetBackend>,
    counters: Arc<NetCounters>,
    /// The peer is there.
    up: bool,
    buffers: Buffers,
    frame: Vec<u8>,
    starved: Starved,
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

/// Chains that are reused.
#[derive(Default)]
struct Buffers(Vec<Chain>);

impl NetEngine {
    /// The engine of that interface.
    pub fn new(interface: NetConfig) -> Self {
        Self {
            name: interface.name,
            backend: interface.backend,
            counters: interface.counters,
            up: true,
            buffers: Buffers(vec![Chain::default()]),
            frame: vec![0; MAX_FRAME],
            starved: Starved::No,
        }
    }

    /// Sends what the guest has; whether there is more.
    fn transmit(&mut self, queue: &mut Queue, config: &Config) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            let chain = &mut self.buffers.0[0];
            if !queue.pop(chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            let frame = read_frame(chain, queue, &mut self.frame)?;
            let head = chain.head();
            let sent = match frame {
                Some(len) if self.up => match self.backend.send(&self.frame[..len]) {
                    Ok(sent) => sent,
                    Err(error) => self.lost(&error, config),
                },
                _ => false,
            };
            NetCounters::add(if sent { &self.counters.sent } else { &self.counters.unsent });
            queue.push(head, 0)?;
        }
        queue.publish()?;
        Ok(true)
    }

    /// Hands the guest what came; whether there is more.
    fn receive(&mut self, queue: &mut Queue, mergeable: bool, config: &Config) -> Result<bool, QueueError> {
        if !self.up {
            return Ok(false);
        }
        if self.starved == Starved::No {
            queue.hold_kicks()?;
        }
        for _ in 0..TURN {
            let delivery = match self.backend.receive() {
                Ok(Some(frame)) => self.buffers.deliver(queue, frame, mergeable)?,
                Ok(None) => {
                    queue.publish()?;
                    return Ok(false);
                }
                Err(error) => {
                    self.lost(&error, config);
                    queue.publish()?;
                    return Ok(false);
                }
            };
            match (delivery, self.starved) {
                (Delivery::Done, _) => {
                    self.starved = Starved::No;
                    NetCounters::add(&self.counters.received);
                }
                (Delivery::NoBuffers, starved) => {
                    queue.publish()?;
                    if queue.allow_kicks()? {
                        continue;
                    }
                    let over = match starved {
                        Starved::No => {
                            self.starved = Starved::Since(Instant::now());
                            false
                        }
                        Starved::Since(since) => since.elapsed() >= PATIENCE,
                        Starved::Dropping => true,
                    };
                    if !over {
                        return Ok(false);
                    }
                    self.starved = Starved::Dropping;
                    NetCounters::add(&self.counters.unreceived);
                }
                (Delivery::TooLong, _) => NetCounters::add(&self.counters.unreceived),
            }
            self.backend.consume();
        }
        queue.publish()?;
        Ok(true)
    }

    /// The network is gone: the guest sees the link go down. False, for nothing was sent.
    fn lost(&mut self, error: &NetError, config: &Config) -> bool {
        if std::mem::take(&mut self.up) {
            tracing::warn!("virtio-net {}: {}: {error}; the link is down", self.name, self.backend.name());
            config.change(STATUS, &0u16.to_le_bytes());
        }
        false
    }

    fn wait(&self) -> Wait {
        if !self.up {
            return Wait::KICKS;
        }
        match self.starved {
            // The frame that waits is behind what the source would tell.
            Starved::Since(since) => {
                Wait { source: self.backend.sending(), timeout: Some(PATIENCE.saturating_sub(since.elapsed())) }
            }
            _ => Wait { source: self.backend.sending() | EpollFlags::EPOLLIN, timeout: None },
        }
    }
}

impl Engine for NetEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        let mergeable = session.has(VIRTIO_NET_F_MRG_RXBUF);
        if self.up
            && let Err(error) = self.backend.flush()
        {
            self.lost(&error, &session.config);
        }
        let mut more = false;
        if let Some(Some(queue)) = session.queues.get_mut(TRANSMIT) {
            more |= self.transmit(queue, &session.config)?;
        }
        match session.queues.get_mut(RECEIVE) {
            Some(Some(queue)) => more |= self.receive(queue, mergeable, &session.config)?,
            // Nobody takes what comes.
            _ => return Ok(if more { Wait::NOTHING } else { Wait { source: self.backend.sending(), timeout: None } }),
        }
        Ok(if more { Wait::NOTHING } else { self.wait() })
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.backend.fd())
    }
}

/// Copies a frame out of its chain; its length, or none where it is no frame.
fn read_frame(chain: &mut Chain, queue: &Queue, frame: &mut [u8]) -> Result<Option<usize>, QueueError> {
    let mut header = [0; HEADER];
    if chain.readable() < HEADER as u64 {
        return Err(QueueError::Broken("a frame without a header"));
    }
    chain.read(queue.lease(), &mut header)?;
    let len = chain.readable() as usize;
    // Without offloads there is nothing to be done to a frame: neither flags nor segmentation.
    if !(1..=frame.len()).contains(&len) || header[..2] != [0, 0] {
        return Ok(None);
    }
    chain.read(queue.lease(), &mut frame[..len])?;
    Ok(Some(len))
}

impl Buffers {
    /// Writes a frame into the next buffer, or over as many as it takes.
    fn deliver(&mut self, queue: &mut Queue, frame: &[u8], mergeable: bool) -> Result<Delivery, QueueError> {
        let needed = (HEADER + frame.len()) as u64;
        let most = if mergeable { MAX_MERGED } else { 1 };
        let (mut count, mut room) = (0, 0);
        while room < needed {
            if count == most {
                queue.put_back(count as u16);
                return Ok(Delivery::TooLong);
            }
            if count == self.0.len() {
                self.0.push(Chain::default());
            }
            let chain = &mut self.0[count];
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
        let mut header = [0; HEADER];
        header[10..].copy_from_slice(&(count as u16).to_le_bytes());
        self.0[0].write(queue.lease(), &header)?;
        let mut rest = frame;
        for (index, chain) in self.0[..count].iter_mut().enumerate() {
            let (now, later) = rest.split_at(rest.len().min(chain.writable() as usize));
            chain.write(queue.lease(), now)?;
            rest = later;
            queue.push(chain.head(), (now.len() + if index == 0 { HEADER } else { 0 }) as u32)?;
        }
        Ok(Delivery::Done)
    }
}
