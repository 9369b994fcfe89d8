//! A guest that keeps a disk or a network busy: what a request or a frame costs in kicks, exits and interrupts, one at a time and 32 at
//! a time.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use integration::{Vm, kvm, test_name};
use payloads::virtio_blk::{Load, MOST_DEPTH, PIECE, Round, WRITTEN, parse, virtio_blk};
use payloads::virtio_net::{Echoes, virtio_net};
use serde_json::Value;
use tempfile::TempDir;

/// A disk whose n-th piece begins with n.
fn disk(dir: &TempDir) -> PathBuf {
    let path = dir.path().join("disk.raw");
    let piece = |n: u64| {
        let mut piece = vec![0; PIECE as usize];
        piece[..8].copy_from_slice(&n.to_le_bytes());
        piece
    };
    std::fs::write(&path, (0..u64::from(MOST_DEPTH)).flat_map(piece).collect::<Vec<_>>()).unwrap();
    path
}

fn rounds(load: Load) -> Vec<Round> {
    let dir = TempDir::new().unwrap();
    let path = disk(&dir);
    let payload = virtio_blk(load).unwrap();
    let spec = format!("file={}", path.display());
    let ended = Vm::payload(&payload, &["--disk", &spec]).wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(33), ""), "{load:?}: {}", ended.debugcon);
    if load.write {
        let written = std::fs::read(path).unwrap();
        for (slot, piece) in written.chunks(PIECE as usize).take(load.depth as usize).enumerate() {
            assert!(piece.iter().all(|byte| *byte == slot as u8 | WRITTEN), "piece {slot}");
        }
    }
    let rounds: Vec<Round> = ended.debugcon.lines().filter_map(parse).collect();
    assert_eq!(rounds.len() as u32, load.rounds);
    rounds
}

#[test]
fn a_request_at_a_time_costs_at_most_a_kick_and_an_interrupt() {
    if !kvm(&test_name()) {
        return;
    }
    for write in [false, true] {
        for round in rounds(Load { write, depth: 1, count: 300, rounds: 3, sleeps: true }) {
            // The interrupt of the last request of a round may come in the next one, where the guest saw its end before.
            assert!(round.kicks <= round.requests && round.interrupts <= round.requests + 1, "{round:?}");
        }
    }
}

#[test]
fn of_requests_that_are_under_way_together_few_are_kicked_for() {
    if !kvm(&test_name()) {
        return;
    }
    for (write, sleeps) in [(false, false), (false, true), (true, false), (true, true)] {
        for round in rounds(Load { write, depth: 32, count: 4000, rounds: 3, sleeps }) {
            assert!(round.kicks <= round.requests / 8, "{round:?}");
            assert!(round.interrupts <= if sleeps { round.requests / 8 } else { 0 }, "{round:?}");
        }
    }
}

#[test]
fn a_kick_leaves_kvm_by_an_eventfd_alone() {
    if !kvm(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let spec = format!("file={}", disk(&dir).display());
    let load = Load { write: false, depth: 1, count: 500, rounds: u32::MAX, sleeps: true };
    let mut vm = Vm::payload(&virtio_blk(load).unwrap(), &["--disk", &spec]);
    let rounds = |vm: &Vm| {
        let text = std::fs::read_to_string(vm.file("debugcon")).unwrap_or_default();
        text.lines().filter_map(parse).collect::<Vec<_>>()
    };
    let exits = |vm: &Vm| {
        let status: Value = serde_json::from_str(&vm.command(&["status", "--json"])).unwrap();
        status["counters"]["host.shim.mmio"].as_u64().unwrap()
    };
    vm.wait_until("first round", |vm| !rounds(vm).is_empty());
    let before = exits(&vm);
    let first = rounds(&vm).len();
    vm.wait_until("three more", |vm| rounds(vm).len() >= first + 3);
    assert_eq!(exits(&vm), before, "memory accesses that left KVM for the shim");
    let kicks: u64 = rounds(&vm)[first..].iter().map(|round| round.kicks).sum();
    assert!(kicks > 0, "{:?}", rounds(&vm));
}

/// Rounds of frames that a peer sends back.
fn echoes(echoes: Echoes) -> Vec<Round> {
    let dir = TempDir::new().unwrap();
    let socket = dir.path().join("peer");
    let listener = UnixListener::bind(&socket).unwrap();
    let peer = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut buffer = vec![0; 1 << 18];
        // Until the VM has ended.
        while let Ok(len @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..len]).is_err() {
                break;
            }
        }
    });
    let spec = format!("stream={}", socket.display());
    let ended = Vm::payload(&virtio_net(echoes).unwrap(), &["--net", &spec]).wait();
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(33), ""), "{echoes:?}: {}", ended.debugcon);
    peer.join().unwrap();
    let rounds: Vec<Round> = ended.debugcon.lines().filter_map(parse).collect();
    assert_eq!(rounds.len() as u32, echoes.rounds);
    rounds
}

#[test]
fn a_frame_there_and_back_costs_at_most_a_kick_and_an_interrupt() {
    if !kvm(&test_name()) {
        return;
    }
    let rounds = echoes(Echoes { depth: 1, count: 300, rounds: 3, sleeps: true });
    for round in rounds {
        assert!(round.kicks <= round.requests && round.interrupts <= round.requests, "{round:?}");
    }
}

#[test]
fn of_frames_that_are_under_way_together_few_are_kicked_for() {
    if !kvm(&test_name()) {
        return;
    }
    for sleeps in [false, true] {
        for round in echoes(Echoes { depth: 32, count: 4000, rounds: 3, sleeps }) {
            assert!(round.kicks <= round.requests / 8, "{round:?}");
            assert!(round.interrupts <= if sleeps { round.requests / 8 } else { 0 }, "{round:?}");
        }
    }
}
