//! Message-signalled interrupts: each message has a vector of the function that is wired to it, so that raising one costs no thread on
//! the host. While a route is being changed, and where vectors are used up, the message itself goes through the channel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Call, Irqfd, Msi, Route, RouteKind, VmCreated};
use pcie_function::SocFunction;
use tokio::sync::Notify;

use super::guest::{GuestEvent, Relay};
use crate::interrupt::{Message, MessageRoute, MessageSink};
use crate::link::{CallError, Channel};

/// GSIs below are pins of the in-kernel chips.
const FIRST_GSI: u32 = 24;
/// Chips by their number on the wire.
const PIC_MASTER: u64 = 0;
const PIC_SLAVE: u64 = 1;
const IO_APIC: u64 = 2;

/// The messages of a VM. Cloned into devices' makers.
#[derive(Debug)]
pub(super) struct Messages<F: SocFunction>(Arc<Shared<F>>);

#[derive(Debug)]
struct Shared<F: SocFunction> {
    function: Arc<F>,
    channel: Channel<F>,
    /// The first vector that may be wired.
    first: u32,
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    /// By vector, counted from the first.
    slots: Vec<Slot>,
    /// Something is to be told to the host.
    dirty: bool,
}

/// A vector and what it is wired to.
#[derive(Clone, Debug, Default)]
struct Slot {
    taken: bool,
    message: Option<Message>,
    /// The host's route is `message`, and the vector is wired.
    settled: bool,
    /// The vector is wired.
    wired: bool,
}

impl<F: SocFunction> Messages<F> {
    /// None yet; `created` says which vectors are free.
    pub(super) fn new(function: Arc<F>, channel: Channel<F>, created: &VmCreated) -> Self {
        // KVM has 4096 routes, of which the chips need some.
        let slots = vec![Slot::default(); created.free_vectors.min(2048) as usize];
        let state = Mutex::new(State { slots, dirty: true });
        Self(Arc::new(Shared { function, channel, first: created.free_vector, state, changed: Notify::new() }))
    }

    /// Starts the task that tells the host; it ends with the connection.
    pub(super) fn start(&self, relay: Arc<Relay>) {
        let shared = self.0.clone();
        tokio::spawn(async move {
            loop {
                match shared.settle().await {
                    Ok(()) => shared.changed.notified().await,
                    // Said by who watches the connection.
                    Err(error) if error.is_loss() => return,
                    Err(error) => {
                        return relay.tell(GuestEvent::Failed(format!("the host can't route interrupts: {error}")));
                    }
                }
            }
        });
    }
}

impl<F: SocFunction> Shared<F> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the host's routes and wires what the slots say now.
    async fn settle(&self) -> Result<(), CallError> {
        let before = {
            let mut state = self.state();
            if !std::mem::take(&mut state.dirty) {
                return Ok(());
            }
            state.slots.clone()
        };
        let irqfd = |index: usize, on: bool| {
            let (vector, gsi) = (self.first + index as u32, FIRST_GSI + index as u32);
            Call::Irqfd(Irqfd { vector, gsi, on: on.into(), resample: 0 })
        };
        for (index, _) in before.iter().enumerate().filter(|(_, slot)| slot.wired && !slot.taken) {
            self.channel.call(&irqfd(index, false)).await?;
        }
        self.channel.call(&Call::SetRouting(routes(&before))).await?;
        for (index, _) in before.iter().enumerate().filter(|(_, slot)| slot.message.is_some() && !slot.wired) {
            self.channel.call(&irqfd(index, true)).await?;
        }
        let mut state = self.state();
        for (slot, before) in state.slots.iter_mut().zip(&before) {
            slot.wired = before.taken && (before.wired || before.message.is_some());
            slot.settled = slot.wired && slot.message == before.message;
        }
        Ok(())
    }

    fn send(&self, message: Message) {
        let Message { address, data } = message;
        // Over: then nobody waits for the interrupt.
        let _ = self.channel.order(&Call::Msi(Msi { address, data, reserved: 0 }));
    }
}

/// The whole table: pins as a PC wires them, where the timer's ISA interrupt 0 is the I/O APIC's input 2, then the messages.
fn routes(slots: &[Slot]) -> Vec<Route> {
    let pin = |gsi, chip, data| Route { gsi, kind: RouteKind::Pin as u32, address: chip, data, reserved: 0 };
    let pics = (0..16).filter(|gsi| *gsi != 2);
    let pics = pics.map(|gsi| pin(gsi, if gsi < 8 { PIC_MASTER } else { PIC_SLAVE }, gsi % 8));
    let inputs = (0..FIRST_GSI).filter(|gsi| *gsi != 2);
    let inputs = inputs.map(|gsi| pin(gsi, IO_APIC, if gsi == 0 { 2 } else { gsi }));
    let messages = slots.iter().zip(FIRST_GSI..).filter_map(|(slot, gsi)| {
        let Message { address, data } = slot.message?;
        Some(Route { gsi, kind: RouteKind::Msi as u32, address, data, reserved: 0 })
    });
    pics.chain(inputs).chain(messages).collect()
}

impl<F: SocFunction> MessageSink for Messages<F> {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Way { shared: self.0.clone(), place: Mutex::new(Place::Off) })
    }
}

/// The way of one message.
struct Way<F: SocFunction> {
    shared: Arc<Shared<F>>,
    place: Mutex<Place>,
}

/// What a way goes by.
#[derive(Clone, Copy)]
enum Place {
    /// No message.
    Off,
    /// A vector: its slot.
    Slot(usize),
    /// The channel.
    Channel(Message),
}

impl<F: SocFunction> Way<F> {
    fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: SocFunction> MessageRoute for Way<F> {
    fn set(&self, message: Option<Message>) {
        let mut place = self.place();
        let mut state = self.shared.state();
        let slot = match *place {
            Place::Slot(index) => Some(index),
            // A vector that is being unwired is not free yet.
            _ => message.and_then(|_| state.slots.iter().position(|slot| !slot.taken && !slot.wired)),
        };
        *place = match (slot, message) {
            (Some(index), _) => {
                let slot = &mut state.slots[index];
                slot.taken = true;
                slot.settled = false;
                slot.message = message;
                state.dirty = true;
                Place::Slot(index)
            }
            (None, Some(message)) => Place::Channel(message),
            (None, None) => Place::Off,
        };
        drop(state);
        self.shared.changed.notify_one();
    }

    fn raise(&self) {
        match *self.place() {
            Place::Off => {}
            Place::Channel(message) => self.shared.send(message),
            Place::Slot(index) => {
                let state = self.shared.state();
                match &state.slots[index] {
                    Slot { message: Some(_), settled: true, .. } => {
                        drop(state);
                        self.shared.function.raise(self.shared.first + index as u32);
                    }
                    Slot { message: Some(message), .. } => self.shared.send(*message),
                    _ => {}
                }
            }
        }
    }
}

impl<F: SocFunction> Drop for Way<F> {
    fn drop(&mut self) {
        if let Place::Slot(index) = *self.place() {
            let mut state = self.shared.state();
            let slot = &mut state.slots[index];
            (slot.taken, slot.message, slot.settled) = (false, None, false);
            state.dirty = true;
            drop(state);
            self.shared.changed.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_pin_and_each_message() {
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        let slot = Slot { taken: true, message: Some(message), ..Slot::default() };
        let table = routes(&[Slot::default(), slot]);
        let pins: Vec<_> = table.iter().filter(|route| route.kind == 1).collect();
        assert_eq!((pins.len(), table.len()), (15 + 23, 15 + 23 + 1));
        assert!(pins.iter().all(|route| route.gsi != 2));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (0, IO_APIC, 2)));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (9, PIC_SLAVE, 1)));
        assert_eq!(table.last().map(|r| (r.gsi, r.kind, r.address, r.data)), Some((25, 2, 0xfee0_0000, 0x41)));
    }
}
