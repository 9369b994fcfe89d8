//! The device by which kvm-unit-tests open Hyper-V connections and raise synthetic interrupts (QEMU's hyperv-testdev).

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::hyperv::{Hyperv, Message, PortError, PortKind, SINTS, Sint, SintRoute};

/// Port 0x3000, of which a write of 4 bytes is a command; reads give 0.
///
/// | bits | |
/// | --- | --- |
/// | 0–7 | SINT |
/// | 8–15 | vCPU |
/// | 16–23 | 1 make a route to the SINT, 2 drop it, 3 raise its interrupt; 4 open a connection that takes messages to the SINT, 5 close it; 6 and 7 the same for an event |
/// | 24–31 | connection |
///
/// What is opened is there when the write is complete. A command that can't be is logged, and does nothing.
pub struct HypervTestdev {
    hyperv: Arc<Hyperv>,
    routes: BTreeMap<Sint, Arc<dyn SintRoute>>,
    /// What this device has opened, by connection.
    ports: BTreeMap<u32, (PortKind, Sint)>,
}

/// Saved state of [`HypervTestdev`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervTestdevState {
    /// Routes that were made: vCPU and SINT.
    pub routes: Vec<(u16, u8)>,
    /// Connections that are open.
    pub ports: Vec<HypervPortState>,
}

/// A connection of a [`HypervTestdevState`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervPortState {
    /// Its number.
    pub connection: u8,
    /// vCPU and SINT.
    pub sint: (u16, u8),
    /// It takes messages, not an event.
    pub messages: bool,
    /// The message that waits, as it will stand in its slot.
    pub waiting: Option<Vec<u8>>,
}

impl HypervTestdev {
    /// What it claims. A guest goes on when its route is there: nothing is postable.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0x3000, 4)]);

    /// A device without routes.
    pub fn new(hyperv: Arc<Hyperv>) -> Self {
        Self { hyperv, routes: BTreeMap::new(), ports: BTreeMap::new() }
    }

    /// Does a command; the route that the guest must wait for, if there is one.
    fn command(&mut self, command: u32) -> Result<Option<Arc<dyn SintRoute>>, PortError> {
        let [number, vcpu, command, connection] = command.to_le_bytes();
        let sint = Sint { vcpu: vcpu.into(), number };
        let connection = u32::from(connection);
        match command {
            1 => {
                let route = self.hyperv.route(sint)?;
                self.routes.insert(sint, route.clone());
                return Ok(Some(route));
            }
            2 => drop(self.routes.remove(&sint)),
            3 => self.routes.get(&sint).ok_or(PortError::Number)?.raise(),
            4 => return self.open(connection, PortKind::Messages, sint).map(Some),
            5 => self.close(connection, PortKind::Messages),
            6 => return self.open(connection, PortKind::Events, sint).map(Some),
            7 => self.close(connection, PortKind::Events),
            _ => return Err(PortError::Number),
        }
        Ok(None)
    }

    fn open(&mut self, connection: u32, kind: PortKind, sint: Sint) -> Result<Arc<dyn SintRoute>, PortError> {
        let route = self.hyperv.open(connection, kind, sint)?;
        self.ports.insert(connection, (kind, sint));
        Ok(route)
    }

    fn close(&mut self, connection: u32, kind: PortKind) {
        if self.ports.get(&connection).is_some_and(|(open, _)| *open == kind) {
            self.ports.remove(&connection);
            self.hyperv.close(connection);
        }
    }
}

impl Device for HypervTestdev {
    fn read(&mut self, _: &Access, _: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(0)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, reply: Deferred<'_>) -> Answer {
        if (offset, access.len) != (0, 4) {
            return Answer::Done(0);
        }
        match self.command(data as u32) {
            Ok(Some(route)) => {
                route.when_ready(reply.ticket());
                Answer::Deferred
            }
            Ok(None) => Answer::Done(0),
            Err(error) => {
                tracing::debug!(command = data, %error, "hyperv-testdev");
                Answer::Done(0)
            }
        }
    }

    fn reset(&mut self) {
        self.routes.clear();
        for connection in std::mem::take(&mut self.ports).into_keys() {
            self.hyperv.close(connection);
        }
    }
}

impl Persist for HypervTestdev {
    const NAME: &'static str = "hyperv-testdev";
    type State = HypervTestdevState;

    fn save(&self) -> HypervTestdevState {
        let port = |(&connection, &(kind, sint)): (&u32, &(PortKind, Sint))| HypervPortState {
            // A command has no room for more.
            connection: connection as u8,
            sint: (sint.vcpu, sint.number),
            messages: kind == PortKind::Messages,
            waiting: self.hyperv.waiting(connection).map(|message| message.bytes().to_vec()),
        };
        let routes = self.routes.keys().map(|sint| (sint.vcpu, sint.number));
        HypervTestdevState { routes: routes.collect(), ports: self.ports.iter().map(port).collect() }
    }

    fn restore(&mut self, state: &HypervTestdevState) -> Result<(), RestoreError> {
        const NAME: &str = "hyperv-testdev";
        let vcpus = self.hyperv.vcpus();
        let all = state.routes.iter().chain(state.ports.iter().map(|port| &port.sint));
        let mut all = all;
        let fits = all.all(|&(vcpu, number)| vcpu < vcpus && number < SINTS);
        check(fits, NAME, "there is no such vCPU or SINT")?;
        check(state.ports.is_sorted_by(|a, b| a.connection < b.connection), NAME, "its connections aren't in order")?;
        let waiting = |port: &HypervPortState| {
            let message = port.waiting.as_deref().map(Message::from_bytes);
            message.is_none_or(|message| port.messages && message.is_some())
        };
        check(state.ports.iter().all(waiting), NAME, "what waits is no message")?;
        self.reset();
        let sint = |&(vcpu, number): &(u16, u8)| Sint { vcpu, number };
        let no_vector = |_| RestoreError::new(NAME, "the function has no vector left for a SINT");
        for route in state.routes.iter().map(sint) {
            self.routes.insert(route, self.hyperv.route(route).map_err(no_vector)?);
        }
        for port in &state.ports {
            let kind = if port.messages { PortKind::Messages } else { PortKind::Events };
            self.open(port.connection.into(), kind, sint(&port.sint)).map_err(no_vector)?;
            if let Some(message) = port.waiting.as_deref().and_then(Message::from_bytes) {
                self.hyperv.put_back(port.connection.into(), message);
            }
        }
        Ok(())
    }
}
