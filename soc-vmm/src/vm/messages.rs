//! Message-signalled interrupts: each message has a vector of the function that is wired to it, so that raising one costs no thread on
//! the host. While a route is being changed, and where vectors are used up, the message itself goes through the channel.
//!
//! So it is with synthetic interrupts, but that they have no way beside a vector, and that the host tells when the guest has ended one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Call, Irqchip, Irqfd, Msi, Route, RouteKind, VmCreated};
use pcie_function::SocFunction;
use tokio::sync::Notify;

use super::guest::{GuestEvent, Relay};
use crate::bus::{Ticket, Wake};
use crate::devices::IO_APIC_PINS;
use crate::hyperv::{Sint, SintRoute, SintSink};
use crate::interrupt::{Message, MessageRoute, MessageSink, Settling};
use crate::link::{CallError, Channel, EoiSink};

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
    /// Some slot's interrupt was ended.
    any_ended: AtomicBool,
    /// Wakes who waits for it to settle, or asks for ended ones.
    wake: Arc<dyn Wake>,
}

#[derive(Debug, Default)]
struct State {
    /// By vector, counted from the first.
    slots: Vec<Slot>,
    /// Something is to be told to the host.
    dirty: bool,
    /// Accesses that wait until it is told.
    tickets: Vec<Ticket>,
}

impl State {
    /// A slot that nobody has. A vector that is being unwired is not free yet.
    fn free(&self) -> Option<usize> {
        self.slots.iter().position(|slot| !slot.taken && !slot.wired)
    }
}

/// A vector and what it is wired to.
#[derive(Clone, Debug, Default)]
struct Slot {
    taken: bool,
    target: Option<Target>,
    /// The host's route is `target`, and the vector is wired.
    settled: bool,
    /// The vector is wired.
    wired: bool,
    /// The guest has ended the interrupt since somebody asked.
    ended: bool,
}

/// What a vector raises.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    Message(Message),
    Sint(Sint),
}

impl<F: SocFunction> Messages<F> {
    /// None yet; `created` says which vectors are free. `wake` is called each time that routes have settled, if the machine has the
    /// I/O APIC, and when the guest has ended a synthetic interrupt.
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
        let state = Mutex::new(State { slots, dirty: true, tickets: Vec::new() });
        Self(Arc::new(Shared {
            function,
            channel,
            irqchip,
            first: created.free_vector,
            vectors,
            state,
            changed: Notify::new(),
            settling: Arc::default(),
            any_ended: AtomicBool::new(false),
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

    /// Routes to synthetic interrupt sources; from now on the host's reports of ended interrupts are heard.
    pub(super) fn sints(&self) -> Arc<dyn SintSink> {
        let sints = Arc::new(Sints(self.0.clone()));
        // The channel is part of it: it must not keep it.
        let sink: Arc<dyn EoiSink> = sints.clone();
        self.0.channel.on_eoi(Arc::downgrade(&sink));
        sints
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
        let (before, tickets, mark) = {
            let mut state = self.state();
            if !std::mem::take(&mut state.dirty) {
                return Ok(());
            }
            (state.slots.clone(), std::mem::take(&mut state.tickets), self.settling.mark())
        };
        let irqfd = |index: usize, on: bool| {
            let (vector, gsi) = (self.first + index as u32, self.first_gsi() + index as u32);
            let tells = on && matches!(before[index].target, Some(Target::Sint(_)));
            Call::Irqfd(Irqfd { vector, gsi, on: on.into(), resample: tells.into() })
        };
        let is_wanted = |index: usize, slot: &Slot| slot.target.is_some() && index < self.vectors;
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
            slot.settled = slot.wired && slot.target == before.target;
        }
        drop(state);
        tickets.into_iter().for_each(|ticket| ticket.done(0));
        self.settled(mark);
        Ok(())
    }

    /// Gives a slot back.
    fn give_up(&self, index: usize) {
        let mut state = self.state();
        let slot = &mut state.slots[index];
        (slot.taken, slot.target, slot.settled) = (false, None, false);
        self.change(&mut state);
    }

    fn send(&self, message: Message) {
        let Message { address, data } = message;
        // Over: then nobody waits for the interrupt.
        let _ = self.channel.order(&Call::Msi(Msi { address, data, reserved: 0 }));
    }
}

/// The whole table: pins of the host's chips as a PC wires them, where the timer's ISA interrupt 0 is the I/O APIC's input 2, then what
/// vectors raise.
fn routes(irqchip: Irqchip, slots: &[Slot]) -> Vec<Route> {
    let full = irqchip == Irqchip::Full;
    let pin = |gsi, chip, data| Route { gsi, kind: RouteKind::Pin as u32, address: chip, data, reserved: 0 };
    let pics = (0..16).filter(|gsi| *gsi != 2);
    let pics = pics.map(|gsi| pin(gsi, if gsi < 8 { PIC_MASTER } else { PIC_SLAVE }, gsi % 8));
    let inputs = (0..FIRST_GSI).filter(|gsi| *gsi != 2);
    let inputs = inputs.map(|gsi| pin(gsi, IO_APIC, if gsi == 0 { 2 } else { gsi }));
    let pins = pics.chain(inputs).filter(|_| full);
    let vectors = slots.iter().zip(if full { FIRST_GSI } else { 0 }..).filter_map(|(slot, gsi)| {
        Some(match slot.target? {
            Target::Message(Message { address, data }) => {
                Route { gsi, kind: RouteKind::Msi as u32, address, data, reserved: 0 }
            }
            Target::Sint(Sint { vcpu, number }) => {
                Route { gsi, kind: RouteKind::Sint as u32, address: vcpu.into(), data: number.into(), reserved: 0 }
            }
        })
    });
    pins.chain(vectors).collect()
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
            _ => message.and_then(|_| state.free()),
        };
        *place = match (slot, message) {
            (Some(index), _) => {
                let slot = &mut state.slots[index];
                slot.taken = true;
                slot.settled = false;
                slot.target = message.map(Target::Message);
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
                    Slot { target: Some(_), settled: true, .. } => {
                        drop(state);
                        self.shared.function.raise(self.shared.first + index as u32);
                    }
                    Slot { target: Some(Target::Message(message)), .. } => self.shared.send(*message),
                    _ => {}
                }
            }
        }
    }
}

impl<F: SocFunction> Drop for Way<F> {
    fn drop(&mut self) {
        if let Place::Slot(index) = *self.place() {
            self.shared.give_up(index);
        }
    }
}

/// Routes to synthetic interrupt sources.
#[derive(Debug)]
struct Sints<F: SocFunction>(Arc<Shared<F>>);

impl<F: SocFunction> SintSink for Sints<F> {
    fn route(&self, sint: Sint) -> Option<Box<dyn SintRoute>> {
        let mut state = self.0.state();
        let index = state.free()?;
        state.slots[index] = Slot { taken: true, target: Some(Target::Sint(sint)), ..Slot::default() };
        self.0.change(&mut state);
        drop(state);
        Some(Box::new(SintWay { shared: self.0.clone(), index }))
    }

    fn take_ended(&self) -> Vec<Sint> {
        if !self.0.any_ended.load(Ordering::Relaxed) || !self.0.any_ended.swap(false, Ordering::Acquire) {
            return Vec::new();
        }
        let mut state = self.0.state();
        let ended = state.slots.iter_mut().filter_map(|slot| match slot.target {
            Some(Target::Sint(sint)) if std::mem::take(&mut slot.ended) => Some(sint),
            _ => None,
        });
        ended.collect()
    }
}

impl<F: SocFunction> EoiSink for Sints<F> {
    fn ended(&self, gsi: u32) {
        let index = gsi.checked_sub(self.0.first_gsi()).map(|index| index as usize);
        let mut state = self.0.state();
        let Some(slot) = index.and_then(|index| state.slots.get_mut(index)) else { return };
        slot.ended = true;
        drop(state);
        self.0.any_ended.store(true, Ordering::Release);
        self.0.wake.wake();
    }
}

/// The way to one synthetic interrupt source: its slot.
struct SintWay<F: SocFunction> {
    shared: Arc<Shared<F>>,
    index: usize,
}

impl<F: SocFunction> SintRoute for SintWay<F> {
    fn raise(&self) {
        if self.shared.state().slots[self.index].settled {
            self.shared.function.raise(self.shared.first + self.index as u32);
        }
    }

    fn when_ready(&self, ticket: Ticket) {
        let mut state = self.shared.state();
        if state.slots[self.index].settled {
            drop(state);
            return ticket.done(0);
        }
        state.tickets.push(ticket);
        self.shared.change(&mut state);
    }
}

impl<F: SocFunction> Drop for SintWay<F> {
    fn drop(&mut self) {
        self.shared.give_up(self.index);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_pin_and_each_message() {
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        let slot = |target| Slot { taken: true, target: Some(target), ..Slot::default() };
        let sint = Sint { vcpu: 3, number: 9 };
        let slots = [Slot::default(), slot(Target::Message(message)), slot(Target::Sint(sint))];
        let table = routes(Irqchip::Full, &slots);
        let pins: Vec<_> = table.iter().filter(|route| route.kind == 1).collect();
        assert_eq!((pins.len(), table.len()), (15 + 23, 15 + 23 + 2));
        assert!(pins.iter().all(|route| route.gsi != 2));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (0, IO_APIC, 2)));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (9, PIC_SLAVE, 1)));
        let [.., message, sint] = table[..] else { panic!("{table:?}") };
        assert_eq!((message.gsi, message.kind, message.address, message.data), (25, 2, 0xfee0_0000, 0x41));
        assert_eq!((sint.gsi, sint.kind, sint.address, sint.data), (26, 3, 3, 9));
    }

    #[test]
    fn where_the_host_has_no_chips_slots_are_gsis() {
        let message = Message { address: 0xfee0_0000, data: 0xc041 };
        let slot = Slot { taken: true, target: Some(Target::Message(message)), ..Slot::default() };
        let table = routes(Irqchip::Split, &[Slot::default(), slot]);
        assert_eq!(table.iter().map(|r| (r.gsi, r.kind, r.data)).collect::<Vec<_>>(), [(1, 2, 0xc041)]);
    }
}
