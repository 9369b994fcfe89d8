//! What a socket device does with its queues (virtio 1.2 §5.10.6): packets from the guest to their connections, packets of
//! connections to the guest, one of each in turn.

use std::collections::{HashMap, VecDeque};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;

use super::connection::Connection;
use super::handshake::wanted_port;
use super::packet::{HEADER, Header, STREAM, op};
use super::{BUFFER, EVENTS, HOST_CID, MAX_CONNECTIONS, RECEIVE, TRANSMIT, VsockConfig, path_of};
use crate::dial::dial_now;
use crate::persist::{StateError, States};
use crate::virtio::complaint::Complaints;
use crate::virtio::session::Control;
use crate::virtio::watch::Watch;
use crate::virtio::{Chain, Config, Engine, Queue, QueueError, Session, Wait};

/// Packets of each direction before the other one has its turn.
const TURN: usize = 64;
/// Resets that may wait for the guest to take them; before there are more, nothing is taken of it.
const RESETS: usize = 64;
/// How long a peer may take to name a port and the guest to answer, together.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a failed accept, so that a lack of descriptors doesn't spin.
const PAUSE: Duration = Duration::from_millis(100);
/// The first port of the host's side for connections that begin here.
const FIRST_PORT: u32 = 1 << 30;
/// The event VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (virtio 1.2 §5.10.6.7).
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();
/// What the watch calls the listener; connections have the numbers behind it.
const LISTENER: u64 = 0;

/// A device's engine.
pub struct VsockEngine {
    pub(super) vsock: VsockConfig,
    watch: Watch,
    /// The session that was served last.
    control: Option<Arc<Control>>,
    /// The driver is to be told that its connections are gone: they were another process's.
    pub(super) moved: bool,
    /// There may be somebody to accept; not before then.
    knocked: bool,
    pause: Option<Instant>,
    /// Peers that have yet to name a port, and connections, by number; the latter also by the host's port and the guest's.
    greeting: HashMap<u64, UnixStream>,
    connections: HashMap<u64, Connection>,
    numbers: HashMap<(u32, u32), u64>,
    last_number: u64,
    next_port: u32,
    /// Who has something to do.
    active: VecDeque<u64>,
    /// Until when those are what they want to be, in order.
    deadlines: VecDeque<(Instant, u64)>,
    /// Resets for packets of no connection.
    resets: VecDeque<Header>,
    chain: Chain,
    buffer: Vec<u8>,
    complaints: Complaints,
}

impl VsockEngine {
    /// The engine of that device.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new(vsock: VsockConfig) -> io::Result<Self> {
        let watch = Watch::new()?;
        watch.add(vsock.socket.listener(), LISTENER)?;
        Ok(Self {
            vsock,
            watch,
            control: None,
            moved: false,
            knocked: true,
            pause: None,
            greeting: HashMap::new(),
            connections: HashMap::new(),
            numbers: HashMap::new(),
            last_number: LISTENER,
            next_port: FIRST_PORT,
            active: VecDeque::new(),
            deadlines: VecDeque::new(),
            resets: VecDeque::new(),
            chain: Chain::default(),
            buffer: vec![0; BUFFER as usize],
            complaints: Complaints::default(),
        })
    }

    /// A driver that begins has no connections.
    pub(super) fn meet(&mut self, session: &Session) {
        if self.control.as_ref().is_some_and(|control| Arc::ptr_eq(control, &session.control)) {
            return;
        }
        self.control = Some(session.control.clone());
        self.moved = false;
        self.connections.clear();
        self.numbers.clear();
        self.active.clear();
        self.resets.clear();
    }

    fn is_full(&self) -> bool {
        self.connections.len() + self.greeting.len() >= MAX_CONNECTIONS
    }

    /// Has a socket watched; its number.
    fn number(&mut self, socket: &UnixStream) -> io::Result<u64> {
        socket.set_nonblocking(true)?;
        self.last_number += 1;
        self.watch.add(socket, self.last_number)?;
        Ok(self.last_number)
    }

    fn activate(&mut self, number: u64) {
        if let Some(connection) = self.connections.get_mut(&number)
            && !std::mem::replace(&mut connection.active, true)
        {
            self.active.push_back(number);
        }
    }

    /// Takes note of what happened to sockets; whether there may be more.
    fn look(&mut self) -> bool {
        let mut greeted = Vec::new();
        let mut active = Vec::new();
        let all = self.watch.changes(|change| match change.token {
            LISTENER => self.knocked = true,
            number => match self.connections.get_mut(&number) {
                Some(connection) => {
                    connection.note(change);
                    active.push(number);
                }
                None => greeted.push(number),
            },
        });
        active.into_iter().for_each(|number| self.activate(number));
        greeted.into_iter().for_each(|number| self.greet(number));
        !all
    }

    /// Lets peers in, while there is room.
    fn accept(&mut self) {
        while self.knocked && !self.is_full() && self.pause.is_none_or(|until| until <= Instant::now()) {
            self.pause = None;
            let accepted = self.vsock.socket.listener().accept().and_then(|(socket, _)| {
                let number = self.number(&socket)?;
                Ok((number, socket))
            });
            match accepted {
                Ok((number, socket)) => {
                    self.greeting.insert(number, socket);
                    self.deadlines.push_back((Instant::now() + PATIENCE, number));
                    self.greet(number);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.knocked = false,
                Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {}
                Err(error) => {
                    let path = self.vsock.socket.path().display();
                    self.complaints.say(&self.vsock.name, format_args!("can't accept on {path}: {error}; tries on"));
                    self.pause = Some(Instant::now() + PAUSE);
                }
            }
        }
    }

    /// Hears which port a peer wants.
    fn greet(&mut self, number: u64) {
        let Some(socket) = self.greeting.get(&number) else { return };
        match wanted_port(socket) {
            Ok(None) => {}
            Ok(Some(peer)) => {
                let Some(socket) = self.greeting.remove(&number) else { return };
                while self.numbers.contains_key(&(self.next_port, peer)) {
                    self.next_port = self.port_behind();
                }
                let local = self.next_port;
                self.next_port = self.port_behind();
                self.insert(number, Connection::new(socket, local, peer, None));
            }
            // It said something else, or has gone.
            Err(_) => drop(self.greeting.remove(&number)),
        }
    }

    /// Ports of this side stay above those that the guest's programs are likely to ask for.
    fn port_behind(&self) -> u32 {
        FIRST_PORT | self.next_port.wrapping_add(1) & (FIRST_PORT - 1)
    }

    fn insert(&mut self, number: u64, connection: Connection) {
        self.numbers.insert((connection.local, connection.peer), number);
        self.connections.insert(number, connection);
        self.activate(number);
    }

    /// Ends what has waited for too long.
    fn expire(&mut self) {
        let now = Instant::now();
        while let Some(&(until, number)) = self.deadlines.front() {
            let waits = self.connections.get(&number).is_some_and(Connection::is_waiting);
            if (waits || self.greeting.contains_key(&number)) && until > now {
                return;
            }
            self.deadlines.pop_front();
            self.greeting.remove(&number);
            if let Some(connection) = self.connections.get_mut(&number).filter(|_| waits) {
                connection.dead = true;
                self.activate(number);
            }
        }
    }

    /// Takes packets of the guest; whether there are more.
    fn listen(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if self.resets.len() >= RESETS {
                queue.publish()?;
                return Ok(false);
            }
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            self.packet(queue)?;
            queue.push(self.chain.head(), 0)?;
        }
        queue.publish()?;
        Ok(true)
    }

    fn packet(&mut self, queue: &Queue) -> Result<(), QueueError> {
        let mut bytes = [0; HEADER];
        if self.chain.readable() < HEADER as u64 || self.chain.writable() > 0 {
            return Err(QueueError::Broken("a packet without a header"));
        }
        self.chain.read(queue.lease(), &mut bytes)?;
        let header = Header::read(&bytes);
        if u64::from(header.len) > self.chain.readable() {
            return Err(QueueError::Broken("a packet that is shorter than it says"));
        }
        // Whose it isn't gets no answer either.
        if header.src_cid != u64::from(self.vsock.cid) {
            return Ok(());
        }
        let key = (header.dst_port, header.src_port);
        let number = self.numbers.get(&key).copied();
        if header.op == op::RST {
            if let Some(number) = number {
                self.release(number);
            }
            return Ok(());
        }
        let known = header.dst_cid == HOST_CID && header.kind == STREAM;
        let Some(number) = number.filter(|_| known) else {
            if !known || header.op != op::REQUEST || !self.connect(&header) {
                self.resets.push_back(header.reset());
            }
            return Ok(());
        };
        let Some(connection) = self.connections.get_mut(&number) else { return Ok(()) };
        // What comes behind its end is of no interest.
        if !connection.dead {
            let chain = &mut self.chain;
            let payload = |bytes: &mut [u8]| chain.read(queue.lease(), bytes);
            connection.dead |= !connection.take(&header, payload, &mut self.buffer)?;
        }
        self.activate(number);
        Ok(())
    }

    /// Connects to the socket of a port; whether somebody is there.
    fn connect(&mut self, header: &Header) -> bool {
        if self.is_full() {
            self.complaints.say(&self.vsock.name, "the guest has as many connections as it may; it gets no other");
            return false;
        }
        let path = path_of(self.vsock.socket.path(), header.dst_port);
        let made = dial_now(&path).and_then(|socket| Ok((self.number(&socket)?, socket)));
        let Ok((number, socket)) = made else { return false };
        self.insert(number, Connection::new(socket, header.dst_port, header.src_port, Some(header)));
        true
    }

    /// The guest knows that it is over. What it sent before it ended it itself is still sent.
    fn release(&mut self, number: u64) {
        let Some(connection) = self.connections.get(&number) else { return };
        let key = (connection.local, connection.peer);
        if self.numbers.get(&key) == Some(&number) {
            self.numbers.remove(&key);
        }
        if !connection.has_rest() {
            self.connections.remove(&number);
        }
    }

    /// Tells the driver that its connections are gone (§5.10.6.7), once it has a buffer for that.
    fn tell_of_move(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        if !self.moved || !(queue.pop(&mut self.chain)? || queue.allow_kicks()? && queue.pop(&mut self.chain)?) {
            return Ok(());
        }
        if self.chain.readable() > 0 || self.chain.writable() < TRANSPORT_RESET.len() as u64 {
            return Err(QueueError::Broken("a buffer for events that can't hold one"));
        }
        self.chain.write(queue.lease(), &TRANSPORT_RESET)?;
        queue.push(self.chain.head(), TRANSPORT_RESET.len() as u32)?;
        self.moved = false;
        queue.publish()
    }

    /// Sends the sockets what waits for them.
    fn flush(&mut self) {
        let mut done = Vec::new();
        for number in &self.active {
            let Some(connection) = self.connections.get_mut(number) else { continue };
            connection.flush();
            let known = self.numbers.get(&(connection.local, connection.peer)) == Some(number);
            if !known && !connection.has_rest() {
                done.push(*number);
            }
        }
        for number in done {
            self.connections.remove(&number);
        }
    }

    /// Hands the guest packets; whether there are more, and room for them.
    fn tell(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if !self.has_news() {
                queue.publish()?;
                return Ok(false);
            }
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            let room = self.chain.writable().saturating_sub(HEADER as u64).min(BUFFER.into()) as usize;
            if self.chain.readable() > 0 || room == 0 {
                return Err(QueueError::Broken("a buffer for packets that can't hold one"));
            }
            match self.next(room) {
                Some(header) => {
                    self.chain.write(queue.lease(), &header.bytes())?;
                    self.chain.write(queue.lease(), &self.buffer[..header.len as usize])?;
                    queue.push(self.chain.head(), HEADER as u32 + header.len)?;
                }
                None => queue.put_back(1),
            }
        }
        queue.publish()?;
        Ok(true)
    }

    /// Whether there may be a packet for the guest: the first in the list of the active is who may have it.
    fn has_news(&mut self) -> bool {
        while let Some(number) = self.active.front() {
            match self.connections.get_mut(number) {
                Some(connection) if self.numbers.get(&(connection.local, connection.peer)) == Some(number) => {
                    if connection.may_have() {
                        return true;
                    }
                    connection.active = false;
                }
                Some(connection) => connection.active = false,
                None => {}
            }
            self.active.pop_front();
        }
        !self.resets.is_empty()
    }

    fn next(&mut self, room: usize) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        let number = self.active.pop_front()?;
        let connection = self.connections.get_mut(&number)?;
        // Others first, then this one again.
        self.active.push_back(number);
        let packet = connection.next(&mut self.buffer[..room])?;
        let header = connection.header(self.vsock.cid.into(), packet);
        if packet.op == op::RST {
            self.release(number);
        }
        Some(header)
    }
}

impl Engine for VsockEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        self.meet(session);
        let mut more = self.look();
        self.accept();
        self.expire();
        if let Some(Some(queue)) = session.queues.get_mut(EVENTS) {
            self.tell_of_move(queue)?;
        }
        if let Some(Some(queue)) = session.queues.get_mut(TRANSMIT) {
            more |= self.listen(queue)?;
        }
        self.flush();
        if let Some(Some(queue)) = session.queues.get_mut(RECEIVE) {
            let full = self.resets.len() >= RESETS;
            more |= self.tell(queue)?;
            // There is room for answers again.
            more |= full && self.resets.len() < RESETS;
        }
        if more {
            return Ok(Wait::NOTHING);
        }
        let deadline = self.deadlines.front().map(|(until, _)| *until);
        let next = [deadline, self.pause].into_iter().flatten().min();
        Ok(Wait {
            source: EpollFlags::EPOLLIN,
            timeout: next.map(|until| until.saturating_duration_since(Instant::now())),
        })
    }

    /// What was taken is given back before anything else is done. Connections stay as they are, for a session that goes on here.
    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        self.meet(session);
        Ok(None)
    }

    fn save_into(&self, at: &str, states: &mut States, _: Option<&Session>) {
        self.save(at, states);
    }

    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        self.restore(at, states, config, session.as_deref())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }
}
