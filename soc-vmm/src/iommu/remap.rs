//! Interrupt remapping (VT-d specification §5.1): what becomes of a message, and the messages that are wired.
//!
//! A message's way to the host is made when the guest sets the message, by the entry that it names then: the host's route is the unit's
//! interrupt entry cache. An invalidation looks the entry up again. What was blocked has no way: it is looked up at each interrupt, and
//! its faults are recorded then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::faults::{Fault, Reason};
use super::tables::InterruptEntry;
use super::{Iommu, walk};
use crate::interrupt::{Message, MessageRoute, MessageSink};
use crate::memory::GuestMemory;
use crate::pci::Requester;

/// The requester ID under which the DMAR table shows the I/O APIC: on a bus that no function is on.
pub const IO_APIC_REQUESTER: u16 = 0xff00;

/// Messages go to addresses of which these bits are …
const MESSAGE_MASK: u64 = 0xfff0_0000;
/// … these.
const MESSAGES: u64 = 0xfee0_0000;
/// In an address: the message names an entry, by these bits, and …
const REMAPPABLE: u64 = 1 << 4;
/// … by its data too.
const HAS_SUBHANDLE: u64 = 1 << 3;
/// A message's data: level-triggered, asserted.
const DATA_LEVEL: u32 = 0xc000;

/// How interrupts are remapped now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Remapping {
    /// Off, a message is what it is.
    pub(super) enabled: bool,
    /// Messages that name no entry are let through.
    pub(super) compatible: bool,
    /// The table, its entries, and whether their destinations have 32 bits.
    pub(super) table: u64,
    pub(super) entries: u32,
    pub(super) extended: bool,
}

/// Who sends a message.
#[derive(Clone, Debug)]
pub enum Sender {
    /// A PCI function.
    Function(Requester),
    /// The I/O APIC. No entry's requester check holds it up: nobody but the guest's kernel can make it send, and QEMU's unit lets it
    /// through too where the local APICs are the host's.
    IoApic,
}

impl Sender {
    fn id(&self) -> u16 {
        match self {
            Self::Function(requester) => requester.id(),
            Self::IoApic => IO_APIC_REQUESTER,
        }
    }
}

/// Why a message is blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    reason: Reason,
    index: u32,
    quiet: bool,
}

impl Remapping {
    /// What `message` becomes, and the entry by which, if any.
    pub(super) fn remap(
        &self,
        memory: &dyn GuestMemory,
        sender: &Sender,
        message: Message,
    ) -> Result<(Message, Option<u32>), Blocked> {
        let Message { address, data } = message;
        if !self.enabled || address & MESSAGE_MASK != MESSAGES {
            return Ok((message, None));
        }
        let loud = |reason, index| Blocked { reason, index, quiet: false };
        if address & REMAPPABLE == 0 {
            // Extended destinations leave no room for the others (§5.1.2.1).
            return match self.compatible && !self.extended {
                true => Ok((message, None)),
                false => Err(loud(Reason::COMPATIBLE_BLOCKED, 0)),
            };
        }
        let handle = (address >> 5) as u32 & 0x7fff | ((address >> 2) as u32 & 1) << 15;
        let subhandle = if address & HAS_SUBHANDLE != 0 { data & 0xffff } else { 0 };
        let index = handle + subhandle;
        if data >> 16 != 0 {
            return Err(loud(Reason::REQUEST_RESERVED, index));
        }
        if index >= self.entries {
            return Err(loud(Reason::INDEX_BEYOND, index));
        }
        let entry = walk::entry(memory, self.table, index.into()).ok_or(loud(Reason::ENTRY_UNREACHABLE, index))?;
        let entry = InterruptEntry(entry);
        let blocked = |reason| Err(Blocked { reason, index, quiet: entry.is_quiet() });
        let admitted = match sender {
            Sender::Function(requester) => entry.admits(requester.id()),
            Sender::IoApic => true,
        };
        match () {
            () if !entry.is_present() => blocked(Reason::ENTRY_ABSENT),
            () if !entry.is_sound() => blocked(Reason::ENTRY_RESERVED),
            () if !admitted => blocked(Reason::REQUESTER_DENIED),
            () => Ok((delivered(entry, self.extended), Some(index))),
        }
    }
}

/// The message that an entry stands for: KVM takes a destination's upper 24 bits from the upper address (KVM api.rst §4.52).
fn delivered(entry: InterruptEntry, extended: bool) -> Message {
    let destination = entry.destination(extended);
    let low = MESSAGES
        | u64::from(destination & 0xff) << 12
        | u64::from(entry.is_redirectable()) << 3
        | u64::from(entry.is_logical()) << 2;
    let level = if entry.is_level() { DATA_LEVEL } else { 0 };
    Message { address: u64::from(destination & !0xff) << 32 | low, data: entry.vector_and_mode() | level }
}

/// The messages of one sender, on their way through the unit.
pub(super) struct RemappedSink<'a> {
    pub(super) iommu: Arc<Iommu>,
    pub(super) sender: Sender,
    pub(super) to: &'a dyn MessageSink,
}

impl MessageSink for RemappedSink<'_> {
    fn route(&self) -> Box<dyn MessageRoute> {
        self.iommu.remapped(self.sender.clone(), self.to.route())
    }
}

/// A message's way through the unit.
pub(super) struct Route {
    pub(super) iommu: Arc<Iommu>,
    pub(super) sender: Sender,
    pub(super) to: Box<dyn MessageRoute>,
    pub(super) state: Mutex<RouteState>,
}

#[derive(Debug, Default)]
pub(super) struct RouteState {
    /// What the sender sends.
    sent: Option<Message>,
    /// What it becomes; none: nothing, or it is blocked.
    becomes: Option<Message>,
    /// The entry by which.
    index: Option<u32>,
}

impl Route {
    /// Looks the entry up again if it is one of these.
    pub(super) fn invalidate(&self, is_meant: impl Fn(Option<u32>) -> bool) {
        let mut state = self.state();
        if is_meant(state.index) {
            // What is blocked now is told when it is sent.
            let _ = self.look_up(&mut state);
        }
    }

    fn look_up(&self, state: &mut RouteState) -> Result<(), Blocked> {
        let found = state.sent.map(|message| self.iommu.remap(&self.sender, message)).transpose();
        let (becomes, index) = match found {
            Ok(Some((message, index))) => (Some(message), index),
            Ok(None) | Err(_) => (None, None),
        };
        if state.becomes != becomes {
            self.to.set(becomes);
        }
        (state.becomes, state.index) = (becomes, index);
        found.map(drop)
    }

    fn state(&self) -> MutexGuard<'_, RouteState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A route as its sender holds it; the unit forgets it with this.
pub(super) struct Held(pub(super) Arc<Route>);

impl MessageRoute for Held {
    fn set(&self, message: Option<Message>) {
        let mut state = self.0.state();
        state.sent = message;
        // What is blocked is told when it is sent.
        let _ = self.0.look_up(&mut state);
    }

    fn raise(&self) {
        let route = &*self.0;
        let mut state = route.state();
        if state.becomes.is_none()
            && let Err(Blocked { reason, index, quiet }) = route.look_up(&mut state)
        {
            if !quiet {
                let information = u64::from(index) << 48;
                let fault = Fault { reason, requester: route.sender.id(), information, read: false };
                route.iommu.faults().record(&fault);
            }
            return;
        }
        route.to.raise();
    }
}
