//! One module a payload, or a few of a kind.

pub mod counter;
pub mod dirty;
pub mod hot;
pub mod interrupts;
pub mod mmio;
pub mod order;
pub mod pio;
pub mod real;
pub mod smp;
pub mod string_io;
