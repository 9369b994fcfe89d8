//! The SoC's end through VFIO.

use std::os::fd::BorrowedFd;

use nix::sys::epoll::EpollFlags;

use super::open::{Opened, VfioDescriptors};
use crate::card::profile::Side;
use crate::card::register;
use crate::card::soc::{SocCard, Transport};
use crate::{BusError, BusMemory, FunctionError, Iova, Window};

/// The SoC side of a card's function, held through VFIO.
pub type VfioSoc = SocCard<MappedBars>;

impl SocCard<MappedBars> {
    /// Opens the function at a PCI address, which resets it, and starts its DMA queue. The host may be absent.
    ///
    /// # Errors
    /// It isn't there, isn't a card's SoC side, isn't bound to vfio-pci, is in use, shares its IOMMU group, or is of another version.
    pub fn open(address: &str) -> Result<Self, FunctionError> {
        Self::on(Opened::new(address, Side::Soc)?)
    }

    /// The same, of a function that another process opened, which may be one with more rights.
    ///
    /// # Errors
    /// As [`VfioSoc::open`]'s, or the descriptors are not the function's.
    pub fn adopt(address: &str, descriptors: VfioDescriptors) -> Result<Self, FunctionError> {
        Self::on(Opened::adopt(address, Side::Soc, descriptors)?)
    }

    fn on(opened: Opened) -> Result<Self, FunctionError> {
        let registers = opened.map_bar(opened.profile.registers)?;
        Self::new(MappedBars { opened, registers })
    }
}

/// Registers and card memory as mapped BARs. On Arm that is device memory: every access is aligned and of at most 8 bytes.
#[derive(Debug)]
pub struct MappedBars {
    opened: Opened,
    registers: Window,
}

impl MappedBars {
    /// All ones are what a read of a vanished function gives, and no value of a register that is read here.
    fn there<T: PartialEq + Copy>(&self, value: T, ones: T) -> Result<T, FunctionError> {
        if value == ones || self.registers.is_lost() { Err(BusError::Gone.into()) } else { Ok(value) }
    }
}

impl Transport for MappedBars {
    fn read32(&self, register: u64) -> Result<u32, FunctionError> {
        self.there(self.registers.load_u32(register as usize), u32::MAX)
    }

    fn read64(&self, register: u64) -> Result<u64, FunctionError> {
        self.there(self.registers.load(register as usize), u64::MAX)
    }

    fn write32(&self, register: u64, value: u32) -> Result<(), FunctionError> {
        self.registers.store_u32(register as usize, value);
        Ok(())
    }

    fn write64(&self, register: u64, value: u64) -> Result<(), FunctionError> {
        self.registers.store(register as usize, value);
        Ok(())
    }

    fn post(&self, register: u64, value: u32) -> Result<(), BusError> {
        // The device is outside the domain that a release orders on Arm.
        self.registers.fence();
        self.registers.store_u32(register as usize, value);
        if self.registers.is_lost() { Err(BusError::Gone) } else { Ok(()) }
    }

    fn is_there(&self) -> bool {
        !self.opened.is_recalled() && self.read64(register::STATUS).is_ok()
    }

    fn lost(&self) -> (BorrowedFd<'_>, EpollFlags) {
        (self.opened.loss(), EpollFlags::EPOLLIN)
    }

    fn card_memory(&self, len: u64) -> Result<Window, FunctionError> {
        let memory = self.opened.map_bar(self.opened.profile.memory)?;
        if memory.len() as u64 == len {
            return Ok(memory);
        }
        let why = format!("the card has {len:#x} bytes of memory, and a BAR of {:#x} for it", memory.len());
        Err(FunctionError::Unusable(why))
    }

    fn give(&mut self, memory: &Window, _file: BorrowedFd<'_>) -> Result<Iova, FunctionError> {
        self.opened.domain.map_high(memory, true)
    }

    fn set_vector(&self, vector: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        self.opened.set_vector(vector, event)
    }
}
