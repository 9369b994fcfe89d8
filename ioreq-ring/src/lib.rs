//! The IOREQ ring: what a vCPU's exit looks like on the wire, and the two ends that carry it.
//!
//! A *lane* is one vCPU's share: a request line and a ring of posted requests in the BAR (the host writes them, the SoC polls
//! them), a completion line and a credit word in host memory (the SoC writes them by DMA, the host polls them). No word has two
//! writers, nothing is read across the bus on the hot path, and no lock or compare-and-swap crosses it.
//!
//! The crate is `no_std`, allocates nothing and holds no `unsafe`: both ends are generic over [`BusMemory`], so that loom and
//! proptest run them on a heap, and the same code runs on a PCIe BAR.

#![cfg_attr(not(any(test, loom)), no_std)]
#![forbid(unsafe_code)]

mod bus;
mod drain;
mod error;
mod host;
mod idle;
mod soc;
pub mod wire;

#[cfg(test)]
mod tests;

// The heap that tests run on is shared with those outside the crate.
#[cfg(test)]
extern crate self as ioreq_ring;

pub use bus::{BusError, BusMemory};
pub use drain::{PostedWrite, drain};
pub use error::LaneError;
pub use host::{HostLane, HostWindows, Posted};
pub use idle::SocIdle;
pub use soc::{Phase, SocLane, SocWindows};
pub use wire::{Completion, Direction, Kind, LineChange, Request, Status};
