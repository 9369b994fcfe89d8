//! Synthetic interrupt sources, and the ways to them.

use crate::bus::Ticket;

/// SINTs of a vCPU.
pub const SINTS: u8 = 16;

/// A synthetic interrupt source of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Sint {
    /// The vCPU, which is also Hyper-V's virtual processor index.
    pub vcpu: u16,
    /// Its source, below [`SINTS`].
    pub number: u8,
}

/// Gives out routes to SINTs, and hears of them.
pub trait SintSink: Send + Sync {
    /// A route to `sint`, until it is dropped; `None` if none is left.
    fn route(&self, sint: Sint) -> Option<Box<dyn SintRoute>>;

    /// The SINTs whose interrupts the guest has ended since the last call, or, with all others of the vCPU, emptied their slots
    /// (a write of the EOM register).
    fn take_ended(&self) -> Vec<Sint>;
}

/// The way to one SINT. Nothing blocks.
pub trait SintRoute: Send + Sync {
    /// Raises the SINT's interrupt.
    fn raise(&self);

    /// Finishes an access once the host has the route: from then on nothing that is raised is lost.
    fn when_ready(&self, ticket: Ticket);
}
