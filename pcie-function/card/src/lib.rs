//! SoC side of an emulated card (docs/card.md): a vfio-user client that is a [`SocFunction`].
//!
//! [`CardFunction::open`] takes the socket of a function's SoC side (`card:PATH` on a command line). Card memory is mapped; registers are
//! messages; everything that crosses to the host goes through the DMA queue. A function that was reset stays stale: open it anew.

mod client;
mod queue;
mod wire;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::card::{self, bar, register, soc_vector};
use pcie_function::{
    BusError, BusMemory, Doorbell, FunctionError, Iova, Mapping, Reach, SocFunction, Window, Windowed,
};

use crate::client::Client;
use crate::queue::{Bell, Queue};

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// PCI command register: memory space and bus master enable.
const COMMAND: (u64, [u8; 2]) = (0x04, 0x0006u16.to_le_bytes());

/// The SoC's end of one function of a card.
#[derive(Debug)]
pub struct CardFunction {
    card: Window,
    shared: Arc<Shared>,
    bells: [EventFd; Doorbell::ALL.len()],
    event: EventFd,
    /// Readable with `event`, or when the card hangs up.
    lost: Epoll,
    vectors: u32,
    role: u32,
}

/// What the function and its windows share. Locks are taken in this order.
#[derive(Debug)]
struct Shared {
    queue: Mutex<Queue>,
    client: Mutex<Client>,
    generation: u32,
}

impl CardFunction {
    /// Connects to the SoC side of a function at `path`, resets it, starts its DMA queue. The host may be absent.
    ///
    /// # Errors
    /// Nobody listens there, or it is no card of this version.
    pub fn open(path: &Path) -> Result<Self, FunctionError> {
        let mut client = Client::connect(path)?;
        client.reset()?;
        let (offset, command) = COMMAND;
        client.write(CONFIG, offset, &command)?;
        let identity = Identity::read(&mut client)?;
        let card = map_memory(&mut client, identity.memory)?;

        let eventfd = || {
            EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
                .map_err(|e| FunctionError::Os("create an eventfd", e))
        };
        let bells = [eventfd()?, eventfd()?];
        for (bell, event) in Doorbell::ALL.into_iter().zip(&bells) {
            client.set_vector(bell as u32, event.as_fd())?;
        }
        let event = eventfd()?;
        client.set_vector(soc_vector::EVENT, event.as_fd())?;
        let lost = watch(event.as_fd(), client.as_fd()).map_err(|e| FunctionError::Os("watch the card", e))?;

        let mut queue = Queue::new()?;
        start(&mut client, &queue)?;
        // Last: what changes from here on is told by the event.
        let generation = state(&mut client)?.generation;
        queue.set_generation(generation);
        let shared = Arc::new(Shared { queue: Mutex::new(queue), client: Mutex::new(client), generation });
        Ok(Self { card, shared, bells, event, lost, vectors: identity.vectors, role: identity.role })
    }

    /// Whether this is the function for the server itself, with no VM.
    pub fn is_host_function(&self) -> bool {
        self.role == card::ROLE_HOST
    }
}

impl SocFunction for CardFunction {
    type Card = Window;
    type Remote = CardRemote;

    fn card_memory(&self) -> Window {
        self.card.clone()
    }

    fn remote(&self, iova: Iova, len: usize) -> CardRemote {
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

    fn raise(&self, vector: u32) {
        // A vector that the host hasn't got would fail what is posted behind it.
        if vector < self.vectors {
            self.shared.queue().raise(&*self.shared, vector);
        }
    }

    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_> {
        self.bells[bell as usize].as_fd()
    }

    fn generation(&self) -> u32 {
        self.shared.generation
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.lost.0.as_fd()
    }

    fn check(&self) -> Result<(), BusError> {
        // Drained before the state is read: a later change signals again. Not readable is as good.
        let _ = self.event.read();
        let mut client = self.shared.client();
        let ask = |client: &mut Client| {
            let events: [u8; 4] = client.read(bar::REGISTERS, register::EVENTS)?;
            client.write(bar::REGISTERS, register::EVENTS, &events)?;
            state(client)
        };
        let state = ask(&mut client).map_err(|_| BusError::Gone)?;
        if !state.link {
            Err(BusError::Gone)
        } else if state.generation != self.shared.generation {
            Err(BusError::Stale)
        } else {
            drop(client);
            self.shared.queue().fault().map_or(Ok(()), Err)
        }
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError> {
        let mut done = 0;
        while done < data.len() {
            done += self.queue().read(self, iova.wrapping_add(done as u64), &mut data[done..])?;
        }
        Ok(())
    }
}

impl Bell for Shared {
    fn submit(&self, tail: u32) -> Result<(), BusError> {
        let posted = self.client().post(bar::REGISTERS, register::DMA_TAIL, &tail.to_le_bytes());
        posted.map_err(|_| BusError::Gone)
    }

    fn is_there(&self) -> bool {
        let client = self.client();
        // A hang-up is always told.
        let mut socket = [PollFd::new(client.as_fd(), PollFlags::empty())];
        poll(&mut socket, PollTimeout::ZERO).is_ok() && socket[0].any() == Some(false)
    }
}

/// A window of host memory behind the DMA queue.
#[derive(Clone, Debug)]
pub struct CardRemote {
    shared: Arc<Shared>,
    iova: Iova,
    len: usize,
}

impl CardRemote {
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

impl Windowed for CardRemote {
    fn cut(&self, offset: usize, len: usize) -> Option<Self> {
        let end = offset.checked_add(len)?;
        (offset.is_multiple_of(8) && end <= self.len).then(|| Self {
            shared: Arc::clone(&self.shared),
            iova: self.iova.wrapping_add(offset as u64),
            len,
        })
    }
}

impl BusMemory for CardRemote {
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
    role: u32,
}

impl Identity {
    fn read(client: &mut Client) -> Result<Self, FunctionError> {
        let unusable = |why: String| Err(FunctionError::Unusable(format!("what is plugged in {why}")));
        let word = |client: &mut Client, at| client.read(bar::REGISTERS, at).map(u32::from_le_bytes);
        let magic = word(client, register::MAGIC)?;
        if magic != card::MAGIC {
            return unusable(format!("is no card of docs/card.md: its registers start with {magic:#010x}"));
        }
        let major = word(client, register::VERSION)? >> 16;
        if major != u32::from(card::VERSION_MAJOR) {
            return unusable(format!("is a card of version {major}, this side knows {}", card::VERSION_MAJOR));
        }
        let memory = u64::from_le_bytes(client.read(bar::REGISTERS, register::MEMORY_SIZE)?);
        let (vectors, role) = (word(client, register::VECTORS)?, word(client, register::ROLE)?);
        if memory < bar::MEMORY_MIN || !memory.is_power_of_two() || role > card::ROLE_HOST {
            return unusable(format!("has {memory:#x} bytes of memory and role {role}"));
        }
        Ok(Self { memory, vectors, role })
    }
}

fn map_memory(client: &mut Client, size: u64) -> Result<Window, FunctionError> {
    let region = client.region(bar::MEMORY)?;
    let unusable = |why: &str| FunctionError::Unusable(format!("the card's memory {why}"));
    let (file, offset) = region.file.ok_or_else(|| unusable("can't be mapped"))?;
    let len = usize::try_from(size).map_err(|_| unusable("is too large"))?;
    // A file that shrinks would end this process by SIGBUS.
    let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    let bytes = nix::sys::stat::fstat(&file).map_err(|e| FunctionError::Os("look at the card's memory", e))?.st_size;
    let fits = offset.checked_add(size).is_some_and(|end| end <= bytes as u64);
    if region.size != size || !fits || !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
        return Err(unusable("has another size than its registers say, or can shrink"));
    }
    Mapping::new(file.as_fd(), offset, len, Reach::Local).map(|mapping| mapping.window())
}

fn start(client: &mut Client, queue: &Queue) -> Result<(), FunctionError> {
    client.map(queue.file(), queue::IOVA, queue::SIZE as u64)?;
    let registers = bar::REGISTERS;
    client.write(registers, register::DMA_SUBMISSION, &queue::SUBMISSION_IOVA.to_le_bytes())?;
    client.write(registers, register::DMA_DONE, &queue::DONE_IOVA.to_le_bytes())?;
    client.write(registers, register::DMA_ENTRIES, &queue::ENTRIES.to_le_bytes())?;
    client.write(registers, register::DMA_CONTROL, &card::DMA_ENABLE.to_le_bytes())?;
    let status = u32::from_le_bytes(client.read(registers, register::DMA_STATUS)?);
    if status != card::DMA_ENABLE {
        return Err(FunctionError::Unusable(format!("the card's DMA queue doesn't start: status {status:#x}")));
    }
    Ok(())
}

struct State {
    link: bool,
    generation: u32,
}

/// `STATUS` and `GENERATION`, in one access.
fn state(client: &mut Client) -> Result<State, FunctionError> {
    let both = u64::from_le_bytes(client.read(bar::REGISTERS, register::STATUS)?);
    if both == u64::MAX {
        return Err(FunctionError::Bus(BusError::Gone));
    }
    Ok(State { link: both as u32 & card::STATUS_LINK != 0, generation: (both >> 32) as u32 })
}

fn watch(event: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> nix::Result<Epoll> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(event, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
    epoll.add(socket, EpollEvent::new(EpollFlags::EPOLLRDHUP, 1))?;
    Ok(epoll)
}
