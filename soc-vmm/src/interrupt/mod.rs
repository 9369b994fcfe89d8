//! Interrupts as devices see them: lines, and messages.

mod line;
mod message;

pub use line::{InterruptLine, LineSink, WiredOr};
pub use message::{Message, MessageRoute, MessageSink};
