//! Message-signalled interrupts: each message has a vector of the function that is wired to it, so that raising one costs no thread on
//! the host. While a route is being changed, and where vectors are used up, the message itself goes through the channel.
//!
//! So it is with synthetic interrupts, but that they have no way beside a vector, and that the host tells when the guest has ended one.

mod routes;
mod sints;
mod way;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Call, Irqchip, Irqfd, Msi, VmCreated};
use pcie_function::SocFunction;
use tokio::sync::Notify;

use self::sints::Sints;
use self::way::Way;
use super::guest::{GuestEvent, Relay};
use crate::bus::{Ticket, Wake};
use crate::devices::IO_APIC_PINS;
use crate::hyperv::{Sint, SintSink};
use crate::interrupt::{Message, MessageRoute, MessageSink, Settling};
use crate::link::{CallError, Channel, EoiSink};

/// GSIs below are pins of the I/O APIC.
const FIRST_GSI: u32 = IO_APIC_PINS as u32;

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
        (0..IO_APIC_PINS).map(|index| Box::new(Way::by_slot(self.0.clone(), index)) as _).collect()
    }

    /// How far the host is with changes.
    pub(super) fn settling(&self) -> Arc<Settling> {
        self.0.settling.clone()
    }

    /// Routes to synthetic interrupt sources; from now on the host's reports of ended interrupts are heard.
    pub(super) fn sints(&self) -> Arc<dyn SintSink> {
        let sints = Arc::new(Sints::new(self.0.clone()));
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
        self.channel.call(&Call::SetRouting(routes::table(self.irqchip, &before))).await?;
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

impl<F: SocFunction> MessageSink for Messages<F> {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Way::off(self.0.clone()))
    }
}
