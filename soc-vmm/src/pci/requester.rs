//! Who makes a request.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

/// A function's requester ID (PCI Express Base §2.2.6.2): bus × 256 + slot × 8 + function. It is a cell, since the guest numbers buses.
#[derive(Clone, Debug, Default)]
pub struct Requester(Arc<AtomicU16>);

impl Requester {
    /// The ID as buses are numbered now.
    pub fn id(&self) -> u16 {
        self.0.load(Ordering::Relaxed)
    }

    /// Says where the function is.
    pub fn place(&self, bus: u8, devfn: u8) {
        self.0.store(u16::from_be_bytes([bus, devfn]), Ordering::Relaxed);
    }
}
