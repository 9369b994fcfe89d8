//! Header lines and region table, of any bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use pcie_function::BusMemory;
use pcie_function::header::{HostHeader, SocHeader};
use pcie_function::regions::{self, Space, Spaces};
use wire_kit::Heap;

const CARD: usize = 0x2000;

fuzz_target!(|data: &[u8]| {
    let card = Heap::new(CARD);
    card.copy_in(0, &data[..data.len().min(CARD)]);
    let _ = SocHeader::load(&card, card.load(16));
    let Ok(Some(header)) = HostHeader::load(&card) else { return };
    let stored = Heap::new(64);
    header.store(&stored);
    assert!((0..64).step_by(8).all(|at| stored.load(at) == card.load(at)), "{header:?}");

    let spaces = Spaces { card: 1 << 20, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
    let Ok(table) = regions::load(&card, header.table, header.regions, &spaces) else { return };
    for region in &table {
        assert!(region.kind.space().is_none_or(|space| space == region.space), "{region:?}");
        let size = match region.space {
            Space::Card => spaces.card,
            Space::Inbox => spaces.inbox,
            Space::Outbox => spaces.outbox,
        };
        let elements = u64::from(region.stride) * u64::from(region.count);
        assert!(region.offset + region.len <= size && elements <= region.len, "{region:?}");
    }
});
