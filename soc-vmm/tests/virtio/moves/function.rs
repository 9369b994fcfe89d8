//! What all devices have: registers, interrupts, rings, and how they halt.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::bus::Wake;
use soc_vmm::persist::{StateError, States};
use soc_vmm::virtio::Plumbing;
use soc_vmm::virtio::block::{self, BlockConfig};
use soc_vmm::virtio::entropy::{self, EntropyConfig};

use super::{Way, elsewhere, halt, load, save, travel};
use crate::rig::{EVENT_INDEX, Guest, HeapDisk, VERSION_1, eventually};

const FLUSH: u64 = 1 << 9;
const BUFFERS: u64 = 0x8_0000;

fn random(plumbing: Plumbing<'_>) -> std::io::Result<Box<dyn soc_vmm::pci::PciFunction>> {
    entropy::new(EntropyConfig { name: "rng0".into(), limit: None }, plumbing)
}

fn disk(queues: u16, write_cache: bool) -> BlockConfig {
    BlockConfig { queues, write_cache, ..BlockConfig::new("disk0", Arc::new(HeapDisk::new(64)), "s") }
}

/// All that a driver can read.
fn registers(guest: &mut Guest) -> Vec<u64> {
    let common: Vec<u64> = (0..0x3c).map(|at| guest.get(at, 1)).collect();
    let device = (0..64).map(|at| guest.get(0x2000 + at, 1)).collect();
    let table = (0..0x1000 / 8).map(|at| guest.access(1, 8 * at, 8, None)).collect();
    let config = (0..0x1000).map(|at| guest.function.read_config(at, 1).into()).collect();
    [common, device, table, config].concat()
}

#[test]
fn a_driver_finds_the_registers_that_it_left_at_any_point() {
    let plug = || disk(2, true);
    let mut guest = Guest::new(|plumbing| block::new(plug(), plumbing));
    let steps: [fn(&mut Guest); 8] = [
        |_| {},
        |guest| guest.put(0x14, 1, 3),
        |guest| guest.enable_msix(3),
        |guest| guest.function.write_config(0x20, 4, 0xfe00_0000),
        |guest| guest.negotiate(VERSION_1 | FLUSH),
        |guest| {
            guest.put(0x10, 2, 2);
            guest.put(0x16, 2, 1);
            guest.put(0x1a, 2, 1);
            guest.put(0x18, 2, 32);
        },
        |guest| {
            guest.queue(1, 32);
            guest.put(0, 4, 1);
        },
        |guest| guest.go(),
    ];
    for step in steps {
        step(&mut guest);
        let before = registers(&mut guest);
        travel(&mut guest, |plumbing| block::new(plug(), plumbing));
        assert!(registers(&mut guest) == before);
    }
    guest.function.reset();
    assert_eq!(guest.status(), 0);
}

#[test]
fn an_interrupt_that_was_on_its_way_comes_elsewhere() {
    for with_msix in [true, false] {
        let mut guest = Guest::new(random);
        if with_msix {
            guest.enable_msix(2);
        }
        guest.negotiate(VERSION_1);
        let mut queue = guest.queue(0, 16);
        guest.put(0x1a, 2, 1);
        guest.go();
        queue.add(&[(BUFFERS, 16, true)]);
        guest.kick(0);
        queue.wait_used();
        let is_told = |guest: &Guest| match with_msix {
            true => guest.board.messages.raised().iter().any(|message| message.data == 0x41),
            false => guest.board.pin.is_high(),
        };
        eventually(|| is_told(&guest).then_some(()));
        travel(&mut guest, random);
        assert!(is_told(&guest), "{with_msix}");
        if !with_msix {
            assert_eq!(guest.get(0x1000, 1) & 1, 1);
            assert!(!guest.board.pin.is_high());
        }
        // A level that nobody has asked about yet is as it was before anything goes on.
        queue.add(&[(BUFFERS, 16, true)]);
        guest.kick(0);
        queue.wait_used();
        eventually(|| is_told(&guest).then_some(()));
        halt(&mut guest);
        let mut other = Guest::on(elsewhere(&guest.board), random);
        load(&mut other, save(&guest)).unwrap();
        assert_eq!(other.board.pin.is_high(), !with_msix);
    }
}

#[test]
fn a_state_of_another_device_is_refused_by_name() {
    let mut guest = Guest::new(|plumbing| block::new(disk(2, true), plumbing));
    guest.negotiate(VERSION_1 | FLUSH);
    let queue = guest.queue(1, 128);
    guest.go();
    halt(&mut guest);
    let states = save(&guest);
    let refusal = |plug: &dyn Fn(Plumbing<'_>) -> std::io::Result<Box<dyn soc_vmm::pci::PciFunction>>| {
        let mut other = Guest::on(elsewhere(&guest.board), plug);
        load(&mut other, states.clone()).unwrap_err().to_string()
    };
    let no_flush = refusal(&|plumbing| block::new(disk(2, false), plumbing));
    assert!(no_flush.contains("VIRTIO_BLK_F_FLUSH, which isn't offered here"), "{no_flush}");
    let one_queue = refusal(&|plumbing| block::new(disk(1, true), plumbing));
    assert!(one_queue.contains("another number of queues"), "{one_queue}");
    assert!(refusal(&random).contains("another number of queues"));
    let smaller = refusal(&|plumbing| {
        let image = Arc::new(HeapDisk::new(63));
        let config = BlockConfig { queues: 2, ..BlockConfig::new("disk0", image, "s") };
        block::new(BlockConfig { write_cache: true, ..config }, plumbing)
    });
    assert!(smaller.contains("its image is smaller here than its driver was told"), "{smaller}");
    assert_eq!(load(&mut guest, States::default()), Err(StateError::Missing("virtio-pci@01.0/00.0".into())));
    drop(queue);
}

#[test]
fn who_waits_for_a_device_to_halt_is_woken() {
    #[derive(Debug, Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }

    let count = Arc::new(Count::default());
    let mut guest = Guest::new(|plumbing| random(Plumbing { wake: count.clone(), ..plumbing }));
    for round in 0..3 {
        // Without a driver, with one, and once more.
        guest.function.halt();
        eventually(|| (count.0.load(SeqCst) > round).then_some(()));
        eventually(|| guest.function.is_halted().then_some(()));
        guest.function.go_on();
        if round == 0 {
            guest.negotiate(VERSION_1);
            guest.queue(0, 16);
            guest.go();
        }
    }
}

#[test]
fn a_driver_that_resets_a_halted_device_begins_again() {
    let mut guest = Guest::new(random);
    guest.negotiate(VERSION_1);
    guest.queue(0, 16);
    guest.go();
    for _ in 0..3 {
        halt(&mut guest);
        guest.function.reset();
        assert!(guest.function.is_halted());
        guest.negotiate(VERSION_1);
        let mut queue = guest.queue(0, 16);
        guest.go();
        queue.add(&[(BUFFERS, 16, true)]);
        guest.function.go_on();
        assert_eq!(queue.wait_used(), (0, 16));
    }
}

/// A step of a driver's, or of who moves its machine.
#[derive(Clone, Debug)]
enum Step {
    Add(u32),
    Kick,
    Take,
    Move(Way),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1u32..64).prop_map(Step::Add),
        4 => Just(Step::Kick),
        3 => Just(Step::Take),
        2 => prop_oneof![Just(Way::Stay), Just(Way::Travel)].prop_map(Step::Move),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Wherever the rings are: each buffer comes back once, in order, and a kick that was given is as good elsewhere.
    #[test]
    fn a_ring_goes_round_through_any_number_of_machines(steps in vec(step(), 1..150), event_index in any::<bool>()) {
        let mut guest = Guest::new(random);
        guest.negotiate(VERSION_1 | if event_index { EVENT_INDEX } else { 0 });
        let mut queue = guest.queue(0, 8);
        guest.go();
        let mut out = std::collections::VecDeque::new();
        for step in steps {
            match step {
                Step::Add(len) if out.len() < 8 => out.push_back((u32::from(queue.add(&[(BUFFERS, len, true)])), len)),
                Step::Add(_) => {}
                Step::Kick => guest.kick(0),
                Step::Take => while let Some(used) = queue.take_used() {
                    prop_assert_eq!(Some(used), out.pop_front());
                },
                Step::Move(way) => way.take(&mut guest, random),
            }
        }
        guest.kick(0);
        for expected in out {
            prop_assert_eq!(queue.wait_used(), expected);
        }
        prop_assert_eq!(queue.take_used(), None);
    }
}
