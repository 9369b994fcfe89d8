//! Hyper-V's messages and events to a guest, where KVM leaves them to user space: the hypercalls that post and signal, and the ports
//! that take them to a synthetic interrupt source (SINT) of a vCPU (Hypervisor Top-Level Functional Specification, TLFS, "Inter-Partition
//! Communication" and "Virtual Interrupts").
//!
//! KVM has the synthetic interrupt controller (SynIC) itself, its timers, and all other enlightenments. It tells where the guest put the
//! two pages of each vCPU's SynIC ([`Hyperv::changed`]), what it asked for ([`Hyperv::hypercall`]), and when it is done with an interrupt or
//! a message ([`SintSink::take_ended`]).
//!
//! Both pages are the guest's own memory, written by DMA while the guest runs. What follows from that:
//! - A message goes into its slot only if it finds the slot empty, and its type is stored last. That orders two, the guest and this
//!   side. KVM's timers are a third: where a guest has them send messages to the SINT of a port, of two that come at the same moment
//!   one is lost. So a VMBus will have to put its messages there with the vCPU out of the guest; the test device, which alone opens
//!   ports today, doesn't.
//! - Where a flag is set while the guest clears another one in the same byte, the other may be set again. A guest takes that for an
//!   event of which it has seen all already.

mod page;
mod sint;
mod state;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

pub use page::{MESSAGE_PAYLOAD, Message};
pub use sint::{SINTS, Sint, SintRoute, SintSink};

use crate::memory::{GuestMemory, MemoryError};
use page::{Put, put_message, set_flag};

/// Bits of a connection's id.
const CONNECTION: u32 = 0xff_ffff;

/// Results of hypercalls (TLFS appendix "Hypercall Status Codes").
mod status {
    pub(super) const SUCCESS: u64 = 0;
    pub(super) const INVALID_HYPERCALL_CODE: u64 = 2;
    pub(super) const INVALID_HYPERCALL_INPUT: u64 = 3;
    pub(super) const INVALID_ALIGNMENT: u64 = 4;
    pub(super) const INVALID_PARAMETER: u64 = 5;
    pub(super) const INVALID_PORT_ID: u64 = 17;
    pub(super) const INVALID_CONNECTION_ID: u64 = 18;
    pub(super) const INSUFFICIENT_BUFFERS: u64 = 19;
}

/// What a port takes to its SINT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortKind {
    /// Messages, one at a time.
    Messages,
    /// An event: the flag with the number of the port's connection.
    Events,
}

/// Why there is no port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PortError {
    /// No vCPU, or no SINT, or no connection of that number.
    #[error("there is no such vCPU, SINT or connection")]
    Number,
    /// Another port has the connection.
    #[error("the connection is in use")]
    Taken,
    /// The host has no more.
    #[error("the function has no vector left for the SINT")]
    NoVector,
}

/// Serves a guest's connections. Its methods are for the thread that serves IOREQs.
pub struct Hyperv {
    memory: Arc<dyn GuestMemory>,
    sints: Arc<dyn SintSink>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By vCPU.
    pages: Vec<Pages>,
    /// By connection.
    ports: BTreeMap<u32, Port>,
    /// The one route of each SINT, while somebody has it.
    routes: BTreeMap<Sint, Weak<dyn SintRoute>>,
    /// Nothing is sent.
    halted: bool,
}

/// Where a vCPU's pages are; none while the guest has switched them off.
#[derive(Clone, Copy, Default)]
struct Pages {
    messages: Option<u64>,
    events: Option<u64>,
}

struct Port {
    sint: Sint,
    route: Arc<dyn SintRoute>,
    kind: PortKind,
    /// A message that found its slot full, or no page yet.
    waiting: Option<Box<Message>>,
}

impl Hyperv {
    /// For a guest with so many vCPUs, whose SynICs are as after a reset.
    pub fn new(vcpus: u16, memory: Arc<dyn GuestMemory>, sints: Arc<dyn SintSink>) -> Self {
        let state = State { pages: vec![Pages::default(); vcpus.into()], ..State::default() };
        Self { memory, sints, state: Mutex::new(state) }
    }

    /// The guest has changed a vCPU's SynIC: its SCONTROL, SIEFP and SIMP now.
    pub fn changed(&self, vcpu: u16, [control, events, messages]: [u64; 3]) {
        const ENABLE: u64 = 1;
        let mut state = self.state();
        let page = |register: u64| (control & register & ENABLE != 0).then_some(register & !0xfff);
        let Some(pages) = state.pages.get_mut(usize::from(vcpu)) else { return };
        *pages = Pages { messages: page(messages), events: page(events) };
        state.deliver(&*self.memory, |sint| sint.vcpu == vcpu);
    }

    /// Serves a hypercall; its result value. `input` says which, and whether `params` are its parameters or their addresses.
    pub fn hypercall(&self, input: u64, params: [u64; 2]) -> u64 {
        const POST_MESSAGE: u16 = 0x5c;
        const SIGNAL_EVENT: u16 = 0x5d;
        const FAST: u64 = 1 << 16;
        let fast = input & FAST != 0;
        let result = match input as u16 {
            POST_MESSAGE if fast => Err(status::INVALID_HYPERCALL_INPUT),
            POST_MESSAGE => self.post(params[0]),
            SIGNAL_EVENT if fast => self.signal(params[0]),
            SIGNAL_EVENT => self.input(params[0]).and_then(|event| self.signal(u64::from_le_bytes(event))),
            _ => Err(status::INVALID_HYPERCALL_CODE),
        };
        result.err().unwrap_or(status::SUCCESS)
    }

    /// Sends what waited for a slot that the guest has emptied.
    pub fn poll(&self) {
        if self.state().halted {
            return;
        }
        let ended = self.sints.take_ended();
        if !ended.is_empty() {
            self.state().deliver(&*self.memory, |sint| ended.contains(&sint));
        }
    }

    /// Machine reset: no pages, nothing waits. Ports are their devices' business.
    pub fn reset(&self) {
        let mut state = self.state();
        state.pages.fill(Pages::default());
        state.ports.values_mut().for_each(|port| port.waiting = None);
    }

    /// The route to a SINT, which others may have too.
    ///
    /// # Errors
    /// There is no such SINT, or no route left.
    pub fn route(&self, sint: Sint) -> Result<Arc<dyn SintRoute>, PortError> {
        self.route_in(&mut self.state(), sint)
    }

    fn route_in(&self, state: &mut State, sint: Sint) -> Result<Arc<dyn SintRoute>, PortError> {
        if usize::from(sint.vcpu) >= state.pages.len() || sint.number >= SINTS {
            return Err(PortError::Number);
        }
        if let Some(route) = state.routes.get(&sint).and_then(Weak::upgrade) {
            return Ok(route);
        }
        let route: Arc<dyn SintRoute> = self.sints.route(sint).ok_or(PortError::NoVector)?.into();
        state.routes.insert(sint, Arc::downgrade(&route));
        Ok(route)
    }

    /// Opens a port behind `connection`; its route, which may not be ready yet.
    ///
    /// # Errors
    /// See [`PortError`].
    pub fn open(&self, connection: u32, kind: PortKind, sint: Sint) -> Result<Arc<dyn SintRoute>, PortError> {
        let mut state = self.state();
        // An event's flag is one of 2048.
        if connection > CONNECTION || kind == PortKind::Events && connection >= page::FLAGS {
            return Err(PortError::Number);
        }
        if state.ports.contains_key(&connection) {
            return Err(PortError::Taken);
        }
        let route = self.route_in(&mut state, sint)?;
        state.ports.insert(connection, Port { sint, route: route.clone(), kind, waiting: None });
        Ok(route)
    }

    /// Closes the port behind `connection`; what waits in it is lost.
    pub fn close(&self, connection: u32) {
        self.state().ports.remove(&connection);
    }

    /// How many vCPUs there are.
    pub fn vcpus(&self) -> u16 {
        self.state().pages.len() as u16
    }

    /// The message that waits in the port behind `connection`.
    pub fn waiting(&self, connection: u32) -> Option<Message> {
        self.state().ports.get(&connection)?.waiting.as_deref().cloned()
    }

    /// Has a message wait in the port behind `connection`, as it did when its device was saved.
    pub fn put_back(&self, connection: u32, message: Message) {
        if let Some(port) = self.state().ports.get_mut(&connection).filter(|port| port.kind == PortKind::Messages) {
            port.waiting = Some(Box::new(message));
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a hypercall's parameters, which lie in one page.
    fn input<const N: usize>(&self, gpa: u64) -> Result<[u8; N], u64> {
        let mut bytes = [0; N];
        if !gpa.is_multiple_of(8) || gpa % 4096 + N as u64 > 4096 {
            return Err(status::INVALID_ALIGNMENT);
        }
        self.memory.read(gpa, &mut bytes).map_err(|_| status::INVALID_HYPERCALL_INPUT)?;
        Ok(bytes)
    }

    /// HvCallPostMessage: connection, 0, type, bytes of payload, payload.
    fn post(&self, gpa: u64) -> Result<(), u64> {
        const HEADER: usize = 16;
        /// Set in the types of the hypervisor's own messages.
        const OF_HYPERVISOR: u32 = 1 << 31;
        let input: [u8; HEADER + MESSAGE_PAYLOAD] = self.input(gpa)?;
        let (words, _) = input.as_chunks::<4>();
        let [connection, _, kind, len] = [0, 1, 2, 3].map(|word: usize| u32::from_le_bytes(words[word]));
        let payload = usize::try_from(len).ok().and_then(|len| input[HEADER..].get(..len));
        let payload = payload.ok_or(status::INVALID_HYPERCALL_INPUT)?;
        if kind == 0 || kind & OF_HYPERVISOR != 0 {
            return Err(status::INVALID_PARAMETER);
        }
        let mut state = self.state();
        let State { pages, ports, .. } = &mut *state;
        let connection = connection & CONNECTION;
        let port = ports.get_mut(&connection).filter(|port| port.kind == PortKind::Messages);
        let port = port.ok_or(status::INVALID_CONNECTION_ID)?;
        if port.waiting.is_some() {
            return Err(status::INSUFFICIENT_BUFFERS);
        }
        port.waiting = Some(Box::new(Message::new(kind, connection, payload)));
        port.deliver(&*self.memory, pages);
        Ok(())
    }

    /// HvCallSignalEvent: connection in bits 0–31, number of the flag in bits 32–47.
    fn signal(&self, event: u64) -> Result<(), u64> {
        let state = self.state();
        let connection = event as u32;
        if event >> 48 != 0 || connection > CONNECTION {
            return Err(status::INVALID_HYPERCALL_INPUT);
        }
        // A port has one flag.
        if event >> 32 != 0 {
            return Err(status::INVALID_PORT_ID);
        }
        let port = state.ports.get(&connection).filter(|port| port.kind == PortKind::Events);
        let port = port.ok_or(status::INVALID_CONNECTION_ID)?;
        // While the page is off, an event is lost (TLFS "SynIC Event Flags").
        let Some(page) = state.pages[usize::from(port.sint.vcpu)].events else { return Ok(()) };
        match set_flag(&*self.memory, page, port.sint.number, connection) {
            Ok(true) => port.route.raise(),
            Ok(false) => {}
            Err(e) => no_page(port.sint, e),
        }
        Ok(())
    }
}

impl State {
    /// Sends what waits for those SINTs.
    fn deliver(&mut self, memory: &dyn GuestMemory, which: impl Fn(Sint) -> bool) {
        for port in self.ports.values_mut().filter(|port| which(port.sint)) {
            port.deliver(memory, &self.pages);
        }
    }
}

impl Port {
    /// Sends the message that waits, if there is one and its slot is empty.
    fn deliver(&mut self, memory: &dyn GuestMemory, pages: &[Pages]) {
        let (Some(message), Some(page)) = (&self.waiting, pages[usize::from(self.sint.vcpu)].messages) else { return };
        match put_message(memory, page, self.sint.number, message) {
            Ok(Put::Sent) => {
                self.waiting = None;
                self.route.raise();
            }
            Ok(Put::Busy) => {}
            Err(e) => no_page(self.sint, e),
        }
    }
}

/// A guest may put its pages anywhere.
fn no_page(sint: Sint, e: MemoryError) {
    tracing::debug!(?sint, error = %e, "a SynIC's page can't be reached");
}
