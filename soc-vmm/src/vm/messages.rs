//! Message-signalled interrupts: each message has a vector of the function that is wired to it, so that raising one costs no thread on
//! the host. While a route is being changed, and where vectors are used up, the message itself goes through the channel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Call, Irqchip, Irqfd, Msi, Route, RouteKind, VmCreated};
use pcie_function::SocFunction;
use tokio::sync::Notify;

use super::guest::{GuestEvent, Relay};
use crate::bus::Wake;
use crate::devices::IO_APIC_PINS;
use crate::interrupt::{Message, MessageRoute, MessageSink, Settling};
use crate::link::{CallError, Channel};

/// GSIs below are pins of the I/O APIC.
const FIRST_GSI: u32 = IO_APIC_PINS as u32;
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
    irqchip: Irqchip,
    /// The first vector that may be wired, and how many.
    first: u32,
    vectors: usize,
    state: Mutex<State>,
    changed: Notify,
    settling: Arc<Settling>,
    /// Wakes who waits for it to settle.
    wake: Arc<dyn Wake>,
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
    /// None yet; `created` says which vectors are free. `wake` is called each time that routes have settled, if the machine has the I/O APIC.
    pub(super) fn new(
        function: Arc<F>,
        channel: Channel<F>,
        created: &VmCreated,
        irqchip: Irqchip,
        wake: Arc<dyn Wake>,
    ) -> Self {
        // KVM has 4096 routes, of which the chips need some.
        let vectors = created.free_vectors.min(2048) as usize;
        let mut slots = vec![Slot::default(); vectors];
        if irqchip == Irqchip::Split {
            // The first ones are the pins', whether or not there is a vector for each.
            slots.resize(vectors.max(IO_APIC_PINS), Slot::default());
            slots[..IO_APIC_PINS].iter_mut().for_each(|slot| slot.taken = true);
        }
        let state = Mutex::new(State { slots, dirty: true });
        Self(Arc::new(Shared {
            function,
            channel,
            irqchip,
            first: created.free_vector,
            vectors,
            state,
            changed: Notify::new(),
            settling: Arc::default(),
            wake,
        }))
    }

    /// Where the pins' messages of an I/O APIC go that is not the host's: by the pin's GSI, so that the host tells of their ends.
    pub(super) fn pins(&self) -> Vec<Box<dyn MessageRoute>> {
        let pin = |index| Way { shared: self.0.clone(), place: Mutex::new(Place::Slot(index)) };
        (0..IO_APIC_PINS).map(|index| Box::new(pin(index)) as _).collect()
    }

    /// How far the host is with changes.
    pub(super) fn settling(&self) -> Arc<Settling> {
        self.0.settling.clone()
    }

    /// Starts the task that tells the host; it ends with the connection.
    pub(super) fn start(&self, relay: Arc<Relay>) {
        let shared = self.0.clone();
        tokio::spawn(async move {
            let error = loop {
                match shared.settle().await {
                    Ok(()) => shared.changed.notified().await,
                    Err(error) => break error,
                }
            };
            // Nobody waits for a host that takes no more.
            shared.settled(u64::MAX);
            // A loss is said by who watches the connection.
            if !error.is_loss() {
                relay.tell(GuestEvent::Failed(format!("the host can't route interrupts: {error}")));
            }
        });
    }
}

impl<F: SocFunction> Shared<F> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that something is to be told to the host.
    fn change(&self, state: &mut State) {
        state.dirty = true;
        self.settling.change();
        self.changed.notify_one();
    }

    fn settled(&self, mark: u64) {
        self.settling.settle(mark);
        // Nobody waits where the host has all the chips.
        if self.irqchip == Irqchip::Split {
            self.wake.wake();
        }
    }

    /// The GSI of the first slot.
    fn first_gsi(&self) -> u32 {
        if self.irqchip == Irqchip::Split { 0 } else { FIRST_GSI }
    }

    /// Makes the host's routes and wires what the slots say now.
    async fn settle(&self) -> Result<(), CallError> {
        let (before, mark) = {
            let mut state = self.state();
            if !std::mem::take(&mut state.dirty) {
                return Ok(());
            }
            (state.slots.clone(), self.settling.mark())
        };
        let irqfd = |index: usize, on: bool| {
            let (vector, gsi) = (self.first + index as u32, self.first_gsi() + index as u32);
            Call::Irqfd(Irqfd { vector, gsi, on: on.into(), resample: 0 })
        };
        let is_wanted = |index: usize, slot: &Slot| slot.message.is_some() && index < self.vectors;
        for (index, _) in before.iter().enumerate().filter(|(_, slot)| slot.wired && !slot.taken) {
            self.channel.call(&irqfd(index, false)).await?;
        }
        self.channel.call(&Call::SetRouting(routes(self.irqchip, &before))).await?;
        for (index, _) in before.iter().enumerate().filter(|(index, slot)| is_wanted(*index, slot) && !slot.wired) {
            self.channel.call(&irqfd(index, true)).await?;
        }
        let mut state = self.state();
        for (index, (slot, before)) in state.slots.iter_mut().zip(&before).enumerate() {
            slot.wired = before.taken && (before.wired || is_wanted(index, before));
            slot.settled = slot.wired && slot.message == before.message;
        }
        drop(state);
        self.settled(mark);
        Ok(())
    }

    fn send(&self, message: Message) {
        let Message { address, data } = message;
        // Over: then nobody waits for the interrupt.
        let _ = self.channel.order(&Call::Msi(Msi { address, data, reserved: 0 }));
    }
}

/// The whole table: pins of the host's chips as a PC wires them, where the timer's ISA interrupt 0 is the I/O APIC's input 2, then the
/// messages.
fn routes(irqchip: Irqchip, slots: &[Slot]) -> Vec<Route> {
    let full = irqchip == Irqchip::Full;
    let pin = |gsi, chip, data| Route { gsi, kind: RouteKind::Pin as u32, address: chip, data, reserved: 0 };
    let pics = (0..16).filter(|gsi| *gsi != 2);
    let pics = pics.map(|gsi| pin(gsi, if gsi < 8 { PIC_MASTER } else { PIC_SLAVE }, gsi % 8));
    let inputs = (0..FIRST_GSI).filter(|gsi| *gsi != 2);
    let inputs = inputs.map(|gsi| pin(gsi, IO_APIC, if gsi == 0 { 2 } else { gsi }));
    let messages = slots.iter().zip(if full { FIRST_GSI } else { 0 }..).filter_map(|(slot, gsi)| {
        let Message { address, data } = slot.message?;
        Some(Route { gsi, kind: RouteKind::Msi as u32, address, data, reserved: 0 })
    });
    let pins = pics.chain(inputs).filter(|_| full);
    pins.chain(messages).collect()
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
                self.shared.change(&mut state);
                Place::Slot(index)
            }
            (None, Some(message)) => Place::Channel(message),
            (None, None) => Place::Off,
        };
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
            self.shared.change(&mut state);
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
        let table = routes(Irqchip::Full, &[Slot::default(), slot.clone()]);
        let pins: Vec<_> = table.iter().filter(|route| route.kind == 1).collect();
        assert_eq!((pins.len(), table.len()), (15 + 23, 15 + 23 + 1));
        assert!(pins.iter().all(|route| route.gsi != 2));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (0, IO_APIC, 2)));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (9, PIC_SLAVE, 1)));
        assert_eq!(table.last().map(|r| (r.gsi, r.kind, r.address, r.data)), Some((25, 2, 0xfee0_0000, 0x41)));
    }
    #[test]
    fn where_the_host_has_no_chips_slots_are_gsis() {
        let message = Message { address: 0xfee0_0000, data: 0xc041 };
        let slot = Slot { taken: true, message: Some(message), ..Slot::default() };
        let table = routes(Irqchip::Split, &[Slot::default(), slot]);
        assert_eq!(table.iter().map(|r| (r.gsi, r.kind, r.data)).collect::<Vec<_>>(), [(1, 2, 0xc041)]);
    }
}
