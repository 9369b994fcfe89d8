//! DPDK's vhost library, by its own test program: it polls, and sends back what it gets, in the order in which it came.

use std::process::{Command, Stdio};

use soc_vmm::virtio::vhost::VhostKind;

use crate::direct;
use crate::rig::{Board, Guest, VERSION_1, eventually};
use crate::vhost::{self, Backend, MAC, Place};

const MAC_AND_STATUS: u64 = 1 << 5 | 1 << 16;
const MERGED: u64 = 1 << 15;
const SEVERAL: u64 = 1 << 22 | 1 << 17;

/// Frames there and back through every pair of queues, on a board, with its back end killed and started again, and the device reset.
fn frames_come_back(pairs: u16, board: Board) {
    let testpmd = std::env::var("OUTBOARD_TEST_TESTPMD").unwrap();
    let place = Place::new();
    let start = || {
        // One that was killed leaves it.
        _ = std::fs::remove_file(place.path("socket"));
        let device = format!("net_vhost0,iface={},queues={pairs}", place.word("socket"));
        let prefix = format!("outboard{}", std::process::id());
        let mut command = Command::new(&testpmd);
        command.args(["--no-huge", "-m", "256", "--no-pci", "--file-prefix", &prefix, "--vdev", &device, "--"]);
        command.args(["--no-mlockall", "--auto-start", "--forward-mode=io", "--total-num-mbufs=2048"]);
        command.args([format!("--rxq={pairs}"), format!("--txq={pairs}"), "--stats-period=60".to_owned()]);
        Backend(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    };
    let mut backend = start();
    let device = vhost::open(&VhostKind::Net, pairs, &place.path("socket"));
    let mut guest = Guest::on(board, |plumbing| device.plug("v0", MAC, plumbing));
    let offered = guest.offered();
    for round in 0..3u8 {
        let several = if pairs > 1 { SEVERAL } else { 0 };
        guest.negotiate(offered & (VERSION_1 | MAC_AND_STATUS | MERGED | several));
        let mut queues: Vec<_> = (0..2 * pairs).map(|index| guest.queue(index, 256)).collect();
        let mut control = (pairs > 1).then(|| guest.queue(2 * pairs, 64));
        guest.go();
        if let Some(control) = &mut control {
            guest.board.ram.set(0x7_8000, &[4, 0, pairs as u8, 0]);
            control.add(&[(0x7_8000, 4, false), (0x7_8010, 1, true)]);
            guest.kick(2 * pairs);
            control.wait_used();
            assert_eq!(guest.board.ram.get(0x7_8010, 1), [0]);
        }
        let buffer = |pair: u16, head: u64| 0x8_0000 + 0x1_0000 * u64::from(pair) + 0x800 * head;
        for pair in 0..pairs {
            for head in 0..32 {
                queues[usize::from(2 * pair)].add_at(head, &[(buffer(pair, head.into()), 2048, true)]);
            }
            guest.kick(2 * pair);
        }
        for life in 0..2u8 {
            eventually(|| (guest.get(0x2006, 2) == 1).then_some(()));
            for pair in 0..pairs {
                let (rx, tx) = (usize::from(2 * pair), usize::from(2 * pair + 1));
                let frames: Vec<Vec<u8>> =
                    (0..16).map(|n| vec![(16 * pair) as u8 + n + 64 * life + round; 60 + usize::from(n)]).collect();
                // It drops what comes while it isn't up.
                let got = eventually(|| {
                    for (n, frame) in (0u64..).zip(&frames) {
                        let addr = 0x7_0000 + 0x100 * n;
                        guest.board.ram.set(addr, &[&[0; 12], &frame[..]].concat());
                        queues[tx].add_at(n as u16, &[(addr, 12 + frame.len() as u32, false)]);
                    }
                    guest.kick(2 * pair + 1);
                    for _ in 0..frames.len() {
                        queues[tx].wait_used();
                    }
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    let mut got = Vec::new();
                    while let Some((head, len)) = queues[rx].take_used() {
                        let addr = buffer(pair, head.into());
                        got.push(guest.board.ram.get(addr + 12, len as usize - 12));
                        queues[rx].add_at(head as u16, &[(addr, 2048, true)]);
                    }
                    guest.kick(2 * pair);
                    (!got.is_empty()).then_some(got)
                });
                assert!(got.windows(2).all(|two| two[0].len() + 1 == two[1].len()), "{got:?}");
                assert!(got.iter().all(|frame| frames.contains(frame)));
            }
            if life == 0 {
                drop(backend);
                eventually(|| (guest.get(0x2006, 2) == 0).then_some(()));
                backend = start();
            }
        }
        guest.put(0x14, 1, 0);
        eventually(|| (guest.status() == 0).then_some(()));
    }
}

#[test]
#[ignore = "needs a dpdk-testpmd with net_vhost, which OUTBOARD_TEST_TESTPMD names"]
fn frames_come_back_from_dpdk_through_shadow_queues() {
    frames_come_back(1, Board::default());
    frames_come_back(2, Board::default());
}

#[test]
#[ignore = "needs a dpdk-testpmd with net_vhost, which OUTBOARD_TEST_TESTPMD names"]
fn frames_come_back_from_dpdk_through_the_guests_own_queues() {
    frames_come_back(1, direct::board(2).0);
    frames_come_back(2, direct::board(8).0);
}
