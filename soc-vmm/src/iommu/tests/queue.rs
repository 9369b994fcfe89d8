//! The invalidation queue.

use super::*;

const STATUS: u64 = 0x8000;

/// A wait that writes `value` to [`STATUS`].
fn wait(value: u32) -> u128 {
    0x25 | u128::from(value) << 32 | u128::from(STATUS) << 64
}

/// A sink whose changes the host has when it is told.
struct Slow(Arc<Settling>);

impl MessageSink for Slow {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Self(self.0.clone()))
    }
}

impl MessageRoute for Slow {
    fn set(&self, _: Option<Message>) {
        self.0.change();
    }

    fn raise(&self) {}
}

#[test]
fn a_wait_says_that_all_before_is_done() {
    let mut rig = Rig::queueing();
    rig.write_low(0xa4, 0x33);
    rig.write_low(0xa8, 0xfee0_0000);
    rig.write_low(0xa0, 0);
    for (n, descriptor) in [0x11, 0x22, 4, wait(7), 0x15].into_iter().enumerate() {
        rig.ram.put_entry(QUEUE + 16 * n as u64, descriptor);
    }
    rig.write(0x88, 4 << 4);
    assert_eq!((rig.read(0x80), rig.ram.get(STATUS), rig.read_low(0x9c)), (4 << 4, 7, 0));
    rig.write(0x88, 5 << 4);
    assert_eq!(rig.read_low(0x9c), 1);
    assert_eq!(rig.events.raised(), [Message { address: 0xfee0_0000, data: 0x33 }]);
    // The next is no news before the first is acknowledged.
    rig.ram.put_entry(QUEUE + 5 * 16, 0x15);
    rig.write(0x88, 6 << 4);
    assert_eq!(rig.events.raised().len(), 1);
    rig.write_low(0x9c, 1);
    assert_eq!(rig.read_low(0x9c), 0);
}

#[test]
fn it_goes_round() {
    let mut rig = Rig::queueing();
    for n in 0..256 {
        rig.ram.put_entry(QUEUE + 16 * n, wait(n as u32));
    }
    rig.write(0x88, 200 << 4);
    assert_eq!(rig.ram.get(STATUS), 199);
    rig.write(0x88, 10 << 4);
    assert_eq!((rig.ram.get(STATUS), rig.read(0x80)), (9, 10 << 4));
}

#[test]
fn a_long_queue_is_served_in_turns() {
    let mut rig = Rig::new();
    rig.write(0x90, QUEUE | 1);
    rig.command(1 << 26);
    for (n, descriptor) in (0..300).map(|n| (n, wait(n as u32))) {
        rig.ram.put_entry(QUEUE + 16 * n, descriptor);
    }
    rig.write(0x88, 300 << 4);
    assert_eq!(rig.read(0x80), 256 << 4);
    rig.unit.poll();
    assert_eq!((rig.read(0x80), rig.ram.get(STATUS)), (300 << 4, 299));
    // Those that look at every message are dear.
    (300..310).for_each(|n| rig.ram.put_entry(QUEUE + 16 * n, 4));
    rig.write(0x88, 310 << 4);
    assert_eq!(rig.read(0x80), 304 << 4);
}

#[test]
fn it_stands_at_what_it_does_not_understand_until_that_is_mended() {
    let mut rig = Rig::queueing();
    rig.write_low(0x3c, 0x44);
    rig.write_low(0x40, 0xfee0_0000);
    rig.write_low(0x38, 0);
    // Another type; one of scalable mode; a context invalidation of no granularity; a wait that writes where there is no memory.
    for bad in [0xf, 5 | 1 << 9, 1, 0x25 | u128::from(RAM as u64) << 64] {
        let head = rig.read(0x80);
        rig.ram.put_entry(QUEUE + head, bad);
        rig.write(0x88, head + 0x10);
        assert_eq!((rig.read(0x80), rig.read_low(0x34)), (head, status::QUEUE));
        rig.ram.put_entry(QUEUE + head, wait(1));
        rig.write_low(0x34, status::QUEUE);
        assert_eq!((rig.read(0x80), rig.read_low(0x34)), (head + 0x10, 0));
    }
    assert_eq!(rig.events.raised().len(), 4);
    // A tail beyond its end, and a queue that is nowhere.
    rig.write(0x88, 256 << 4);
    assert_eq!(rig.read_low(0x34), status::QUEUE);
    let mut rig = Rig::new();
    rig.write(0x90, RAM as u64);
    rig.write(0x88, 1 << 4);
    rig.command(1 << 26);
    assert_eq!(rig.read_low(0x34), status::QUEUE);
}

#[test]
fn a_wait_is_not_over_before_the_host_has_what_it_waits_for() {
    let mut rig = Rig::queueing();
    let settling = rig.settling.clone();
    let sink = Slow(settling.clone());
    let route = rig.iommu.messages_of(rig.requester.clone(), &sink).route();
    rig.ram.put_entry(INTERRUPTS, 1);
    route.set(Some(Message { address: 0xfee0_0010, data: 0 }));
    settling.settle(settling.mark());
    rig.ram.put_entry(INTERRUPTS, 1 | 0x77 << 16);
    rig.ram.put_entry(QUEUE, 4);
    rig.ram.put_entry(QUEUE + 16, wait(1));
    rig.write(0x88, 2 << 4);
    assert_eq!((rig.read(0x80), rig.ram.get(STATUS)), (1 << 4, 0));
    rig.unit.poll();
    assert_eq!(rig.ram.get(STATUS), 0);
    settling.settle(settling.mark());
    rig.unit.poll();
    assert_eq!((rig.read(0x80), rig.ram.get(STATUS)), (2 << 4, 1));
    // So is the command that turns remapping off.
    assert_eq!(rig.access(0x18, 4, Some(1 << 26)), None);
}
