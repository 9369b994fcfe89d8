//! PIRQA–PIRQH: from the INTx pins of PCI functions to the interrupt controllers.
//!
//! Each PIRQ has an input of the I/O APIC (GSI 16–23), and, where the LPC bridge's register routes it, an ISA interrupt of the PICs.
//! Which function's pin is wired to which PIRQ is QEMU's q35's: slots below 25 go round PIRQE–PIRQH, those of the chipset have
//! PIRQA–PIRQD.

use std::sync::{Arc, Mutex, PoisonError};

use crate::interrupt::{InterruptLine, LineSink, WiredOr};

/// PIRQs.
pub const PIRQS: usize = 8;
/// GSI of PIRQA.
pub const PIRQ_GSI: u32 = 16;
/// A PIRQ's route is off.
pub(super) const ROUTE_OFF: u8 = 0x80;

/// The PIRQs of a machine.
pub struct Pirqs {
    inputs: Vec<WiredOr>,
    router: Arc<Router>,
}

struct Router {
    sink: Arc<dyn LineSink>,
    state: Mutex<State>,
}

struct State {
    high: [bool; PIRQS],
    /// The LPC bridge's registers.
    routes: [u8; PIRQS],
}

impl Pirqs {
    /// All low, routed nowhere but to the I/O APIC.
    pub fn new(sink: Arc<dyn LineSink>) -> Self {
        let router =
            Arc::new(Router { sink, state: Mutex::new(State { high: [false; PIRQS], routes: [ROUTE_OFF; PIRQS] }) });
        let inputs = (0..PIRQS as u32).map(|pirq| WiredOr::new(pirq, router.clone() as Arc<dyn LineSink>)).collect();
        Self { inputs, router }
    }

    /// A wire for INTA of the function in `slot` of the root bus, or of one behind the bridge there.
    pub fn wire(&self, slot: u8) -> InterruptLine {
        self.inputs[pirq_of(slot, 0)].input()
    }

    /// Sets the ISA route of each PIRQ.
    pub fn route(&self, routes: [u8; PIRQS]) {
        let mut state = self.router.state();
        let changed: Vec<u8> = (0..PIRQS).flat_map(|n| [state.routes[n], routes[n]]).collect();
        state.routes = routes;
        for irq in changed.into_iter().filter_map(isa) {
            self.router.sink.set_level(irq, state.isa_level(irq));
        }
    }
}

impl std::fmt::Debug for Pirqs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pirqs")
    }
}

/// The PIRQ of `pin` (0 is INTA) of the function in `slot`.
pub fn pirq_of(slot: u8, pin: u8) -> usize {
    match slot {
        // The chipset's own (ICH9 datasheet, DxxIR's defaults).
        25.. => usize::from(pin % 4),
        _ => usize::from((slot + pin) % 4) + 4,
    }
}

/// The ISA interrupt that a route names; the reserved ones name none (ICH9 datasheet §13.1.10).
fn isa(route: u8) -> Option<u32> {
    matches!(route, 3..=7 | 9..=12 | 14 | 15).then_some(route.into())
}

impl Router {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn isa_level(&self, irq: u32) -> bool {
        (0..PIRQS).any(|n| self.high[n] && isa(self.routes[n]) == Some(irq))
    }
}

impl LineSink for Router {
    fn set_level(&self, pirq: u32, high: bool) {
        let mut state = self.state();
        let n = pirq as usize;
        state.high[n] = high;
        self.sink.set_level(PIRQ_GSI + pirq, high);
        if let Some(irq) = isa(state.routes[n]) {
            self.sink.set_level(irq, state.isa_level(irq));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Board(Mutex<std::collections::BTreeMap<u32, bool>>);

    impl LineSink for Board {
        fn set_level(&self, gsi: u32, high: bool) {
            self.0.lock().unwrap().insert(gsi, high);
        }
    }

    impl Board {
        fn high(&self) -> Vec<u32> {
            self.0.lock().unwrap().iter().filter(|(_, high)| **high).map(|(gsi, _)| *gsi).collect()
        }
    }

    #[test]
    fn a_pin_reaches_the_io_apic_and_where_it_is_routed() {
        let board = Arc::new(Board::default());
        let pirqs = Pirqs::new(board.clone());
        let (slot1, slot5, sata) = (pirqs.wire(1), pirqs.wire(5), pirqs.wire(31));
        slot1.set(true);
        assert_eq!(board.high(), [21]);
        slot5.set(true);
        slot1.set(false);
        assert_eq!(board.high(), [21]);
        let mut routes = [ROUTE_OFF; PIRQS];
        (routes[0], routes[5]) = (10, 10);
        pirqs.route(routes);
        assert_eq!(board.high(), [10, 21]);
        sata.set(true);
        slot5.set(false);
        assert_eq!(board.high(), [10, 16]);
        routes[0] = 11;
        pirqs.route(routes);
        assert_eq!(board.high(), [11, 16]);
        // No interrupt has that number to give.
        routes[0] = 8;
        pirqs.route(routes);
        assert_eq!(board.high(), [16]);
    }
}
