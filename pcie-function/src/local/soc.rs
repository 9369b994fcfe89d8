//! The SoC's end of a local function.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};

use super::message::{Message, is_sealed};
use crate::function::{eventfd, signal};
use crate::{BusError, BusMemory, Doorbell, FunctionError, Iova, Mapping, Reach, SocFunction, Window, Windowed};

/// The SoC's end: maps what the host's end announces. A thread of its own listens; it ends when the host's end hangs up or
/// this is dropped.
#[derive(Debug)]
pub struct LocalSoc {
    card: Window,
    bells: [OwnedFd; 2],
    vectors: Vec<OwnedFd>,
    shared: Arc<Shared>,
}

/// What the listening thread and the users share.
#[derive(Debug)]
struct Shared {
    socket: OwnedFd,
    table: RwLock<BTreeMap<Iova, Entry>>,
    lost: AtomicBool,
    /// A posted write that faulted: later flushes say so.
    faulted: AtomicBool,
    lost_event: OwnedFd,
}

#[derive(Clone, Debug)]
struct Entry {
    window: Window,
    device_writes: bool,
}

impl LocalSoc {
    /// Receives what the host's end sends over `socket` (SOCK_SEQPACKET, connected), and starts to listen.
    ///
    /// # Errors
    /// The peer is not a shim of this version, or has gone.
    pub fn new(socket: OwnedFd) -> Result<Self, FunctionError> {
        let unusable =
            || FunctionError::Unusable("the peer of the function's socket is no host-kvm-shim of this version".into());
        let next = || Message::receive(socket.as_fd())?.ok_or(FunctionError::Bus(BusError::Gone));
        let (Message::Hello { card_len, vectors: count }, fds) = next()? else { return Err(unusable()) };
        let [memory, lanes, channel]: [OwnedFd; 3] = fds.try_into().map_err(|_| unusable())?;
        let len = usize::try_from(card_len).ok().filter(|len| (1 << 16..1 << 30).contains(len)).ok_or_else(unusable)?;
        if !is_sealed(memory.as_fd(), card_len) || count > 4096 {
            return Err(unusable());
        }
        let card = Mapping::new(memory.as_fd(), 0, len, Reach::Local)?.window();
        let mut vectors = Vec::new();
        while (vectors.len() as u64) < count {
            let (Message::Vectors, fds) = next()? else { return Err(unusable()) };
            if fds.is_empty() {
                return Err(unusable());
            }
            vectors.extend(fds);
        }
        let shared = Arc::new(Shared {
            socket,
            table: RwLock::default(),
            lost: AtomicBool::new(false),
            faulted: AtomicBool::new(false),
            lost_event: eventfd()?,
        });
        let listener = shared.clone();
        std::thread::Builder::new()
            .name("local-function".into())
            .spawn(move || listener.listen())
            .map_err(|_| FunctionError::Os("start a thread", nix::errno::Errno::EAGAIN))?;
        Ok(Self { card, bells: [lanes, channel], vectors, shared })
    }
}

impl Drop for LocalSoc {
    fn drop(&mut self) {
        // Ends the listener's receive; the host's end sees a hang-up.
        let _ = nix::sys::socket::shutdown(
            std::os::fd::AsRawFd::as_raw_fd(&self.shared.socket),
            nix::sys::socket::Shutdown::Both,
        );
    }
}

impl Shared {
    fn listen(&self) {
        while let Ok(Some((message, fds))) = Message::receive(self.socket.as_fd()) {
            if self.obey(message, fds).is_err() || Message::Done.send(self.socket.as_fd(), &[]).is_err() {
                break;
            }
        }
        self.lost.store(true, Ordering::Release);
        self.table.write().unwrap_or_else(PoisonError::into_inner).clear();
        signal(&self.lost_event);
    }

    fn obey(&self, message: Message, fds: Vec<OwnedFd>) -> Result<(), FunctionError> {
        let broken = || FunctionError::Unusable("the function's other end broke its protocol".into());
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        match message {
            Message::Map { iova, len, offset, device_writes } => {
                let [fd]: [OwnedFd; 1] = fds.try_into().map_err(|_| broken())?;
                let end = offset.checked_add(len).filter(|_| iova.checked_add(len).is_some()).ok_or_else(broken)?;
                if !is_sealed(fd.as_fd(), end) {
                    return Err(broken());
                }
                let len = usize::try_from(len).map_err(|_| broken())?;
                let window = Mapping::new(fd.as_fd(), offset, len, Reach::Local)?.window();
                table.insert(iova, Entry { window, device_writes });
                Ok(())
            }
            Message::Unmap { iova } => table.remove(&iova).map(drop).ok_or_else(broken),
            _ => Err(broken()),
        }
    }

    /// The mapping that holds all of `len` bytes at `iova`, and where in it they start.
    fn find(&self, iova: Iova, len: usize) -> Result<(Entry, usize), BusError> {
        if self.lost.load(Ordering::Acquire) {
            return Err(BusError::Gone);
        }
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = table.range(..=iova).next_back().ok_or(BusError::Dma)?;
        let offset = usize::try_from(iova - base).map_err(|_| BusError::Dma)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= entry.window.len());
        inside.then(|| (entry.clone(), offset)).ok_or(BusError::Dma)
    }

    fn check(&self) -> Result<(), BusError> {
        match self.lost.load(Ordering::Acquire) {
            true => Err(BusError::Gone),
            false => Ok(()),
        }
    }
}

impl SocFunction for LocalSoc {
    type Card = Window;
    type Remote = LocalRemote;

    fn card_memory(&self) -> Window {
        self.card.clone()
    }

    fn remote(&self, iova: Iova, len: usize) -> LocalRemote {
        LocalRemote { shared: self.shared.clone(), iova, len, entry: OnceLock::new() }
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        let (entry, offset) = self.shared.find(iova, data.len())?;
        entry.window.read_bytes(offset, data);
        Ok(())
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError> {
        let (entry, offset) = self.shared.find(iova, data.len())?;
        if !entry.device_writes {
            return Err(BusError::Dma);
        }
        entry.window.write_bytes(offset, data);
        Ok(())
    }

    fn raise(&self, vector: u32) {
        if let Some(event) = self.vectors.get(vector as usize) {
            signal(event);
        }
    }

    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_> {
        self.bells[bell as usize].as_fd()
    }

    fn generation(&self) -> u32 {
        1
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.shared.lost_event.as_fd()
    }

    fn check(&self) -> Result<(), BusError> {
        self.shared.check()
    }
}

/// A window of the host's mailbox; looked up in the table when it is first used.
#[derive(Clone, Debug)]
pub struct LocalRemote {
    shared: Arc<Shared>,
    iova: Iova,
    len: usize,
    entry: OnceLock<(Window, bool)>,
}

impl LocalRemote {
    fn entry(&self) -> Option<&(Window, bool)> {
        if let Some(entry) = self.entry.get() {
            return Some(entry);
        }
        let found = self.shared.find(self.iova, self.len).ok();
        let found = found.and_then(|(e, offset)| Some((e.window.cut(offset, self.len)?, e.device_writes)))?;
        Some(self.entry.get_or_init(|| found))
    }

    fn writable(&self) -> Option<&Window> {
        let window = self.entry().filter(|(_, writes)| *writes).map(|(window, _)| window);
        if window.is_none() {
            self.shared.faulted.store(true, Ordering::Release);
        }
        window
    }
}

impl Windowed for LocalRemote {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (offset.is_multiple_of(8) && end <= self.len).then(|| Self {
            shared: self.shared.clone(),
            iova: self.iova + offset as u64,
            len,
            entry: OnceLock::new(),
        })
    }
}

impl BusMemory for LocalRemote {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self, offset: usize) -> u64 {
        self.entry().map_or(u64::MAX, |(window, _)| window.load(offset))
    }

    fn store(&self, offset: usize, word: u64) {
        if let Some(window) = self.writable() {
            window.store(offset, word);
        }
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        if let Some(window) = self.writable() {
            window.store_line(offset, words);
        }
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        if let Some(window) = self.writable() {
            window.copy_in(offset, data);
        }
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        match self.entry() {
            Some((window, _)) => window.copy_out(offset, data),
            None => data.fill(0xff),
        }
    }

    fn fence(&self) {
        std::sync::atomic::fence(Ordering::SeqCst);
    }

    fn flush(&self) -> Result<(), BusError> {
        self.fence();
        self.shared.check()?;
        match self.shared.faulted.load(Ordering::Acquire) {
            true => Err(BusError::Dma),
            false => Ok(()),
        }
    }
}
