//! Guest writes that the host's KVM turns into eventfds by itself, where host and SoC share them: kicks without an exit to the SoC.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;

use api_channel::call::{Call, IoEvent};
use nix::sys::eventfd::EventFd;
use pcie_function::SocFunction;

use crate::link::{CallError, Channel};
use crate::pci::Signal;

/// Where: ports or memory, and the address.
type Place = (bool, u64);

/// What the host signals now.
#[derive(Debug)]
pub(super) struct Signals<F: SocFunction> {
    function: Arc<F>,
    channel: Channel<F>,
    there: BTreeMap<Place, Arc<EventFd>>,
}

impl<F: SocFunction> Signals<F> {
    pub(super) fn new(function: Arc<F>, channel: Channel<F>) -> Self {
        Self { function, channel, there: BTreeMap::new() }
    }

    /// Has the host signal `wanted` and nothing else, as far as it can: what it doesn't signal comes as an exit.
    ///
    /// # Errors
    /// The host is gone, or keeps what it was to remove.
    pub(super) async fn arrange(&mut self, wanted: &[Signal]) -> Result<(), CallError> {
        let wanted = places(wanted);
        let stays = |place: &Place, event: &Arc<EventFd>| wanted.get(place).is_some_and(|e| Arc::ptr_eq(e, event));
        let gone = self.there.extract_if(.., |place, event| !stays(place, event));
        for (place, _) in gone.collect::<Vec<_>>() {
            self.channel.call(&Call::IoEvent(io_event(place, 0, 0))).await?;
        }
        for (place, event) in wanted {
            if self.there.contains_key(&place) {
                continue;
            }
            let Some(number) = self.function.share(event.as_fd()) else { continue };
            match self.channel.call(&Call::IoEvent(io_event(place, 1, number))).await {
                Ok(_) => drop(self.there.insert(place, event)),
                Err(CallError::Refused { text, .. }) => {
                    tracing::debug!(address = place.1, text, "the host signals no event there");
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Each place's event: of windows that a guest laid over each other, the first.
fn places(signals: &[Signal]) -> BTreeMap<Place, Arc<EventFd>> {
    let mut places = BTreeMap::new();
    for Signal { window, event, .. } in signals {
        places.entry((window.io, window.base)).or_insert_with(|| event.clone());
    }
    places
}

/// Writes of any length count: a driver may use 2 bytes or 4.
fn io_event((port, address): Place, on: u32, event: u32) -> IoEvent {
    IoEvent { address, data: 0, len: 0, port: port.into(), match_data: 0, on, event, reserved: 0 }
}
