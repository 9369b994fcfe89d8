//! SoC side of an emulated card (docs/card.md) in another process: a vfio-user client that is a `SocFunction`.
//!
//! [`open`] takes the socket of a function's SoC side (`card:PATH` on a command line). Card memory is mapped; registers are messages. The
//! driver is [`pcie_function::card::soc`]'s.

mod client;
mod wire;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::epoll::EpollFlags;
use pcie_function::card::bar;
use pcie_function::card::soc::{SocCard, Transport};
use pcie_function::{BusError, BusMemory, FunctionError, Iova, Mapping, Reach, Window};

use crate::client::Client;

/// `VFIO_PCI_CONFIG_REGION_INDEX`.
const CONFIG: u32 = 7;
/// PCI command register: memory space and bus master enable.
const COMMAND: (u64, [u8; 2]) = (0x04, 0x0006u16.to_le_bytes());
/// Where the card sees the memory that it is given. Its domain holds nothing else.
const GIVEN: Iova = 0x10_0000;

/// The SoC's end of one function of a card.
pub type CardFunction = SocCard<VfioUser>;
/// A window of host memory behind its DMA queue.
pub type CardRemote = pcie_function::card::soc::CardRemote<VfioUser>;

/// Connects to the SoC side of a function at `path`, resets it, starts its DMA queue. The host may be absent.
///
/// # Errors
/// Nobody listens there, or it is no card of this version.
pub fn open(path: &Path) -> Result<CardFunction, FunctionError> {
    start(Client::connect(path)?)
}

/// Goes on with a connection that came through a [`Door`], here or in another process: resets the function, starts its DMA queue.
///
/// # Errors
/// It is no card of this version.
pub fn adopt(socket: OwnedFd) -> Result<CardFunction, FunctionError> {
    start(Client::adopt(socket)?)
}

/// A connection to the SoC side of a function that may be in use: a card serves one client at a time. Its descriptor is readable once
/// the card turns to this one, or hangs up.
#[derive(Debug)]
pub struct Door(client::Door);

impl Door {
    /// Connects to the SoC side of a function at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn knock(path: &Path) -> Result<Self, FunctionError> {
        Client::knock(path).map(Self)
    }

    /// The connection, for [`adopt`]. The function is reset: what it was doing for whoever had it before is over.
    ///
    /// # Errors
    /// It doesn't answer within 10 s, or is no card.
    pub fn enter(self) -> Result<OwnedFd, FunctionError> {
        let mut client = self.0.enter()?;
        client.reset()?;
        Ok(client.into_socket())
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn start(mut client: Client) -> Result<CardFunction, FunctionError> {
    client.reset()?;
    let (offset, command) = COMMAND;
    client.write(CONFIG, offset, &command)?;
    // Of its own, so that watching it needs no lock.
    let socket = client.as_fd().try_clone_to_owned();
    let socket = socket.map_err(|_| FunctionError::Os("watch the card", nix::errno::Errno::EMFILE))?;
    SocCard::new(VfioUser { client: Mutex::new(client), socket })
}

/// Registers by messages.
#[derive(Debug)]
pub struct VfioUser {
    client: Mutex<Client>,
    /// The client's, to be watched.
    socket: OwnedFd,
}

impl VfioUser {
    fn client(&self) -> MutexGuard<'_, Client> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Transport for VfioUser {
    fn read32(&self, register: u64) -> Result<u32, FunctionError> {
        self.client().read(bar::REGISTERS, register).map(u32::from_le_bytes)
    }

    fn read64(&self, register: u64) -> Result<u64, FunctionError> {
        self.client().read(bar::REGISTERS, register).map(u64::from_le_bytes)
    }

    fn write32(&self, register: u64, value: u32) -> Result<(), FunctionError> {
        self.client().write(bar::REGISTERS, register, &value.to_le_bytes())
    }

    fn write64(&self, register: u64, value: u64) -> Result<(), FunctionError> {
        self.client().write(bar::REGISTERS, register, &value.to_le_bytes())
    }

    fn post(&self, register: u64, value: u32) -> Result<(), BusError> {
        self.client().post(bar::REGISTERS, register, &value.to_le_bytes()).map_err(|_| BusError::Gone)
    }

    fn is_there(&self) -> bool {
        // A hang-up is always told.
        let mut socket = [PollFd::new(self.socket.as_fd(), PollFlags::empty())];
        poll(&mut socket, PollTimeout::ZERO).is_ok() && socket[0].any() == Some(false)
    }

    fn lost(&self) -> (BorrowedFd<'_>, EpollFlags) {
        (self.socket.as_fd(), EpollFlags::EPOLLRDHUP)
    }

    fn card_memory(&self, len: u64) -> Result<Window, FunctionError> {
        let region = self.client().region(bar::MEMORY)?;
        let unusable = |why: &str| FunctionError::Unusable(format!("the card's memory {why}"));
        let (file, offset) = region.file.ok_or_else(|| unusable("can't be mapped"))?;
        let size = usize::try_from(len).map_err(|_| unusable("is too large"))?;
        // A file that shrinks would end this process by SIGBUS.
        let seals = fcntl(&file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
        let stat = nix::sys::stat::fstat(&file).map_err(|e| FunctionError::Os("look at the card's memory", e))?;
        let fits = offset.checked_add(len).is_some_and(|end| end <= stat.st_size as u64);
        if region.size != len || !fits || !seals.is_ok_and(|seals| seals.contains(SealFlag::F_SEAL_SHRINK)) {
            return Err(unusable("has another size than its registers say, or can shrink"));
        }
        Mapping::new(file.as_fd(), offset, size, Reach::Local).map(|mapping| mapping.window())
    }

    fn give(&mut self, memory: &Window, file: BorrowedFd<'_>) -> Result<Iova, FunctionError> {
        self.client().map(file, GIVEN, memory.len() as u64)?;
        Ok(GIVEN)
    }

    fn set_vector(&self, vector: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        self.client().set_vector(vector, event)
    }
}
