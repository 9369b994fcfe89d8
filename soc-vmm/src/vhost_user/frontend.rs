//! The conversations with a back end.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::sys::eventfd::EventFd;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use zerocopy::{FromBytes, IntoBytes};

use super::VhostUserError;
use super::notices::Notices;
use super::record::Record;
use super::socket::{Socket, failed, take_notices};
use super::wire::{
    ConfigPart, F_LOG_ALL, F_PROTOCOL_FEATURES, Inflight, LogBase, MAX_CONFIG, MAX_REGIONS, MemRegion, MemTable,
    NEED_REPLY, Request, VRING_LOG, VringAddr, VringState, protocol,
};
use crate::dial::dial;
use crate::memory::GuestLog;

/// Memory that a back end may use.
#[derive(Clone, Copy, Debug)]
pub struct Region<'a> {
    /// The file: its size is sealed.
    pub file: BorrowedFd<'a>,
    /// Where in it the region begins.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// The address of its first byte in descriptors.
    pub guest: u64,
    /// The same for rings.
    pub user: u64,
}

/// What a back end is to serve.
#[derive(Debug)]
pub struct Setup<'a> {
    /// What was agreed on, of the features that it offers.
    pub features: u64,
    /// All memory that it may use: 1 to [`MAX_REGIONS`] regions.
    pub memory: &'a [Region<'a>],
    /// Where it notes what of the memory it writes; none: nowhere.
    pub log: Option<&'a GuestLog>,
    /// The queues.
    pub queues: &'a [QueueSetup<'a>],
}

/// A queue, as the back end is told of it.
#[derive(Debug)]
pub struct QueueSetup<'a> {
    /// Which one.
    pub index: usize,
    /// Entries.
    pub size: u16,
    /// The entry of the available ring that comes first.
    pub base: u16,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    /// The same as descriptors have it.
    pub used_guest: u64,
    /// Signalled when there is something in the available ring.
    pub kick: &'a EventFd,
    /// Signalled when there is something in the used ring.
    pub call: &'a EventFd,
    /// Whether it is turned on.
    pub enabled: bool,
}

/// A connection to a back end that has said what it can do. Dropped, it is closed.
#[derive(Debug)]
pub struct Frontend {
    socket: Socket,
    notices: Option<Notices>,
    features: u64,
    protocol: u64,
    queues: Option<u64>,
}

impl Frontend {
    /// Connects to the back end that listens at `path`. This conversation and each later one may take as long as `patience`. `records`: it
    /// is to keep a [`Record`], if it can.
    ///
    /// # Errors
    /// Nobody listens there, or he doesn't speak the protocol.
    pub fn connect(path: &Path, patience: Duration, records: bool) -> Result<Self, VhostUserError> {
        Self::new(dial(path, patience).map_err(VhostUserError::Connect)?, patience, records)
    }

    /// The same over a connection that is there.
    ///
    /// # Errors
    /// As [`Frontend::connect`].
    pub fn new(stream: UnixStream, patience: Duration, records: bool) -> Result<Self, VhostUserError> {
        let socket = Socket::new(stream, patience).map_err(failed("can't use the connection"))?;
        let mut frontend = Self { socket, notices: None, features: 0, protocol: 0, queues: None };
        frontend.negotiate(records)?;
        Ok(frontend)
    }

    /// The virtio features that it offers.
    pub fn features(&self) -> u64 {
        self.features & !(1 << F_PROTOCOL_FEATURES | 1 << F_LOG_ALL)
    }

    /// How many queues it has, if it says so.
    pub fn queues(&self) -> Option<u64> {
        self.queues
    }

    /// Whether it keeps a record of what is in flight.
    pub fn records(&self) -> bool {
        self.speaks(protocol::INFLIGHT_SHMFD)
    }

    /// Whether it can note which memory it writes.
    pub fn logs(&self) -> bool {
        self.speaks(protocol::LOG_SHMFD) && self.features >> F_LOG_ALL & 1 != 0
    }

    /// Becomes readable when it says something, or goes.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.socket.fd()
    }

    /// Becomes readable when it has a message of its own.
    pub fn channel(&self) -> Option<BorrowedFd<'_>> {
        self.notices.as_ref().map(Notices::fd)
    }

    /// Looks whether it is still there, without waiting; whether its configuration has changed.
    ///
    /// # Errors
    /// It isn't, or speaks out of turn.
    pub fn look(&mut self) -> Result<bool, VhostUserError> {
        self.socket.check()?;
        take_notices(&mut self.notices)?;
        Ok(self.notices.as_mut().is_some_and(Notices::take_change))
    }

    /// The first `len` bytes of the device's configuration, [`MAX_CONFIG`] at most.
    ///
    /// # Errors
    /// It has none, or not so much.
    pub fn config(&mut self, len: usize) -> Result<Vec<u8>, VhostUserError> {
        if !self.speaks(protocol::CONFIG) {
            return Err(VhostUserError::Lacks("configuration (VHOST_USER_PROTOCOL_F_CONFIG)"));
        }
        self.socket.begin();
        let len = len.min(MAX_CONFIG);
        let part = ConfigPart { offset: 0, size: len as u32, flags: 0 };
        let question = [part.as_bytes(), &vec![0; len]].concat();
        let answer = self.ask(Request::GetConfig, &question)?;
        match ConfigPart::read_from_prefix(&answer) {
            Ok((said, bytes)) if said.offset == 0 && said.size as usize == len && bytes.len() == len => {
                Ok(bytes.to_vec())
            }
            _ => Err(VhostUserError::Protocol("a configuration of another size than asked for")),
        }
    }

    /// Agrees on features, and starts queues over new memory. What is in flight goes into `record`, a new one if there is none, if it keeps
    /// one.
    ///
    /// # Errors
    /// It refuses, or is gone.
    pub fn start(&mut self, setup: &Setup<'_>, record: &mut Option<Record>) -> Result<(), VhostUserError> {
        let &Setup { features, memory, log, queues } = setup;
        self.socket.begin();
        let features = features | self.features & 1 << F_PROTOCOL_FEATURES;
        let log = log.filter(|_| self.logs());
        let (features, flags) = if log.is_some() { (features | 1 << F_LOG_ALL, VRING_LOG) } else { (features, 0) };
        if let Some(log) = log {
            let base = LogBase { size: log.size(), offset: 0 };
            self.socket.send(Request::SetLogBase, 0, base.as_bytes(), &[log.fd()])?;
            // It answers in any case, whatever.
            self.socket.answer(Request::SetLogBase, &mut self.notices)?;
        }
        self.tell(Request::SetFeatures, features.as_bytes(), &[])?;
        if self.records() {
            self.keep_record(queues, record)?;
        }
        self.tell_memory(memory)?;
        for queue in queues {
            let index = queue.index as u32;
            let state = |num| VringState { index, num };
            self.tell(Request::SetVringNum, state(queue.size.into()).as_bytes(), &[])?;
            self.tell(Request::SetVringBase, state(queue.base.into()).as_bytes(), &[])?;
            let QueueSetup { descriptors, available, used, used_guest, .. } = *queue;
            let log = if flags == 0 { 0 } else { used_guest };
            let addr = VringAddr { index, flags, descriptors, used, available, log };
            self.tell(Request::SetVringAddr, addr.as_bytes(), &[])?;
            let number = u64::from(index);
            self.tell(Request::SetVringKick, number.as_bytes(), &[queue.kick.as_fd()])?;
            self.tell(Request::SetVringCall, number.as_bytes(), &[queue.call.as_fd()])?;
        }
        if self.features >> F_PROTOCOL_FEATURES & 1 != 0 {
            for queue in queues {
                self.tell_enabled(queue.index, queue.enabled)?;
            }
        }
        if !self.speaks(protocol::REPLY_ACK) {
            // The answer comes once all of this is done.
            self.ask_number(Request::GetFeatures)?;
        }
        Ok(())
    }

    /// Turns a queue that was started on or off. It does nothing where the back end doesn't know of that: then all are on.
    ///
    /// # Errors
    /// It refuses, or is gone.
    pub fn enable(&mut self, queue: usize, on: bool) -> Result<(), VhostUserError> {
        if self.features >> F_PROTOCOL_FEATURES & 1 == 0 {
            return Ok(());
        }
        self.socket.begin();
        self.tell_enabled(queue, on)
    }

    /// Stops queues that were started: afterwards it uses their memory no more. For each, the entry of the available ring that it would have
    /// taken next.
    ///
    /// # Errors
    /// It has not let go of them in time, or is gone.
    pub fn stop(&mut self, queues: impl IntoIterator<Item = usize>) -> Result<Vec<(usize, u16)>, VhostUserError> {
        self.socket.begin();
        let mut stopped = Vec::new();
        for queue in queues {
            let index = queue as u32;
            let answer = self.ask(Request::GetVringBase, VringState { index, num: 0 }.as_bytes())?;
            match VringState::read_from_bytes(&answer) {
                Ok(state) if state.index == index => stopped.push((queue, state.num as u16)),
                _ => return Err(VhostUserError::Protocol("a stopped queue that is another one")),
            }
        }
        Ok(stopped)
    }

    /// Has it tell its network that the guest with that address is here now, if it can.
    ///
    /// # Errors
    /// It refuses, or is gone.
    pub fn announce(&mut self, mac: [u8; 6]) -> Result<(), VhostUserError> {
        if !self.speaks(protocol::RARP) {
            return Ok(());
        }
        self.socket.begin();
        let [a, b, c, d, e, f] = mac;
        self.tell(Request::SendRarp, &[a, b, c, d, e, f, 0, 0], &[])
    }

    /// Tells it what of which files is memory.
    fn tell_memory(&mut self, memory: &[Region<'_>]) -> Result<(), VhostUserError> {
        let memory = &memory[..memory.len().min(MAX_REGIONS)];
        let mut table = MemTable { count: memory.len() as u32, padding: 0 }.as_bytes().to_vec();
        for &Region { offset, size, guest, user, .. } in memory {
            table.extend_from_slice(MemRegion { guest, size, user, offset }.as_bytes());
        }
        let files: Vec<_> = memory.iter().map(|region| region.file).collect();
        self.tell(Request::SetMemTable, &table, &files)
    }

    /// Gives it the record, a new one if there is none.
    fn keep_record(&mut self, queues: &[QueueSetup<'_>], record: &mut Option<Record>) -> Result<(), VhostUserError> {
        let record = match record {
            Some(record) => record,
            None => {
                let count = queues.iter().map(|queue| queue.index as u16 + 1).max().unwrap_or(1);
                let entries = queues.iter().map(|queue| queue.size).max().unwrap_or(1);
                let asked = Inflight { size: 0, offset: 0, queues: count, entries, padding: 0 };
                let answer = self.ask(Request::GetInflightFd, asked.as_bytes())?;
                let said = Inflight::read_from_bytes(&answer)
                    .map_err(|_| VhostUserError::Protocol("a record of requests in flight that is none"))?;
                record.insert(Record::new(&asked, &said)?)
            }
        };
        self.tell(Request::SetInflightFd, record.what().as_bytes(), &[record.fd()])
    }

    fn negotiate(&mut self, records: bool) -> Result<(), VhostUserError> {
        self.socket.begin();
        self.features = self.ask_number(Request::GetFeatures)?;
        if self.features >> VIRTIO_F_VERSION_1 & 1 == 0 {
            return Err(VhostUserError::Lacks("virtio 1 (VIRTIO_F_VERSION_1)"));
        }
        if self.features >> F_PROTOCOL_FEATURES & 1 != 0 {
            let offered = self.ask_number(Request::GetProtocolFeatures)?;
            let known = [
                protocol::MQ,
                protocol::LOG_SHMFD,
                protocol::RARP,
                protocol::REPLY_ACK,
                protocol::BACKEND_REQ,
                protocol::CONFIG,
            ];
            let record = records.then_some(protocol::INFLIGHT_SHMFD);
            let wanted = offered & known.into_iter().chain(record).fold(0, |bits, bit| bits | 1 << bit);
            // Not acknowledged yet: whether it will acknowledge is part of what is said.
            self.socket.send(Request::SetProtocolFeatures, 0, wanted.as_bytes(), &[])?;
            self.protocol = wanted;
        }
        self.tell(Request::SetOwner, &[], &[])?;
        if self.speaks(protocol::MQ) {
            self.queues = Some(self.ask_number(Request::GetQueueNum)?);
        }
        if self.speaks(protocol::BACKEND_REQ) {
            let (notices, theirs) = Notices::pair().map_err(failed("no descriptors for the back end's messages"))?;
            self.tell(Request::SetBackendReqFd, &[], &[theirs.as_fd()])?;
            self.notices = Some(notices);
        }
        Ok(())
    }

    fn tell_enabled(&mut self, queue: usize, on: bool) -> Result<(), VhostUserError> {
        let state = VringState { index: queue as u32, num: on.into() };
        self.tell(Request::SetVringEnable, state.as_bytes(), &[])
    }

    fn speaks(&self, feature: u32) -> bool {
        self.protocol >> feature & 1 != 0
    }

    /// Sends what has no answer of its own; waits until it is done, if the back end says when.
    fn tell(&mut self, request: Request, payload: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), VhostUserError> {
        if !self.speaks(protocol::REPLY_ACK) {
            return self.socket.send(request, 0, payload, fds);
        }
        self.socket.send(request, NEED_REPLY, payload, fds)?;
        match self.number(request)? {
            0 => Ok(()),
            code => Err(VhostUserError::Refused { request, code }),
        }
    }

    fn ask(&mut self, request: Request, payload: &[u8]) -> Result<Vec<u8>, VhostUserError> {
        self.socket.send(request, 0, payload, &[])?;
        self.socket.answer(request, &mut self.notices)
    }

    fn ask_number(&mut self, request: Request) -> Result<u64, VhostUserError> {
        self.socket.send(request, 0, &[], &[])?;
        self.number(request)
    }

    fn number(&mut self, request: Request) -> Result<u64, VhostUserError> {
        let answer = self.socket.answer(request, &mut self.notices)?;
        u64::read_from_bytes(&answer).map_err(|_| VhostUserError::Protocol("an answer that is no number of 8 bytes"))
    }
}
