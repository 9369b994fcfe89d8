//! Kicks by the notify pages of a card: the card in software, its host side a plain vfio-user client.

use std::sync::Arc;

use card::Card;
use pcie_function::card::bar::{NOTIFY, NOTIFY_PAGE};
use soc_vmm::pci::Signal;
use soc_vmm::virtio::NotifyPages;
use soc_vmm::virtio::block::{self, BlockConfig};

use super::rig::{Board, Guest, HeapDisk, VERSION_1, eventually};

const REQUEST: u64 = 0x8_0000;
/// Where a guest's firmware puts the registers.
const REGISTERS: u64 = 0x8_c000_0000;

/// A card, plugged in on both sides.
struct Bed {
    host: vfio_user::Client,
    pages: Arc<NotifyPages>,
    _card: Card,
    _directory: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let card = Card::start(directory.path(), 1).unwrap();
        let host = vfio_user::Client::new(&card.host_socket(0)).unwrap();
        eventually(|| card.stats(0).link.then_some(()));
        let soc = pcie_function_card::open(&card.soc_socket(0)).unwrap();
        Self { host, pages: Arc::new(NotifyPages::of(Arc::new(soc))), _card: card, _directory: directory }
    }

    /// A disk that kicks of these pages reach, in its place.
    fn disk(&self, queues: u16) -> Guest {
        let board = Board { notify: self.pages.clone(), ..Board::default() };
        let config = BlockConfig { queues, ..BlockConfig::new("d", Arc::new(HeapDisk::new(64)), "") };
        let mut guest = Guest::on(board, |plumbing| block::new(config, plumbing));
        guest.function.write_config(0x20, 4, REGISTERS as u32);
        guest.function.write_config(0x24, 4, (REGISTERS >> 32) as u32);
        guest.function.write_config(4, 2, 6);
        guest
    }

    /// What a guest does to whom `page` is shown.
    fn write(&mut self, page: u32, data: &[u8]) {
        self.host.region_write(NOTIFY, u64::from(page) * NOTIFY_PAGE, data).unwrap();
    }
}

fn pages(guest: &Guest) -> Vec<Option<u32>> {
    guest.function.signals().iter().map(|signal| signal.page).collect()
}

#[test]
fn a_notify_page_kicks_its_own_queue() {
    let mut bed = Bed::new();
    let mut guest = bed.disk(2);
    let signals = guest.function.signals();
    let places: Vec<_> = signals.iter().map(|Signal { window, .. }| (window.base, window.len)).collect();
    assert_eq!(places, [(REGISTERS + 0x3000, 0x1000), (REGISTERS + 0x4000, 0x1000)]);
    assert_eq!(pages(&guest), [Some(0), Some(1)]);
    // Nobody waits for them before DRIVER_OK.
    for (page, other) in [(0, 1), (1, 0)] {
        bed.write(page, &[0; 2]);
        let rung = signals[page as usize].event.read();
        assert_eq!((rung, signals[other].event.read().ok()), (Ok(1), None));
    }
    guest.negotiate(VERSION_1);
    let mut queues = [guest.queue(0, 16), guest.queue(1, 16)];
    guest.go();
    for (page, queue) in (0..).zip(&mut queues) {
        for _ in 0..20 {
            guest.board.ram.set(REQUEST, &[0; 16]);
            queue.add(&[(REQUEST, 16, false), (REQUEST + 512, 512, true), (REQUEST + 16, 1, true)]);
            bed.write(page, &[page as u8, 0]);
            queue.wait_used();
        }
    }
}

#[test]
fn a_device_leaves_pages_to_others_and_queues_without_one_are_kicked_as_ever() {
    let mut bed = Bed::new();
    let first = bed.disk(64);
    let mut second = bed.disk(16);
    let mut third = bed.disk(2);
    let with = |pages: std::ops::Range<u32>, queues: usize| {
        pages.map(Some).chain(std::iter::repeat(None)).take(queues).collect::<Vec<_>>()
    };
    assert_eq!(pages(&first), with(0..16, 64));
    assert_eq!(pages(&second), with(16..24, 16));
    assert_eq!(pages(&third), with(24..26, 2));
    // To the guest it is the same device.
    let shape = |guest: &mut Guest| {
        let notify = guest.capability(0x09, |guest, at| guest.function.read_config(at + 3, 1) == 2);
        [8, 16].map(|at| guest.function.read_config(notify + at, 4))
    };
    assert_eq!((shape(&mut third), shape(&mut second)), ([0x3000, 0x1000], [0x3000, 0x1000]));
    second.negotiate(VERSION_1);
    let mut queue = second.queue(8, 16);
    second.go();
    second.board.ram.set(REQUEST, &[0; 16]);
    queue.add(&[(REQUEST, 16, false), (REQUEST + 512, 512, true), (REQUEST + 16, 1, true)]);
    second.kick(8);
    queue.wait_used();

    // A device that leaves gives its pages back; the next one is signalled by them.
    drop(first);
    let fourth = bed.disk(2);
    assert_eq!(pages(&fourth), [Some(0), Some(1)]);
    bed.write(1, &[0; 4]);
    let events: Vec<_> = fourth.function.signals().into_iter().map(|signal| signal.event).collect();
    assert_eq!((events[0].read().ok(), events[1].read()), (None, Ok(1)));
}

#[test]
fn registers_have_room_for_a_page_a_queue() {
    let bed = Bed::new();
    for (queues, size) in [(1, 0x4000), (2, 0x8000), (5, 0x8000), (6, 0x1_0000), (13, 0x1_0000), (14, 0x2_0000)] {
        let mut disk = bed.disk(queues);
        disk.function.write_config(0x20, 4, u32::MAX);
        assert_eq!(!(disk.function.read_config(0x20, 4) & !0xf) + 1, size, "{queues} queues");
    }
}
