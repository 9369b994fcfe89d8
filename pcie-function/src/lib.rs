//! A VM's PCIe function: BAR, mailbox, doorbells, vectors, DMA.
//!
//! [`HostFunction`] and [`SocFunction`] are its two ends; [`local`] is a function of shared memory, [`vfio`] a real one, [`modelled`] counts
//! what crosses another one. [`header`] and [`regions`] are what stands in card memory and mailbox so that the ends find everything else.

pub mod card;
mod fault;
mod function;
pub mod header;
pub mod local;
mod mapped;
pub mod modelled;
pub mod regions;
mod state;
mod string_copy;
pub mod vfio;

pub use function::{Bell, Doorbell, FunctionError, HostFunction, Iova, MemoryFile, SocFunction, Windowed};
pub use ioreq_ring::{BusError, BusMemory};
pub use mapped::{Mapping, Reach, Window};
pub use state::{Illegal, State};
