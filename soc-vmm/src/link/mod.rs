//! The connection to the host through one function: who is there, where everything lies, and the channel to ask it.

mod bell;
mod channel;
mod log;
mod open;

pub use channel::{CallError, Channel, EoiSink, Notice, Reply, WantedSink};
pub use open::{Link, LinkError};
