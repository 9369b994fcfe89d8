//! Guest memory as a function behind the unit reaches it.
//!
//! A transfer holds the translation from its walks to its last byte: an invalidation waits for transfers that are under way (both
//! read and write drain), and what the guest takes back then is not reached any more.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::Iommu;
use super::faults::Fault;
use super::tables::PAGE;
use super::walk::{self, Mapping};
use crate::memory::{GuestMemory, MemoryError};
use crate::pci::Requester;

/// Pages that the unit remembers; then it forgets all of them.
const REMEMBERED: usize = 4096;

/// How DMA is translated now.
#[derive(Debug, Default)]
pub(super) struct Translation {
    /// The root table; none: addresses are what they are.
    root: Option<u64>,
    /// By function and page. What a guest has not mapped is not remembered (CAP.CM is 0).
    pages: Mutex<HashMap<(u16, u64), Mapping>>,
}

impl Translation {
    /// Translates by the tables at `root` from now on, or not at all.
    pub(super) fn set(&mut self, root: Option<u64>) {
        self.root = root;
        self.forget();
    }

    /// Forgets what it remembers.
    pub(super) fn forget(&mut self) {
        self.pages.get_mut().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The memory of a function.
pub(super) struct Remapped {
    pub(super) iommu: Arc<Iommu>,
    pub(super) requester: Requester,
    pub(super) memory: Arc<dyn GuestMemory>,
}

/// A piece of a transfer that is one piece of guest memory too.
#[derive(Clone, Copy, Debug)]
struct Piece {
    to: u64,
    len: usize,
}

impl Remapped {
    /// Guest memory behind `len` bytes from `addr`, all of it allowed; a fault is recorded.
    fn pieces(&self, translation: &Translation, addr: u64, len: usize, write: bool) -> Result<Vec<Piece>, MemoryError> {
        let unreached = MemoryError::NotRam { addr, len: len as u64 };
        let Some(root) = translation.root else { return Ok(vec![Piece { to: addr, len }]) };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut done = 0;
        while done < len {
            let at = addr.checked_add(done as u64).ok_or(unreached)?;
            let mapping = self.page(translation, root, at, write).ok_or(unreached)?;
            let within = at % PAGE;
            let count = (PAGE - within).min((len - done) as u64) as usize;
            let to = mapping.page + within;
            match pieces.last_mut() {
                Some(last) if last.to + last.len as u64 == to => last.len += count,
                _ => pieces.push(Piece { to, len: count }),
            }
            done += count;
        }
        Ok(pieces)
    }

    fn page(&self, translation: &Translation, root: u64, at: u64, write: bool) -> Option<Mapping> {
        let requester = self.requester.id();
        let key = (requester, at / PAGE);
        let pages = || translation.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mapping) = pages().get(&key).filter(|mapping| mapping.rights & walk::right(write) != 0) {
            return Some(*mapping);
        }
        match walk::translate(&*self.memory, root, requester, at, write) {
            Ok(mapping) => {
                let mut pages = pages();
                if pages.len() >= REMEMBERED {
                    pages.clear();
                }
                pages.insert(key, mapping);
                Some(mapping)
            }
            Err(blocked) => {
                if !blocked.quiet {
                    let information = at & !(PAGE - 1);
                    self.iommu.faults().record(&Fault { reason: blocked.reason, requester, information, read: !write });
                }
                None
            }
        }
    }
}

impl GuestMemory for Remapped {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let translation = self.iommu.translation();
        let mut data = data;
        for Piece { to, len } in self.pieces(&translation, addr, data.len(), false)? {
            let (now, later) = data.split_at_mut(len);
            self.memory.read(to, now)?;
            data = later;
        }
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let translation = self.iommu.translation();
        let mut data = data;
        for Piece { to, len } in self.pieces(&translation, addr, data.len(), true)? {
            let (now, later) = data.split_at(len);
            self.memory.write(to, now)?;
            data = later;
        }
        Ok(())
    }
}
