//! The SoC's end of a local function against a host's end that sends any packet with any descriptors, then what it mapped is used.
#![no_main]

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::LazyLock;

use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::EventFd;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, Shutdown, SockFlag, SockType, recvmsg, sendmsg, shutdown, socketpair,
};
use pcie_function::local::{LocalSoc, sealed_memfd};
use pcie_function::{BusMemory, SocFunction};

const MAGIC: u64 = u64::from_le_bytes(*b"OUTBLOC1");
const CARD: u64 = 1 << 16;

/// What can be sent along.
struct Pool {
    card: OwnedFd,
    sealed: OwnedFd,
    unsealed: OwnedFd,
    event: EventFd,
}

static POOL: LazyLock<Pool> = LazyLock::new(|| {
    let unsealed = memfd_create(c"unsealed", MFdFlags::MFD_CLOEXEC).expect("a memfd");
    nix::unistd::ftruncate(&unsealed, 1 << 16).expect("64 KiB");
    Pool {
        card: sealed_memfd("card", CARD).expect("a memfd"),
        sealed: sealed_memfd("sealed", 1 << 14).expect("a memfd"),
        unsealed,
        event: EventFd::new().expect("an eventfd"),
    }
});

#[derive(Arbitrary, Clone, Copy, Debug)]
enum Fd {
    Card,
    Sealed,
    Unsealed,
    Event,
}

impl Fd {
    fn number(self) -> RawFd {
        match self {
            Self::Card => POOL.card.as_raw_fd(),
            Self::Sealed => POOL.sealed.as_raw_fd(),
            Self::Unsealed => POOL.unsealed.as_raw_fd(),
            Self::Event => POOL.event.as_fd().as_raw_fd(),
        }
    }
}

#[derive(Arbitrary, Debug)]
enum Packet<'a> {
    Hello { card_len: Option<u64>, vectors: u8 },
    Vectors,
    Map { iova: u16, len: u16, offset: u16, writes: bool },
    Unmap { iova: u16 },
    Words([u64; 5]),
    Bytes(&'a [u8]),
}

#[derive(Arbitrary, Debug)]
enum Step<'a> {
    Send {
        packet: Packet<'a>,
        fds: Vec<Fd>,
    },
    /// A page-aligned window of the mailbox, as the regions that this side uses are.
    Window {
        page: u8,
        len: u16,
    },
    /// What a guest's descriptor may name.
    Copy {
        iova: u16,
        len: u16,
        write: bool,
    },
}

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Instead of a good greeting.
    greeting: Option<Vec<(Packet<'a>, Vec<Fd>)>>,
    steps: Vec<Step<'a>>,
}

fuzz_target!(|input: Input<'_>| {
    let flags = SockFlag::SOCK_CLOEXEC;
    let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags).expect("a pair of sockets");
    match input.greeting {
        None => {
            send(&ours, &Packet::Hello { card_len: None, vectors: 2 }, &[Fd::Card, Fd::Event, Fd::Event]);
            send(&ours, &Packet::Vectors, &[Fd::Event, Fd::Event]);
        }
        Some(greeting) => {
            greeting.iter().take(8).for_each(|(packet, fds)| send(&ours, packet, fds));
            // Whoever still waits sees a hang-up.
            shutdown(ours.as_raw_fd(), Shutdown::Write).expect("a connected socket");
        }
    }
    let Ok(soc) = LocalSoc::new(theirs) else { return };
    let card = soc.card_memory();
    card.store(0, 1);
    assert_eq!(card.load(0), 1);
    soc.raise(u32::MAX);
    for step in input.steps.into_iter().take(32) {
        match step {
            Step::Send { packet, fds } => {
                send(&ours, &packet, &fds);
                settled(&ours, &soc);
            }
            Step::Window { page, len } => {
                let len = usize::from(len).next_multiple_of(64).max(64);
                let window = soc.remote(u64::from(page) << 12, len);
                let _ = window.load(len - 8);
                window.store(8, 8);
                window.store_line(0, &[1; 8]);
                window.copy_in(0, &[2; 64]);
                window.copy_out(0, &mut [0; 64]);
                let _ = window.flush();
            }
            Step::Copy { iova, len, write } => {
                let mut data = vec![3; len.into()];
                let _ = match write {
                    true => soc.write(iova.into(), &data),
                    false => soc.read(iova.into(), &mut data),
                };
            }
        }
    }
});

/// Sends a packet; a peer that has hung up is no matter.
fn send(socket: &OwnedFd, packet: &Packet<'_>, fds: &[Fd]) {
    let words = match *packet {
        Packet::Hello { card_len, vectors } => [1, card_len.unwrap_or(CARD), vectors.into(), 0, 0],
        Packet::Vectors => [2, 0, 0, 0, 0],
        Packet::Map { iova, len, offset, writes } => [3, iova.into(), len.into(), offset.into(), writes.into()],
        Packet::Unmap { iova } => [4, iova.into(), 0, 0, 0],
        Packet::Words(words) => words,
        Packet::Bytes(_) => [0; 5],
    };
    let words = [MAGIC, words[0], words[1], words[2], words[3], words[4]].map(u64::to_le_bytes).concat();
    let bytes = if let Packet::Bytes(bytes) = *packet { bytes } else { &words };
    let fds: Vec<RawFd> = fds.iter().take(200).map(|fd| fd.number()).collect();
    let rights = [ControlMessage::ScmRights(&fds)];
    let control = if fds.is_empty() { &rights[..0] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    let _ = sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(bytes)], control, flags, None);
}

/// Waits until the other end has done what it was told, or given up.
fn settled(socket: &OwnedFd, soc: &LocalSoc) {
    let mut both = [PollFd::new(socket.as_fd(), PollFlags::POLLIN), PollFd::new(soc.lost_event(), PollFlags::POLLIN)];
    // libFuzzer's timer interrupts a wait now and then.
    let ready =
        std::iter::repeat_with(|| poll(&mut both, PollTimeout::from(5000u16))).find(|r| *r != Err(Errno::EINTR));
    assert!(matches!(ready, Some(Ok(1..))), "neither done nor over: {ready:?}");
    let mut answer = [0; 64];
    let _ = recvmsg::<()>(socket.as_raw_fd(), &mut [IoSliceMut::new(&mut answer)], None, MsgFlags::MSG_DONTWAIT);
}
