//! From nothing to a channel: card memory laid out, mailbox mapped, header stored, the SoC's answer taken.

use std::sync::Arc;

use api_channel::{Server, ServerWindows};
use ioreq_ring::BusMemory;
use pcie_function::header::{FEATURES, HEADER, HeaderError, HostHeader, Role, SocHeader, VERSION, epoch};
use pcie_function::regions::{self, INBOX, Layout, OUTBOX, Region, Space, Type};
use pcie_function::{Bell, Doorbell, HostFunction, Iova, State, Windowed};

use crate::error::ServeError;
use crate::vm::Notices;

/// A function and everything that stands in its card memory and mailbox apart from the lanes.
pub(crate) struct Offer<F: HostFunction> {
    pub(crate) function: F,
    pub(crate) notices: Arc<Notices>,
    /// Where the function stands.
    pub(crate) state: State,
    card: F::Window,
    layout: Layout,
    inbox: (Iova, F::Window),
    outbox: (Iova, F::Window),
    role: Role,
    /// Names the current offer.
    nonce: u64,
}

impl<F: HostFunction> Offer<F> {
    /// Lays a function out. Nothing is offered yet.
    pub(crate) fn new(mut function: F, role: Role) -> Result<Self, ServeError> {
        let card = function.card_memory();
        let layout = regions::layout(card.len() as u64).map_err(ServeError::Layout)?;
        let inbox = function.map_mailbox(INBOX, true)?;
        let outbox = function.map_mailbox(OUTBOX, false)?;
        let notices = Arc::new(Notices::new().map_err(|errno| ServeError::Os("create an eventfd", errno))?);
        Ok(Self { function, notices, state: State::Absent, card, layout, inbox, outbox, role, nonce: 0 })
    }

    /// Offers the function anew: takes the old header away, zeroes what it led to, stores a header with a new nonce, and rings.
    pub(crate) fn offer(&mut self) -> Result<(), ServeError> {
        self.card.store(HEADER - 8, 0);
        let lanes = self.region_at(Type::LANE_REQUESTS).map_or(0, |r| r.offset as usize);
        zero(&self.card, 0..lanes.min(self.card.len()));
        zero(&self.inbox.1, 0..regions::INBOX.min(0x1000));
        self.nonce = nonce()?;
        regions::store(&self.card, &self.layout.regions);
        let header = HostHeader {
            versions: (VERSION, VERSION),
            features: FEATURES,
            inbox: self.inbox.0,
            inbox_len: INBOX as u32,
            outbox: self.outbox.0,
            outbox_len: OUTBOX as u32,
            table: regions::TABLE,
            regions: self.layout.regions.len() as u16,
            role: self.role,
            nonce: self.nonce,
        };
        header.store(&self.card);
        self.ring();
        self.go(State::Offered);
        Ok(())
    }

    /// The SoC's answer to the current offer, where there is one with another nonce than `known`.
    pub(crate) fn answer(&self, known: u64) -> Result<Option<SocHeader>, HeaderError> {
        Ok(SocHeader::load(&self.inbox.1, self.nonce)?.filter(|header| header.nonce != known))
    }

    /// The channel to the SoC that answered.
    pub(crate) fn open(&mut self, soc: &SocHeader) -> Option<Server<F::Window, F::Window>> {
        let windows = ServerWindows {
            host_lines: self.region(Type::HOST_LINES)?,
            replies: self.region(Type::REPLIES)?,
            events: self.region(Type::EVENTS)?,
            soc_lines: self.region(Type::SOC_LINES)?,
            requests: self.region(Type::REQUESTS)?,
            bulk: self.region(Type::BULK)?,
        };
        self.go(State::Negotiated);
        Some(Server::new(windows, epoch(self.nonce, soc.nonce)))
    }

    /// Makes the channel's words in card memory new for another SoC that answered the same offer.
    pub(crate) fn restart(&self) {
        if let Some(lines) = self.region(Type::HOST_LINES) {
            zero(&lines, 0..lines.len());
        }
    }

    /// Takes the offer back: nobody serves the function.
    pub(crate) fn withdraw(&mut self) {
        self.card.store(HEADER - 8, 0);
    }

    /// Rings the SoC's channel.
    pub(crate) fn ring(&self) {
        self.function.bell().ring(Doorbell::Channel);
    }

    /// Goes on in the function's life.
    ///
    /// # Panics
    /// The step is not one of the table: a mistake of this program.
    pub(crate) fn go(&mut self, to: State) {
        if let Err(illegal) = self.state.go(to) {
            panic!("{illegal}");
        }
    }

    /// How many lanes card memory has room for.
    pub(crate) fn lanes(&self) -> u32 {
        self.layout.lanes
    }

    /// The word in which the SoC says whether it polls the lanes.
    pub(crate) fn soc_idle(&self) -> Option<F::Window> {
        self.region(Type::SOC_LINES)?.cut(api_channel::lines::soc::LANES_IDLE, 8)
    }

    /// The window of a region.
    pub(crate) fn region(&self, kind: Type) -> Option<F::Window> {
        let region = self.region_at(kind)?;
        let memory = match region.space {
            Space::Card => &self.card,
            Space::Inbox => &self.inbox.1,
            Space::Outbox => &self.outbox.1,
        };
        regions::window(memory, region)
    }

    fn region_at(&self, kind: Type) -> Option<&Region> {
        self.layout.regions.iter().find(|region| region.kind == kind)
    }
}

fn zero(memory: &impl BusMemory, range: std::ops::Range<usize>) {
    range.step_by(8).for_each(|at| memory.store(at, 0));
}

/// A random number that is not 0.
///
/// `unsafe`: getrandom writes through a pointer.
#[allow(unsafe_code)]
fn nonce() -> Result<u64, ServeError> {
    use nix::libc;
    let mut bytes = [0u8; 8];
    // SAFETY: the buffer is as long as said and outlives the call.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match got {
        8 => Ok(u64::from_ne_bytes(bytes).max(1)),
        _ => Err(ServeError::Os("get random numbers", nix::errno::Errno::last())),
    }
}
