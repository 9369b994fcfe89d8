//! The way of one message: by its vector, or through the channel.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pcie_function::SocFunction;

use super::{Shared, Slot, Target};
use crate::interrupt::{Message, MessageRoute};

/// The way of one message.
pub(super) struct Way<F: SocFunction> {
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
    /// The way of no message yet.
    pub(super) fn off(shared: Arc<Shared<F>>) -> Self {
        Self { shared, place: Mutex::new(Place::Off) }
    }

    /// The way of a message by a slot that is taken for it.
    pub(super) fn by_slot(shared: Arc<Shared<F>>, index: usize) -> Self {
        Self { shared, place: Mutex::new(Place::Slot(index)) }
    }

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
