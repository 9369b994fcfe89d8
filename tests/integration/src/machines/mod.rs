//! What the tests on emulated servers share.

mod counters;
mod server;
mod watched;

pub use counters::Counters;
pub use server::{MOST, Server};
pub use watched::Watched;
