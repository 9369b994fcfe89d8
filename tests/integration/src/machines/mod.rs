//! What the tests on emulated servers share.

mod counters;
mod footprint;
mod server;
mod watched;

pub use counters::Counters;
pub use footprint::shim_is_small;
pub use server::{MOST, Server};
pub use watched::{Watched, but_for_the_emulator};
