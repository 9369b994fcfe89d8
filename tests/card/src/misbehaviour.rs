//! How a card goes wrong, on demand.

use std::time::Duration;

/// What a function does wrong now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Misbehaviour {
    pub(crate) doorbell: Doorbell,
    /// Vectors of the host are lost.
    pub(crate) vectors_lost: bool,
    pub(crate) dma: Dma,
}

/// What becomes of the host's doorbells.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Doorbell {
    /// Each raises the SoC's vector.
    #[default]
    Normal,
    /// None does.
    Drop,
    /// Each does, this much later.
    Delay(Duration),
    /// Each does twice.
    Double,
}

/// What becomes of DMA descriptors.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dma {
    /// As specified.
    #[default]
    Normal,
    /// Every copy ends in `HOST_FAULT`.
    Fault,
    /// Every descriptor takes this much longer.
    Slow(Duration),
    /// Every copy ends midway, `ABORTED`.
    Torn,
    /// Every copy pauses midway, which is legal.
    Split(Duration),
}

impl Dma {
    /// Whether it must not hold up the thread that serves the function's registers.
    pub(crate) fn takes_time(self) -> bool {
        matches!(self, Self::Slow(_) | Self::Split(_))
    }

    /// Whether something happens at half a copy's length.
    pub(crate) fn is_midway(self) -> bool {
        matches!(self, Self::Torn | Self::Split(_))
    }
}
