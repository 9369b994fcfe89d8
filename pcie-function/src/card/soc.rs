//! The SoC side of a card, whatever stands between this process and its registers.
//!
//! [`SocCard`] is the driver: identity, DMA queue, vectors, loss. A [`Transport`] is how it reaches registers and gives the card memory: mapped BARs
//! (`vfio`), or messages to a card in another process. Everything that crosses to the host goes through the DMA queue. A function that was
//! reset once it was used stays stale: open it anew.

use std::fmt::Debug;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};

use super::engine::{self, Bell, Queue};
use super::{bar, register, soc_vector};
use crate::function::eventfd;
use crate::{BusError, BusMemory, Doorbell, FunctionError, Iova, SocFunction, Window, Windowed, card};

/// How a driver reaches the SoC side of a card. Offsets are [`register`]'s.
pub trait Transport: Debug + Send + Sync + 'static {
    /// Reads a 4-byte register.
    ///
    /// # Errors
    /// The card can't be reached.
    fn read32(&self, register: u64) -> Result<u32, FunctionError>;

    /// Reads an 8-byte register, or two of 4 bytes at once.
    ///
    /// # Errors
    /// The card can't be reached.
    fn read64(&self, register: u64) -> Result<u64, FunctionError>;

    /// Writes a 4-byte register.
    ///
    /// # Errors
    /// The card can't be reached.
    fn write32(&self, register: u64, value: u32) -> Result<(), FunctionError>;

    /// Writes an 8-byte register.
    ///
    /// # Errors
    /// The card can't be reached.
    fn write64(&self, register: u64, value: u64) -> Result<(), FunctionError>;

    /// Writes a 4-byte register and doesn't wait. The card sees it after every earlier store to memory that it was given.
    ///
    /// # Errors
    /// The card can't be reached.
    fn post(&self, register: u64, value: u32) -> Result<(), BusError>;

    /// Whether the card can still be reached, looked at from time to time by who waits for it.
    fn is_there(&self) -> bool;

    /// A descriptor, and the events on it that say that the card may be gone.
    fn lost(&self) -> (BorrowedFd<'_>, EpollFlags);

    /// Maps card memory, which has `len` bytes.
    ///
    /// # Errors
    /// It can't be mapped, or has another size.
    fn card_memory(&self, len: u64) -> Result<Window, FunctionError>;

    /// Lets the card read and write `memory`, all of the file `file`; where the card sees it.
    ///
    /// # Errors
    /// The card, or its IOMMU, refuses.
    fn give(&mut self, memory: &Window, file: BorrowedFd<'_>) -> Result<Iova, FunctionError>;

    /// Has an MSI-X vector signal `event`.
    ///
    /// # Errors
    /// There is no such vector.
    fn set_vector(&self, vector: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError>;
}

/// The SoC's end of one function of a card.
#[derive(Debug)]
pub struct SocCard<T> {
    card: Window,
    shared: Arc<Shared<T>>,
    bells: [OwnedFd; Doorbell::ALL.len()],
    event: OwnedFd,
    /// Readable with `event`, or when the transport is lost.
    lost: Epoll,
    vectors: u32,
    notify_pages: u32,
}

/// What the function and its windows share.
#[derive(Debug)]
struct Shared<T> {
    // Dropped before the queue: its end takes the queue's memory from the card.
    transport: T,
    queue: Mutex<Queue>,
    /// The queue's.
    generation: AtomicU32,
}

impl<T: Transport> SocCard<T> {
    /// Takes a card that was just reset and may master its bus, and starts its DMA queue. The host may be absent.
    ///
    /// # Errors
    /// It is no card of this version, or can't be set up.
    pub fn new(mut transport: T) -> Result<Self, FunctionError> {
        let identity = Identity::read(&transport)?;
        let card = transport.card_memory(identity.memory)?;
        let bells = [eventfd()?, eventfd()?];
        for (bell, event) in Doorbell::ALL.into_iter().zip(&bells) {
            transport.set_vector(bell as u32, event.as_fd())?;
        }
        let event = eventfd()?;
        transport.set_vector(soc_vector::EVENT, event.as_fd())?;
        let lost = watch(event.as_fd(), transport.lost()).map_err(|e| FunctionError::Os("watch the card", e))?;

        let (memory, file) = engine::memory()?;
        let iova = transport.give(&memory, file.as_fd())?;
        start(&transport, iova)?;
        // Last: what changes from here on is told by the event.
        let generation = State::read(&transport)?.generation;
        let queue = Mutex::new(Queue::new(memory, iova, generation));
        let shared = Arc::new(Shared { transport, queue, generation: AtomicU32::new(generation) });
        let Identity { vectors, notify_pages, .. } = identity;
        Ok(Self { card, shared, bells, event, lost, vectors, notify_pages })
    }
}

impl<T: Transport> SocFunction for SocCard<T> {
    type Card = Window;
    type Remote = CardRemote<T>;

    fn card_memory(&self) -> Window {
        self.card.clone()
    }

    fn remote(&self, iova: Iova, len: usize) -> CardRemote<T> {
        CardRemote { shared: Arc::clone(&self.shared), iova, len }
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        self.shared.read(iova, data)
    }

    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError> {
        let mut done = 0;
        while done < data.len() {
            done += self.shared.queue().write(&*self.shared, iova.wrapping_add(done as u64), &data[done..])?;
        }
        Ok(())
    }

    fn take_pages(&self, _: Iova, _: u64) -> Result<(), FunctionError> {
        // What the card reaches is pinned.
        Ok(())
    }

    fn raise(&self, vector: u32) {
        // A vector that the host hasn't got would fail what is posted behind it.
        if vector < self.vectors {
            self.shared.queue().raise(&*self.shared, vector);
        }
    }

    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_> {
        self.bells[bell as usize].as_fd()
    }

    fn notify_pages(&self) -> u32 {
        self.notify_pages
    }

    fn set_notify(&self, page: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        if page >= self.notify_pages {
            let why = format!("the function has {} notify pages, and none of number {page}", self.notify_pages);
            return Err(FunctionError::Unusable(why));
        }
        self.shared.transport.set_vector(soc_vector::COUNT + page, event)
    }

    fn generation(&self) -> u32 {
        self.shared.generation.load(Ordering::Relaxed)
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.lost.0.as_fd()
    }

    fn check(&self) -> Result<(), BusError> {
        // Drained before the state is read: a later change signals again. Not readable is as good.
        let _ = nix::unistd::read(&self.event, &mut [0; 8]);
        let transport = &self.shared.transport;
        let events = transport.read32(register::EVENTS);
        let cleared = events.and_then(|events| transport.write32(register::EVENTS, events));
        let state = cleared.and_then(|()| State::read(transport)).map_err(|_| BusError::Gone)?;
        if !state.link || !transport.is_there() {
            Err(BusError::Gone)
        } else if state.generation != self.generation() {
            Err(BusError::Stale)
        } else {
            self.shared.queue().fault().map_or(Ok(()), Err)
        }
    }

    fn renew(&self) -> Result<(), BusError> {
        match self.check() {
            Err(BusError::Stale) => {}
            carries => return carries,
        }
        let now = State::read(&self.shared.transport).map_err(|_| BusError::Gone)?.generation;
        if !self.shared.queue().begin_with(now) {
            return Err(BusError::Stale);
        }
        self.shared.generation.store(now, Ordering::Relaxed);
        self.check()
    }
}

impl<T: Transport> Shared<T> {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        let mut done = 0;
        while done < data.len() {
            done += self.queue().read(self, iova.wrapping_add(done as u64), &mut data[done..])?;
        }
        Ok(())
    }
}

impl<T: Transport> Bell for Shared<T> {
    fn submit(&self, tail: u32) -> Result<(), BusError> {
        self.transport.post(register::DMA_TAIL, tail)
    }

    fn is_there(&self) -> bool {
        self.transport.is_there()
    }
}

/// A window of host memory behind the DMA queue.
#[derive(Debug)]
pub struct CardRemote<T> {
    shared: Arc<Shared<T>>,
    iova: Iova,
    len: usize,
}

impl<T> Clone for CardRemote<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), iova: self.iova, len: self.len }
    }
}

impl<T: Transport> CardRemote<T> {
    /// The IOVA of `len` bytes at `offset`.
    ///
    /// # Panics
    /// They aren't all within, or `offset` is no word's.
    fn at(&self, offset: usize, len: usize) -> Iova {
        let within = offset.checked_add(len).is_some_and(|end| end <= self.len);
        assert!(within && offset.is_multiple_of(8), "{len} bytes at {offset:#x} of a window of {:#x}", self.len);
        self.iova.wrapping_add(offset as u64)
    }
}

impl<T: Transport> Windowed for CardRemote<T> {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (offset.is_multiple_of(8) && end <= self.len).then(|| Self {
            shared: Arc::clone(&self.shared),
            iova: self.iova.wrapping_add(offset as u64),
            len,
        })
    }
}

impl<T: Transport> BusMemory for CardRemote<T> {
    fn len(&self) -> usize {
        self.len
    }

    fn load(&self, offset: usize) -> u64 {
        let mut word = [0; 8];
        match self.shared.read(self.at(offset, 8), &mut word) {
            Ok(()) => u64::from_le_bytes(word),
            Err(_) => u64::MAX,
        }
    }

    fn store(&self, offset: usize, word: u64) {
        self.store_line(offset, &[word]);
    }

    fn store_line(&self, offset: usize, words: &[u64]) {
        assert!(offset % 64 + words.len() * 8 <= 64, "a line crosses 64 bytes at {offset:#x}");
        let mut line = [0; 64];
        for (bytes, word) in line.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *bytes = word.to_le_bytes();
        }
        let len = words.len() * 8;
        let iova = self.at(offset, len);
        self.shared.queue().store(&*self.shared, iova, &line[..len]);
    }

    fn copy_in(&self, offset: usize, data: &[u8]) {
        let iova = self.at(offset, data.len());
        self.shared.queue().store(&*self.shared, iova, data);
    }

    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        if self.shared.read(self.at(offset, data.len()), data).is_err() {
            data.fill(0xff);
        }
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }

    fn flush(&self) -> Result<(), BusError> {
        self.shared.queue().flush(&*self.shared)
    }
}

/// What the identity registers say.
struct Identity {
    memory: u64,
    vectors: u32,
    notify_pages: u32,
}

impl Identity {
    fn read(transport: &impl Transport) -> Result<Self, FunctionError> {
        card::check_version(transport.read32(register::MAGIC)?, transport.read32(register::VERSION)?)?;
        let memory = transport.read64(register::MEMORY_SIZE)?;
        let (vectors, role) = (transport.read32(register::VECTORS)?, transport.read32(register::ROLE)?);
        if memory < bar::MEMORY_MIN || !memory.is_power_of_two() || role > card::ROLE_HOST {
            let why = format!("what is plugged in has {memory:#x} bytes of memory and role {role}");
            return Err(FunctionError::Unusable(why));
        }
        let notify_pages = transport.read32(register::NOTIFY_PAGES)?;
        if notify_pages > card::NOTIFY_PAGES_MAX {
            return Err(FunctionError::Unusable(format!("what is plugged in has {notify_pages} notify pages")));
        }
        Ok(Self { memory, vectors, notify_pages })
    }
}

/// Starts the DMA queue in memory that the card sees at `iova`.
fn start(transport: &impl Transport, iova: Iova) -> Result<(), FunctionError> {
    let (submission, done) = engine::rings(iova);
    transport.write64(register::DMA_SUBMISSION, submission)?;
    transport.write64(register::DMA_DONE, done)?;
    transport.write32(register::DMA_ENTRIES, engine::ENTRIES)?;
    transport.write32(register::DMA_CONTROL, card::DMA_ENABLE)?;
    let status = transport.read32(register::DMA_STATUS)?;
    if status != card::DMA_ENABLE {
        return Err(FunctionError::Unusable(format!("the card's DMA queue doesn't start: status {status:#x}")));
    }
    Ok(())
}

/// `STATUS` and `GENERATION`.
struct State {
    link: bool,
    generation: u32,
}

impl State {
    /// Reads both in one access.
    fn read(transport: &impl Transport) -> Result<Self, FunctionError> {
        let both = transport.read64(register::STATUS)?;
        if both == u64::MAX {
            return Err(FunctionError::Bus(BusError::Gone));
        }
        Ok(Self { link: both as u32 & card::STATUS_LINK != 0, generation: (both >> 32) as u32 })
    }
}

fn watch(event: BorrowedFd<'_>, (lost, flags): (BorrowedFd<'_>, EpollFlags)) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    epoll.add(lost, EpollEvent::new(flags, 1))?;
    Ok(epoll)
}
