//! The controller's registers: the generic ones (AHCI 1.3.1 §3.1), and those of its ports behind them.

use super::dma::Dma;
use super::port::{Effect, Port};
use super::registers::{CAP, CAP_VALUE, GHC, IS, PI, PORT_BASE, PORT_STRIDE, PORTS, VS, VS_VALUE, ghc};

/// What a register write asks for besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Wish {
    /// There may be something to do.
    pub(super) kick: bool,
    /// Interrupts were acknowledged: those that remain are to be told again.
    pub(super) acknowledged: bool,
}

/// The HBA.
#[derive(Debug)]
pub(super) struct Hba {
    pub(super) interrupts_on: bool,
    /// Ports whose interrupt happened, until the guest clears their bits.
    pub(super) pending: u32,
    pub(super) ports: [Port; PORTS],
    /// The function may use the bus.
    pub(super) bus_master: bool,
    /// The port that was served last.
    served: usize,
    /// The device is gone: its thread ends.
    pub(super) ended: bool,
    /// Nothing is begun any more.
    pub(super) halted: bool,
    /// The thread is at something.
    pub(super) busy: bool,
}

impl Hba {
    pub(super) fn new(ports: [Port; PORTS]) -> Self {
        Self {
            interrupts_on: false,
            pending: 0,
            ports,
            bus_master: false,
            served: PORTS - 1,
            ended: false,
            halted: false,
            busy: false,
        }
    }

    /// HBA reset (§10.4.3).
    pub(super) fn reset(&mut self, dma: &Dma) {
        (self.interrupts_on, self.pending) = (false, 0);
        for (index, port) in self.ports.iter_mut().enumerate() {
            dma.fence(index);
            port.reset();
        }
    }

    /// Ports whose interrupt is to be told.
    pub(super) fn interrupts(&mut self) -> u32 {
        for (index, port) in self.ports.iter().enumerate() {
            self.pending |= u32::from(port.is_pending()) << index;
        }
        if self.interrupts_on { self.pending } else { 0 }
    }

    /// The ports' indices, the one first whose turn it is.
    pub(super) fn turns(&self) -> impl Iterator<Item = usize> + use<> {
        let first = self.served + 1;
        (0..PORTS).map(move |n| (first + n) % PORTS)
    }

    /// It is the others' turn.
    pub(super) fn serve(&mut self, port: usize) {
        self.served = port;
    }

    /// Reads the register at `offset`, a multiple of 4.
    pub(super) fn read(&self, offset: u64) -> u32 {
        if let Some((port, offset)) = port_of(offset) {
            return self.ports[port].read(offset);
        }
        match offset {
            CAP => CAP_VALUE,
            GHC => ghc::AHCI | if self.interrupts_on { ghc::INTERRUPTS } else { 0 },
            IS => self.pending,
            PI => (1 << PORTS) - 1,
            VS => VS_VALUE,
            _ => 0,
        }
    }

    /// Writes those bits of the register at `offset` that are in `mask`.
    pub(super) fn write(&mut self, offset: u64, value: u32, mask: u32, dma: &Dma) -> Wish {
        if let Some((port, offset)) = port_of(offset) {
            let Effect { fence, kick } = self.ports[port].write(offset, value, mask);
            if fence {
                dma.fence(port);
            }
            return Wish { kick, acknowledged: false };
        }
        match offset {
            GHC if value & mask & ghc::RESET != 0 => self.reset(dma),
            GHC if mask & ghc::INTERRUPTS != 0 => self.interrupts_on = value & ghc::INTERRUPTS != 0,
            IS => {
                self.pending &= !(value & mask);
                return Wish { kick: false, acknowledged: true };
            }
            _ => {}
        }
        Wish::default()
    }
}

/// The port that has a register at `offset`, and the offset from its first one.
fn port_of(offset: u64) -> Option<(usize, u64)> {
    let from_first = offset.checked_sub(PORT_BASE)?;
    let port = (from_first / PORT_STRIDE) as usize;
    (port < PORTS).then_some((port, from_first % PORT_STRIDE))
}
