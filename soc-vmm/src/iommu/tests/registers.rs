//! Registers, fault records, and what any guest may do to them.

use super::*;

#[test]
fn the_unit_says_what_it_can() {
    let mut rig = Rig::new();
    assert_eq!(rig.read_low(0), 0x10);
    let (capability, extended) = (rig.read(8), rig.read(0x10));
    assert_eq!(capability >> 8 & 0x1f, 0b110, "39 and 48 bits");
    assert_eq!((capability >> 16 & 0x3f, capability >> 24 & 0x3ff, capability >> 40 & 0xff), (47, 0x22, 7));
    assert_eq!(capability >> 34 & 0xf, 0b11, "large pages");
    assert_eq!(capability >> 7 & 1, 0, "what is not mapped is not remembered");
    assert_eq!(extended & 0x7f, 0b101_1011, "coherent, queue, remapping, 32-bit destinations, pass-through");
    assert_eq!(extended >> 8 & 0x3ff, 0xf);
    assert_eq!((rig.read_low(0x64), rig.read_low(0x58)), (0, 0), "no protected memory, no log in memory");
}

#[test]
fn commands_are_told_once_and_switches_stay() {
    let mut rig = Rig::remapping();
    rig.start_queue();
    assert_eq!(rig.read_low(0x1c), 1 << 24 | 1 << 25 | 1 << 26);
    rig.write_low(0x18, 1 << 26);
    assert_eq!(rig.read_low(0x1c), 1 << 24 | 1 << 26);
    assert_eq!(rig.read_low(0x18), 0, "commands can't be read");
}

#[test]
fn an_invalidation_by_register_is_done_when_it_is_written() {
    let mut rig = Rig::new();
    rig.write(0x28, 1 << 63 | 2 << 61 | 0x1234);
    assert_eq!(rig.read(0x28), 2 << 61 | 2 << 59 | 0x1234);
    rig.write_low(0xf8, 0x55);
    rig.write_low(0xfc, 1 << 31 | 3 << 28);
    assert_eq!(rig.read(0xf8), 3 << 60 | 3 << 57 | 0x55);
}

#[test]
fn a_fault_interrupts_once_and_is_owed_while_it_is_masked() {
    let mut rig = Rig::translating(3);
    rig.write_low(0x3c, 0x44);
    rig.write_low(0x40, 0xfee0_5000);
    rig.write_low(0x44, 1);
    assert_eq!(rig.read_low(0x38), 1 << 31);
    rig.dma().read(0, &mut [0]).unwrap_err();
    assert_eq!((rig.read_low(0x38), rig.events.raised().len()), (3 << 30, 0));
    rig.write_low(0x38, 0);
    assert_eq!(rig.events.raised(), [Message { address: 0x1_fee0_5000, data: 0x44 }]);
    rig.dma().read(0, &mut [0]).unwrap_err();
    assert_eq!(rig.events.raised().len(), 1, "the first is not dealt with");
    rig.fault().unwrap();
    assert_eq!(rig.fault(), None, "one of a function is enough");
    rig.dma().read(0, &mut [0]).unwrap_err();
    assert_eq!(rig.events.raised().len(), 2);
    // What is dealt with is not owed.
    rig.fault().unwrap();
    rig.write_low(0x38, 1 << 31);
    rig.dma().read(0, &mut [0]).unwrap_err();
    rig.fault().unwrap();
    assert_eq!(rig.read_low(0x38), 1 << 31);
}

#[test]
fn faults_for_which_there_is_no_room_are_counted_as_lost() {
    let mut rig = Rig::translating(3);
    for function in 0..9 {
        rig.requester.place(1, function);
        rig.dma().read(0, &mut [0]).unwrap_err();
    }
    assert_eq!(rig.read_low(0x34), status::OVERFLOW | status::PENDING);
    let seen: Vec<_> = std::iter::from_fn(|| rig.fault()).map(|(_, requester, _)| requester).collect();
    assert_eq!(seen, (0x100..0x108).collect::<Vec<u16>>());
    rig.write_low(0x34, status::OVERFLOW);
    assert_eq!(rig.read_low(0x34), 0);
}

#[test]
fn after_a_reset_nothing_is_translated() {
    let mut rig = Rig::translating(3);
    rig.dma().read(0, &mut [0]).unwrap_err();
    let fresh = Rig::new().unit.save();
    rig.unit.reset();
    assert_eq!(rig.unit.save(), fresh);
    rig.dma().read(0, &mut [0]).unwrap();
}

#[test]
fn a_state_that_cannot_be_is_refused() {
    let mut rig = Rig::queueing();
    let good = serde_json::to_value(rig.unit.save()).unwrap();
    for (path, value) in [
        ("/values/status", 1u64 << 20),
        ("/values/root", 1),
        ("/values/table_used", 1 << 8),
        ("/values/queue/address", 8),
        ("/values/queue/head", 1 << 16),
        ("/faults/next", 8),
        ("/faults/sticky", 2),
    ] {
        let mut bad = good.clone();
        *bad.pointer_mut(path).unwrap() = value.into();
        rig.unit.restore(&serde_json::from_value(bad).unwrap()).unwrap_err();
    }
    rig.unit.restore(&serde_json::from_value(good).unwrap()).unwrap();
}

proptest! {
    /// Any accesses, any memory: it answers, and what is saved is what was there.
    #[test]
    fn any_guest_is_answered(
        accesses in proptest::collection::vec((0u64..0x300, 1u8..=8, proptest::option::of(any::<u64>())), 0..60),
        words in proptest::collection::vec((0u64..0x2000, any::<u64>()), 0..60),
        dma in proptest::collection::vec((any::<u64>(), 1usize..0x3000), 0..4),
    ) {
        let mut rig = Rig::queueing();
        for (at, word) in words {
            rig.ram.put(at * 8, word);
        }
        for (offset, len, data) in accesses {
            let offset = if len >= 4 { offset & !3 } else { offset };
            let value = rig.access(offset, len, data);
            prop_assert!(data.is_some() || value.is_some(), "reads are never deferred");
        }
        for (at, len) in dma {
            let _ = rig.dma().read(at, &mut vec![0; len]);
        }
        let saved = rig.unit.save();
        let mut other = Rig::new();
        other.unit.restore(&saved).unwrap();
        prop_assert_eq!(other.unit.save(), saved);
    }
}
