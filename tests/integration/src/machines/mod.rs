//! What the tests on emulated servers share.

pub mod complaints;
mod counters;
mod footprint;
mod page;
mod server;
mod talk;
mod watched;

pub use counters::Counters;
pub use footprint::shim_is_small;
pub use page::PageServer;
pub use server::{MOST, Server};
pub use talk::Talk;
pub use watched::{Watched, but_for_the_emulator};
