//! Routes to synthetic interrupt sources: each by a vector, for there is no other way, and with the host's notice of the interrupt's end.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use pcie_function::SocFunction;

use super::{Shared, Slot, Target};
use crate::bus::Ticket;
use crate::hyperv::{Sint, SintRoute, SintSink};
use crate::link::EoiSink;

/// Routes to synthetic interrupt sources.
#[derive(Debug)]
pub(super) struct Sints<F: SocFunction>(Arc<Shared<F>>);

impl<F: SocFunction> Sints<F> {
    pub(super) fn new(shared: Arc<Shared<F>>) -> Self {
        Self(shared)
    }
}

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
