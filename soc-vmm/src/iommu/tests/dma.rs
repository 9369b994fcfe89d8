//! Translation of DMA.

use super::*;

const DATA: [u8; 4] = [1, 2, 3, 4];
/// Pages that tests map, which no table is in.
const TARGET: u64 = 0x20_0000;

#[test]
fn without_translation_addresses_are_what_they_are() {
    let rig = Rig::new();
    rig.dma().write(0x7ffe, &DATA).unwrap();
    assert_eq!(rig.ram.get(0x7ffe), 0x0403_0201);
}

#[test]
fn pages_of_each_size_are_found() {
    for levels in [3, 4] {
        for level in 1..=3 {
            let size = 1u64 << (12 + 9 * (level - 1));
            let mut rig = Rig::translating(levels.into());
            // All of guest memory is within one page of 1 GiB.
            let (from, to) = (5 * size.max(1 << 30), if level == 3 { 0 } else { TARGET });
            rig.map(levels, level, from, to, 3);
            let within = if level == 1 { 0xffc } else { 0x1_fffc };
            rig.dma().write(from + within, &DATA).unwrap();
            assert_eq!(rig.ram.get(to + within) as u32, 0x0403_0201, "{levels} levels, a page at level {level}");
            assert_eq!(rig.fault(), None);
        }
    }
}

#[test]
fn a_transfer_goes_from_page_to_page_or_not_at_all() {
    let mut rig = Rig::translating(3);
    rig.map(3, 1, 0x1000, TARGET, 3);
    rig.map(3, 1, 0x2000, TARGET + 0x5000, 3);
    rig.map(3, 1, 0x3000, TARGET + 0x6000, 3);
    let data: Vec<u8> = (0..0x2010u32).map(|n| n as u8 ^ (n >> 8) as u8).collect();
    rig.dma().write(0x1ff8, &data).unwrap_err();
    assert_eq!(rig.ram.get(TARGET + 0xff8), 0, "nothing was written");
    assert_eq!(rig.fault(), Some((5, FUNCTION, 0x4000)));
    rig.map(3, 1, 0x4000, TARGET + 0x1000, 3);
    rig.dma().write(0x1ff8, &data).unwrap();
    let mut read = vec![0; data.len()];
    rig.dma().read(0x1ff8, &mut read).unwrap();
    assert_eq!(read, data);
    rig.ram.read(TARGET + 0x5000, &mut read[..0x2000]).unwrap();
    assert_eq!(read[..0x2000], data[8..0x2008]);
    assert_eq!(rig.fault(), None);
}

#[test]
fn each_way_to_be_blocked_has_its_reason() {
    type Spoil = fn(&mut Rig);
    let cases: [(u8, Spoil); 14] = [
        (0x1, |rig| rig.ram.put(ROOT, 0)),
        (0x2, |rig| rig.put_context(0)),
        // An address width, and a translation type, that there is not.
        (0x3, |rig| rig.put_context(u128::from(PAGES | 1))),
        (0x3, |rig| rig.put_context(u128::from(PAGES | 5) | 1 << 64)),
        (0x4, |rig| rig.put_context(u128::from(PAGES | 9) | 7 << 67 | 1 << 64)),
        (0x5, |rig| rig.map(3, 1, 0x1000, TARGET, 1)),
        (0x5, |rig| rig.map(3, 1, 0x1000, TARGET, 0)),
        (0x7, |rig| rig.ram.put(PAGES, RAM as u64 | 3)),
        (0x8, |rig| {
            rig.write(0x20, RAM as u64);
            rig.command(1 << 30);
        }),
        (0x9, |rig| rig.ram.put(ROOT, RAM as u64 | 1)),
        (0xa, |rig| rig.ram.put(ROOT + 8, 1)),
        (0xb, |rig| rig.put_context(u128::from(PAGES | 1 | 0x10) | 1 << 64)),
        (0xc, |rig| rig.map(3, 1, 0x1000, TARGET | 1 << 11, 3)),
        (0xc, |rig| rig.map(3, 2, 0, TARGET | 0x1000, 3)),
    ];
    for (reason, spoil) in cases {
        let mut rig = Rig::translating(3);
        rig.map(3, 1, 0x1000, TARGET, 3);
        spoil(&mut rig);
        let address = if reason == 4 { 1 << 39 } else { 0x1000 };
        rig.dma().write(address, &DATA).unwrap_err();
        assert_eq!(rig.fault(), Some((reason, FUNCTION, address)));
        assert_eq!(rig.ram.get(TARGET), 0);
    }
}

#[test]
fn a_page_that_may_be_written_alone_is_not_read() {
    let mut rig = Rig::translating(4);
    rig.map(4, 1, 0x1000, TARGET, 2);
    rig.dma().write(0x1000, &DATA).unwrap();
    rig.dma().read(0x1000, &mut [0; 4]).unwrap_err();
    assert_eq!(rig.read(0x228) >> 62 & 1, 1, "it was a read");
    assert_eq!(rig.fault(), Some((6, FUNCTION, 0x1000)));
}

#[test]
fn a_function_that_passes_through_is_not_translated() {
    let mut rig = Rig::translating(3);
    rig.put_context(0b1001 | 1 << 64);
    rig.dma().write(TARGET, &DATA).unwrap();
    assert_eq!(rig.ram.get(TARGET), 0x0403_0201);
    assert_eq!(rig.fault(), None);
}

#[test]
fn faults_that_nobody_wants_to_hear_of_are_not_recorded() {
    let mut rig = Rig::translating(3);
    rig.put_context(u128::from(PAGES | 3) | 1 << 64);
    rig.dma().write(0x1000, &DATA).unwrap_err();
    assert_eq!(rig.fault(), None);
}

#[test]
fn what_is_taken_back_is_reached_until_it_is_invalidated_and_never_after() {
    let forget: [fn(&mut Rig); 4] = [
        |rig| rig.write(0xf8, 1 << 63 | 1 << 60),
        |rig| rig.write(0x28, 1 << 63 | 1 << 61),
        |rig| rig.command(1 << 30),
        |rig| {
            rig.start_queue();
            rig.ram.put_entry(QUEUE, 0x12);
            rig.write(0x88, 0x10);
        },
    ];
    for forget in forget {
        let mut rig = Rig::translating(3);
        rig.map(3, 1, 0x1000, TARGET, 3);
        let dma = rig.dma();
        dma.write(0x1000, &DATA).unwrap();
        rig.map(3, 1, 0x1000, 0, 0);
        forget(&mut rig);
        dma.write(0x1000, &DATA).unwrap_err();
        assert_eq!(rig.fault(), Some((5, FUNCTION, 0x1000)));
        // What was not mapped is not remembered.
        rig.map(3, 1, 0x1000, TARGET + 0x1000, 3);
        dma.write(0x1000, &DATA).unwrap();
        assert_eq!(rig.ram.get(TARGET + 0x1000), 0x0403_0201);
    }
}

#[test]
fn a_function_is_known_by_where_its_bus_is() {
    let mut rig = Rig::translating(3);
    rig.map(3, 1, 0x1000, TARGET, 3);
    let dma = rig.dma();
    dma.write(0x1000, &DATA).unwrap();
    rig.requester.place(7, FUNCTION as u8);
    dma.write(0x1000, &DATA).unwrap_err();
    assert_eq!(rig.fault(), Some((1, 0x700 | FUNCTION, 0x1000)));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// Whatever is mapped is what is reached, and nothing else.
    #[test]
    fn transfers_reach_what_is_mapped(
        four: bool,
        pages in proptest::collection::btree_map(0u64..12, (0u64..64, 0u64..4), 0..10),
        transfers in proptest::collection::vec((0u64..0xc000, 1usize..0x3000, any::<bool>()), 1..12),
    ) {
        let levels = if four { 4 } else { 3 };
        let mut rig = Rig::translating(levels.into());
        for (from, (to, rights)) in &pages {
            rig.map(levels, 1, from * 0x1000, TARGET + to * 0x1000, *rights);
        }
        let dma = rig.dma();
        for (at, len, write) in transfers {
            let right = if write { 2 } else { 1 };
            let allowed = (at / 0x1000..=(at + len as u64 - 1) / 0x1000)
                .all(|page| pages.get(&page).is_some_and(|(_, rights)| rights & right != 0));
            let mut data = vec![0x5a; len];
            let done = if write { dma.write(at, &data) } else { dma.read(at, &mut data) };
            prop_assert_eq!(done.is_ok(), allowed);
            prop_assert_eq!(rig.fault().is_none(), allowed);
            if allowed && !write {
                for (n, byte) in data.iter().enumerate() {
                    let at = at + n as u64;
                    let page = TARGET + pages[&(at / 0x1000)].0 * 0x1000;
                    prop_assert_eq!(*byte, rig.ram.get((page + at % 0x1000) & !7).to_le_bytes()[at as usize % 8]);
                }
            }
        }
    }
}
