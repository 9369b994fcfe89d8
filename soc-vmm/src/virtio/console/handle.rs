//! The side of the ports that isn't the guest's: which there are, and how they come and go.

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sys::eventfd::EventFd;

use super::{MAX_PORTS, PortConfig};
use crate::virtio::session::{eventfd, ring_bell};

/// Longest name, as QEMU's device has it.
const NAME_MAX: usize = 127;

/// `Ok` if a port can have that name.
///
/// # Errors
/// [`PortError::Name`].
pub fn check_name(name: &str) -> Result<(), PortError> {
    if !(1..=NAME_MAX).contains(&name.len()) || name.chars().any(|c| c == '/' || c.is_control()) {
        return Err(PortError::Name(name.escape_default().to_string()));
    }
    Ok(())
}

/// Why there is no such port.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// All of them are in use.
    #[error("there is no room for another port: a device has {} at most; remove one first", MAX_PORTS - 1)]
    Full,
    /// No port has such a number.
    #[error("nr={number}: ports have numbers from 1 to {}", MAX_PORTS - 1)]
    Number {
        /// The number.
        number: usize,
    },
    /// Another one has the number.
    #[error("nr={0} is another port's: give another number, or none")]
    Occupied(usize),
    /// Another one is called so.
    #[error("there is a port {0} already; choose another name or id")]
    Taken(String),
    /// No name for a port.
    #[error(
        "'{0:.40}' is no name for a port: a name has 1 to {NAME_MAX} bytes, none of them '/' or a control character"
    )]
    Name(String),
    /// No port has it.
    #[error("there is no port {0}")]
    Unknown(String),
}

/// A port as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortStatus {
    /// [`PortConfig::id`].
    pub id: String,
    /// [`PortConfig::name`].
    pub name: String,
    /// Its socket.
    pub path: PathBuf,
    /// A program in the guest has it open.
    pub guest_open: bool,
    /// A peer is connected.
    pub host_open: bool,
}

/// Hears of what the guest does with its ports: QMP's `VSERPORT_CHANGE`. Called on the device's thread.
pub trait PortEvents: Send + Sync {
    /// A program in the guest has opened the port, or closed it.
    fn guest_open(&self, id: &str, open: bool);
}

/// From where ports are added, removed and looked at.
#[derive(Debug)]
pub struct ConsoleHandle {
    state: Mutex<State>,
    bell: EventFd,
}

#[derive(Debug)]
struct State {
    /// By the port's number; the first is never used.
    ports: [Option<PortStatus>; MAX_PORTS],
    /// The number that is tried first: numbers are used again as late as possible, since drivers take time to let go of a queue.
    next: usize,
    orders: VecDeque<Order>,
}

/// What the device has to do.
#[derive(Debug)]
pub(super) enum Order {
    Add(usize, PortConfig),
    Remove(usize),
}

impl ConsoleHandle {
    /// The handle of a device that is yet to be made.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub fn new() -> io::Result<Self> {
        let state = State { ports: Default::default(), next: 1, orders: VecDeque::new() };
        Ok(Self { state: Mutex::new(state), bell: eventfd()? })
    }

    /// Adds a port; the guest sees it as soon as its driver looks.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn add(&self, port: PortConfig) -> Result<(), PortError> {
        self.add_at(port, None)
    }

    /// Adds a port with that number, if one is given.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn add_at(&self, port: PortConfig, number: Option<usize>) -> Result<(), PortError> {
        let name = &port.name;
        check_name(name)?;
        let mut state = self.state();
        if let Some(other) = state.ports.iter().flatten().find(|other| other.name == *name || other.id == port.id) {
            return Err(PortError::Taken(if other.name == *name { name.clone() } else { port.id }));
        }
        let next = state.next;
        let mut numbers = (next..MAX_PORTS).chain(1..next);
        let number = match number {
            Some(number) if !(1..MAX_PORTS).contains(&number) => return Err(PortError::Number { number }),
            Some(number) if state.ports[number].is_some() => return Err(PortError::Occupied(number)),
            Some(number) => number,
            None => numbers.find(|&number| state.ports[number].is_none()).ok_or(PortError::Full)?,
        };
        state.next = number % (MAX_PORTS - 1) + 1;
        state.ports[number] = Some(PortStatus {
            id: port.id.clone(),
            name: name.clone(),
            path: port.end.path().to_owned(),
            guest_open: false,
            host_open: port.end.is_open(),
        });
        state.orders.push_back(Order::Add(number, port));
        drop(state);
        ring_bell(&self.bell);
        Ok(())
    }

    /// Removes the port with that id. Its socket goes once the device's thread has seen that, its name once the driver knows.
    ///
    /// # Errors
    /// [`PortError::Unknown`].
    pub fn remove(&self, id: &str) -> Result<(), PortError> {
        let mut state = self.state();
        let number = state.ports.iter().position(|port| port.as_ref().is_some_and(|port| port.id == id));
        let number = number.ok_or_else(|| PortError::Unknown(id.escape_default().to_string()))?;
        let ordered = |order: &Order| matches!(order, Order::Remove(other) if *other == number);
        if !state.orders.iter().any(ordered) {
            state.orders.push_back(Order::Remove(number));
        }
        drop(state);
        ring_bell(&self.bell);
        Ok(())
    }

    /// The ports, in the order of their numbers.
    pub fn ports(&self) -> Vec<PortStatus> {
        self.state().ports.iter().flatten().cloned().collect()
    }

    pub(super) fn bell(&self) -> &EventFd {
        &self.bell
    }

    pub(super) fn take_order(&self) -> Option<Order> {
        self.state().orders.pop_front()
    }

    /// What the device knows of a port.
    pub(super) fn set(&self, number: usize, guest_open: bool, host_open: bool) {
        if let Some(port) = &mut self.state().ports[number] {
            (port.guest_open, port.host_open) = (guest_open, host_open);
        }
    }

    /// The driver knows that the port is gone: its number and its name are free.
    pub(super) fn forget(&self, number: usize) {
        self.state().ports[number] = None;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
