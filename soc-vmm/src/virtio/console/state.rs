//! A device's ports on their way to another process: what its driver knows of them and what it was sending. Peers are sockets of the process that
//! is left; those of the other one come anew, and the driver is told.

use serde::{Deserialize, Serialize};

use super::port::{Driver, Port, Sending};
use super::{ConsoleEngine, HostEnd, PortConfig, check_name, queues_of};
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::Session;

pub(super) const NAME: &str = "virtio-console";
pub(super) const VERSION: u32 = 1;

/// Saved state of a [`ConsoleEngine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct ConsoleState {
    /// Its driver wants to know of ports.
    asked: bool,
    /// Those that there are, by ascending numbers; none without a driver.
    ports: Vec<PortState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct PortState {
    number: usize,
    name: String,
    /// It is to go, which its driver doesn't know yet.
    leaving: bool,
    driver: Driver,
    sending: Option<Sending>,
}

impl ConsoleEngine {
    pub(super) fn save(&self, at: &str, states: &mut States, in_session: bool) {
        let ports = self.ports.iter().enumerate().filter(|_| in_session);
        let ports = ports.filter_map(|(number, port)| Some((number, port.as_deref()?)));
        let port = |(number, port): (usize, &Port)| PortState {
            number,
            name: port.name.clone(),
            leaving: port.leaving,
            driver: port.driver.clone(),
            sending: port.sending(),
        };
        let state = ConsoleState { asked: self.asked && in_session, ports: ports.map(port).collect() };
        states.put(NAME, at, VERSION, &state);
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        session: Option<&Session>,
    ) -> Result<(), StateError> {
        let ConsoleState { asked, ports } = states.take(NAME, at, VERSION)?;
        let refused = |what: &'static str| StateError::from(RestoreError::new(NAME, what));
        // Those that it has from the start are added by the first who looks.
        self.obey();
        let Some(session) = session else {
            let is_empty = ports.is_empty() && !asked;
            return if is_empty { Ok(()) } else { Err(refused("ports of a driver that isn't there")) };
        };
        if !ports.is_sorted_by(|one, next| one.number < next.number) {
            return Err(refused("its ports are not in order"));
        }
        for PortState { number, name, leaving, sending, .. } in &ports {
            match self.ports.get(*number) {
                Some(Some(port)) if port.name == *name && !leaving => {}
                Some(None) if *leaving && *number > 0 && check_name(name).is_ok() => {}
                _ => {
                    return Err(refused(
                        "its ports are others than here: start this machine with the source's options",
                    ));
                }
            }
            let queue = session.queues.get(queues_of(*number).1).and_then(Option::as_ref);
            let size = queue.map_or(0, |queue| queue.layout().size);
            if sending.is_some_and(|sending| sending.head >= size) {
                return Err(refused("a chain of a queue that isn't in use"));
            }
        }
        self.meet(session);
        (self.asked, self.moved) = (asked, true);
        // Those that are new here.
        self.ports.iter_mut().flatten().for_each(|port| port.driver.asked = asked);
        for PortState { number, name, leaving, driver, sending } in ports {
            let port = self.ports[number].get_or_insert_with(|| {
                let gone = PortConfig { id: String::new(), name, end: HostEnd::nobody() };
                Box::new(Port::new(gone))
            });
            port.leaving = leaving;
            port.move_in(driver, sending);
        }
        Ok(())
    }
}
