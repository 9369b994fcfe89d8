//! The host's end of a local function.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};

use super::message::{MOST_FDS, Message, limit_waits, sealed_memfd};
use crate::function::{eventfd, signal};
use crate::{Bell, BusError, Doorbell, FunctionError, HostFunction, Iova, Mapping, Reach, Window};

/// Bytes of card memory of a local function: room for 1024 lanes.
pub const CARD_MEMORY: usize = 4 << 20;
/// Vectors of a local function.
pub const VECTORS: u32 = 64;
/// How long the SoC's end may take to do what it is told: it is a thread that does nothing else, perhaps on a starving machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Where the mailbox lies on the "bus": above any guest-physical address.
const MAILBOX: Iova = 1 << 56;

/// The host's end: owns the memory and the eventfds, tells the SoC's end about them.
#[derive(Debug)]
pub struct LocalHost {
    socket: OwnedFd,
    card: Arc<Mapping>,
    bells: Arc<[OwnedFd; 2]>,
    vectors: Vec<OwnedFd>,
    mapped: BTreeMap<Iova, u64>,
    next_mailbox: Iova,
}

impl LocalHost {
    /// Sets a function up over `socket` (SOCK_SEQPACKET, connected): creates its memory, sends it.
    ///
    /// # Errors
    /// No memory or descriptors left, or the peer has gone.
    pub fn new(socket: OwnedFd) -> Result<Self, FunctionError> {
        limit_waits(&socket, PATIENCE)?;
        let memory = sealed_memfd("outboard-card", CARD_MEMORY as u64)?;
        let card = Mapping::new(memory.as_fd(), 0, CARD_MEMORY, Reach::Local)?;
        let bells = [eventfd()?, eventfd()?];
        let vectors = (0..VECTORS).map(|_| eventfd()).collect::<Result<Vec<_>, _>>()?;
        let hello = Message::Hello { card_len: CARD_MEMORY as u64, vectors: VECTORS.into() };
        hello.send(socket.as_fd(), &[memory.as_raw_fd(), bells[0].as_raw_fd(), bells[1].as_raw_fd()])?;
        for some in vectors.chunks(MOST_FDS) {
            Message::Vectors.send(socket.as_fd(), &some.iter().map(AsRawFd::as_raw_fd).collect::<Vec<_>>())?;
        }
        Ok(Self { socket, card, bells: Arc::new(bells), vectors, mapped: BTreeMap::new(), next_mailbox: MAILBOX })
    }

    fn map(
        &mut self,
        fd: BorrowedFd<'_>,
        offset: u64,
        iova: Iova,
        len: u64,
        writes: bool,
    ) -> Result<(), FunctionError> {
        let end = iova.checked_add(len).filter(|_| len != 0);
        let taken = self.mapped.range(..end.unwrap_or(0)).next_back().is_some_and(|(at, len)| at + len > iova);
        if end.is_none() || taken {
            return Err(FunctionError::Unusable(format!("IOVA {iova:#x}+{len:#x} is taken, or no range")));
        }
        let map = Message::Map { iova, len, offset, device_writes: writes };
        map.send(self.socket.as_fd(), &[fd.as_raw_fd()])?;
        self.done()?;
        self.mapped.insert(iova, len);
        Ok(())
    }

    /// Waits for the SoC's end to say that it has done what it was told; the descriptors that it sends with that.
    fn done(&self) -> Result<Vec<OwnedFd>, FunctionError> {
        let why = match Message::receive(self.socket.as_fd()) {
            Ok(Some((Message::Done, fds))) => return Ok(fds),
            Ok(Some(_)) => FunctionError::Unusable("the function's other end broke its protocol".into()),
            Ok(None) => return Err(BusError::Gone.into()),
            Err(FunctionError::Os(_, Errno::EAGAIN)) => FunctionError::Unusable(format!(
                "the function's other end did not do what it was told within {} s",
                PATIENCE.as_secs()
            )),
            Err(error) => error,
        };
        // An answer that comes yet would be taken for the next one: it is over, and both sides see so.
        let _ = shutdown(self.socket.as_raw_fd(), Shutdown::Both);
        Err(why)
    }
}

impl HostFunction for LocalHost {
    type Window = Window;
    type Bell = LocalBell;

    fn card_memory(&self) -> Window {
        self.card.window()
    }

    fn bell(&self) -> LocalBell {
        let bells = self.bells.clone();
        LocalBell(bells)
    }

    fn map_mailbox(&mut self, len: usize, device_writes: bool) -> Result<(Iova, Window), FunctionError> {
        let len = len.next_multiple_of(4096);
        let memory = sealed_memfd("outboard-mailbox", len as u64)?;
        let window = Mapping::new(memory.as_fd(), 0, len, Reach::Local)?.window();
        let iova = self.next_mailbox;
        self.map(memory.as_fd(), 0, iova, len as u64, device_writes)?;
        // A guard of one page: a transfer that runs past the end faults.
        self.next_mailbox += len as u64 + 4096;
        Ok((iova, window))
    }

    fn map_ram(
        &mut self,
        ram: BorrowedFd<'_>,
        offset: u64,
        iova: Iova,
        len: u64,
        writes: bool,
    ) -> Result<(), FunctionError> {
        self.map(ram, offset, iova, len, writes)
    }

    fn unmap(&mut self, iova: Iova) -> Result<(), FunctionError> {
        if self.mapped.remove(&iova).is_none() {
            return Err(FunctionError::Unusable(format!("nothing is mapped at IOVA {iova:#x}")));
        }
        Message::Unmap { iova }.send(self.socket.as_fd(), &[])?;
        self.done().map(drop)
    }

    fn pins(&self) -> bool {
        false
    }

    fn vectors(&self) -> u32 {
        self.vectors.len() as u32
    }

    fn vector(&self, vector: u32) -> Option<BorrowedFd<'_>> {
        self.vectors.get(vector as usize).map(AsFd::as_fd)
    }

    fn shared(&self, event: u32) -> Result<OwnedFd, FunctionError> {
        Message::Shared { event }.send(self.socket.as_fd(), &[])?;
        let fds = <[OwnedFd; 1]>::try_from(self.done()?);
        fds.map(|[fd]| fd).map_err(|_| FunctionError::Unusable(format!("no eventfd {event} is shared")))
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    fn check(&self) -> Result<(), BusError> {
        use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            // The SoC's end speaks only when it is spoken to: anything else is its hang-up.
            Ok(0) => Ok(()),
            _ => Err(BusError::Gone),
        }
    }
}

/// The doorbells as the host rings them.
#[derive(Clone, Debug)]
pub struct LocalBell(Arc<[OwnedFd; 2]>);

impl Bell for LocalBell {
    fn ring(&self, bell: Doorbell) {
        signal(&self.0[bell as usize]);
    }
}
