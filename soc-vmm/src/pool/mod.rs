//! Functions for programs that may not open them: `soc-vmm pool serve` opens them with its own rights and hands their descriptors to soc-vmm
//! processes of other users (docs/pool.md).
//!
//! A function is a client's for as long as its connection lasts, which is as long as the process lives, however it ends. It is given to the next
//! one only after it could be opened anew, which it can't be while anybody is at work on it ([`door`]).

mod client;
mod door;
mod server;
mod session;
mod table;
mod wire;

pub use client::list;
pub(crate) use client::{Lent, Loan, host_cpuid};
pub use server::serve;
