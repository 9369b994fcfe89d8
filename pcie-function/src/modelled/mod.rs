//! A function that counts what crosses the bus, and lets each crossing take its time.
//!
//! Wraps another function's ends. The counts are those that a PCIe analyser would show: a store to the BAR is a posted TLP, a load
//! from it a non-posted read; a store to the mailbox from the SoC is a DMA write, a load a DMA read; a doorbell is a posted write
//! of its own; a vector is an interrupt. What is local to a side costs nothing.
//!
//! One end can be counted alone. Where both are in one process, a [`Link`] between them charges [`Latencies`]: what is posted is
//! stamped when it is sent and lands in the other side's memory when that side looks at it, no earlier than its latency after the
//! stamp and behind everything sent before; the sender goes on at once. A read makes its issuer wait there and back.
//! The model's own cost comes on top, about 0.1 µs a crossing; signals can come later by as long as a sleeping thread takes to wake.
//! Nothing models bandwidth or flow control: any number of crossings can be under way, and a long one takes no longer than a short one.
//!
//! What changes without either end's windows, the guest's own view of its RAM, sees [`crate::SocFunction::write`] when that
//! returns, and a store through [`crate::SocFunction::remote`] when anything else arrives or is sent after it is due.

mod clock;
mod counts;
mod courier;
mod host;
mod latency;
mod link;
mod queue;
mod soc;
#[cfg(test)]
mod tests;
mod window;

pub use counts::{Counts, Crossings};
pub use host::{ModelledBell, ModelledHost};
pub use latency::Latencies;
pub use link::Link;
pub use soc::ModelledSoc;
pub use window::ModelledWindow;
