//! A back end over vhost-user: whatever it answers and says of its own accord, and whatever it writes to the rings and buffers that it was
//! given, against a guest that keeps the rules.
#![no_main]

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use nix::sys::eventfd::EventFd;
use pcie_function::BusMemory;
use rig::{Board, Driver};
use soc_vmm::memory::GuestLog;
use soc_vmm::vhost_user::{Frontend, QueueSetup, Region as Place, Setup};
use soc_vmm::virtio::vhost::{BASES, Conduct, Loss, Manners, Region, Shadow, Trouble};

#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

const SIZE: u16 = 16;
const PAGES: usize = 64;
const BYTES: u64 = 0x8_0000;
/// Virtio 1, a log and the protocol's features; of those several queues, the log, acknowledgements, messages of its own, a configuration, a
/// record of what is in flight.
const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 26;
const PROTOCOL: u64 = 1 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 12;
/// A record of two queues of [`SIZE`], as it is asked for, and bytes of it.
const RECORD: u64 = 640;
/// What a socket takes without a reader.
const MOST: usize = 64 << 10;

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    /// A chain: bytes to read, room to write.
    Add {
        opcode: u8,
        read: u16,
        write: u16,
    },
    Visit,
    /// What the back end writes, anywhere.
    Write {
        at: u32,
        bytes: &'a [u8],
    },
    /// A used entry that may be right.
    Use {
        id: u8,
        len: u16,
    },
    /// It goes, and another one comes.
    Die,
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Answers that are right, before those that are anything.
    right: u8,
    answers: &'a [u8],
    indirect: bool,
    event_index: bool,
    loss: u8,
    whole: bool,
    steps: Vec<Step<'a>>,
}

fuzz_target!(|input: Input<'_>| {
    talk(input.right, input.answers);
    let manners = Manners { indirect: input.indirect, event_index: input.event_index };
    let loss = [Loss::Replay, Loss::Drop, Loss::Fuse][usize::from(input.loss % 3)];
    let conduct = Conduct { loss, whole: input.whole };
    let mut shadow = Shadow::new(0, SIZE, PAGES, conduct, manners.indirect);
    let board = Board::default();
    let mut driver = Driver::new(&board.ram, 0x1_0000, 64);
    let mut session = board.session(rig::VERSION_1, &[driver.at]);
    let Some(Some(queue)) = session.queues.first_mut() else { return };
    let mut share = attach(&mut shadow, manners);
    let (mut added, mut lost) = (0u32, false);
    for step in input.steps.into_iter().take(128) {
        match step {
            Step::Add { opcode, read, write } if added.wrapping_sub(u32::from(driver.seen)) < 16 => {
                let at = BYTES + 0x4000 * u64::from(added % 16);
                let header = [64u32.to_le_bytes(), u32::from(opcode).to_le_bytes()].concat();
                board.ram.set(at, &header);
                let (read, write) = (u32::from(read) % 0x2000, u32::from(write) % 0x2000);
                let buffers = [(at, read.min(40), false), (at + 40, read, false), (at + 0x2000, write, true)];
                let buffers: Vec<_> = buffers.into_iter().filter(|(_, len, _)| *len > 0).collect();
                if !buffers.is_empty() {
                    driver.add(&buffers);
                    added += 1;
                }
            }
            Step::Add { .. } => {}
            Step::Visit => {
                match shadow.collect(queue) {
                    Ok(_) => {}
                    Err(Trouble::Backend(_)) => {
                        shadow.detach(queue, &mut lost).expect("the guest keeps the rules");
                        share = attach(&mut shadow, manners);
                    }
                    Err(Trouble::Guest(error)) => panic!("the guest keeps the rules: {error}"),
                }
                shadow.fill(queue, &mut lost).expect("the guest keeps the rules");
                shadow.show();
                shadow.allow_calls();
            }
            Step::Write { at, bytes } => {
                let bytes = &bytes[..bytes.len().min(64)];
                share.window.write_bytes(at as usize % (share.window.len() - 64), bytes);
            }
            Step::Use { id, len } => {
                let used = share.at.used;
                let mut index = [0; 2];
                share.window.read_bytes(used + 2, &mut index);
                let index = u16::from_le_bytes(index);
                let entry = used + 4 + 8 * usize::from(index % SIZE);
                share.window.store_u32(entry, id.into());
                share.window.store_u32(entry + 4, len.into());
                share.window.write_bytes(used + 2, &index.wrapping_add(1).to_le_bytes());
            }
            Step::Die => {
                shadow.detach(queue, &mut lost).expect("the guest keeps the rules");
                share = attach(&mut shadow, manners);
            }
        }
        while driver.take_used().is_some() {}
        // Each chain once.
        assert!(u32::from(driver.seen) <= added);
    }
});

fn attach(shadow: &mut Shadow, manners: Manners) -> soc_vmm::virtio::vhost::Share {
    let share = Region::new(&[shadow.layout()], BASES[0]).expect("memory").share(0);
    shadow.attach(share.clone(), manners);
    share
}

/// What a back end answers that does its work: each a request and what is said to it.
fn right_answers() -> Vec<Vec<u8>> {
    let number = |request: u32, number: u64| message(request, &number.to_ne_bytes());
    let acks = |requests: &[u32]| requests.iter().map(|request| number(*request, 0)).collect::<Vec<_>>();
    let negotiated = vec![number(1, FEATURES), number(15, PROTOCOL), number(3, 0), number(17, 4), number(21, 0)];
    let config = [&[0u32, 60, 0].map(u32::to_ne_bytes).concat()[..], &[0; 60]].concat();
    let log = vec![message(6, &[0; 16]), number(2, 0)];
    let record = message(31, &[RECORD, 0, 2 | u64::from(SIZE) << 16].map(u64::to_ne_bytes).concat());
    let started = acks(&[32, 5, 8, 10, 9, 12, 13, 18]);
    let stopped = vec![message(11, &[0; 8])];
    [negotiated, vec![message(24, &config)], log, vec![record], started, stopped].concat()
}

/// An answer.
fn message(request: u32, payload: &[u8]) -> Vec<u8> {
    let header = [request, 5, payload.len() as u32].map(u32::to_ne_bytes).concat();
    [&header[..], payload].concat()
}

/// A back end that has said all it will before it was asked.
fn talk(right: u8, answers: &[u8]) {
    let Ok((ours, mut theirs)) = UnixStream::pair() else { return };
    let right = right_answers().into_iter().take(right.into()).flatten();
    let said: Vec<u8> = right.chain(answers.iter().copied().take(MOST)).collect();
    if theirs.write_all(&said).is_err() || theirs.shutdown(Shutdown::Write).is_err() {
        return;
    }
    // The end of what it says is the end of the connection, so nothing waits.
    let Ok(mut frontend) = Frontend::new(ours, Duration::from_secs(10), true) else { return };
    if let Ok(config) = frontend.config(60) {
        assert_eq!(config.len(), 60);
    }
    let Ok(event) = EventFd::new() else { return };
    let (kick, call) = (&event, &event);
    let queue = QueueSetup {
        index: 1,
        size: SIZE,
        base: 0,
        descriptors: 1,
        available: 2,
        used: 3,
        used_guest: 4,
        kick,
        call,
        enabled: true,
    };
    let memory = Place { file: event.as_fd(), offset: 0, size: 0x1000, guest: 1 << 32, user: 1 << 33 };
    let Ok(log) = GuestLog::new(1 << 30) else { return };
    let setup = Setup { features: 1 << 32, memory: &[memory], log: Some(&log), queues: &[queue] };
    let _ = frontend.start(&setup, &mut None);
    let _ = frontend.stop([1]);
    let _ = frontend.look();
}
