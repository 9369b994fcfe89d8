//! Keeps the host's memslots, posted ranges and ioeventfds as the machine's registers say. The thread that serves IOREQs leaves here what it wants;
//! a task makes it so, and only then finishes the access that asked for it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Call, Extent, Memslot, PostedRange};
use pcie_function::SocFunction;
use tokio::sync::{Notify, oneshot};

use super::guest::{GuestEvent, Relay};
use super::notify::NotifyPages;
use super::ram::GuestRam;
use super::signals::Signals;
use super::view::Memory;
use crate::bus::Ticket;
use crate::flash::FlashMemory;
use crate::link::{CallError, Channel};
use crate::memory::MemoryError;
use crate::pci::{MemoryView, Platform, Signal, Window};

/// The host's side of the machine's address spaces.
#[derive(Debug)]
pub(super) struct Arranger<F: SocFunction> {
    function: Arc<F>,
    channel: Channel<F>,
    ram: Arc<GuestRam<F>>,
    memory: Memory,
    /// Each allocation as DMA reaches it.
    extents: Vec<(u32, Vec<Extent>)>,
    wanted: Mutex<Wanted>,
    changed: Notify,
}

/// What is to be made so.
#[derive(Debug)]
struct Wanted {
    view: MemoryView,
    /// Which ROMs are memory, and not their device's registers.
    shown: Vec<bool>,
    memory_changed: bool,
    /// Accesses that wait for it.
    tickets: Vec<Ticket>,
    /// Who waits until everything is as wanted.
    waiting: Vec<oneshot::Sender<()>>,
    /// Posted ranges of devices that never move; none where the host can't post.
    fixed: Option<Vec<PostedRange>>,
    /// Those of windows that the guest moves.
    moving: Vec<PostedRange>,
    posted_changed: bool,
    /// Writes that signal events; none: as before.
    signals: Option<Vec<Signal>>,
    /// The host takes no more.
    over: bool,
}

impl<F: SocFunction> Arranger<F> {
    /// An arranger for memory that the host has allocated, of which the guest sees nothing yet but `view`, soon.
    pub(super) fn new(
        function: Arc<F>,
        channel: Channel<F>,
        ram: Arc<GuestRam<F>>,
        memory: Memory,
        extents: Vec<(u32, Vec<Extent>)>,
        view: MemoryView,
    ) -> Self {
        let wanted = Wanted {
            view,
            shown: vec![true; memory.roms.len()],
            memory_changed: false,
            tickets: Vec::new(),
            waiting: Vec::new(),
            fixed: None,
            moving: Vec::new(),
            posted_changed: false,
            signals: None,
            over: false,
        };
        Self { function, channel, ram, memory, extents, wanted: Mutex::new(wanted), changed: Notify::new() }
    }

    /// Shows the guest its memory for the first time.
    ///
    /// # Errors
    /// The host refused.
    pub(super) async fn begin(&self) -> Result<(), CallError> {
        let slots = self.slots();
        self.arrange(&slots).await
    }

    /// Each allocation as DMA reaches it.
    pub(super) fn extents(&self) -> &[(u32, Vec<Extent>)] {
        &self.extents
    }

    /// Those of them that are ROM.
    pub(super) fn roms(&self) -> Vec<u32> {
        self.memory.roms.iter().map(|rom| rom.ram).collect()
    }

    /// Says that the host can post, and which ranges never move.
    pub(super) fn post_always(&self, fixed: Vec<PostedRange>) {
        let mut wanted = self.wanted();
        (wanted.fixed, wanted.posted_changed) = (Some(fixed), true);
    }

    /// Starts the task that makes it so; it ends with the connection.
    pub(super) fn start(self: &Arc<Self>, relay: Arc<Relay>) {
        let arranger = self.clone();
        tokio::spawn(async move {
            let mut signals = Signals::new(arranger.function.clone(), arranger.channel.clone());
            let mut pages = NotifyPages::new(arranger.channel.clone());
            let error = loop {
                match arranger.settle(&mut signals, &mut pages).await {
                    Ok(()) => arranger.changed.notified().await,
                    Err(error) => break error,
                }
            };
            {
                let mut wanted = arranger.wanted();
                wanted.over = true;
                // Dropped, they are told that it failed.
                wanted.tickets.clear();
                wanted.waiting.clear();
            }
            // A loss is said by who watches the connection.
            if !error.is_loss() {
                relay.tell(GuestEvent::Failed(format!("the host can't arrange the guest's memory: {error}")));
            }
        });
    }

    /// Waits until all that was wanted so far is so, or never will be.
    pub(super) async fn settled(&self) {
        let (done, waits) = oneshot::channel();
        {
            let mut wanted = self.wanted();
            if wanted.over {
                return;
            }
            wanted.waiting.push(done);
        }
        self.changed.notify_one();
        // Dropped: the task ended, and so does the VM, by what ended it.
        let _ = waits.await;
    }

    fn wanted(&self) -> MutexGuard<'_, Wanted> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn slots(&self) -> Vec<Memslot> {
        let wanted = self.wanted();
        self.memory.slots(&wanted.view, &wanted.shown)
    }

    async fn arrange(&self, slots: &[Memslot]) -> Result<(), CallError> {
        self.channel.call(&Call::SetMemslots(slots.to_vec())).await?;
        self.ram.set(slots, &self.extents);
        Ok(())
    }

    async fn settle(&self, signals: &mut Signals<F>, pages: &mut NotifyPages<F>) -> Result<(), CallError> {
        let (slots, memory_changed, tickets, waiting, posted, signalled) = {
            let mut wanted = self.wanted();
            let slots = self.memory.slots(&wanted.view, &wanted.shown);
            let memory_changed = std::mem::take(&mut wanted.memory_changed);
            let ranges = |wanted: &Wanted| Some(apart(wanted.fixed.as_ref()?, &wanted.moving));
            let posted = if std::mem::take(&mut wanted.posted_changed) { ranges(&wanted) } else { None };
            let (tickets, waiting) = (std::mem::take(&mut wanted.tickets), std::mem::take(&mut wanted.waiting));
            (slots, memory_changed, tickets, waiting, posted, wanted.signals.take())
        };
        if memory_changed {
            pages.make_room(&slots).await?;
            self.arrange(&slots).await?;
        }
        if let Some(ranges) = posted {
            self.channel.call(&Call::PostedRanges(ranges)).await?;
        }
        if let Some(wanted) = signalled {
            signals.arrange(&wanted).await?;
            pages.want(&wanted);
        }
        pages.show(&slots).await?;
        tickets.into_iter().for_each(|ticket| ticket.done(0));
        for waiting in waiting {
            // Who waited may have gone.
            let _ = waiting.send(());
        }
        Ok(())
    }
}

impl<F: SocFunction> Platform for Arranger<F> {
    fn show(&self, view: &MemoryView, done: Option<Ticket>) {
        let mut wanted = self.wanted();
        wanted.memory_changed |= wanted.view != *view;
        wanted.view = *view;
        if !wanted.over {
            wanted.tickets.extend(done);
        }
        drop(wanted);
        self.changed.notify_one();
    }

    fn post(&self, windows: &[Window]) {
        let mut wanted = self.wanted();
        wanted.moving = windows.iter().map(|w| PostedRange { base: w.base, len: w.len, ports: w.io.into() }).collect();
        wanted.posted_changed = true;
        drop(wanted);
        self.changed.notify_one();
    }

    fn signal(&self, signals: &[Signal]) {
        self.wanted().signals = Some(signals.to_vec());
        self.changed.notify_one();
    }
}

impl<F: SocFunction> FlashMemory for Arranger<F> {
    fn show_array(&self, bank: usize, on: bool, done: Option<Ticket>) {
        let mut wanted = self.wanted();
        if let Some(shown) = wanted.shown.get_mut(bank) {
            *shown = on;
        }
        wanted.memory_changed = true;
        if !wanted.over {
            wanted.tickets.extend(done);
        }
        drop(wanted);
        self.changed.notify_one();
    }

    fn program(&self, bank: usize, offset: u64, bytes: &[u8]) {
        let Some(rom) = self.memory.roms.get(bank) else { return };
        let extents = self.extents.iter().find(|(ram, _)| *ram == rom.ram);
        // Lost: said by who watches the function.
        let _ = extents.map(|(ram, extents)| self.ram.fill(*ram, extents, rom.offset + offset, bytes));
    }

    fn fetch(&self, bank: usize, bytes: &mut [u8]) -> Result<(), MemoryError> {
        let rom = self.memory.roms.get(bank);
        let (addr, len) = (rom.map_or(0, |rom| rom.base), bytes.len() as u64);
        let found = rom.and_then(|rom| Some((rom, self.extents.iter().find(|(ram, _)| *ram == rom.ram)?)));
        let (rom, (_, extents)) = found.ok_or(MemoryError::NotRam { addr, len })?;
        self.ram.fetch(extents, rom.offset, bytes).map_err(|_| MemoryError::Lost { addr, len })
    }
}

/// The ranges that a host takes: of those that overlap, the first. A guest may lay its windows over each other.
fn apart(fixed: &[PostedRange], moving: &[PostedRange]) -> Vec<PostedRange> {
    let mut kept: Vec<PostedRange> = fixed.to_vec();
    for range in moving {
        let overlaps =
            |k: &PostedRange| k.ports == range.ports && k.base < range.base + range.len && range.base < k.base + k.len;
        if !kept.iter().any(overlaps) {
            kept.push(*range);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_ranges_that_overlap_the_first_is_posted() {
        let range = |base, len, ports| PostedRange { base, len, ports };
        let kept = apart(&[range(0x402, 1, 1)], &[range(0x400, 8, 1), range(0x402, 1, 0), range(0x403, 1, 1)]);
        assert_eq!(kept, [range(0x402, 1, 1), range(0x402, 1, 0), range(0x403, 1, 1)]);
    }
}
