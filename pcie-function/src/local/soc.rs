//! The SoC's end of a local function.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, Shutdown, SockFlag, SockType, UnixAddr, connect, shutdown, socket};

use super::entry::Entry;
use super::message::{Message, is_sealed, limit_waits};
use crate::function::{eventfd, signal};
use crate::{
    BusError, BusMemory, Doorbell, FunctionError, Iova, Mapping, MemoryFile, Reach, SocFunction, Window, Windowed,
};

/// Most mappings that a host's end may announce: a VM has at most 64 of RAM, and a few mailboxes.
const MOST_MAPPINGS: usize = 256;
/// Most eventfds that wait for the host's end to ask for them.
const MOST_SHARED: usize = 64;
/// IOVAs are mapped by pages of so many bytes.
const PAGE: u64 = 4096;
/// Most vectors: MSI-X has no more than 2048.
const MOST_VECTORS: u64 = 2048;
/// How long a shim that listens may take to greet; one that serves another soc-vmm doesn't.
const GREETING: Duration = Duration::from_secs(10);
/// How long a shim that was just started may take: it opens KVM and looks at the host first, perhaps on a starving machine.
const START: Duration = Duration::from_secs(60);

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
    table: RwLock<BTreeMap<Iova, Arc<Entry>>>,
    offers: Mutex<Offers>,
    lost: AtomicBool,
    /// A posted write that faulted: later flushes say so.
    faulted: AtomicBool,
    lost_event: OwnedFd,
    failure: LocalFailure,
}

/// Eventfds that the host's end may ask for, once each.
#[derive(Debug, Default)]
struct Offers {
    next: u32,
    waiting: BTreeMap<u32, OwnedFd>,
}

/// Why this end gave a function up, where it was this end.
#[derive(Clone, Debug, Default)]
pub struct LocalFailure(Arc<OnceLock<String>>);

impl LocalFailure {
    /// What could not be done here, such as to map what the host's end announced.
    pub fn why(&self) -> Option<&str> {
        self.0.get().map(String::as_str)
    }
}

impl LocalSoc {
    /// Connects to the host-kvm-shim that listens at `path`.
    ///
    /// # Errors
    /// Nobody listens there, or not a shim of this version; or it doesn't greet within 10 s, as one that serves another soc-vmm.
    pub fn dial(path: &Path) -> Result<Self, FunctionError> {
        let start = Instant::now();
        Self::within(Self::knock(path)?, start, GREETING)
    }

    /// Connects to the host-kvm-shim that listens at `path`, for [`LocalSoc::new`], here or in another process. The shim greets once it has
    /// done with whom it serves: until then there is nothing to read.
    ///
    /// # Errors
    /// Nobody listens there, or so many wait already that there is no room for 10 s.
    pub fn knock(path: &Path) -> Result<OwnedFd, FunctionError> {
        let os = |what| move |e| FunctionError::Os(what, e);
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).map_err(os("make a socket"))?;
        let address = UnixAddr::new(path).map_err(os("name the socket"))?;
        // Its queue of connections may be full.
        limit_waits(&socket, GREETING)?;
        match connect(socket.as_raw_fd(), &address) {
            Ok(()) => Ok(socket),
            Err(Errno::EAGAIN) => Err(silent(GREETING)),
            Err(Errno::EPROTOTYPE) => Err(FunctionError::Unusable("the socket there is no host-kvm-shim's".into())),
            Err(e @ (Errno::ENOENT | Errno::ECONNREFUSED)) => {
                Err(FunctionError::Unusable(format!("no host-kvm-shim listens there: {}; start one", e.desc())))
            }
            Err(e) => Err(FunctionError::Os("connect to the host-kvm-shim there", e)),
        }
    }

    /// Receives what the host's end sends over `socket` (SOCK_SEQPACKET, connected), and starts to listen.
    ///
    /// # Errors
    /// The peer is not a shim of this version, has gone, or says nothing for a minute.
    pub fn new(socket: OwnedFd) -> Result<Self, FunctionError> {
        Self::within(socket, Instant::now(), START)
    }

    /// Receives the greeting, all of it within `patience` since `start`: a peer may send it bit by bit.
    fn within(socket: OwnedFd, start: Instant, patience: Duration) -> Result<Self, FunctionError> {
        let unusable =
            || FunctionError::Unusable("the peer of the function's socket is no host-kvm-shim of this version".into());
        let next = || {
            let left = patience.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Err(silent(patience));
            }
            // Zero would be no bound.
            limit_waits(&socket, left.max(Duration::from_millis(1)))?;
            match Message::receive(socket.as_fd()) {
                Ok(Some(received)) => Ok(received),
                Ok(None) => Err(FunctionError::Unusable(
                    "the host-kvm-shim there hung up before it had said anything: see what it printed".into(),
                )),
                Err(FunctionError::Os(_, Errno::EAGAIN)) => Err(silent(patience)),
                Err(error) => Err(error),
            }
        };
        let (Message::Hello { card_len, vectors: count }, fds) = next()? else { return Err(unusable()) };
        let [memory, lanes, channel]: [OwnedFd; 3] = fds.try_into().map_err(|_| unusable())?;
        let len = usize::try_from(card_len).ok().filter(|len| (1 << 16..1 << 30).contains(len)).ok_or_else(unusable)?;
        if !is_sealed(memory.as_fd(), card_len) || count > MOST_VECTORS {
            return Err(unusable());
        }
        let card = Mapping::guarded(memory.as_fd(), 0, len, Reach::Local)?.window();
        let mut vectors = Vec::new();
        while (vectors.len() as u64) < count {
            let (Message::Vectors, fds) = next()? else { return Err(unusable()) };
            if fds.is_empty() {
                return Err(unusable());
            }
            vectors.extend(fds);
        }
        // From now on the listener waits for as long as it takes.
        limit_waits(&socket, Duration::ZERO)?;
        let shared = Arc::new(Shared {
            socket,
            table: RwLock::default(),
            offers: Mutex::default(),
            lost: AtomicBool::new(false),
            faulted: AtomicBool::new(false),
            lost_event: eventfd()?,
            failure: LocalFailure::default(),
        });
        let listener = shared.clone();
        std::thread::Builder::new()
            .name("local-function".into())
            .spawn(move || listener.listen())
            .map_err(|_| FunctionError::Os("start a thread", Errno::EAGAIN))?;
        Ok(Self { card, bells: [lanes, channel], vectors, shared })
    }

    /// Tells, once the function is lost, whether it was given up here.
    pub fn failure(&self) -> LocalFailure {
        self.shared.failure.clone()
    }
}

fn silent(patience: Duration) -> FunctionError {
    FunctionError::Unusable(format!(
        "the host-kvm-shim there does not greet within {} s: it serves another soc-vmm, or is stopped; use another function",
        patience.as_secs()
    ))
}

impl Drop for LocalSoc {
    fn drop(&mut self) {
        // Ends the listener's receive; the host's end sees a hang-up.
        let _ = shutdown(self.shared.socket.as_raw_fd(), Shutdown::Both);
    }
}

impl Shared {
    fn listen(&self) {
        if let Err(FunctionError::Os(what, errno @ (Errno::ENOMEM | Errno::EMFILE | Errno::ENFILE))) = self.obey_all() {
            // Nobody else sets it.
            let _ = self.failure.0.set(FunctionError::Os(what, errno).to_string());
        }
        self.lost.store(true, Ordering::Release);
        let table = std::mem::take(&mut *self.table.write().unwrap_or_else(PoisonError::into_inner));
        table.values().for_each(|entry| entry.revoke());
        signal(&self.lost_event);
        // A host's end that broke the protocol learns that it is over: nothing of it is used any more.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
    }

    /// Obeys until the host's end hangs up.
    fn obey_all(&self) -> Result<(), FunctionError> {
        while let Some((message, fds)) = Message::receive(self.socket.as_fd())? {
            let event = self.obey(message, fds)?;
            let event: Vec<_> = event.iter().map(AsRawFd::as_raw_fd).collect();
            Message::Done.send(self.socket.as_fd(), &event)?;
        }
        Ok(())
    }

    /// Does what the host's end says; what it asked for.
    fn obey(&self, message: Message, fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, FunctionError> {
        let broken = || FunctionError::Unusable("the function's other end broke its protocol".into());
        let table = || self.table.write().unwrap_or_else(PoisonError::into_inner);
        match message {
            Message::Map { iova, len, offset, device_writes } => {
                let [fd]: [OwnedFd; 1] = fds.try_into().map_err(|_| broken())?;
                let size = usize::try_from(len).map_err(|_| broken())?;
                let end = iova.checked_add(len).ok_or_else(broken)?;
                let sealed = offset.checked_add(len).is_some_and(|last| is_sealed(fd.as_fd(), last));
                let mut table = table();
                let last = table.range(..end).next_back();
                let apart = last.is_none_or(|(base, entry)| base + entry.len() as u64 <= iova);
                // Pages, as an IOMMU has them: else words of a window that is aligned would not be.
                let aligned = iova.is_multiple_of(PAGE);
                if !sealed || !apart || !aligned || table.len() >= MOST_MAPPINGS {
                    return Err(broken());
                }
                let window = Mapping::guarded(fd.as_fd(), offset, size, Reach::Local)?.window();
                table.insert(iova, Arc::new(Entry::new(window, fd, offset, device_writes)));
                Ok(None)
            }
            Message::Unmap { iova } => {
                let entry = table().remove(&iova).ok_or_else(broken)?;
                entry.revoke();
                Ok(None)
            }
            Message::Shared { event } => Ok(self.offers().waiting.remove(&event)),
            _ => Err(broken()),
        }
    }

    fn offers(&self) -> MutexGuard<'_, Offers> {
        self.offers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The mapping that holds all of `len` bytes at `iova`, and where in it they start.
    fn find(&self, iova: Iova, len: usize) -> Result<(Arc<Entry>, usize), BusError> {
        self.check()?;
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let (base, entry) = table.range(..=iova).next_back().ok_or(BusError::Dma)?;
        let offset = usize::try_from(iova - base).map_err(|_| BusError::Dma)?;
        let inside = offset.checked_add(len).is_some_and(|end| end <= entry.len());
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
        LocalRemote { shared: self.shared.clone(), iova, len, found: OnceLock::new() }
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        let (entry, offset) = self.shared.find(iova, data.len())?;
        entry.read(offset, data).ok_or(BusError::Dma)
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError> {
        let (entry, offset) = self.shared.find(iova, data.len())?;
        if !entry.device_writes() {
            return Err(BusError::Dma);
        }
        entry.write(offset, data).ok_or(BusError::Dma)
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

    fn is_near(&self) -> bool {
        true
    }

    fn file(&self, iova: Iova) -> Option<MemoryFile> {
        let (entry, from) = self.shared.find(iova, 1).ok()?;
        entry.device_writes().then(|| entry.file(from))
    }

    fn take_pages(&self, iova: Iova, len: u64) -> Result<(), FunctionError> {
        let gone = || FunctionError::Unusable(format!("the host has no memory at {iova:#x}"));
        let bytes = usize::try_from(len).map_err(|_| gone())?;
        let (entry, offset) = self.shared.find(iova, bytes).map_err(|_| gone())?;
        let taken = entry.take_pages(offset, bytes).ok_or_else(gone)?;
        taken.map_err(|e| FunctionError::Os("take the guest's memory", e))
    }

    fn share(&self, event: BorrowedFd<'_>) -> Option<u32> {
        let event = event.try_clone_to_owned().ok()?;
        let mut offers = self.shared.offers();
        // A host that asks for none of them costs so many descriptors, and no more.
        if offers.waiting.len() >= MOST_SHARED {
            return None;
        }
        let number = offers.next;
        offers.next = number.wrapping_add(1);
        offers.waiting.insert(number, event);
        Some(number)
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.shared.lost_event.as_fd()
    }

    fn check(&self) -> Result<(), BusError> {
        self.shared.check()
    }
}

/// A window of the host's mailbox; looked up in the table when it is first used. Once what it was found in is unmapped it faults
/// for good, also where the host maps something else there.
#[derive(Clone, Debug)]
pub struct LocalRemote {
    shared: Arc<Shared>,
    iova: Iova,
    len: usize,
    found: OnceLock<(Arc<Entry>, usize)>,
}

impl LocalRemote {
    fn found(&self) -> Option<&(Arc<Entry>, usize)> {
        if let Some(found) = self.found.get() {
            return Some(found);
        }
        let found = self.shared.find(self.iova, self.len).ok()?;
        Some(self.found.get_or_init(|| found))
    }

    /// Loads through the mapping; `None` is a fault.
    fn load_from<T>(&self, load: impl FnOnce(&Window, usize) -> T) -> Option<T> {
        let (entry, base) = self.found()?;
        entry.access(|window| load(window, *base))
    }

    /// Stores through the mapping, or notes the fault.
    fn store_to(&self, store: impl FnOnce(&Window, usize)) {
        let entry = self.found().filter(|(entry, _)| entry.device_writes());
        if entry.and_then(|(entry, base)| entry.access(|window| store(window, *base))).is_none() {
            self.shared.faulted.store(true, Ordering::Release);
        }
    }

    /// # Panics
    /// The bytes are not all within: they may lie in the mapping all the same.
    fn within(&self, offset: usize, len: usize) {
        assert!(
            offset.checked_add(len).is_some_and(|end| end <= self.len),
            "{len} bytes at {offset:#x} outside their window"
        );
    }
}

impl Windowed for LocalRemote {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (offset.is_multiple_of(8) && end <= self.len).then(|| Self {
            shared: self.shared.clone(),
            iova: self.iova + offset as u64,
            len,
            found: OnceLock::new(),
        })
    }
}

impl BusMemory for LocalRemote {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self, offset: usize) -> u64 {
        self.within(offset, 8);
        self.load_from(|window, base| window.load(base + offset)).unwrap_or(u64::MAX)
    }

    fn store(&self, offset: usize, word: u64) {
        self.within(offset, 8);
        self.store_to(|window, base| window.store(base + offset, word));
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        self.within(offset, words.len() * 8);
        self.store_to(|window, base| window.store_line(base + offset, words));
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.within(offset, data.len().next_multiple_of(8));
        self.store_to(|window, base| window.copy_in(base + offset, data));
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.within(offset, data.len().next_multiple_of(8));
        if self.load_from(|window, base| window.copy_out(base + offset, data)).is_none() {
            data.fill(0xff);
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

#[cfg(test)]
mod tests {
    use super::super::message::sealed_memfd;
    use super::*;

    #[test]
    fn a_greeting_that_comes_bit_by_bit_has_one_deadline() {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) =
            nix::sys::socket::socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).unwrap();
        let dripping = std::thread::spawn(move || {
            let card = sealed_memfd("card", 1 << 16).unwrap();
            let event = eventfd().unwrap();
            let [card, bell] = [&card, &event].map(AsRawFd::as_raw_fd);
            let hello = Message::Hello { card_len: 1 << 16, vectors: 1000 };
            hello.send(theirs.as_fd(), &[card, bell, bell]).unwrap();
            // Until it is hung up on.
            while Message::Vectors.send(theirs.as_fd(), &[bell]).is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        let start = Instant::now();
        let patience = Duration::from_millis(300);
        let refused = LocalSoc::within(ours, start, patience).unwrap_err();
        assert!(matches!(&refused, FunctionError::Unusable(why) if why.contains("does not greet")), "{refused}");
        assert!(start.elapsed() < Duration::from_secs(20), "1000 drips take 50 s");
        dripping.join().unwrap();
    }
}
