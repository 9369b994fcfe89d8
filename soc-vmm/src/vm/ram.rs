//! Guest memory by DMA: which guest-physical addresses are memory, and by which IOVAs the function reaches them.

use std::sync::{Arc, PoisonError, RwLock};

use api_channel::call::{Extent, Memslot, SlotFlags};
use pcie_function::{BusError, SocFunction};

use crate::memory::{GuestMemory, MemoryError};

/// A piece of guest-physical memory that is one piece for DMA too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    base: u64,
    len: u64,
    iova: u64,
    read_only: bool,
}

/// The guest's memory as devices and the loader reach it.
#[derive(Debug)]
pub struct GuestRam<F> {
    function: Arc<F>,
    /// Sorted by base.
    pieces: RwLock<Vec<Piece>>,
}

impl<F: SocFunction> GuestRam<F> {
    /// No memory yet.
    pub fn new(function: Arc<F>) -> Self {
        Self { function, pieces: RwLock::default() }
    }

    /// Takes over the memslots that the host now has; `extents` gives each allocation's, by its id.
    pub fn set(&self, slots: &[Memslot], extents: &[(u32, Vec<Extent>)]) {
        let mut pieces = Vec::new();
        for slot in slots {
            let of_slot = extents.iter().filter(|(ram, _)| *ram == slot.ram).flat_map(|(_, e)| e);
            for extent in of_slot {
                let first = slot.offset.max(extent.offset);
                let end = (slot.offset + slot.len).min(extent.offset + extent.len);
                if first < end {
                    pieces.push(Piece {
                        base: slot.base + (first - slot.offset),
                        len: end - first,
                        iova: extent.iova + (first - extent.offset),
                        read_only: slot.flags & SlotFlags::READ_ONLY != 0,
                    });
                }
            }
        }
        pieces.sort_by_key(|piece| piece.base);
        *self.pieces.write().unwrap_or_else(PoisonError::into_inner) = pieces;
    }

    /// Copies `data` to the bytes from `offset` of an allocation that DMA reaches by `extents`, whether or not the guest sees them.
    ///
    /// # Errors
    /// The function is lost.
    pub(super) fn fill(&self, extents: &[Extent], offset: u64, data: &[u8]) -> Result<(), BusError> {
        let end = offset + data.len() as u64;
        for extent in extents {
            let (first, last) = (extent.offset.max(offset), (extent.offset + extent.len).min(end));
            if first < last {
                let bytes = &data[(first - offset) as usize..(last - offset) as usize];
                self.function.write(extent.iova + (first - extent.offset), bytes)?;
            }
        }
        Ok(())
    }

    /// The loader's view of the same memory: ROM can be written.
    pub fn loader(&self) -> Loader<'_, F> {
        Loader(self)
    }

    /// Calls `transfer` with (IOVA, first byte, bytes) for each piece of the range, once all of it is known to be memory.
    fn each(
        &self,
        addr: u64,
        len: u64,
        write_rom: Option<bool>,
        mut transfer: impl FnMut(u64, usize, usize) -> Result<(), BusError>,
    ) -> Result<(), MemoryError> {
        let not_ram = MemoryError::NotRam { addr, len };
        let end = addr.checked_add(len).ok_or(not_ram)?;
        // Held while bytes move: who takes memory from the guest waits until nothing reaches it any more.
        let pieces = self.pieces.read().unwrap_or_else(PoisonError::into_inner);
        let part = |at: u64| {
            let index = pieces.partition_point(|piece| piece.base <= at).checked_sub(1)?;
            let (piece, within) = (pieces[index], at - pieces[index].base);
            let writable = !piece.read_only || write_rom != Some(false);
            (within < piece.len && writable).then(|| (piece.iova + within, (piece.len - within).min(end - at)))
        };
        // Twice: nothing moves before all of it is known to be there.
        let mut at = addr;
        while at < end {
            at += part(at).ok_or(not_ram)?.1;
        }
        let mut at = addr;
        while let Some((iova, count)) = (at < end).then(|| part(at)).flatten() {
            transfer(iova, (at - addr) as usize, count as usize).map_err(|_| MemoryError::Lost { addr, len })?;
            at += count;
        }
        Ok(())
    }

    fn write_checked(&self, addr: u64, data: &[u8], rom: bool) -> Result<(), MemoryError> {
        self.each(addr, data.len() as u64, Some(rom), |iova, at, len| self.function.write(iova, &data[at..at + len]))
    }
}

impl<F: SocFunction> GuestMemory for GuestRam<F> {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let len = data.len() as u64;
        self.each(addr, len, None, |iova, at, len| self.function.read(iova, &mut data[at..at + len]))
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.write_checked(addr, data, false)
    }
}

/// See [`GuestRam::loader`].
#[derive(Debug)]
pub struct Loader<'a, F>(&'a GuestRam<F>);

impl<F: SocFunction> GuestMemory for Loader<'_, F> {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        self.0.read(addr, data)
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.0.write_checked(addr, data, true)
    }
}
