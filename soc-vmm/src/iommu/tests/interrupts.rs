//! Interrupt remapping.

use super::*;
use crate::pci::test_sink::TestSink;

/// A message that names an entry.
fn naming(index: u64) -> Message {
    Message { address: 0xfee0_0010 | (index & 0x7fff) << 5 | (index >> 15) << 2, data: 0 }
}

/// An entry: present, for this vector, at the processor with this ID.
fn entry(vector: u8, destination: u8) -> u128 {
    1 | u128::from(vector) << 16 | u128::from(destination) << 40
}

impl Rig {
    fn put_interrupt(&self, index: u64, entry: u128) {
        self.ram.put_entry(INTERRUPTS + index * 16, entry);
    }

    /// A message of the function's, sent once; what arrives.
    fn send(&self, message: Message) -> Vec<Message> {
        let sink = TestSink::default();
        let route = self.iommu.messages_of(self.requester.clone(), &sink).route();
        route.set(Some(message));
        route.raise();
        sink.raised()
    }
}

#[test]
fn off_it_lets_every_message_through() {
    let rig = Rig::new();
    for message in [naming(3), Message { address: 0xfee0_1000, data: 0x41 }] {
        assert_eq!(rig.send(message), [message]);
    }
}

#[test]
fn an_entry_says_what_arrives() {
    let rig = Rig::remapping();
    rig.put_interrupt(3, entry(0x41, 7));
    assert_eq!(rig.send(naming(3)), [Message { address: 0xfee0_7000, data: 0x41 }]);
    // Logical, redirectable, level-triggered, lowest priority.
    rig.put_interrupt(3, entry(0x41, 7) | 0x3c);
    assert_eq!(rig.send(naming(3)), [Message { address: 0xfee0_700c, data: 0xc141 }]);
    // With a subhandle.
    let with_subhandle = Message { address: naming(1).address | 8, data: 2 };
    assert_eq!(rig.send(with_subhandle), [Message { address: 0xfee0_700c, data: 0xc141 }]);
}

#[test]
fn extended_destinations_have_32_bits() {
    let mut rig = Rig::remapping();
    rig.write(0xb8, INTERRUPTS | 1 << 11 | 7);
    rig.command(1 << 24);
    rig.put_interrupt(0, 1 | 0x41 << 16 | 0x12_3456 << 32);
    assert_eq!(rig.send(naming(0)), [Message { address: 0x12_3400_fee5_6000, data: 0x41 }]);
}

#[test]
fn each_way_to_be_blocked_has_its_reason() {
    let present = entry(0x41, 0);
    let other = present | u128::from(FUNCTION ^ 0x100) << 64;
    for (reason, index, message, entry) in [
        (0x20, 3, Message { data: 1 << 16, ..naming(3) }, present),
        (0x21, 256, naming(256), present),
        (0x21, 0x8000, naming(0x8000), present),
        (0x22, 3, naming(3), 0),
        (0x24, 3, naming(3), present | 1 << 15),
        (0x24, 3, naming(3), present | 3 << 82),
        (0x25, 0, Message { address: 0xfee0_0000, data: 0x41 }, present),
        (0x26, 3, naming(3), other | 1 << 82),
        (0x26, 3, naming(3), present | 0x0203 << 64 | 2 << 82),
    ] {
        let mut rig = Rig::remapping();
        rig.put_interrupt(3, entry);
        assert_eq!(rig.send(message), []);
        assert_eq!(rig.fault(), Some((reason, FUNCTION, index << 48)));
    }
    let mut rig = Rig::new();
    rig.write(0xb8, RAM as u64 | 7);
    rig.command(1 << 24);
    rig.command(1 << 25);
    assert_eq!(rig.send(naming(0)), []);
    assert_eq!(rig.fault(), Some((0x23, FUNCTION, 0)));
}

#[test]
fn an_entry_may_be_for_some_functions_alone() {
    let rig = Rig::remapping();
    let like = |requester: u16, how: u128| entry(0x41, 0) | u128::from(requester) << 64 | how << 80;
    for admits in [like(FUNCTION, 4), like(FUNCTION ^ 4, 5), like(FUNCTION ^ 6, 6), like(FUNCTION ^ 7, 7), like(2, 8)] {
        rig.put_interrupt(3, admits);
        assert_eq!(rig.send(naming(3)).len(), 1, "{admits:#x}");
    }
    for denies in [like(FUNCTION ^ 1, 4), like(FUNCTION ^ 8, 7)] {
        rig.put_interrupt(3, denies);
        assert_eq!(rig.send(naming(3)), [], "{denies:#x}");
    }
}

#[test]
fn the_io_apic_may_use_every_entry() {
    let rig = Rig::remapping();
    rig.put_interrupt(3, entry(0x41, 0) | u128::from(FUNCTION) << 64 | 1 << 82);
    let sink = TestSink::default();
    let route = rig.iommu.remapped(Sender::IoApic, sink.route());
    route.set(Some(naming(3)));
    route.raise();
    assert_eq!(sink.raised(), [Message { address: 0xfee0_0000, data: 0x41 }]);
}

#[test]
fn messages_that_name_no_entry_go_through_where_the_guest_allows_it() {
    let mut rig = Rig::remapping();
    let message = Message { address: 0xfee0_1000, data: 0x4041 };
    rig.command(1 << 23);
    assert_eq!(rig.send(message), [message]);
    rig.write(0xb8, INTERRUPTS | 1 << 11 | 7);
    rig.command(1 << 24);
    assert_eq!(rig.send(message), [], "not beside extended destinations");
}

#[test]
fn a_wired_message_follows_when_its_entry_is_invalidated() {
    let mut rig = Rig::queueing();
    let sink = TestSink::default();
    let messages = rig.iommu.messages_of(rig.requester.clone(), &sink);
    let routes = [2, 3, 9].map(|index| {
        rig.put_interrupt(index, entry(0x40 + index as u8, 0));
        let route = messages.route();
        route.set(Some(naming(index)));
        route
    });
    let heard = |sink: &TestSink, before: usize| sink.raised()[before..].iter().map(|m| m.data).collect::<Vec<_>>();
    for index in [2, 3, 9] {
        rig.put_interrupt(index, entry(0x80 + index as u8, 0));
    }
    routes.iter().for_each(|route| route.raise());
    assert_eq!(heard(&sink, 0), [0x42, 0x43, 0x49], "nothing was invalidated");
    // Entries 2 and 3: from 3 on, cut to a multiple of 2.
    rig.ram.put_entry(QUEUE, 4 | 1 << 4 | 1 << 27 | 3 << 32);
    rig.write(0x88, 0x10);
    routes.iter().for_each(|route| route.raise());
    assert_eq!(heard(&sink, 3), [0x82, 0x83, 0x49]);
    rig.ram.put_entry(QUEUE + 16, 4);
    rig.write(0x88, 0x20);
    routes.iter().for_each(|route| route.raise());
    assert_eq!(heard(&sink, 6), [0x82, 0x83, 0x89]);
    // Entries that are gone are told of when they are used; one that is there again needs no invalidation.
    rig.put_interrupt(9, 0);
    rig.ram.put_entry(QUEUE + 32, 4);
    rig.write(0x88, 0x30);
    assert_eq!(rig.fault(), None);
    routes[2].raise();
    assert_eq!(rig.fault(), Some((0x22, FUNCTION, 9 << 48)));
    rig.put_interrupt(9, entry(0x50, 0));
    routes[2].raise();
    assert_eq!(heard(&sink, 9), [0x50]);
    // With the function its messages are forgotten.
    drop(routes);
    assert!(rig.iommu.routes().iter().all(|route| route.strong_count() == 0));
}

proptest! {
    /// Whatever a message and its entry are, what arrives is a message to the local APICs.
    #[test]
    fn what_arrives_is_an_interrupt(low: u64, high: u64, index in 0u64..300, data: u32, shv: bool, extended: bool) {
        let mut rig = Rig::remapping();
        rig.write(0xb8, INTERRUPTS | u64::from(extended) << 11 | 7);
        rig.command(1 << 24);
        for index in 0..256 {
            rig.put_interrupt(index, u128::from(high) << 64 | u128::from(low));
        }
        let address = naming(index).address | u64::from(shv) << 3;
        let arrived = rig.send(Message { address, data });
        for Message { address, data } in &arrived {
            prop_assert_eq!(address & 0xfff0_0ff3, 0xfee0_0000);
            prop_assert_eq!(data & !0xc7ff, 0);
            prop_assert!(extended || address >> 32 == 0);
            prop_assert_eq!(*data as u8, (low >> 16) as u8);
        }
        // Bit 1 of an entry keeps its faults quiet.
        prop_assert!(arrived.is_empty() == rig.fault().is_some() || low & 2 != 0);
    }
}
