//! The state of devices on its way to another process: by name and version, in types of its own, as JSON.

mod hex;

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use hex::Hex;

/// A device whose state can be taken out and put back, here or in another process.
///
/// Between `save` and `restore` no access may be in flight. `restore` raises the device's lines as they were: the irqchip's state
/// goes first. It interrupts for nothing new, since a vCPU's state, which follows, would wipe that out: what waited, and what timers owe, comes
/// when the bus is polled afterwards.
pub trait Persist {
    /// The device, in a stream.
    const NAME: &'static str;
    /// Which layout of its state; another one is refused.
    const VERSION: u32 = 1;
    /// All that the guest can tell, as plain data.
    type State: Serialize + DeserializeOwned;

    /// Takes the state.
    fn save(&self) -> Self::State;

    /// Puts the state back. It may come from a peer: it is checked before anything is changed.
    ///
    /// # Errors
    /// The state is none that the device can have.
    fn restore(&mut self, state: &Self::State) -> Result<(), RestoreError>;
}

/// A device as its machine moves it. Whatever is a [`Persist`] and does nothing by itself is one.
pub trait Moves {
    /// Stops what the device does by itself, at a point from which it can go on. It begins; [`Moves::is_halted`] tells when it is done.
    fn halt(&mut self) {}

    /// Whether nothing is under way any more: guest memory and the outside stay as they are.
    fn is_halted(&mut self) -> bool {
        true
    }

    /// Goes on after [`Moves::halt`], or after [`Moves::load`].
    fn go_on(&mut self) {}

    /// Why it can't move to another process, in one line that names it; none: it can.
    fn blocker(&self) -> Option<String> {
        None
    }

    /// Puts the state into `states`. `at` says which of several devices of its kind it is; of a device that is there once it is empty.
    fn save_into(&self, at: &str, states: &mut States);

    /// Takes the state out of `states`; the device has never run, or is halted. Guest memory, flash included, is as the state has it; so is
    /// the irqchip, while vCPUs follow. Until [`Moves::go_on`] the device does nothing by itself, and interrupts for nothing new.
    ///
    /// # Errors
    /// It isn't there, or not as this device has it.
    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError>;
}

impl<P: Persist> Moves for P {
    fn save_into(&self, at: &str, states: &mut States) {
        states.put(P::NAME, at, P::VERSION, &self.save());
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let state = states.take(P::NAME, at, P::VERSION)?;
        Ok(self.restore(&state)?)
    }
}

/// A device's state.
#[derive(Clone, PartialEq, Eq)]
pub struct Saved {
    /// Of its layout.
    pub version: u32,
    /// In JSON.
    pub state: Vec<u8>,
}

impl std::fmt::Debug for Saved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.version, String::from_utf8_lossy(&self.state))
    }
}

/// What a device was made with that its driver knows, so that one that is made otherwise can't take its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fact {
    /// It is the same wherever the guest goes on.
    Is(u64),
    /// It may be more there.
    AtLeast(u64),
}

/// [`Fact`]s by what they are of.
pub type Facts = BTreeMap<String, Fact>;

/// The states of a machine's devices, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct States {
    list: BTreeMap<String, Saved>,
    /// Which there are is all that is wanted.
    names_only: bool,
    facts: BTreeMap<String, Facts>,
}

/// Why a machine can't take states over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// There is none for a device.
    #[error(
        "there is no state of {0}, which this machine has: start it with the devices of the source, in their places"
    )]
    Missing(String),
    /// There is one for no device.
    #[error(
        "there is a state of {0}, which this machine doesn't have: start it with the devices of the source, in their places"
    )]
    Unknown(String),
    /// There are two for one.
    #[error("there are two states of {0}")]
    Twice(String),
    /// Another layout.
    #[error(
        "the state of {name} is of version {found}, this soc-vmm knows version {known}: use one that is as old as the source's"
    )]
    Version {
        /// The device.
        name: String,
        /// The state's.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// It isn't of the shape that it should be.
    #[error("the state of {name} can't be read: {why}")]
    Malformed {
        /// The device.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// It is none that the device can have.
    #[error(transparent)]
    Impossible(#[from] RestoreError),
}

/// A saved state that no device of the kind can have.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("saved state of {device}: {what}")]
pub struct RestoreError {
    /// Which device.
    pub device: &'static str,
    /// What is wrong with it.
    pub what: Cow<'static, str>,
}

impl RestoreError {
    /// What is wrong with the state of a device.
    pub fn new(device: &'static str, what: impl Into<Cow<'static, str>>) -> Self {
        Self { device, what: what.into() }
    }
}

/// `Ok` where `condition` holds, else the error that names it.
pub(crate) fn check(condition: bool, device: &'static str, what: &'static str) -> Result<(), RestoreError> {
    if condition { Ok(()) } else { Err(RestoreError::new(device, what)) }
}

impl States {
    /// Takes names, versions and facts alone: of devices that are at work, too.
    pub fn of_names() -> Self {
        Self { names_only: true, ..Self::default() }
    }

    /// Whether names and versions are all that is wanted.
    pub fn are_names(&self) -> bool {
        self.names_only
    }

    /// Adds the state of the device `name` at `at`.
    ///
    /// # Panics
    /// The machine has two devices of that name and place, or a state whose maps have keys that are no strings: mistakes of ours.
    pub fn put(&mut self, name: &str, at: &str, version: u32, state: &impl Serialize) {
        let json = || serde_json::to_vec(state).expect("a device's state has a form in JSON");
        let state = if self.names_only { Vec::new() } else { json() };
        let before = self.list.insert(full(name, at), Saved { version, state });
        assert!(before.is_none(), "two devices are {}", full(name, at));
    }

    /// Adds what the device `name` at `at` was made with.
    pub fn tell(&mut self, name: &str, at: &str, what: &str, fact: Fact) {
        self.facts.entry(full(name, at)).or_default().insert(what.to_owned(), fact);
    }

    /// What devices were made with, by their names.
    pub fn facts(&self) -> &BTreeMap<String, Facts> {
        &self.facts
    }

    /// Adds one that came from elsewhere.
    ///
    /// # Errors
    /// It is there already.
    pub fn add(&mut self, name: &str, saved: Saved) -> Result<(), StateError> {
        match self.list.insert(name.to_owned(), saved) {
            None => Ok(()),
            Some(_) => Err(StateError::Twice(name.to_owned())),
        }
    }

    /// Takes the state of the device `name` at `at`.
    ///
    /// # Errors
    /// It isn't there, or of another version or shape.
    pub fn take<T: DeserializeOwned>(&mut self, name: &str, at: &str, known: u32) -> Result<T, StateError> {
        let name = full(name, at);
        let Some(Saved { version: found, state }) = self.list.remove(&name) else {
            return Err(StateError::Missing(name));
        };
        if found != known {
            return Err(StateError::Version { name, found, known });
        }
        serde_json::from_slice(&state).map_err(|e| StateError::Malformed { name, why: e.to_string() })
    }

    /// Says that every device has taken its own.
    ///
    /// # Errors
    /// Something is left.
    pub fn end(self) -> Result<(), StateError> {
        match self.list.into_keys().next() {
            None => Ok(()),
            Some(name) => Err(StateError::Unknown(name)),
        }
    }
}

impl IntoIterator for States {
    type Item = (String, Saved);
    type IntoIter = std::collections::btree_map::IntoIter<String, Saved>;

    fn into_iter(self) -> Self::IntoIter {
        self.list.into_iter()
    }
}

fn full(name: &str, at: &str) -> String {
    if at.is_empty() { name.to_owned() } else { format!("{name}@{at}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_left_or_of_another_version_is_named() {
        let mut states = States::default();
        states.put("serial", "", 1, &7u8);
        states.put("virtio-blk", "01.0/00.0", 2, &"x");
        let said = |e: StateError| e.to_string();
        assert!(said(states.take::<u8>("rtc", "", 1).unwrap_err()).contains("no state of rtc,"));
        assert_eq!(states.take::<u8>("serial", "", 1), Ok(7));
        let mut other = states.clone();
        let old = other.take::<String>("virtio-blk", "01.0/00.0", 1).unwrap_err();
        assert_eq!(old, StateError::Version { name: "virtio-blk@01.0/00.0".into(), found: 2, known: 1 });
        let mut other = states.clone();
        assert!(said(other.take::<u8>("virtio-blk", "01.0/00.0", 2).unwrap_err()).contains("can't be read"));
        assert!(said(states.end().unwrap_err()).contains("virtio-blk@01.0/00.0, which this machine doesn't have"));
        assert_eq!(States::default().end(), Ok(()));
    }
}
