//! Message-signalled interrupts on their way to the host.

/// A message: a write of `data` to `address`, which an interrupt controller takes for an interrupt (Intel SDM volume 3A §11.11).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Gives out routes for messages.
pub trait MessageSink: Send + Sync {
    /// A route for a message that may be raised often. It lasts until it is dropped.
    fn route(&self) -> Box<dyn MessageRoute>;
}

/// The way of one message. Any thread may use it; nothing blocks.
pub trait MessageRoute: Send + Sync {
    /// Makes `message` the one that is raised from now on; none: raising does nothing.
    fn set(&self, message: Option<Message>);

    /// Raises the message.
    fn raise(&self);
}

impl<S: MessageSink + ?Sized> MessageSink for &S {
    fn route(&self) -> Box<dyn MessageRoute> {
        (**self).route()
    }
}
