//! The host's end: takes requests, answers, reports.

use ioreq_ring::BusMemory;

use crate::bulk::MOST as MOST_BULK;
use crate::call::Call;
use crate::codec::Malformed;
use crate::event::Event;
use crate::lines::{host, soc};
use crate::message::{ChannelError, Class, Header, MOST_PAYLOAD, Status};
use crate::ring::{Consumer, Producer};

/// The channel's windows as the host sees them: `B` the BAR, `M` its own memory.
#[derive(Debug)]
pub struct ServerWindows<B, M> {
    /// Region *host lines*.
    pub host_lines: B,
    /// Region *replies*.
    pub replies: B,
    /// Region *events*.
    pub events: B,
    /// Region *SoC lines*.
    pub soc_lines: M,
    /// Region *requests*.
    pub requests: M,
    /// Region *bulk*, in the outbox.
    pub bulk: M,
}

/// A request that was taken: what [`Server::reply`] needs to know of it.
#[derive(Clone, Copy, Debug)]
pub struct Asked {
    opcode: u16,
    sequence: u32,
    /// Whether the SoC waits for a reply.
    answered: bool,
    /// Milliseconds within which the work should begin; 0: no limit.
    pub deadline_ms: u32,
}

/// The host's end of the channel, free of I/O: after a reply or an event ring the channel's doorbell, and call [`Server::poll`]
/// whenever the channel's vector was raised.
#[derive(Debug)]
pub struct Server<B, M> {
    requests: Consumer<M, B>,
    replies: Producer<B, M>,
    events: Producer<B, M>,
    host_lines: B,
    soc_lines: M,
    bulk: M,
    bulk_sent: u64,
    epoch: u64,
    event_sequence: u32,
    beat: u64,
}

impl<B: BusMemory + Clone, M: BusMemory + Clone> Server<B, M> {
    /// A server for the epoch that a SoC header told of: zeroes this side's words, then says whose they are.
    pub fn new(windows: ServerWindows<B, M>, epoch: u64) -> Self {
        let ServerWindows { host_lines, replies, events, soc_lines, requests, bulk } = windows;
        host::ALL.iter().for_each(|word| host_lines.store(*word, 0));
        host_lines.store(host::EPOCH, epoch);
        let producer = |ring, tail, head| Producer {
            ring,
            tail_word: (host_lines.clone(), tail),
            head_word: (soc_lines.clone(), head),
            tail: 0,
        };
        Self {
            requests: Consumer {
                ring: requests,
                tail_word: (soc_lines.clone(), soc::REQUESTS_TAIL),
                head_word: (host_lines.clone(), host::REQUESTS_HEAD),
                head: 0,
            },
            replies: producer(replies, host::REPLIES_TAIL, soc::REPLIES_HEAD),
            events: producer(events, host::EVENTS_TAIL, soc::EVENTS_HEAD),
            host_lines,
            soc_lines,
            bulk,
            bulk_sent: 0,
            epoch,
            event_sequence: 0,
            beat: 0,
        }
    }

    /// Takes the next request; `None` while there is none, or while the last bulk still waits to be fetched. Requests that can't
    /// be read are answered here; there may be more after `None` only if the SoC goes on sending those.
    ///
    /// # Errors
    /// The SoC broke the channel's rules: the connection is over.
    pub fn poll(&mut self) -> Result<Option<(Asked, Call)>, ChannelError> {
        for _ in 0..self.requests.most_waiting() {
            if !self.bulk_is_free()? {
                break;
            }
            let Some((header, payload)) = self.requests.receive()? else { return Ok(None) };
            if header.epoch != self.epoch {
                return Err(ChannelError::Epoch(header.epoch));
            }
            let answered = match header.class {
                Class::Request => true,
                Class::Order => false,
                Class::Reply | Class::Event => return Err(ChannelError::Class(header.opcode)),
            };
            let asked = Asked { opcode: header.opcode, sequence: header.sequence, answered, deadline_ms: header.extra };
            match Call::decode(header.opcode, &payload) {
                Ok(Some(call)) => return Ok(Some((asked, call))),
                Ok(None) => {
                    self.refuse(asked, Status::UNKNOWN, "this host-kvm-shim doesn't know the call; upgrade it")?;
                }
                Err(Malformed) => self.refuse(asked, Status::MALFORMED, "the call's payload can't be read")?,
            }
        }
        Ok(None)
    }

    /// Answers a request; does nothing for an order.
    ///
    /// # Errors
    /// The ring is full, the bulk of another reply was not fetched yet, or the answer is too long: the connection is over.
    pub fn reply(&mut self, asked: Asked, payload: &[u8], bulk: &[u8]) -> Result<(), ChannelError> {
        if !asked.answered {
            return Ok(());
        }
        if bulk.len() > self.bulk.len().min(MOST_BULK) {
            return Err(ChannelError::TooLong(bulk.len()));
        }
        if !bulk.is_empty() {
            if !self.bulk_is_free()? {
                return Err(ChannelError::Full);
            }
            self.bulk.copy_in(0, bulk);
            self.bulk_sent += 1;
        }
        self.answer(asked, Status::OK, payload, bulk.len() as u32)
    }

    /// Answers that a request failed, with a sentence that says why.
    ///
    /// # Errors
    /// As [`Server::reply`].
    pub fn refuse(&mut self, asked: Asked, status: Status, why: &str) -> Result<(), ChannelError> {
        if !asked.answered {
            return Ok(());
        }
        self.answer(asked, status, &why.as_bytes()[..why.floor_char_boundary(MOST_PAYLOAD)], 0)
    }

    fn answer(&mut self, asked: Asked, status: Status, payload: &[u8], extra: u32) -> Result<(), ChannelError> {
        let header = Header {
            opcode: asked.opcode,
            class: Class::Reply,
            length: payload.len() as u32,
            sequence: asked.sequence,
            status,
            epoch: self.epoch,
            extra,
        };
        let head = self.replies.head();
        self.replies.send(&header, payload, head)
    }

    /// Reports an event.
    ///
    /// # Errors
    /// [`ChannelError::Full`]: the SoC doesn't read; the caller keeps the event or counts it as dropped.
    pub fn event(&mut self, event: &Event) -> Result<(), ChannelError> {
        let payload = event.encode();
        let header = Header {
            opcode: event.opcode(),
            class: Class::Event,
            length: payload.len() as u32,
            sequence: self.event_sequence.wrapping_add(1),
            status: Status::OK,
            epoch: self.epoch,
            extra: 0,
        };
        let head = self.events.head();
        self.events.send(&header, &payload, head)?;
        self.event_sequence = header.sequence;
        Ok(())
    }

    fn bulk_is_free(&self) -> Result<bool, ChannelError> {
        let fetched = self.soc_lines.load(soc::BULK_FETCHED);
        if fetched > self.bulk_sent {
            return Err(ChannelError::Head { head: fetched, tail: self.bulk_sent });
        }
        Ok(fetched == self.bulk_sent)
    }

    /// Counts this side's heartbeat up; call it about once a second.
    pub fn beat(&mut self) {
        self.beat += 1;
        self.host_lines.store(host::HEARTBEAT, self.beat);
    }

    /// The SoC's heartbeat: one load of local memory.
    pub fn soc_beat(&self) -> u64 {
        self.soc_lines.load(soc::HEARTBEAT)
    }
}
