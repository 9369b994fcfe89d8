//! The host's end through VFIO.

use std::cell::OnceCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::open::Opened;
use crate::card::profile::Side;
use crate::card::{self, register};
use crate::function::eventfd;
use crate::header::Role;
use crate::local::sealed_memfd;
use crate::{Bell, BusError, BusMemory, Doorbell, FunctionError, HostFunction, Iova, Mapping, Reach, Window};

/// The host side of a card's function, held through VFIO.
///
/// Opening it resets it, so the card's SoC side learns that whoever had it before is gone. Calls that it makes later, for a sandbox:
/// ioctl with `VFIO_IOMMU_MAP_DMA`, `VFIO_IOMMU_UNMAP_DMA`, `VFIO_DEVICE_SET_IRQS`; eventfd2, memfd_create, ftruncate, fcntl, mmap, munmap,
/// poll; and mmap, mremap, rt_sigreturn in a handler of SIGBUS.
#[derive(Debug)]
pub struct VfioHost {
    opened: Opened,
    registers: Window,
    card: Window,
    notify: Option<Window>,
    generation: u32,
    /// Made when they are first asked for: an idle function takes no interrupts of the host.
    vectors: Vec<OnceCell<OwnedFd>>,
}

impl VfioHost {
    /// Opens the function at a PCI address.
    ///
    /// # Errors
    /// It isn't there, isn't a card's host side, isn't bound to vfio-pci, is in use, shares its IOMMU group, is of another version, or
    /// its link is down.
    pub fn open(address: &str) -> Result<Self, FunctionError> {
        let opened = Opened::new(address, Side::Host)?;
        let registers = opened.map_bar(opened.profile.registers)?;
        let card = opened.map_bar(opened.profile.memory)?;
        card::check_version(
            registers.load_u32(register::MAGIC as usize),
            registers.load_u32(register::VERSION as usize),
        )?;
        let generation = state(&registers)?;
        let notify = opened.map_notify_pages(registers.load_u32(register::NOTIFY_PAGES as usize))?;
        let count = registers.load_u32(register::VECTORS as usize).min(opened.vectors);
        let vectors = (0..count).map(|_| OnceCell::new()).collect();
        Ok(Self { opened, registers, card, notify, generation, vectors })
    }

    /// What the function is for.
    pub fn role(&self) -> Role {
        self.opened.role
    }
}

impl HostFunction for VfioHost {
    type Window = Window;
    type Bell = VfioBell;

    fn card_memory(&self) -> Window {
        self.card.clone()
    }

    fn bell(&self) -> VfioBell {
        VfioBell(self.registers.clone())
    }

    fn map_mailbox(&mut self, len: usize, device_writes: bool) -> Result<(Iova, Window), FunctionError> {
        let page = self.opened.domain.page() as usize;
        let len = len.checked_next_multiple_of(page).ok_or(FunctionError::Os("size a mailbox", nix::Error::EFBIG))?;
        let memory = sealed_memfd("outboard-mailbox", len as u64)?;
        let window = Mapping::new(memory.as_fd(), 0, len, Reach::Local)?.window();
        let iova = self.opened.domain.map_high(&window, device_writes)?;
        Ok((iova, window))
    }

    fn map_ram(
        &mut self,
        ram: BorrowedFd<'_>,
        offset: u64,
        iova: Iova,
        len: u64,
        device_writes: bool,
    ) -> Result<(), FunctionError> {
        let len = usize::try_from(len).map_err(|_| FunctionError::Os("map RAM", nix::Error::EFBIG))?;
        // Only for the kernel to find the pages, which stay pinned: a second set of page tables is not kept.
        let window = Mapping::new(ram, offset, len, Reach::Local)?.window();
        self.opened.domain.map(&window, iova, device_writes)
    }

    fn unmap(&mut self, iova: Iova) -> Result<(), FunctionError> {
        self.opened.domain.unmap(iova)
    }

    fn vectors(&self) -> u32 {
        self.vectors.len() as u32
    }

    fn vector(&self, vector: u32) -> Option<BorrowedFd<'_>> {
        let place = self.vectors.get(vector as usize)?;
        if place.get().is_none() {
            let event = eventfd().ok()?;
            self.opened.set_vector(vector, event.as_fd()).ok()?;
            let _ = place.set(event);
        }
        place.get().map(AsFd::as_fd)
    }

    fn notify_pages(&self) -> Option<Window> {
        self.notify.clone()
    }

    fn lost_event(&self) -> BorrowedFd<'_> {
        self.opened.loss()
    }

    fn check(&self) -> Result<(), BusError> {
        if self.opened.is_recalled() || self.card.is_lost() {
            return Err(BusError::Gone);
        }
        if state(&self.registers)? == self.generation { Ok(()) } else { Err(BusError::Stale) }
    }
}

/// The generation, if the link is up: one load across the bus.
fn state(registers: &Window) -> Result<u32, BusError> {
    let both = registers.load(register::STATUS as usize);
    if both == u64::MAX || registers.is_lost() || both as u32 & card::STATUS_LINK == 0 {
        return Err(BusError::Gone);
    }
    Ok((both >> 32) as u32)
}

/// The doorbell register.
#[derive(Clone, Debug)]
pub struct VfioBell(Window);

impl Bell for VfioBell {
    fn ring(&self, bell: Doorbell) {
        self.0.store_u32(register::DOORBELL as usize, bell as u32);
    }
}
