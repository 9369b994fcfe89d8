//! How a device interrupts: MSI-X, or the pin where the guest doesn't use that (virtio 1.2 §4.1.5.3, §4.1.5.4).

use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::interrupt::InterruptLine;
use crate::pci::MsixVectors;

/// No vector (§4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR status: a queue, or the configuration (§4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// Raises a device's interrupts, from any thread.
#[derive(Debug)]
pub struct Interrupts {
    vectors: MsixVectors,
    /// The vector of each queue, and behind them that of the configuration.
    routes: Vec<AtomicU16>,
    pin: Mutex<Pin>,
}

#[derive(Debug)]
struct Pin {
    /// DRIVER_OK is set: nobody listens before, nor after a reset (§2.4.1).
    live: bool,
    isr: u8,
    /// Neither MSI-X nor INTx Disable is on.
    enabled: bool,
    high: bool,
    line: InterruptLine,
}

impl Interrupts {
    /// For a device of so many queues. `line` is its INTA.
    pub fn new(queues: usize, vectors: MsixVectors, line: InterruptLine) -> Self {
        let routes = (0..=queues).map(|_| AtomicU16::new(NO_VECTOR)).collect();
        Self { vectors, routes, pin: Mutex::new(Pin { live: false, isr: 0, enabled: true, high: false, line }) }
    }

    /// Says that a queue has used buffers.
    pub fn queue(&self, index: usize) {
        self.raise(index, ISR_QUEUE);
    }

    /// Says that the configuration changed, or that the device needs a reset.
    pub fn config(&self) {
        self.raise(self.routes.len() - 1, ISR_CONFIG);
    }

    fn raise(&self, index: usize, bit: u8) {
        let mut pin = self.pin();
        if !pin.live {
            return;
        }
        if self.vectors.enabled() {
            self.vectors.raise(self.routes[index].load(Ordering::Relaxed));
        } else {
            pin.isr |= bit;
            pin.update();
        }
    }

    /// DRIVER_OK: from now on the driver is told.
    pub fn start(&self) {
        self.pin().live = true;
    }

    /// Sets the vector of a queue, or of the configuration behind the last queue.
    pub(super) fn set_route(&self, index: usize, vector: u16) {
        self.routes[index].store(vector, Ordering::Relaxed);
    }

    /// Reads the ISR status, which clears it.
    pub(super) fn take_status(&self) -> u8 {
        let mut pin = self.pin();
        let isr = std::mem::take(&mut pin.isr);
        pin.update();
        isr
    }

    /// Whether the pin has a reason to be high, whether or not it may.
    pub(super) fn is_asserted(&self) -> bool {
        self.pin().isr != 0
    }

    /// Lets the pin speak or not: after a write to configuration space.
    pub(super) fn enable_pin(&self, intx_disabled: bool) {
        let mut pin = self.pin();
        pin.enabled = !intx_disabled && !self.vectors.enabled();
        pin.update();
    }

    /// What the ISR status is; nothing is cleared.
    pub(super) fn status(&self) -> u8 {
        self.pin().isr
    }

    /// Makes the ISR status what it was. `live`: DRIVER_OK is set.
    pub(super) fn restore(&self, isr: u8, live: bool) {
        let mut pin = self.pin();
        (pin.live, pin.isr) = (live, isr & (ISR_QUEUE | ISR_CONFIG));
        pin.update();
    }

    /// Device reset.
    pub(super) fn reset(&self) {
        self.routes.iter().for_each(|route| route.store(NO_VECTOR, Ordering::Relaxed));
        let mut pin = self.pin();
        (pin.live, pin.isr) = (false, 0);
        pin.update();
    }

    fn pin(&self) -> MutexGuard<'_, Pin> {
        self.pin.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pin {
    /// Under the lock, so that levels leave in order.
    fn update(&mut self) {
        let high = self.isr != 0 && self.enabled;
        if self.high != high {
            self.high = high;
            self.line.set(high);
        }
    }
}
