//! A stream connection: who may send how much, and who has ended what (virtio 1.2 §5.10.6.3, §5.10.6.5, §5.10.6.6).

use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::BUFFER;
use super::packet::{Header, NEITHER, NO_RECEIVE, NO_SEND, op};
use crate::virtio::watch::Change;

/// Bytes passed on of which the guest isn't told before it is worth a packet.
const WORTH_TELLING: u32 = BUFFER / 2;

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    socket: UnixStream,
    /// The host's port and the guest's.
    pub(super) local: u32,
    pub(super) peer: u32,
    /// It stands.
    established: bool,
    /// It is to be ended by a reset.
    pub(super) dead: bool,
    /// It is in the list of those that have something to do.
    pub(super) active: bool,

    readable: bool,
    writable: bool,
    hung_up: bool,
    /// The peer on the SoC sends no more, and all of it was read.
    ended: bool,

    /// What the guest sent and the socket didn't take yet, and how much of it is sent.
    unsent: Vec<u8>,
    sent: usize,
    /// Bytes that the socket took, and what of that the guest was told.
    forwarded: u32,
    told_forwarded: u32,

    /// Bytes that the guest was sent; its window.
    to_guest: u32,
    guest_room: u32,
    guest_forwarded: u32,

    /// What the guest has shut down, and what it was told to be.
    guest_shut: u32,
    told_shut: u32,
    /// The socket knows that the guest sends no more.
    passed_end: bool,

    /// Packets that are due.
    due_open: Option<u16>,
    due_credit: bool,
    asked_credit: bool,
}

/// A packet to the guest, but for what the connection adds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Outgoing {
    pub(super) op: u16,
    flags: u32,
    pub(super) len: usize,
}

impl Connection {
    /// One that the guest asked for, or one that it is to be asked for.
    pub(super) fn new(socket: UnixStream, local: u32, peer: u32, request: Option<&Header>) -> Self {
        Self {
            socket,
            local,
            peer,
            established: request.is_some(),
            dead: false,
            active: false,
            readable: true,
            writable: true,
            hung_up: false,
            ended: false,
            unsent: Vec::new(),
            sent: 0,
            forwarded: 0,
            told_forwarded: 0,
            to_guest: 0,
            guest_room: request.map_or(0, |header| header.buf_alloc),
            guest_forwarded: 0,
            guest_shut: 0,
            told_shut: 0,
            passed_end: false,
            due_open: Some(if request.is_some() { op::RESPONSE } else { op::REQUEST }),
            due_credit: false,
            asked_credit: false,
        }
    }

    pub(super) fn note(&mut self, change: Change) {
        self.readable |= change.readable;
        self.writable |= change.writable;
        self.hung_up |= change.hung_up;
    }

    /// Whether the guest was asked and hasn't answered.
    pub(super) fn is_waiting(&self) -> bool {
        !self.established
    }

    /// Whether the peer hasn't taken all that the guest sent before it ended the connection.
    pub(super) fn has_rest(&self) -> bool {
        self.guest_shut == NEITHER && self.sent < self.unsent.len()
    }

    /// Takes the guest's packet; false: it breaks a rule, and the connection is to be reset. `payload` reads what is in it.
    pub(super) fn take<E>(
        &mut self,
        header: &Header,
        payload: impl FnOnce(&mut [u8]) -> Result<(), E>,
        scratch: &mut [u8],
    ) -> Result<bool, E> {
        let passed = header.fwd_cnt.wrapping_sub(self.guest_forwarded);
        if passed > self.to_guest.wrapping_sub(self.guest_forwarded) {
            // It says that it passed on what it was never sent.
            return Ok(false);
        }
        (self.guest_forwarded, self.guest_room) = (header.fwd_cnt, header.buf_alloc);
        self.asked_credit &= self.credit() == 0;
        match (header.op, self.established) {
            (op::RESPONSE, false) => {
                self.established = true;
                // The first bytes in an empty socket: it takes them, or is gone.
                let answer = format!("OK {}\n", self.local);
                return Ok((&self.socket).write(answer.as_bytes()).is_ok_and(|count| count == answer.len()));
            }
            (op::RW, true) => {
                let held = self.unsent.len() - self.sent;
                if self.guest_shut & NO_SEND != 0 || held + header.len as usize > BUFFER as usize {
                    return Ok(false);
                }
                let bytes = &mut scratch[..header.len as usize];
                payload(bytes)?;
                self.send(bytes);
            }
            (op::SHUTDOWN, true) => {
                self.guest_shut |= header.flags & NEITHER;
                self.flush();
                self.dead |= self.guest_shut == NEITHER;
            }
            (op::CREDIT_UPDATE, true) => {}
            (op::CREDIT_REQUEST, true) => self.due_credit = true,
            _ => return Ok(false),
        }
        Ok(true)
    }

    fn send(&mut self, bytes: &[u8]) {
        self.flush();
        let now = if self.sent == self.unsent.len() { self.write(bytes) } else { 0 };
        self.unsent.extend_from_slice(&bytes[now..]);
    }

    /// Sends what waits for the socket.
    pub(super) fn flush(&mut self) {
        while self.sent < self.unsent.len() {
            let rest = std::mem::take(&mut self.unsent);
            let count = self.write(&rest[self.sent..]);
            self.unsent = rest;
            self.sent += count;
            if count == 0 {
                // What is sent needs no room.
                if self.sent > BUFFER as usize / 2 {
                    self.unsent.drain(..std::mem::take(&mut self.sent));
                }
                return;
            }
        }
        self.unsent.clear();
        self.sent = 0;
        if self.guest_shut & NO_SEND != 0 && !std::mem::replace(&mut self.passed_end, true) {
            // One that is gone needs no end.
            let _ = self.socket.shutdown(Shutdown::Write);
        }
    }

    /// Writes what the socket takes at once.
    fn write(&mut self, bytes: &[u8]) -> usize {
        let mut written = 0;
        while self.writable && written < bytes.len() {
            match (&self.socket).write(&bytes[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => self.writable = false,
                Err(_) => {
                    // Nobody takes what the guest sends: what is left of it is dropped, and the guest is told.
                    self.dead = true;
                    self.forwarded = self.forwarded.wrapping_add(bytes.len() as u32);
                    return bytes.len();
                }
            }
        }
        self.forwarded = self.forwarded.wrapping_add(written as u32);
        self.due_credit |= self.forwarded.wrapping_sub(self.told_forwarded) >= WORTH_TELLING;
        written
    }

    /// Bytes that the guest has room for.
    fn credit(&self) -> u32 {
        self.guest_room.saturating_sub(self.to_guest.wrapping_sub(self.guest_forwarded))
    }

    /// Whether [`Connection::next`] may have something.
    pub(super) fn may_have(&self) -> bool {
        self.dead
            || self.due_open.is_some()
            || self.established
                && (self.due_credit
                    || self.new_shut() != 0
                    || self.may_read() && (self.credit() > 0 || !self.asked_credit))
    }

    fn may_read(&self) -> bool {
        self.readable && !self.ended && self.guest_shut & NO_RECEIVE == 0
    }

    /// What the guest doesn't know yet to be shut.
    fn new_shut(&self) -> u32 {
        let sends = if self.ended { NO_SEND } else { 0 };
        let over = self.ended || self.guest_shut & NO_RECEIVE != 0;
        let gone = if self.hung_up && over { NEITHER } else { 0 };
        (sends | gone) & !self.told_shut
    }

    /// The next packet for the guest; data at the front of `buffer`, which is what it has room for.
    pub(super) fn next(&mut self, buffer: &mut [u8]) -> Option<Outgoing> {
        let plain = |op| Some(Outgoing { op, flags: 0, len: 0 });
        if self.dead {
            return plain(op::RST);
        }
        if let Some(op) = self.due_open.take() {
            return plain(op);
        }
        if !self.established {
            return None;
        }
        if self.may_read() {
            if self.credit() == 0 {
                if !std::mem::replace(&mut self.asked_credit, true) {
                    return plain(op::CREDIT_REQUEST);
                }
            } else if let Some(len) = self.read(buffer) {
                self.to_guest = self.to_guest.wrapping_add(len as u32);
                return Some(Outgoing { op: op::RW, flags: 0, len });
            } else if self.dead {
                return plain(op::RST);
            }
        }
        let new = self.new_shut();
        if new != 0 {
            self.told_shut |= new;
            return Some(Outgoing { op: op::SHUTDOWN, flags: self.told_shut, len: 0 });
        }
        if self.due_credit { plain(op::CREDIT_UPDATE) } else { None }
    }

    fn read(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let most = buffer.len().min(self.credit() as usize);
        match (&self.socket).read(&mut buffer[..most]) {
            Ok(0) => self.ended = true,
            Ok(count) => return Some(count),
            Err(error) if error.kind() == ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            // A peer that went with bytes unread resets its end; what it sent before was read.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.ended = true,
            Err(_) => self.dead = true,
        }
        None
    }

    /// The header of a packet; what it tells the guest counts as told.
    pub(super) fn header(&mut self, cid: u64, packet: Outgoing) -> Header {
        self.told_forwarded = self.forwarded;
        self.due_credit = false;
        Header {
            src_cid: super::HOST_CID,
            dst_cid: cid,
            src_port: self.local,
            dst_port: self.peer,
            len: packet.len as u32,
            kind: super::packet::STREAM,
            op: packet.op,
            flags: packet.flags,
            buf_alloc: BUFFER,
            fwd_cnt: self.forwarded,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_go_on_behind_their_end() {
        let (socket, mut peer) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        let near = u32::MAX - 10;
        let window = |op, len, fwd_cnt| Header { op, len, fwd_cnt, buf_alloc: 30, ..Header::default() };
        let mut connection = Connection::new(socket, 1, 2, Some(&window(op::REQUEST, 0, 0)));
        (connection.to_guest, connection.guest_forwarded) = (near, near);
        (connection.forwarded, connection.told_forwarded) = (near, near);
        let mut buffer = [0; 100];
        assert_eq!(connection.next(&mut buffer).map(|packet| packet.op), Some(op::RESPONSE));
        peer.write_all(&[7; 50]).unwrap();
        assert_eq!(connection.next(&mut buffer).map(|packet| (packet.op, packet.len)), Some((op::RW, 30)));
        assert_eq!(connection.next(&mut buffer).map(|packet| packet.op), Some(op::CREDIT_REQUEST));
        assert_eq!(connection.next(&mut buffer), None);
        let take = |connection: &mut Connection, header| {
            let fill = |bytes: &mut [u8]| -> Result<(), ()> {
                bytes.fill(9);
                Ok(())
            };
            connection.take(&header, fill, &mut [0; 100]).unwrap()
        };
        // Of 30 bytes, 15 are passed on; then 15 more, in a packet with data.
        assert!(take(&mut connection, window(op::CREDIT_UPDATE, 0, near.wrapping_add(15))));
        assert_eq!(connection.next(&mut buffer).map(|packet| packet.len), Some(15));
        assert!(take(&mut connection, window(op::RW, 20, near.wrapping_add(45))));
        assert_eq!(connection.header(3, Outgoing { op: op::RW, flags: 0, len: 0 }).fwd_cnt, 9);
        // Back is no way for a count, nor is further than what was sent.
        assert!(!take(&mut connection, window(op::CREDIT_UPDATE, 0, near.wrapping_add(44))));
        assert!(!take(&mut connection, window(op::CREDIT_UPDATE, 0, near.wrapping_add(46))));
    }
}
