//! A port: what the driver knows of it, and how its bytes move.

use serde::{Deserialize, Serialize};

use super::control::{DEVICE_ADD, DEVICE_REMOVE, Message, PORT_NAME, PORT_OPEN};
use super::end::Moved;
use super::{HostEnd, PortConfig};
use crate::virtio::{Chain, Queue, QueueError};

/// Bytes moved at once.
pub(super) const PART: usize = 32 << 10;
/// Parts of each direction before other ports have their turn.
const TURN: usize = 16;

/// A port.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) id: String,
    pub(super) name: String,
    pub(super) end: HostEnd,
    /// It is to go: the driver is told, then it is forgotten.
    pub(super) leaving: bool,
    pub(super) driver: Driver,
    /// A chain of the guest's that is being sent, all its bytes, and how much of what was read of it.
    chain: Chain,
    busy: bool,
    len: u64,
    unsent: Vec<u8>,
    sent: usize,
    /// One that another process was sending, to be gone on with.
    taken: Option<Sending>,
    /// A buffer of the guest's that is being filled.
    incoming: Chain,
}

/// A chain that is being sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Sending {
    pub(super) head: u16,
    /// Bytes of it that the peer has.
    sent: u64,
}

/// What a driver knows of a port. Messages are not queued: they are the difference between this and the port, so that there is no
/// end to what may happen and no list of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Driver {
    /// It asked for ports.
    pub(super) asked: bool,
    /// It was told of this one.
    pub(super) added: bool,
    /// It has set it up, and been told its name.
    pub(super) ready: bool,
    named: bool,
    /// It was told that there is a peer.
    told_open: bool,
    /// A program in the guest has it open.
    pub(super) open: bool,
}

/// What a driver doesn't know yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum News {
    There,
    Gone,
    Name,
    Open(bool),
}

impl Port {
    pub(super) fn new(port: PortConfig) -> Self {
        Self {
            id: port.id,
            name: port.name,
            end: port.end,
            leaving: false,
            driver: Driver::default(),
            chain: Chain::default(),
            busy: false,
            len: 0,
            unsent: Vec::new(),
            sent: 0,
            taken: None,
            incoming: Chain::default(),
        }
    }

    /// Another driver, which knows nothing. Chains of the one before are not to be given back.
    pub(super) fn restart(&mut self) {
        self.driver = Driver::default();
        self.busy = false;
        self.taken = None;
        self.unsent.clear();
        self.sent = 0;
    }

    /// What is being sent.
    pub(super) fn sending(&self) -> Option<Sending> {
        let unsent = self.chain.readable() + (self.unsent.len() - self.sent) as u64;
        let busy = self.busy.then(|| Sending { head: self.chain.head(), sent: self.len - unsent });
        self.taken.or(busy)
    }

    /// Another process's driver, with what was being sent there.
    pub(super) fn move_in(&mut self, driver: Driver, sending: Option<Sending>) {
        self.restart();
        (self.driver, self.taken) = (driver, sending);
    }

    /// Goes on with a chain that another process was sending.
    fn take_up(&mut self, Sending { head, sent }: Sending, queue: &mut Queue) -> Result<(), QueueError> {
        queue.retake(head, &mut self.chain)?;
        if self.chain.writable() > 0 || sent > self.chain.readable() {
            return Err(QueueError::Broken("a buffer to write where bytes are sent, or a shorter one than it was"));
        }
        (self.busy, self.len) = (true, self.chain.readable());
        self.chain.skip(sent)
    }

    /// It is to go: its socket at once, it itself when the driver knows.
    pub(super) fn leave(&mut self) {
        self.leaving = true;
        self.end.shut();
    }

    /// Whether it can be forgotten: it is to go, and no driver has it.
    pub(super) fn is_gone(&self) -> bool {
        self.leaving && !self.driver.added
    }

    /// A peer may come: the driver knows that the last one has gone.
    pub(super) fn may_open(&self) -> bool {
        !self.leaving && !self.end.is_open() && !self.driver.told_open
    }

    /// The next thing that the driver is to be told.
    pub(super) fn news(&self) -> Option<News> {
        let driver = &self.driver;
        if self.leaving {
            driver.added.then_some(News::Gone)
        } else if driver.asked && !driver.added {
            Some(News::There)
        } else if driver.ready && !driver.named {
            Some(News::Name)
        } else if driver.ready && driver.told_open != self.end.is_open() {
            Some(News::Open(self.end.is_open()))
        } else {
            None
        }
    }

    /// How port `number` says that.
    pub(super) fn message(&self, number: u32, news: News) -> Vec<u8> {
        let (event, value, name) = match news {
            News::There => (DEVICE_ADD, 1, ""),
            News::Gone => (DEVICE_REMOVE, 1, ""),
            News::Name => (PORT_NAME, 1, &self.name[..]),
            News::Open(open) => (PORT_OPEN, open.into(), ""),
        };
        Message { port: number, event, value }.bytes(name)
    }

    /// The driver knows.
    pub(super) fn told(&mut self, news: News) {
        match news {
            News::There => self.driver.added = true,
            News::Gone => self.driver.added = false,
            News::Name => self.driver.named = true,
            News::Open(open) => self.driver.told_open = open,
        }
    }

    /// Hands the peer what the guest wrote; whether there is more to do at once.
    pub(super) fn transmit(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        if let Some(taken) = self.taken.take() {
            self.take_up(taken, queue)?;
        }
        for _ in 0..TURN {
            if self.sent < self.unsent.len() {
                match self.end.write(&self.unsent[self.sent..]) {
                    Moved::Bytes(count) => self.sent += count,
                    Moved::NoPeer => self.sent = self.unsent.len(),
                    Moved::NotNow => {
                        queue.publish()?;
                        return Ok(false);
                    }
                }
                continue;
            }
            if !self.busy {
                if !queue.pop(&mut self.chain)? {
                    queue.publish()?;
                    return queue.allow_kicks();
                }
                if self.chain.writable() > 0 {
                    return Err(QueueError::Broken("a buffer to write where bytes are sent"));
                }
                (self.busy, self.len) = (true, self.chain.readable());
            }
            // Nobody will ever read it.
            let part = if self.end.is_open() { self.chain.readable().min(PART as u64) as usize } else { 0 };
            self.unsent.resize(part, 0);
            self.sent = 0;
            self.chain.read(queue.lease(), &mut self.unsent)?;
            if part == 0 {
                queue.push(self.chain.head(), 0)?;
                self.busy = false;
            }
        }
        queue.publish()?;
        Ok(true)
    }

    /// Hands the guest what the peer wrote; whether there is more to do at once.
    pub(super) fn receive(&mut self, queue: &mut Queue, buffer: &mut [u8]) -> Result<bool, QueueError> {
        if !self.driver.open || !self.end.may_read() {
            return Ok(false);
        }
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if !queue.pop(&mut self.incoming)? {
                self.end.close_if_done();
                queue.publish()?;
                return queue.allow_kicks();
            }
            if self.incoming.readable() > 0 || self.incoming.writable() == 0 {
                return Err(QueueError::Broken("a buffer for bytes that can hold none, or holds some"));
            }
            let part = self.incoming.writable().min(buffer.len() as u64) as usize;
            match self.end.read(&mut buffer[..part]) {
                // A signal; the next call will do.
                Moved::Bytes(0) => queue.put_back(1),
                Moved::Bytes(count) => {
                    self.incoming.write(queue.lease(), &buffer[..count])?;
                    queue.push(self.incoming.head(), count as u32)?;
                }
                Moved::NotNow | Moved::NoPeer => {
                    queue.put_back(1);
                    queue.publish()?;
                    return Ok(false);
                }
            }
        }
        queue.publish()?;
        Ok(true)
    }
}
