//! What a device with ports does with its queues (virtio 1.2 §5.3.6).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::epoll::EpollFlags;

use super::control::{DEVICE_READY, Message, PORT_OPEN, PORT_READY};
use super::handle::Order;
use super::port::{PART, Port};
use super::{
    CONTROL_RECEIVE, CONTROL_TRANSMIT, ConsoleConfig, ConsoleHandle, F_MULTIPORT, MAX_PORTS, PortEvents, queues_of,
};
use crate::persist::{StateError, States};
use crate::virtio::complaint::Complaints;
use crate::virtio::session::Control;
use crate::virtio::watch::Watch;
use crate::virtio::{Chain, Config, Engine, Queue, QueueError, Session, Wait};

/// Control messages of the driver's before ports have their turn.
const TURN: usize = 64;
/// What the watch calls the handle; a port's peer is twice its number, its listener the next.
const HANDLE: u64 = 0;

/// A device's engine.
pub struct ConsoleEngine {
    name: String,
    handle: Arc<ConsoleHandle>,
    events: Arc<dyn PortEvents>,
    pub(super) ports: [Option<Box<Port>>; MAX_PORTS],
    watch: Watch,
    /// The session that was served last.
    control: Option<Arc<Control>>,
    /// Its driver wants to know of ports.
    pub(super) asked: bool,
    /// It has opened ports in another process, of which nobody here has heard.
    pub(super) moved: bool,
    chain: Chain,
    buffer: Vec<u8>,
    complaints: Complaints,
}

impl ConsoleEngine {
    /// The engine of that device.
    ///
    /// # Errors
    /// This process can have no more descriptors; or [`super::PortError`].
    pub fn new(console: ConsoleConfig) -> io::Result<Self> {
        let watch = Watch::new()?;
        watch.add(console.handle.bell(), HANDLE)?;
        for port in console.ports {
            console.handle.add(port).map_err(io::Error::other)?;
        }
        Ok(Self {
            name: console.name,
            handle: console.handle,
            events: console.events,
            ports: Default::default(),
            watch,
            control: None,
            asked: false,
            moved: false,
            chain: Chain::default(),
            buffer: vec![0; PART],
            complaints: Complaints::default(),
        })
    }

    /// Forgets what a driver of an earlier session knew.
    pub(super) fn meet(&mut self, session: &Session) {
        if self.control.as_ref().is_some_and(|control| Arc::ptr_eq(control, &session.control)) {
            return;
        }
        self.control = Some(session.control.clone());
        self.asked = false;
        for port in self.ports.iter_mut().flatten() {
            if port.driver.open {
                self.events.guest_open(&port.id, false);
            }
            port.restart();
        }
    }

    /// Says which ports a driver that came from another process has open.
    fn arrive(&mut self) {
        if std::mem::take(&mut self.moved) {
            let open = self.ports.iter().flatten().filter(|port| port.driver.open && !port.leaving);
            open.for_each(|port| self.events.guest_open(&port.id, true));
        }
    }

    /// Adds and removes the ports that it is told to.
    pub(super) fn obey(&mut self) {
        while let Some(order) = self.handle.take_order() {
            match order {
                Order::Add(number, port) => {
                    let mut port = Port::new(port);
                    if let Err(errno) = port.end.watch(&self.watch, 2 * number as u64) {
                        self.complaints.say(&self.name, format_args!("port {}: can't wait for it: {errno}", port.id));
                    }
                    // A driver that has asked already gets it at once.
                    port.driver.asked = self.asked;
                    self.ports[number] = Some(Box::new(port));
                }
                Order::Remove(number) => {
                    if let Some(port) = &mut self.ports[number] {
                        if port.driver.open {
                            self.events.guest_open(&port.id, false);
                        }
                        port.leave();
                    }
                }
            }
        }
    }

    /// Takes the driver's messages; whether there are more.
    fn listen(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        for _ in 0..TURN {
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            let message = Message::read(&mut self.chain, queue.lease())?;
            queue.push(self.chain.head(), 0)?;
            self.hear(message);
        }
        queue.publish()?;
        Ok(true)
    }

    fn hear(&mut self, message: Message) {
        let yes = message.value == 1;
        if message.event == DEVICE_READY {
            self.asked = yes;
            self.ports.iter_mut().flatten().for_each(|port| port.driver.asked = yes);
            return;
        }
        // Of a port that there isn't, or not any more, a driver may well speak.
        let Some(port) = self.ports.get_mut(message.port as usize).and_then(Option::as_mut) else { return };
        match message.event {
            PORT_READY => port.driver.ready = yes,
            PORT_OPEN if port.driver.open != yes => {
                port.driver.open = yes;
                self.events.guest_open(&port.id, yes);
            }
            _ => {}
        }
    }

    /// Tells the driver what it doesn't know; whether there is more to be told, and room for it.
    fn tell(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        for (number, port) in self.ports.iter_mut().enumerate() {
            let Some(port) = port else { continue };
            while let Some(news) = port.news() {
                let bytes = port.message(number as u32, news);
                if !queue.pop(&mut self.chain)? {
                    queue.publish()?;
                    return queue.allow_kicks();
                }
                if self.chain.readable() > 0 || self.chain.writable() < bytes.len() as u64 {
                    return Err(QueueError::Broken("a buffer for control messages that can't hold one"));
                }
                self.chain.write(queue.lease(), &bytes)?;
                queue.push(self.chain.head(), bytes.len() as u32)?;
                port.told(news);
            }
        }
        queue.publish()?;
        Ok(false)
    }

    /// Forgets ports of which the driver knows that they are gone.
    fn forget(&mut self) {
        for (number, place) in self.ports.iter_mut().enumerate() {
            if place.take_if(|port| port.is_gone()).is_some() {
                self.handle.forget(number);
            }
        }
    }

    /// Moves the bytes of every port; whether there is more to do at once.
    fn carry(&mut self, session: &mut Session) -> Result<bool, QueueError> {
        let mut more = false;
        for (number, place) in self.ports.iter_mut().enumerate() {
            let Some(port) = place else { continue };
            if port.may_open()
                && let Err(error) = port.end.open(&self.watch, 2 * number as u64)
            {
                let path = port.end.path().display();
                self.complaints.say(&self.name, format_args!("port {}: {path}: {error}; tries on", port.id));
            }
            let (to_guest, from_guest) = queues_of(number);
            if port.driver.ready && !port.leaving {
                if let Some(Some(queue)) = session.queues.get_mut(to_guest) {
                    more |= port.receive(queue, &mut self.buffer)?;
                }
                if let Some(Some(queue)) = session.queues.get_mut(from_guest) {
                    more |= port.transmit(queue)?;
                }
            }
            // What it left is for nobody.
            if port.end.is_hung_up() && !port.driver.open {
                port.end.close();
            }
            self.handle.set(number, port.driver.open, port.end.is_open());
        }
        Ok(more)
    }

    /// What is written to a console that isn't there vanishes.
    fn swallow(&mut self, queue: &mut Queue) -> Result<bool, QueueError> {
        queue.hold_kicks()?;
        for _ in 0..TURN {
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return queue.allow_kicks();
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.publish()?;
        Ok(true)
    }
}

impl Engine for ConsoleEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        self.meet(session);
        self.arrive();
        let ports = &mut self.ports;
        let mut more = !self.watch.changes(|change| {
            let number = (change.token / 2) as usize;
            if change.token != HANDLE
                && let Some(Some(port)) = ports.get_mut(number)
            {
                port.end.note(change.token % 2 == 1, change);
            }
        });
        self.obey();
        if let Some(Some(queue)) = session.queues.get_mut(queues_of(0).1) {
            more |= self.swallow(queue)?;
        }
        if session.has(F_MULTIPORT) {
            if let Some(Some(queue)) = session.queues.get_mut(CONTROL_TRANSMIT) {
                more |= self.listen(queue)?;
            }
            if let Some(Some(queue)) = session.queues.get_mut(CONTROL_RECEIVE) {
                more |= self.tell(queue)?;
            }
            more |= self.carry(session)?;
            // Peers have come and gone meanwhile.
            if let Some(Some(queue)) = session.queues.get_mut(CONTROL_RECEIVE) {
                more |= self.tell(queue)?;
            }
        }
        self.forget();
        if more {
            return Ok(Wait::NOTHING);
        }
        let pauses = self.ports.iter().flatten().filter(|port| port.may_open()).filter_map(|port| port.end.pause());
        let timeout = pauses.min();
        Ok(Wait { source: EpollFlags::EPOLLIN, timeout })
    }

    /// What was taken is given back before anything else is done, but for bytes that a peer didn't take yet.
    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        self.meet(session);
        self.obey();
        Ok(None)
    }

    fn save_into(&self, at: &str, states: &mut States, session: Option<&Session>) {
        self.save(at, states, session.is_some());
    }

    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        _: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        self.restore(at, states, session.as_deref())
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.watch.as_fd())
    }
}
