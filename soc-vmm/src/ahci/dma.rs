//! The HBA's way to guest memory, with a fence.
//!
//! Transfers are the device thread's. When the guest stops a port, resets it or takes away bus mastering, no byte may move for it any
//! more once the register write is finished. So each transfer is made in small pieces, each under a lock and only while the port's
//! *epoch* is still the one that the command began in; a reset counts the epoch up under the same lock. It waits for the piece that
//! is under way, never for the disk.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::registers::PORTS;
use crate::memory::{GuestMemory, MemoryError};

/// Bytes that are moved under the lock: how long a reset may wait.
const PIECE: usize = 64 << 10;

/// Why a transfer was not made, or not to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// The port was stopped or reset since: nobody wants to hear of it.
    Stale,
    /// Not memory, or the function may not use the bus.
    Bus,
}

/// Guest memory behind the fence.
pub(super) struct Dma {
    memory: Arc<dyn GuestMemory>,
    gate: Mutex<Gate>,
}

#[derive(Debug, Default)]
struct Gate {
    bus_master: bool,
    epochs: [u64; PORTS],
}

impl Dma {
    pub(super) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        Self { memory, gate: Mutex::default() }
    }

    /// Lets transfers be made, or no longer.
    pub(super) fn set_bus_master(&self, on: bool) {
        self.gate().bus_master = on;
    }

    /// Begins a new epoch of a port: transfers of older ones are not made from now on.
    pub(super) fn fence(&self, port: usize) {
        self.gate().epochs[port] += 1;
    }

    /// The right to transfer until the port's next fence.
    pub(super) fn pass(&self, port: usize) -> Pass<'_> {
        Pass { dma: self, port, epoch: self.gate().epochs[port] }
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The right to transfer for one command.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    dma: &'a Dma,
    port: usize,
    epoch: u64,
}

impl Pass<'_> {
    /// Whether the port is still in the same epoch.
    pub(super) fn is_valid(&self) -> bool {
        self.dma.gate().epochs[self.port] == self.epoch
    }

    /// Copies from guest memory.
    pub(super) fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), Refused> {
        self.transfer(|memory| memory.read_now(addr, data))
    }

    /// Copies to guest memory.
    pub(super) fn write(&self, addr: u64, data: &[u8]) -> Result<(), Refused> {
        let mut at = addr;
        for piece in data.chunks(PIECE) {
            self.transfer(|memory| memory.write_now(at, piece))?;
            at = at.saturating_add(piece.len() as u64);
        }
        Ok(())
    }

    fn transfer(&self, mut copy: impl FnMut(&dyn GuestMemory) -> Result<(), MemoryError>) -> Result<(), Refused> {
        loop {
            let moved = {
                let _open = self.open()?;
                copy(&*self.dma.memory)
            };
            match moved {
                // Whoever shuts the gate waits for transfers, not for pages.
                Err(late @ MemoryError::Late { .. }) => self.dma.memory.wait_for(late).map_err(|_| Refused::Bus)?,
                moved => return moved.map_err(|_| Refused::Bus),
            }
        }
    }

    fn open(&self) -> Result<MutexGuard<'_, Gate>, Refused> {
        let gate = self.dma.gate();
        match () {
            () if gate.epochs[self.port] != self.epoch => Err(Refused::Stale),
            () if !gate.bus_master => Err(Refused::Bus),
            () => Ok(gate),
        }
    }
}
