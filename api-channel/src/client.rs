//! The SoC's end: asks, and takes what comes back.

use std::collections::BTreeMap;

use ioreq_ring::BusMemory;

use crate::bulk;
use crate::call::Call;
use crate::event::Event;
use crate::lines::{host, soc};
use crate::message::{ChannelError, Class, HEADER, Header, Status};
use crate::ring::{Consumer, Producer};

/// The channel's windows as the SoC sees them: `C` card memory, `M` host memory by DMA.
#[derive(Debug)]
pub struct ClientWindows<C, M> {
    /// Region *host lines*.
    pub host_lines: C,
    /// Region *replies*.
    pub replies: C,
    /// Region *events*.
    pub events: C,
    /// Region *SoC lines*.
    pub soc_lines: M,
    /// Region *requests*.
    pub requests: M,
    /// Region *bulk*, in the outbox.
    pub bulk: M,
}

/// What the host said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Incoming {
    /// The answer to the request with this sequence.
    Reply {
        /// The request.
        sequence: u32,
        /// How it ended.
        status: Status,
        /// The reply's payload; where `status` is an error, a sentence.
        payload: Vec<u8>,
        /// What was too long for it.
        bulk: Vec<u8>,
    },
    /// Something happened.
    Event(Event),
}

/// Most requests that wait for an answer: more than the ring holds, so that a peer that answers is never held up.
const MOST_WAITING: usize = 4096;

/// The SoC's end of the channel, free of I/O: after [`Client::send`] raise the host's channel vector, and call [`Client::poll`]
/// whenever the channel's doorbell rang.
#[derive(Debug)]
pub struct Client<C, M> {
    requests: Producer<M, C>,
    replies: Consumer<C, M>,
    events: Consumer<C, M>,
    host_lines: C,
    soc_lines: M,
    bulk: M,
    bulk_fetched: u64,
    epoch: u64,
    /// Whether the host's words are of this epoch.
    host_is_here: bool,
    sequence: u32,
    /// Requests that wait: sequence → opcode.
    waiting: BTreeMap<u32, u16>,
    beat: u64,
    /// Bytes of messages sent and received.
    bytes: (u64, u64),
}

impl<C: BusMemory + Clone, M: BusMemory + Clone> Client<C, M> {
    /// A client of a new epoch: zeroes this side's words, so it comes before the SoC header that tells the host of the epoch.
    pub fn new(windows: ClientWindows<C, M>, epoch: u64) -> Self {
        let ClientWindows { host_lines, replies, events, soc_lines, requests, bulk } = windows;
        soc::ALL.iter().for_each(|word| soc_lines.store(*word, 0));
        let consumer = |ring, tail, head| Consumer {
            ring,
            tail_word: (host_lines.clone(), tail),
            head_word: (soc_lines.clone(), head),
            head: 0,
        };
        Self {
            requests: Producer {
                ring: requests,
                tail_word: (soc_lines.clone(), soc::REQUESTS_TAIL),
                head_word: (host_lines.clone(), host::REQUESTS_HEAD),
                tail: 0,
            },
            replies: consumer(replies, host::REPLIES_TAIL, soc::REPLIES_HEAD),
            events: consumer(events, host::EVENTS_TAIL, soc::EVENTS_HEAD),
            host_lines,
            soc_lines,
            bulk,
            bulk_fetched: 0,
            epoch,
            host_is_here: false,
            sequence: 0,
            waiting: BTreeMap::new(),
            beat: 0,
            bytes: (0, 0),
        }
    }

    /// Sends a call as a request that the host should begin within `deadline_ms` (0: no limit); returns its sequence.
    ///
    /// # Errors
    /// The ring is full, the call too long, or too many calls were never answered; nothing was sent.
    pub fn send(&mut self, call: &Call, deadline_ms: u32) -> Result<u32, ChannelError> {
        if self.waiting.len() == MOST_WAITING {
            return Err(ChannelError::Unanswered(MOST_WAITING));
        }
        let sequence = self.put(call, Class::Request, deadline_ms)?;
        self.waiting.insert(sequence, call.opcode());
        Ok(sequence)
    }

    /// Sends a call that is not answered.
    ///
    /// # Errors
    /// The ring is full, or the call too long; nothing was sent.
    pub fn order(&mut self, call: &Call) -> Result<(), ChannelError> {
        self.put(call, Class::Order, 0).map(drop)
    }

    fn put(&mut self, call: &Call, class: Class, extra: u32) -> Result<u32, ChannelError> {
        let sequence = self.sequence.wrapping_add(1);
        let payload = call.encode();
        let header = Header {
            opcode: call.opcode(),
            class,
            length: payload.len() as u32,
            sequence,
            status: Status::OK,
            epoch: self.epoch,
            extra,
        };
        // A host that isn't here yet has read nothing.
        let head = if self.meet() { self.requests.head() } else { 0 };
        self.requests.send(&header, &payload, head)?;
        self.bytes.0 += (HEADER + payload.len()) as u64;
        self.sequence = sequence;
        Ok(sequence)
    }

    /// Whether the host has begun this connection: only then its words are to be believed.
    fn meet(&mut self) -> bool {
        self.host_is_here = self.host_is_here || self.host_lines.load(host::EPOCH) == self.epoch;
        self.host_is_here
    }

    /// Takes the next thing that the host said; replies first. There may be more after `None` only if the host goes on sending events
    /// that this side doesn't know.
    ///
    /// # Errors
    /// The host broke the channel's rules: the connection is over.
    pub fn poll(&mut self) -> Result<Option<Incoming>, ChannelError> {
        if !self.meet() {
            return Ok(None);
        }
        if let Some((header, payload)) = self.replies.receive()? {
            return self.reply(&header, payload).map(Some);
        }
        for _ in 0..self.events.most_waiting() {
            let Some((header, payload)) = self.events.receive()? else { break };
            self.belongs(&header, Class::Event)?;
            match Event::decode(header.opcode, &payload) {
                Ok(Some(event)) => return Ok(Some(Incoming::Event(event))),
                // A newer host's event: nothing that this side could act on.
                Ok(None) => {}
                Err(_) => return Err(ChannelError::Class(header.opcode)),
            }
        }
        Ok(None)
    }

    fn reply(&mut self, header: &Header, payload: Vec<u8>) -> Result<Incoming, ChannelError> {
        self.belongs(header, Class::Reply)?;
        if self.waiting.remove(&header.sequence) != Some(header.opcode) {
            return Err(ChannelError::Class(header.opcode));
        }
        let mut bulk = Vec::new();
        if header.extra != 0 {
            if header.extra as usize > self.bulk.len().min(bulk::MOST) {
                return Err(ChannelError::Bulk(header.extra));
            }
            bulk.resize(header.extra as usize, 0);
            self.bulk.copy_out(0, &mut bulk);
            self.bulk_fetched += 1;
            self.soc_lines.store(soc::BULK_FETCHED, self.bulk_fetched);
        }
        Ok(Incoming::Reply { sequence: header.sequence, status: header.status, payload, bulk })
    }

    fn belongs(&mut self, header: &Header, class: Class) -> Result<(), ChannelError> {
        if header.epoch != self.epoch {
            return Err(ChannelError::Epoch(header.epoch));
        }
        if header.class != class {
            return Err(ChannelError::Class(header.opcode));
        }
        let bulk = if class == Class::Reply { header.extra } else { 0 };
        self.bytes.1 += HEADER as u64 + u64::from(header.length) + u64::from(bulk);
        Ok(())
    }

    /// Bytes of messages so far, headers and bulk included: sent and received.
    pub fn bytes(&self) -> (u64, u64) {
        self.bytes
    }

    /// Counts this side's heartbeat up; call it about once a second.
    pub fn beat(&mut self) {
        self.beat += 1;
        self.soc_lines.store(soc::HEARTBEAT, self.beat);
    }

    /// The host's heartbeat: one load of local memory. Silent for seconds: suspend and report, never destroy.
    pub fn host_beat(&self) -> u64 {
        self.host_lines.load(host::HEARTBEAT)
    }
}
