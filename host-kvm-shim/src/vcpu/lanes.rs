//! The lanes of a VM: where their words are in card memory and in the mailbox.

use api_channel::call::{Irqchip, VmCreated};
use ioreq_ring::wire::{LINE, POSTED_RING, STRING_PAGE};
use ioreq_ring::{BusMemory, HostWindows};
use pcie_function::regions::Type;
use pcie_function::{HostFunction, Iova, Windowed};

use crate::bootstrap::Offer;
use crate::error::Refusal;
use crate::host::Host;

/// Windows of all lanes.
#[derive(Debug)]
pub(crate) struct Lanes<F: HostFunction> {
    vcpus: u32,
    requests: F::Window,
    controls: F::Window,
    posted: F::Window,
    /// Completions, credits, `ins` pages, each from a page's start.
    inbox: (Iova, F::Window),
    /// `outs` pages.
    outbox: (Iova, F::Window),
    soc_idle: F::Window,
    /// The first vector of the lanes, and how many they have.
    vectors: (u32, u32),
    all_vectors: u32,
    /// Memory that is mapped for the device can't be given back.
    pinned: bool,
}

/// The vector of the channel; those of the lanes follow.
const LANE_VECTOR: u32 = 1;

impl<F: HostFunction> Lanes<F> {
    /// Maps the mailbox memory of `vcpus` lanes, and zeroes their words in card memory.
    pub(crate) fn new(offer: &mut Offer<F>, vcpus: u32) -> Result<Self, Refusal> {
        let all_vectors = offer.function.vectors();
        // Half of what the channel leaves is for GSIs. Lanes that share a vector wake each other.
        let lane_vectors = (all_vectors.saturating_sub(LANE_VECTOR) / 2).clamp(1, vcpus);
        if all_vectors <= LANE_VECTOR {
            return Err(Refusal::unavailable(format!("the function has {all_vectors} vectors, 2 are needed")));
        }
        let n = vcpus as usize;
        let region = |kind| offer.region(kind).ok_or_else(|| Refusal::unavailable("card memory has no lanes"));
        let (requests, controls, posted) =
            (region(Type::LANE_REQUESTS)?, region(Type::LANE_CONTROLS)?, region(Type::LANE_POSTED)?);
        for (window, len) in [(&requests, LINE), (&controls, LINE), (&posted, POSTED_RING)] {
            for at in (0..n * len).step_by(8) {
                window.store(at, 0);
            }
        }
        let inbox = offer.function.map_mailbox(lines(n) * 2 + n * STRING_PAGE, true)?;
        let outbox = match offer.function.map_mailbox(n * STRING_PAGE, false) {
            Ok(outbox) => outbox,
            Err(error) => {
                let _ = offer.function.unmap(inbox.0);
                return Err(error.into());
            }
        };
        let soc_idle = offer.soc_idle().ok_or_else(|| Refusal::unavailable("the inbox has no lines"))?;
        let vectors = (LANE_VECTOR, lane_vectors);
        let pinned = offer.function.pins();
        Ok(Self { vcpus, requests, controls, posted, inbox, outbox, soc_idle, vectors, all_vectors, pinned })
    }

    /// What the SoC is told of them.
    pub(crate) fn created(&self, host: &Host, irqchip: Irqchip) -> VmCreated {
        let n = self.vcpus as usize;
        let (lane_vector, lane_vectors) = self.vectors;
        let free_vector = lane_vector + lane_vectors;
        let mut features = 0;
        if host.tsc_is_synchronised() {
            features |= VmCreated::POSTING;
        }
        if irqchip == Irqchip::Full && host.has_resample() {
            features |= VmCreated::RESAMPLE;
        }
        if !self.pinned {
            features |= VmCreated::DISCARD;
        }
        VmCreated {
            completions: self.inbox.0,
            credits: self.inbox.0 + lines(n) as u64,
            ins: self.inbox.0 + 2 * lines(n) as u64,
            outs: self.outbox.0,
            tsc_khz: host.tsc_khz(),
            lane_vector,
            lane_vectors,
            free_vector,
            free_vectors: self.all_vectors.saturating_sub(free_vector),
            features,
        }
    }

    /// The windows of lane `index`.
    pub(crate) fn windows(&self, index: u32) -> Option<HostWindows<F::Window, F::Window>> {
        let (i, n) = (index as usize, self.vcpus as usize);
        let (inbox, outbox) = (&self.inbox.1, &self.outbox.1);
        Some(HostWindows {
            request: self.requests.cut(i * LINE, LINE)?,
            control: self.controls.cut(i * LINE, LINE)?,
            posted: self.posted.cut(i * POSTED_RING, POSTED_RING)?,
            completion: inbox.cut(i * LINE, LINE)?,
            credit: inbox.cut(lines(n) + i * LINE, LINE)?,
            soc_idle: self.soc_idle.clone(),
            outs: outbox.cut(i * STRING_PAGE, STRING_PAGE)?,
            ins: inbox.cut(2 * lines(n) + i * STRING_PAGE, STRING_PAGE)?,
        })
    }

    /// Takes the mailbox memory back.
    pub(crate) fn unmap(&self, function: &mut F) {
        // A function that is gone has no mapping left.
        let _ = function.unmap(self.inbox.0);
        let _ = function.unmap(self.outbox.0);
    }
}

/// Bytes of a line a lane, in whole pages.
fn lines(lanes: usize) -> usize {
    (lanes * LINE).next_multiple_of(STRING_PAGE)
}
