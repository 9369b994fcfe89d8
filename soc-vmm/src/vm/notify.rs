//! The function's notify pages, shown to the guest where queues are kicked: a kick is then one posted write without an exit.

use api_channel::call::{Call, Memslot, NotifyPage, PAGE};
use pcie_function::SocFunction;

use crate::link::{CallError, Channel};
use crate::pci::Signal;

/// Which of them the guest sees now.
#[derive(Debug)]
pub(super) struct NotifyPages<F: SocFunction> {
    channel: Channel<F>,
    wanted: Vec<NotifyPage>,
    /// The set that was asked for last, and whether the host took it.
    asked: Vec<NotifyPage>,
    shown: bool,
}

impl<F: SocFunction> NotifyPages<F> {
    pub(super) fn new(channel: Channel<F>) -> Self {
        Self { channel, wanted: Vec::new(), asked: Vec::new(), shown: true }
    }

    /// Says where the guest is to see which. It does after [`NotifyPages::show`].
    pub(super) fn want(&mut self, signals: &[Signal]) {
        self.wanted = signals.iter().filter_map(page).collect();
    }

    /// Takes away those that are where memory is to be: a guest that lays a device over it finds the memory.
    ///
    /// # Errors
    /// The host is gone, or keeps what it was to take away.
    pub(super) async fn make_room(&mut self, slots: &[Memslot]) -> Result<(), CallError> {
        let stay = if self.shown { beside(&self.asked, slots) } else { Vec::new() };
        self.ask(stay).await
    }

    /// Shows those that are wanted, but where there is memory. What the host doesn't show comes as an exit.
    ///
    /// # Errors
    /// As for [`NotifyPages::make_room`].
    pub(super) async fn show(&mut self, slots: &[Memslot]) -> Result<(), CallError> {
        self.ask(beside(&self.wanted, slots)).await
    }

    async fn ask(&mut self, pages: Vec<NotifyPage>) -> Result<(), CallError> {
        if pages == self.asked {
            return Ok(());
        }
        self.asked.clone_from(&pages);
        self.shown = true;
        match self.channel.call(&Call::NotifyPages(pages)).await {
            Ok(_) => Ok(()),
            Err(CallError::Refused { text, .. }) => {
                tracing::debug!(text, "the host shows no notify pages there");
                self.shown = false;
                // Some of them may have been shown before one could not be.
                self.channel.call(&Call::NotifyPages(Vec::new())).await.map(drop)
            }
            Err(error) => Err(error),
        }
    }
}

/// Where a signal is to be a notify page: where it has a page of addresses to itself.
fn page(signal: &Signal) -> Option<NotifyPage> {
    let window = &signal.window;
    let whole = !window.io && window.len == PAGE && window.base.is_multiple_of(PAGE);
    signal.page.filter(|_| whole).map(|page| NotifyPage { base: window.base, page, reserved: 0 })
}

/// Those pages that no memory is in the way of, and of those that a guest laid over each other the first.
fn beside(pages: &[NotifyPage], slots: &[Memslot]) -> Vec<NotifyPage> {
    let mut kept: Vec<NotifyPage> = Vec::with_capacity(pages.len());
    for page in pages {
        let is_memory = |slot: &Memslot| slot.base < page.base.saturating_add(PAGE) && page.base < slot.base + slot.len;
        if !slots.iter().any(is_memory) && !kept.iter().any(|other| other.base == page.base) {
            kept.push(*page);
        }
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use nix::sys::eventfd::EventFd;

    use super::*;
    use crate::pci::Window;

    fn at(page: u32, base: u64) -> NotifyPage {
        NotifyPage { base, page, reserved: 0 }
    }

    #[test]
    fn memory_and_the_first_of_two_devices_go_before() {
        let slot = |base, len| Memslot { base, len, offset: 0, ram: 0, flags: 0 };
        let slots = [slot(0, 0xa_0000), slot(0x10_0000, 0x1000), slot(0xfffc_0000, 0x4_0000)];
        let pages = [0x9_f000, 0xa_0000, 0xf_f000, 0x10_0000, 0x10_1000, 0xa_0000, 0xffff_f000, 1 << 32, !4095];
        let wanted: Vec<_> = (0..).zip(pages).map(|(page, base)| at(page, base)).collect();
        let kept = [at(1, 0xa_0000), at(2, 0xf_f000), at(4, 0x10_1000), at(7, 1 << 32), at(8, !4095)];
        assert_eq!(beside(&wanted, &slots), kept);
    }

    #[test]
    fn a_page_takes_the_place_of_whole_pages_alone() {
        let signal = |page, io, base, len| Signal {
            window: Window { io, base, len, region: 4 },
            event: Arc::new(EventFd::new().unwrap()),
            page,
        };
        assert_eq!(page(&signal(Some(3), false, 0xfe00_3000, 0x1000)), Some(at(3, 0xfe00_3000)));
        for other in [
            signal(None, false, 0xfe00_3000, 0x1000),
            signal(Some(3), true, 0x3000, 0x1000),
            signal(Some(3), false, 0xfe00_3004, 0x1000),
            signal(Some(3), false, 0xfe00_3000, 4),
        ] {
            assert_eq!(page(&other), None, "{other:?}");
        }
    }
}
