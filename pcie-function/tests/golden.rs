//! Header lines and region table against their bytes in `tests/golden/header`, both ways.

use std::os::fd::AsFd;

use pcie_function::header::{HostHeader, Role, SocHeader};
use pcie_function::local::sealed_memfd;
use pcie_function::regions::{self, Region, Space, Spaces, TABLE, Type};
use pcie_function::{BusMemory, Mapping, Reach, Window};

/// Bytes in hex, `#` starts a comment.
fn bytes(text: &str) -> Vec<u8> {
    let digits: String = text.lines().flat_map(|line| line.split('#').next()).flat_map(str::split_whitespace).collect();
    let (pairs, rest) = digits.as_bytes().as_chunks::<2>();
    assert!(rest.is_empty(), "odd number of digits");
    pairs.iter().map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
}

fn memory() -> Window {
    let fd = sealed_memfd("golden", 0x10_0000).unwrap();
    Mapping::new(fd.as_fd(), 0, 0x10_0000, Reach::Local).unwrap().window()
}

fn stored(memory: &Window, offset: usize, expected: &[u8]) {
    let mut found = vec![0; expected.len()];
    memory.copy_out(offset, &mut found);
    assert_eq!(found, expected);
}

#[test]
fn the_host_header_line() {
    let golden = bytes(include_str!("../../tests/golden/header/host-header.hex"));
    let header = HostHeader {
        versions: (1, 1),
        features: 0,
        inbox: 1 << 56,
        inbox_len: 0x1_1000,
        outbox: 1 << 56 | 0x1_2000,
        outbox_len: 0x2_0000,
        table: TABLE,
        regions: 9,
        role: Role::Vm,
        nonce: 0x1122_3344_5566_7788,
    };
    let card = memory();
    assert_eq!(HostHeader::load(&card), Ok(None));
    header.store(&card);
    stored(&card, 0, &golden);

    let card = memory();
    card.copy_in(0, &golden);
    assert_eq!(HostHeader::load(&card), Ok(Some(header)));
}

#[test]
fn the_soc_header_line() {
    let golden = bytes(include_str!("../../tests/golden/header/soc-header.hex"));
    let header = SocHeader { version: 1, features: 0, host_nonce: 0x1122_3344_5566_7788, nonce: 0xaabb_ccdd_eeff_1100 };
    let inbox = memory();
    assert_eq!(SocHeader::load(&inbox, header.host_nonce), Ok(None));
    header.store(&inbox);
    stored(&inbox, 0, &golden);

    let inbox = memory();
    inbox.copy_in(0, &golden);
    assert_eq!(SocHeader::load(&inbox, header.host_nonce), Ok(Some(header)));
    assert_eq!(SocHeader::load(&inbox, 1), Ok(None), "an answer to another offer");
}

#[test]
fn the_region_table() {
    let golden = bytes(include_str!("../../tests/golden/header/region-table.hex"));
    let regions = [
        Region {
            kind: Type::LANE_REQUESTS,
            version: 1,
            space: Space::Card,
            offset: 0x6_0000,
            len: 0x800,
            stride: 64,
            count: 32,
        },
        Region {
            kind: Type::REQUESTS,
            version: 1,
            space: Space::Inbox,
            offset: 0x1000,
            len: 0x1_0000,
            stride: 64,
            count: 1024,
        },
    ];
    let card = memory();
    regions::store(&card, &regions);
    stored(&card, TABLE as usize, &golden);

    let card = memory();
    card.copy_in(TABLE as usize, &golden);
    let spaces = Spaces { card: card.len() as u64, inbox: 0x1_1000, outbox: 0 };
    assert_eq!(regions::load(&card, TABLE, 2, &spaces), Ok(regions.to_vec()));
}
