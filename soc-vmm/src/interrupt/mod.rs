//! Interrupts as devices see them: lines, and messages.

mod line;
mod message;
mod settling;

pub use line::{InterruptLine, LineSink, WiredOr};
pub use message::{Message, MessageRoute, MessageSink};
pub use settling::{Settling, Waiters};
