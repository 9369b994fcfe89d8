//! The host's table of interrupt routes, made from what vectors raise.

use api_channel::call::{Irqchip, Route, RouteKind};

use super::{FIRST_GSI, Slot, Target};
use crate::hyperv::Sint;
use crate::interrupt::Message;

/// Chips by their number on the wire.
const PIC_MASTER: u64 = 0;
const PIC_SLAVE: u64 = 1;
const IO_APIC: u64 = 2;

/// The whole table: pins of the host's chips as a PC wires them, where the timer's ISA interrupt 0 is the I/O APIC's input 2, then what
/// vectors raise.
pub(super) fn table(irqchip: Irqchip, slots: &[Slot]) -> Vec<Route> {
    let full = irqchip == Irqchip::Full;
    let pin = |gsi, chip, data| Route { gsi, kind: RouteKind::Pin as u32, address: chip, data, reserved: 0 };
    let pics = (0..16).filter(|gsi| *gsi != 2);
    let pics = pics.map(|gsi| pin(gsi, if gsi < 8 { PIC_MASTER } else { PIC_SLAVE }, gsi % 8));
    let inputs = (0..FIRST_GSI).filter(|gsi| *gsi != 2);
    let inputs = inputs.map(|gsi| pin(gsi, IO_APIC, if gsi == 0 { 2 } else { gsi }));
    let pins = pics.chain(inputs).filter(|_| full);
    let vectors = slots.iter().zip(if full { FIRST_GSI } else { 0 }..).filter_map(|(slot, gsi)| {
        Some(match slot.target? {
            Target::Message(Message { address, data }) => {
                Route { gsi, kind: RouteKind::Msi as u32, address, data, reserved: 0 }
            }
            Target::Sint(Sint { vcpu, number }) => {
                Route { gsi, kind: RouteKind::Sint as u32, address: vcpu.into(), data: number.into(), reserved: 0 }
            }
        })
    });
    pins.chain(vectors).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_every_pin_and_each_message() {
        let message = Message { address: 0xfee0_0000, data: 0x41 };
        let slot = |target| Slot { taken: true, target: Some(target), ..Slot::default() };
        let sint = Sint { vcpu: 3, number: 9 };
        let slots = [Slot::default(), slot(Target::Message(message)), slot(Target::Sint(sint))];
        let table = table(Irqchip::Full, &slots);
        let pins: Vec<_> = table.iter().filter(|route| route.kind == 1).collect();
        assert_eq!((pins.len(), table.len()), (15 + 23, 15 + 23 + 2));
        assert!(pins.iter().all(|route| route.gsi != 2));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (0, IO_APIC, 2)));
        assert!(pins.iter().any(|r| (r.gsi, r.address, r.data) == (9, PIC_SLAVE, 1)));
        let [.., message, sint] = table[..] else { panic!("{table:?}") };
        assert_eq!((message.gsi, message.kind, message.address, message.data), (25, 2, 0xfee0_0000, 0x41));
        assert_eq!((sint.gsi, sint.kind, sint.address, sint.data), (26, 3, 3, 9));
    }

    #[test]
    fn where_the_host_has_no_chips_slots_are_gsis() {
        let message = Message { address: 0xfee0_0000, data: 0xc041 };
        let slot = Slot { taken: true, target: Some(Target::Message(message)), ..Slot::default() };
        let table = table(Irqchip::Split, &[Slot::default(), slot]);
        assert_eq!(table.iter().map(|r| (r.gsi, r.kind, r.data)).collect::<Vec<_>>(), [(1, 2, 0xc041)]);
    }
}
