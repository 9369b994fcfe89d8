//! Devices whose back ends are other processes: the next machine has a back end of its own.

use std::io::Write;
use std::os::unix::net::UnixListener;

use soc_vmm::virtio::vhost::VhostKind;

use super::{Way, elsewhere, halt, load, save};
use crate::direct::board;
use crate::rig::{Board, Guest, NEEDS_RESET, VERSION_1, eventually};
use crate::vhost::{self, BLOCK, BLOCKS, Backend, Load, MAC, Place, QUEUES, SLOTS, frame, send};

const MQ: u64 = 1 << 12;

/// A board on which a disk has shadow queues, or one whose memory its back end maps; and what that is.
fn boards() -> [(Board, &'static str); 2] {
    [(Board::default(), "block"), (board(2).0, "recorded")]
}

/// The next back end, on a socket of its own, and the words that start one.
fn next(place: &Place, kind: &str, number: &mut usize) -> (Backend, std::path::PathBuf) {
    *number += 1;
    let socket = format!("socket{number}");
    (Backend::start(&[kind, &place.word("disk"), &place.word(&socket)]), place.path(&socket))
}

#[test]
fn a_disk_under_load_moves_from_one_back_end_to_the_next() {
    for (board, kind) in boards() {
        let place = Place::new();
        let disk = place.disk(BLOCKS * SLOTS);
        let mut number = 0;
        let (mut backend, socket) = next(&place, kind, &mut number);
        let device = vhost::open(&VhostKind::Block, QUEUES as u16, &socket);
        let mut guest = Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing));
        assert_eq!(guest.function.blocker(), None);
        guest.negotiate(VERSION_1 | MQ);
        let queues = (0..QUEUES as u16).map(|index| guest.queue(index, 128)).collect();
        guest.go();
        let mut load = Load::new(guest, queues);
        for round in 0..20 {
            let until = load.done + 50;
            eventually(|| {
                load.turn();
                (load.done >= until).then_some(())
            });
            let way = Way::BOTH[round % 2];
            let (fresh, socket) = next(&place, kind, &mut number);
            let device = vhost::open(&VhostKind::Block, QUEUES as u16, &socket);
            way.take(&mut load.guest, |plumbing| device.plug("v0", MAC, plumbing));
            if way == Way::Travel {
                backend = fresh;
            }
        }
        load.finish();
        load.check(&disk);
        drop(backend);
    }
}

#[test]
fn a_disk_whose_back_end_is_gone_moves_if_that_is_all_that_is_known_of_its_requests() {
    for (board, kind) in boards() {
        let place = Place::new();
        let disk = place.disk(BLOCKS * SLOTS);
        let mut number = 0;
        let (backend, socket) = next(&place, kind, &mut number);
        let device = vhost::open(&VhostKind::Block, 1, &socket);
        let mut guest = Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing));
        guest.negotiate(VERSION_1);
        let mut queue = guest.queue(0, 128);
        guest.go();
        vhost::do_one(&mut guest, &mut queue, vhost::WRITE, 1);
        // It dies with requests that it was given.
        backend.stop();
        guest.board.ram.set(vhost::request(1)[1], &[9; BLOCK]);
        for slot in 0..4 {
            send(&guest, &mut queue, slot, vhost::WRITE, slot);
        }
        guest.kick(0);
        drop(backend);
        halt(&mut guest);
        let states = save(&guest);
        let (_backend, socket) = next(&place, kind, &mut number);
        let device = vhost::open(&VhostKind::Block, 1, &socket);
        let mut other = Guest::on(elsewhere(&guest.board), |plumbing| device.plug("v0", MAC, plumbing));
        match load(&mut other, states) {
            Ok(()) => {
                assert_eq!(kind, "block");
                guest = other;
            }
            Err(error) => {
                // A record of what is in flight is its back end's; the source goes on with it.
                assert!(kind == "recorded" && error.to_string().contains("left requests in flight"), "{error}");
                number = 0;
                std::fs::remove_file(place.path("socket1")).unwrap();
                std::mem::forget(next(&place, kind, &mut number));
            }
        }
        guest.function.go_on();
        for _ in 0..4 {
            queue.wait_used();
        }
        let mut found = [0; BLOCK];
        std::os::unix::fs::FileExt::read_exact_at(&disk, &mut found, BLOCK as u64).unwrap();
        assert_eq!(found, [9; BLOCK]);
        assert_eq!(guest.status() & NEEDS_RESET, 0);
    }
}

#[test]
fn an_interface_moves_with_buffers_at_its_back_end() {
    for board in [Board::default(), board(2).0] {
        let place = Place::new();
        let listen = |number: usize| {
            let (network, socket) = (format!("network{number}"), format!("socket{number}"));
            let listener = UnixListener::bind(place.path(&network)).unwrap();
            let backend = Backend::start(&["net", &place.word(&network), &place.word(&socket)]);
            let (stream, _) = listener.accept().unwrap();
            (backend, stream, vhost::open(&VhostKind::Net, 1, &place.path(&socket)))
        };
        let (mut _backend, mut stream, device) = listen(0);
        let mut guest = Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing));
        guest.negotiate(VERSION_1 | 1 << 5 | 1 << 16);
        let (mut receive, mut transmit) = (guest.queue(0, 256), guest.queue(1, 256));
        guest.go();
        for buffer in 0..8 {
            receive.add(&[(0x8_0000 + 0x1000 * buffer, 2048, true)]);
        }
        guest.kick(0);
        for round in 0..6u8 {
            eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
            let sent = vec![round + 1; 60];
            guest.board.ram.set(0x9_8000, &[&[0; 12], &sent[..]].concat());
            transmit.add(&[(0x9_8000, 72, false)]);
            guest.kick(1);
            transmit.wait_used();
            assert_eq!(frame(&mut stream), sent);
            stream.write_all(&[&100u32.to_be_bytes()[..], &[round; 100]].concat()).unwrap();
            assert_eq!(receive.wait_used().1, 112);
            assert_eq!(guest.board.ram.get(0x8_0000 + 0x1000 * u64::from(round) + 12, 100), [round; 100]);
            if round % 2 == 0 {
                super::stay(&mut guest);
                continue;
            }
            let (fresh, its, device) = listen(1 + usize::from(round));
            super::travel(&mut guest, |plumbing| device.plug("v0", MAC, plumbing));
            (_backend, stream) = (fresh, its);
        }
    }
}

#[test]
fn what_can_not_move_says_why() {
    let place = Place::new();
    let network = UnixListener::bind(place.path("network")).unwrap();
    let _backend = Backend::start(&["net", &place.word("network"), &place.word("socket")]);
    let (_stream, _) = network.accept().unwrap();
    let device = vhost::open(&VhostKind::Net, 1, &place.path("socket"));
    let guest = Guest::on(board(2).0, |plumbing| device.plug("v0", MAC, plumbing));
    let why = guest.function.blocker().unwrap();
    assert!(why.starts_with("vhost-net v0 can't move: ") && why.contains("LOG_SHMFD"), "{why}");
}
