//! A disk of another process's, by its NBD server: what is asked by several threads is under way at once, on one connection. A connection
//! that broke stays broken, and every call says why.

mod handshake;

use std::collections::HashMap;
use std::io::{BufReader, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};

use zerocopy::IntoBytes;

use super::stream::get;
use super::wire::{REPLY_MAGIC, Reply, Request, command, flag};
use super::{Address, NbdError, PIECE, REQUEST_MOST, Socket, Stream};
use crate::block::{BlockBackend, BlockError, check_range};

pub use handshake::{Offer, negotiate};

/// Bytes of a request that moves none, at most: a whole number of anything.
const CHANGE_MOST: u64 = 1 << 30;

/// A disk by NBD.
pub struct NbdDisk {
    /// Where it is, and its name there.
    name: String,
    offer: Offer,
    read_only: bool,
    /// For requests, one at a time.
    sender: Mutex<Socket>,
    /// The same connection, to end it.
    socket: Socket,
    cookies: AtomicU64,
    waiting: Arc<Mutex<Waiting>>,
    reader: Option<JoinHandle<()>>,
}

/// Requests that are not answered yet.
#[derive(Default)]
struct Waiting {
    by_cookie: HashMap<u64, Question>,
    /// Nothing is answered any more.
    broken: Option<NbdError>,
}

struct Question {
    /// Bytes that come with the answer.
    len: usize,
    /// There is room for the one answer.
    answer: SyncSender<Result<Vec<u8>, NbdError>>,
}

impl NbdDisk {
    /// Connects to a server and takes an export of it.
    ///
    /// # Errors
    /// Nobody answers there, or has no such export, or it is of no use as a disk.
    pub fn connect(address: &Address, export: &str, read_only: bool) -> Result<Self, BlockError> {
        let name = format!("{address}/{export}");
        match Socket::connect(address) {
            Ok(socket) => Self::over(name, socket, export, read_only),
            Err(e) => Err(BlockError::Nbd { disk: name, source: e.into() }),
        }
    }

    /// Takes an export of the server behind a connection; `name` is what it is called here.
    ///
    /// # Errors
    /// As [`NbdDisk::connect`].
    pub fn over(name: String, mut socket: Socket, export: &str, read_only: bool) -> Result<Self, BlockError> {
        let failed = |source| BlockError::Nbd { disk: name.clone(), source };
        let offer = negotiate(&mut socket, export).map_err(failed)?;
        if !read_only && offer.flags & flag::READ_ONLY != 0 {
            return Err(BlockError::ReadOnly);
        }
        socket.settled();
        let again = || socket.again().map_err(|e| failed(e.into()));
        let (own, mut reading) = (again()?, BufReader::with_capacity(PIECE, again()?));
        let waiting = Arc::<Mutex<Waiting>>::default();
        let shared = waiting.clone();
        let reader = Builder::new().name("nbd-replies".into()).spawn(move || {
            let Err(why) = answer_all(&mut reading, &shared);
            reading.get_ref().cut();
            give_up(&shared, why);
        });
        let reader = Some(reader.map_err(|e| failed(e.into()))?);
        let (sender, cookies) = (Mutex::new(socket), AtomicU64::new(0));
        Ok(Self { name, offer, read_only, sender, socket: own, cookies, waiting, reader })
    }

    /// Where it is, and its name there.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Asks for something; what comes with the answer.
    fn ask(&self, kind: u16, flags: u16, offset: u64, len: u32, data: &[u8]) -> Result<Vec<u8>, BlockError> {
        let answer = self.send(kind, flags, offset, len, data).and_then(|answer| {
            // Who gives up answers all first.
            answer.recv().unwrap_or(Err(NbdError::GivenUp))
        });
        answer.map_err(|source| BlockError::Nbd { disk: self.name.clone(), source })
    }

    fn send(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u32,
        data: &[u8],
    ) -> Result<Receiver<Result<Vec<u8>, NbdError>>, NbdError> {
        let cookie = self.cookies.fetch_add(1, Ordering::Relaxed);
        let (sender, answer) = sync_channel(1);
        {
            let mut waiting = lock(&self.waiting);
            if let Some(why) = &waiting.broken {
                return Err(why.clone());
            }
            let len = if kind == command::READ { len as usize } else { 0 };
            waiting.by_cookie.insert(cookie, Question { len, answer: sender });
        }
        let request = Request::new(kind, flags, cookie, offset, len);
        let mut socket = lock(&self.sender);
        let sent = socket.write_all(request.as_bytes()).and_then(|()| socket.write_all(data));
        drop(socket);
        if let Err(e) = sent {
            // A request in part is one that nobody can read over.
            self.socket.cut();
            give_up(&self.waiting, e.into());
        }
        Ok(answer)
    }

    /// Changes bytes without moving any.
    fn change(&self, kind: u16, flags: u16, offset: u64, len: u64) -> Result<(), BlockError> {
        let mut at = offset;
        while at < offset + len {
            let count = (offset + len - at).min(CHANGE_MOST);
            self.ask(kind, flags, at, count as u32, &[])?;
            at += count;
        }
        Ok(())
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        if self.read_only { Err(BlockError::ReadOnly) } else { check_range(offset, len, self.offer.size) }
    }

    fn piece(&self) -> usize {
        PIECE.max(1 << 20).min(self.offer.most.min(REQUEST_MOST) as usize)
    }
}

impl BlockBackend for NbdDisk {
    fn size(&self) -> u64 {
        self.offer.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.offer.size)?;
        let mut at = offset;
        for piece in buf.chunks_mut(self.piece()) {
            let bytes = self.ask(command::READ, 0, at, piece.len() as u32, &[])?;
            piece.copy_from_slice(&bytes);
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        self.check_write(offset, data.len() as u64)?;
        let mut at = offset;
        for piece in data.chunks(self.piece()) {
            self.ask(command::WRITE, 0, at, piece.len() as u32, piece)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only || self.offer.flags & flag::SEND_FLUSH == 0 {
            return Ok(());
        }
        self.ask(command::FLUSH, 0, 0, 0, &[]).map(drop)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        if self.offer.flags & flag::SEND_TRIM == 0 {
            return Ok(());
        }
        self.change(command::TRIM, 0, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        if self.offer.flags & flag::SEND_WRITE_ZEROES == 0 {
            return crate::block::write_zeros(self, offset, len);
        }
        let flags = if may_unmap { 0 } else { command::NO_HOLE };
        self.change(command::WRITE_ZEROES, flags, offset, len)
    }

    fn interrupt(&self) {
        give_up(&self.waiting, NbdError::GivenUp);
        self.socket.cut();
    }
}

impl Drop for NbdDisk {
    fn drop(&mut self) {
        if lock(&self.waiting).broken.is_none() {
            // A goodbye that isn't heard is as good.
            let goodbye = Request::new(command::DISCONNECT, 0, 0, 0, 0);
            let _ = lock(&self.sender).write_all(goodbye.as_bytes());
        }
        self.socket.cut();
        if let Some(reader) = self.reader.take() {
            // It doesn't panic.
            let _ = reader.join();
        }
    }
}

/// Reads answers until something is wrong.
fn answer_all(stream: &mut impl Read, waiting: &Mutex<Waiting>) -> Result<std::convert::Infallible, NbdError> {
    loop {
        let reply: Reply = get(stream)?;
        if reply.magic.get() != REPLY_MAGIC {
            return Err(NbdError::Protocol("a reply without its magic"));
        }
        let question = lock(waiting).by_cookie.remove(&reply.cookie.get());
        let Some(Question { len, answer }) = question else {
            return Err(NbdError::Protocol("a reply to no request"));
        };
        let outcome = match reply.error.get() {
            0 => {
                let mut bytes = vec![0; len];
                if let Err(e) = stream.read_exact(&mut bytes) {
                    let why = NbdError::from(e);
                    let _ = answer.send(Err(why.clone()));
                    return Err(why);
                }
                Ok(bytes)
            }
            number => Err(NbdError::Failed(number)),
        };
        // Somebody waits for it, or it is of no use.
        let _ = answer.send(outcome);
    }
}

/// Nothing is answered any more: those who wait hear why, the first reason.
fn give_up(waiting: &Mutex<Waiting>, why: NbdError) {
    let mut waiting = lock(waiting);
    let why = waiting.broken.get_or_insert(why).clone();
    for (_, question) in waiting.by_cookie.drain() {
        let _ = question.answer.send(Err(why.clone()));
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for NbdDisk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NbdDisk").field("name", &self.name).field("offer", &self.offer).finish_non_exhaustive()
    }
}
