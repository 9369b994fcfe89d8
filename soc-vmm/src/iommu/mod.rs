//! Intel's IOMMU (Virtualization Technology for Directed I/O, architecture specification revision 4.1), as much of it as an operating
//! system needs to confine DMA and to remap interrupts: legacy-mode tables with second-level translation, fault records, invalidation
//! by registers and by a queue, interrupt remapping. There are no protected memory regions, device TLBs, page requests or PASIDs.
//!
//! [`VtdRegisters`] is the unit on the bus; [`Iommu`] what functions send their DMA and their messages through, from any thread. Who
//! goes through it is the machine's to say; virtio functions' DMA doesn't, as long as they don't offer VIRTIO_F_ACCESS_PLATFORM.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use crate::interrupt::{Message, MessageRoute, MessageSink};
use crate::memory::GuestMemory;
use crate::pci::Requester;

mod dma;
mod event;
mod faults;
mod queue;
mod registers;
mod remap;
mod tables;
#[cfg(test)]
mod tests;
mod walk;

pub use registers::{VtdRegisters, VtdState};
pub use remap::{IO_APIC_REQUESTER, Sender};

/// Bits of the addresses that functions use.
pub const ADDRESS_BITS: u8 = 48;

use dma::{Remapped, Translation};
use faults::Faults;
use remap::{Blocked, Held, RemappedSink, Remapping, Route, RouteState};

/// What requests go through.
///
/// Locks, in the order in which they are taken: the list of routes, a route, then any of the others.
pub struct Iommu {
    memory: Arc<dyn GuestMemory>,
    translation: RwLock<Translation>,
    remapping: Mutex<Remapping>,
    faults: Mutex<Faults>,
    /// Every route that lives; as many as the machine's functions have messages.
    routes: Mutex<Vec<Weak<Route>>>,
}

impl Iommu {
    /// A unit that lets everything through. Its tables are in `memory`; its own interrupts take a route of `messages`.
    pub fn new(memory: Arc<dyn GuestMemory>, messages: &dyn MessageSink) -> Arc<Self> {
        Arc::new(Self {
            memory,
            translation: RwLock::default(),
            remapping: Mutex::default(),
            faults: Mutex::new(Faults::new(messages.route())),
            routes: Mutex::default(),
        })
    }

    /// Guest memory as the function `requester` reaches it.
    pub fn memory_of(self: &Arc<Self>, requester: Requester) -> Arc<dyn GuestMemory> {
        Arc::new(Remapped { iommu: self.clone(), requester, memory: self.memory.clone() })
    }

    /// Where messages of the function `requester` go: through the unit, to `to`.
    pub fn messages_of<'a>(
        self: &Arc<Self>,
        requester: Requester,
        to: &'a dyn MessageSink,
    ) -> Box<dyn MessageSink + 'a> {
        Box::new(RemappedSink { iommu: self.clone(), sender: Sender::Function(requester), to })
    }

    /// A way through the unit, then by `to`.
    pub fn remapped(self: &Arc<Self>, sender: Sender, to: Box<dyn MessageRoute>) -> Box<dyn MessageRoute> {
        let route = Arc::new(Route { iommu: self.clone(), sender, to, state: Mutex::new(RouteState::default()) });
        let mut routes = self.routes();
        routes.retain(|route| route.strong_count() != 0);
        routes.push(Arc::downgrade(&route));
        Box::new(Held(route))
    }

    /// How interrupts are remapped from now on. Those that are wired follow with [`Iommu::invalidate_entries`].
    fn set_remapping(&self, remapping: Remapping) {
        *self.remapping.lock().unwrap_or_else(PoisonError::into_inner) = remapping;
    }

    fn remap(&self, sender: &Sender, message: Message) -> Result<(Message, Option<u32>), Blocked> {
        // A copy: no read of guest memory holds it.
        let remapping = *self.remapping.lock().unwrap_or_else(PoisonError::into_inner);
        remapping.remap(&*self.memory, sender, message)
    }

    /// Looks those wired messages up again whose entry is meant; none: there is no entry, or it is not known.
    fn invalidate_entries(&self, is_meant: impl Fn(Option<u32>) -> bool) {
        for route in self.routes().iter().filter_map(Weak::upgrade) {
            route.invalidate(&is_meant);
        }
    }

    fn translation(&self) -> RwLockReadGuard<'_, Translation> {
        self.translation.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the transfers that are under way.
    fn translation_mut(&self) -> RwLockWriteGuard<'_, Translation> {
        self.translation.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn faults(&self) -> MutexGuard<'_, Faults> {
        self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn routes(&self) -> MutexGuard<'_, Vec<Weak<Route>>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Iommu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Iommu").field("remapping", &self.remapping).finish_non_exhaustive()
    }
}
