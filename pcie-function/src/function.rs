//! The two ends of a function.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ioreq_ring::{BusError, BusMemory};

/// An address on the host's bus: what the SoC's DMA uses, translated by the function's own IOMMU domain.
pub type Iova = u64;

/// Shared memory that can be cut into smaller windows.
pub trait Windowed: BusMemory + Clone + std::fmt::Debug + Send + Sync + 'static {
    /// The `len` bytes from `offset`; `None` if they are not all within, or `offset` is no word's.
    fn cut(&self, offset: usize, len: usize) -> Option<Self>;
}

/// What the host rings. The SoC side has an eventfd for each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbell {
    /// A lane has a request or posted writes.
    Lanes = 0,
    /// The API channel has a reply, an event, a log record, or the host header changed.
    Channel = 1,
}

impl Doorbell {
    /// Every doorbell, by its number.
    pub const ALL: [Self; 2] = [Self::Lanes, Self::Channel];
}

/// Rings the SoC.
pub trait Bell: Clone + Send + Sync + 'static {
    /// Rings one doorbell: one posted write, or one write to an eventfd.
    fn ring(&self, bell: Doorbell);
}

/// The host's end, held by the shim.
///
/// Vectors: each is an MSI-X vector of the function with an eventfd; what it means (a wake-up or a GSI) is the shim's to keep apart.
pub trait HostFunction: Send {
    /// Mapped memory that the host shares: BAR and mailbox.
    type Window: Windowed;
    /// Rings the SoC; cheap to clone into vCPU threads.
    type Bell: Bell;

    /// The card memory (the BAR that holds lanes and channel), whole.
    fn card_memory(&self) -> Self::Window;

    /// A way to ring the SoC: one store to the BAR, or one write to an eventfd.
    fn bell(&self) -> Self::Bell;

    /// Allocates zeroed, pinned host memory and maps it for the device at an IOVA outside the guest's address space, rounded up
    /// to whole pages; read-only for the device if `!device_writes`.
    ///
    /// # Errors
    /// No memory, or the IOMMU refused.
    fn map_mailbox(&mut self, len: usize, device_writes: bool) -> Result<(Iova, Self::Window), FunctionError>;

    /// Maps `len` bytes of the memfd `ram` from `offset` for the device at `iova`, pinned.
    ///
    /// # Errors
    /// [`FunctionError::Unusable`]: the range is reserved or taken, another may do. Others: no range would.
    fn map_ram(
        &mut self,
        ram: BorrowedFd<'_>,
        offset: u64,
        iova: Iova,
        len: u64,
        device_writes: bool,
    ) -> Result<(), FunctionError>;

    /// Takes a mapping back. When it returns, the device can't reach the memory, and no transfer to it is in flight.
    ///
    /// # Errors
    /// Nothing is mapped at `iova`, or the function is gone.
    fn unmap(&mut self, iova: Iova) -> Result<(), FunctionError>;

    /// Whether what is mapped for the device stays in memory for as long as that: a page that is given back would only be another one
    /// then than the device's.
    fn pins(&self) -> bool {
        true
    }

    /// How many vectors the function has.
    fn vectors(&self) -> u32;

    /// The eventfd of a vector, if there is such a vector.
    fn vector(&self, vector: u32) -> Option<BorrowedFd<'_>>;

    /// The eventfd that the SoC's end shared by this number ([`SocFunction::share`]): KVM signals it by itself (ioeventfd).
    ///
    /// # Errors
    /// This kind of function shares none, none of this number is shared, or the function is lost.
    fn shared(&self, event: u32) -> Result<OwnedFd, FunctionError> {
        Err(FunctionError::Unusable(format!("no eventfd {event} is shared on this kind of function")))
    }

    /// The function's notify pages, of 4096 bytes each: KVM may show any of them to the guest, who can do nothing by it but signal what
    /// [`SocFunction::set_notify`] says. Where the function vanishes, so do they. `None`: it has none.
    fn notify_pages(&self) -> Option<crate::Window> {
        None
    }

    /// Readable when the function may have been lost (removal request, peer hung up). Then ask [`HostFunction::check`].
    fn lost_event(&self) -> BorrowedFd<'_>;

    /// Whether the function still carries.
    ///
    /// # Errors
    /// It doesn't, and why.
    fn check(&self) -> Result<(), BusError>;
}

/// The SoC's end, held by soc-vmm. Shared by its threads; transfers of one function keep their order.
pub trait SocFunction: std::fmt::Debug + Send + Sync + 'static {
    /// Card memory as the SoC maps it: loads are local.
    type Card: Windowed;
    /// A window of host memory: stores are DMA writes in order, loads are DMA reads.
    type Remote: Windowed;

    /// The card memory, whole.
    fn card_memory(&self) -> Self::Card;

    /// A window of the host's mailbox. Nothing is transferred before it is used.
    fn remote(&self, iova: Iova, len: usize) -> Self::Remote;

    /// Copies from host memory, in as many transfers as it takes, and waits for the last.
    ///
    /// # Errors
    /// A transfer faulted ([`BusError::Dma`]: `data` is undefined in part), or the function is lost.
    fn read(&self, iova: Iova, data: &mut [u8]) -> Result<(), BusError>;

    /// Copies to host memory, and waits until it has arrived.
    ///
    /// # Errors
    /// A transfer faulted (part may have arrived), or the function is lost.
    fn write(&self, iova: Iova, data: &[u8]) -> Result<(), BusError>;

    /// Raises a vector on the host, after every earlier transfer has arrived.
    fn raise(&self, vector: u32);

    /// The eventfd of a doorbell.
    fn doorbell(&self, bell: Doorbell) -> BorrowedFd<'_>;

    /// The card's count of resets and link losses. A transfer carries the one its function was opened with; a stale one is refused.
    fn generation(&self) -> u32;

    /// Whether host memory is loads and stores away, so that it costs the bus nothing to look at it again and again.
    fn is_near(&self) -> bool {
        false
    }

    /// The file behind the host memory at `iova`, for another process of this machine to map. `None`: host memory is not on this machine,
    /// or nothing is mapped there.
    fn file(&self, iova: Iova) -> Option<MemoryFile> {
        let _ = iova;
        None
    }

    /// Takes every page of the host memory at `iova` before it is used, where that is left until then: memory that a function pins is taken
    /// already.
    ///
    /// # Errors
    /// This machine hasn't that much.
    fn take_pages(&self, iova: Iova, len: u64) -> Result<(), FunctionError>;

    /// Shares an eventfd with the host's end, which asks for it by the number returned ([`HostFunction::shared`]), once. `None`: both
    /// ends are not on one machine, or too many wait to be asked for.
    fn share(&self, event: BorrowedFd<'_>) -> Option<u32> {
        let _ = event;
        None
    }

    /// How many notify pages the function has.
    fn notify_pages(&self) -> u32 {
        0
    }

    /// Has every write to notify page `page` signal `event`: another one than before, where there was one.
    ///
    /// # Errors
    /// There is no such page, or the system gives it no interrupt.
    fn set_notify(&self, page: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        let _ = event;
        Err(FunctionError::Unusable(format!("this kind of function has no notify page {page}")))
    }

    /// Readable when the generation or the link changed. Then ask [`SocFunction::check`].
    fn lost_event(&self) -> BorrowedFd<'_>;

    /// Whether the function still carries, with the generation it was opened with.
    ///
    /// # Errors
    /// It doesn't, and why.
    fn check(&self) -> Result<(), BusError>;

    /// As [`SocFunction::check`], for who waits for a host: a host's program resets the function as it opens it, so a function
    /// through which nothing was transferred yet takes the generation that is in force now.
    ///
    /// # Errors
    /// As [`SocFunction::check`].
    fn renew(&self) -> Result<(), BusError> {
        self.check()
    }
}

/// Host memory as the file that it is. Its size is sealed.
#[derive(Clone, Debug)]
pub struct MemoryFile {
    /// The file.
    pub file: Arc<OwnedFd>,
    /// Where in it the byte is that was asked for.
    pub offset: u64,
    /// Bytes that are mapped from there on.
    pub len: u64,
}

/// Why a function can't be opened or used.
#[derive(Debug)]
pub enum FunctionError {
    /// A system call failed: what was tried, and the error.
    Os(&'static str, nix::Error),
    /// The peer or the device is not what this side can use.
    Unusable(String),
    /// It no longer carries.
    Bus(BusError),
}

impl std::fmt::Display for FunctionError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Os(what, errno) => write!(f, "can't {what}: {}", errno.desc()),
            Self::Unusable(why) => f.write_str(why),
            Self::Bus(bus) => write!(f, "{bus}"),
        }
    }
}

impl std::error::Error for FunctionError {}

impl From<BusError> for FunctionError {
    fn from(bus: BusError) -> Self {
        Self::Bus(bus)
    }
}

/// An eventfd that doesn't block.
pub(crate) fn eventfd() -> Result<OwnedFd, FunctionError> {
    use nix::sys::eventfd::{EfdFlags, EventFd};
    EventFd::from_value_and_flags(0, EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
        .map(Into::into)
        .map_err(|e| FunctionError::Os("create an eventfd", e))
}

/// Adds 1 to an eventfd. A full counter is as good as a rung one.
pub(crate) fn signal(event: impl AsFd) {
    let _ = nix::unistd::write(event, &1u64.to_ne_bytes());
}
