//! What a driver's kick signals, and the function's notify pages by which a guest does that without an exit.

use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;
use pcie_function::{FunctionError, SocFunction};

use super::session::eventfd;

/// What a queue's kicks signal. Dropped, its notify page is another's to take.
#[derive(Debug)]
pub(super) struct Kick {
    /// The device's thread waits for this.
    pub(super) event: Arc<EventFd>,
    /// Where the host signals kicks itself, this instead: somebody else waits for it, who may do to it what he likes. So nobody here writes
    /// it but the device's thread.
    pub(super) bypass: Option<Arc<EventFd>>,
    page: Option<(u32, Arc<NotifyPages>)>,
}

impl Kick {
    /// The notify page that signals the event, if there is one.
    pub(super) fn page(&self) -> Option<u32> {
        self.page.as_ref().map(|(number, _)| *number)
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        if let Some((number, pages)) = &self.page {
            // What it was signalled for last comes to the next queue as a kick too many.
            pages.free().insert(*number, Some(self.event.clone()));
        }
    }
}

/// The notify pages of a function that no queue has. The default has none, and then every kick is this process's own eventfd.
#[derive(Default)]
pub struct NotifyPages {
    /// By number, with what a page signals if it was ever taken: each takes an interrupt of the SoC from then on.
    free: Mutex<BTreeMap<u32, Option<Arc<EventFd>>>>,
    function: Option<Arc<dyn Wire>>,
}

/// A function whose notify pages can be wired.
trait Wire: Send + Sync {
    fn wire(&self, page: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError>;
}

impl<F: SocFunction> Wire for F {
    fn wire(&self, page: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        self.set_notify(page, event)
    }
}

impl NotifyPages {
    /// All that `function` has.
    pub fn of<F: SocFunction>(function: Arc<F>) -> Self {
        let free = (0..function.notify_pages()).map(|page| (page, None)).collect();
        Self { free: Mutex::new(free), function: Some(function) }
    }

    /// Kicks for the queues of a device, the first of them with pages: it takes half of those that are left at most, so that a disk with
    /// a queue for each CPU leaves some to the devices after it.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub(super) fn kicks(self: &Arc<Self>, queues: usize) -> nix::Result<Vec<Kick>> {
        let share = self.free().len().div_ceil(2);
        (0..queues).map(|queue| self.kick(queue < share)).collect()
    }

    fn kick(self: &Arc<Self>, with_page: bool) -> nix::Result<Kick> {
        let taken = if with_page { self.free().pop_first() } else { None };
        let (Some((number, event)), Some(function)) = (taken, &self.function) else {
            return Ok(Kick { event: Arc::new(eventfd()?), bypass: None, page: None });
        };
        if let Some(event) = event {
            return Ok(Kick { event, bypass: None, page: Some((number, self.clone())) });
        }
        let event = Arc::new(eventfd()?);
        let page = match function.wire(number, event.as_fd()) {
            Ok(()) => Some((number, self.clone())),
            Err(error) => {
                // Its number is not tried again.
                tracing::warn!(page = number, %error, "a notify page can't be used: a queue's kicks are exits");
                None
            }
        };
        Ok(Kick { event, bypass: None, page })
    }

    fn free(&self) -> MutexGuard<'_, BTreeMap<u32, Option<Arc<EventFd>>>> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for NotifyPages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NotifyPages").field("free", &self.free().len()).finish_non_exhaustive()
    }
}
