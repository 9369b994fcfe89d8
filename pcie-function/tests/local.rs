//! Both ends of a local function in one process: what unmapping means, and peers that are none.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep, spawn};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, send, socket, socketpair};
use pcie_function::local::{LocalHost, LocalSoc, sealed_memfd};
use pcie_function::{BusError, BusMemory, HostFunction, SocFunction, Windowed};

fn pair() -> (OwnedFd, OwnedFd) {
    socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
}

fn function() -> (LocalHost, LocalSoc) {
    let (ours, theirs) = pair();
    let host = spawn(|| LocalHost::new(ours).unwrap());
    let soc = LocalSoc::new(theirs).unwrap();
    (host.join().unwrap(), soc)
}

#[test]
fn what_is_unmapped_faults_also_through_windows_that_were_used_before() {
    let (mut host, soc) = function();
    let (iova, memory) = host.map_mailbox(4096, true).unwrap();
    let remote = soc.remote(iova, 4096);
    let cut = remote.cut(64, 64).unwrap();
    remote.store(0, 1);
    cut.store_line(32, &[2, 3]);
    assert_eq!((memory.load(0), memory.load(96), remote.flush()), (1, 2, Ok(())));

    host.unmap(iova).unwrap();
    remote.store(0, 7);
    assert_eq!((memory.load(0), remote.load(0), cut.load(32)), (1, u64::MAX, u64::MAX));
    assert_eq!(remote.flush(), Err(BusError::Dma));
    assert_eq!(soc.write(iova, &[1]), Err(BusError::Dma));
    let mut bytes = [0; 8];
    assert_eq!(soc.read(iova, &mut bytes), Err(BusError::Dma));
    assert!(host.unmap(iova).is_err(), "nothing is there any more");
}

#[test]
fn unmapping_waits_for_transfers_and_none_lands_later() {
    const LEN: usize = 4 << 20;
    let (mut host, soc) = function();
    let (mailbox, _) = host.map_mailbox(4096, true).unwrap();
    for round in 0..50 {
        let ram = sealed_memfd("ram", LEN as u64).unwrap();
        let view = pcie_function::Mapping::new(ram.as_fd(), 0, LEN, pcie_function::Reach::Local).unwrap().window();
        host.map_ram(ram.as_fd(), 0, 0, LEN as u64, true).unwrap();
        let line = soc.remote(mailbox, 4096);
        let started = AtomicBool::new(false);
        scope(|scope| {
            let writer = scope.spawn(|| {
                let data = vec![0xab; LEN];
                while soc.write(0, &data).is_ok() {
                    started.store(true, Ordering::Relaxed);
                    line.store(0, round);
                }
            });
            while !started.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
            sleep(Duration::from_micros(100 * (round % 7)));
            host.unmap(0).unwrap();
            // From here on the memory is the host's own.
            for offset in (0..LEN).step_by(8) {
                view.store(offset, 0);
            }
            writer.join().unwrap();
            assert!((0..LEN).step_by(8).all(|offset| view.load(offset) == 0), "a transfer landed after the unmap");
        });
    }
}

#[test]
fn copies_of_any_length_see_the_same_memory() {
    const LEN: usize = 256 << 10;
    // The mapping begins within the file.
    const BEFORE: u64 = 64 << 10;
    const AT: u64 = 1 << 20;
    let (mut host, soc) = function();
    let ram = sealed_memfd("ram", BEFORE + LEN as u64).unwrap();
    let view = pcie_function::Mapping::new(ram.as_fd(), BEFORE, LEN, pcie_function::Reach::Local).unwrap().window();
    host.map_ram(ram.as_fd(), BEFORE, AT, LEN as u64, true).unwrap();
    let bytes: Vec<u8> = (0..LEN).map(|n| (n % 251) as u8).collect();
    for (offset, len) in [(0, LEN), (1, 40_001), (7, 4096), (LEN - 70_000, 70_000), (LEN - 3, 3)] {
        view.write_bytes(0, &vec![0; LEN]);
        soc.write(AT + offset as u64, &bytes[..len]).unwrap();
        let mut seen = vec![0xff; LEN];
        view.read_bytes(0, &mut seen);
        let expected = [&vec![0; offset], &bytes[..len], &vec![0; LEN - offset - len]].concat();
        assert!(seen == expected, "{len} bytes to {offset}");
        let mut back = vec![0xff; len];
        soc.read(AT + offset as u64, &mut back).unwrap();
        assert!(back == bytes[..len], "{len} bytes from {offset}");
    }
    assert_eq!(soc.write(AT + 1, &bytes), Err(BusError::Dma), "a byte too many");
    host.unmap(AT).unwrap();
    assert_eq!(soc.write(AT, &bytes), Err(BusError::Dma));
    assert_eq!(soc.read(AT, &mut vec![0; LEN]), Err(BusError::Dma));
}

#[test]
fn memory_is_taken_before_it_is_used() {
    const LEN: u64 = 1 << 20;
    let (mut host, soc) = function();
    let ram = sealed_memfd("ram", LEN).unwrap();
    host.map_ram(ram.as_fd(), 0, 0, LEN, true).unwrap();
    let taken = || nix::sys::stat::fstat(&ram).unwrap().st_blocks as u64 * 512;
    assert_eq!(taken(), 0);
    soc.take_pages(0, LEN / 2).unwrap();
    assert_eq!(taken(), LEN / 2);
    soc.take_pages(0, LEN).unwrap();
    assert_eq!(taken(), LEN);
    assert!(soc.take_pages(1, LEN).is_err(), "beyond its end");
}

#[test]
fn what_was_taken_and_given_back_is_not_taken_by_who_reads_it() {
    const LEN: u64 = 1 << 20;
    let (mut host, soc) = function();
    let ram = sealed_memfd("ram", LEN).unwrap();
    host.map_ram(ram.as_fd(), 0, 0, LEN, true).unwrap();
    soc.take_pages(0, LEN).unwrap();
    let mut bytes: Vec<u8> = (0..LEN).map(|at| (at / 8 % 251) as u8).collect();
    soc.write(0, &bytes).unwrap();
    let read = || {
        let mut read = vec![0; LEN as usize];
        soc.read(0, &mut read).unwrap();
        read
    };
    assert!(read() == bytes);
    let hole = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&ram, hole, 0x3_0000, 0x2_0000).unwrap();
    bytes[0x3_0000..0x5_0000].fill(0);
    assert!(read() == bytes);
    assert_eq!(nix::sys::stat::fstat(&ram).unwrap().st_blocks as u64 * 512, LEN - 0x2_0000);
}

#[test]
fn the_host_takes_no_mapping_twice_and_gives_up_on_no_memory() {
    let (mut host, _soc) = function();
    let ram = sealed_memfd("ram", 1 << 20).unwrap();
    host.map_ram(ram.as_fd(), 0, 0x1000, 1 << 20, true).unwrap();
    assert!(host.map_ram(ram.as_fd(), 0, 0x2000, 4096, true).is_err());
    assert!(host.map_ram(ram.as_fd(), 0, u64::MAX - 4095, 8192, true).is_err());
    assert_eq!(host.check(), Ok(()));
}

#[test]
fn memory_that_could_vanish_is_refused() {
    // Not sealed; huge pages that no machine has.
    for flags in [MFdFlags::MFD_CLOEXEC, MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_HUGETLB | MFdFlags::MFD_HUGE_2MB] {
        use nix::fcntl::{FcntlArg, SealFlag, fcntl};
        let (mut host, soc) = function();
        let huge = flags.contains(MFdFlags::MFD_HUGETLB);
        let len = if huge { 1 << 40 } else { 1 << 20 };
        let fd = memfd_create(c"ram", flags | MFdFlags::MFD_ALLOW_SEALING).unwrap();
        nix::unistd::ftruncate(&fd, len).unwrap();
        if huge {
            let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
            fcntl(&fd, FcntlArg::F_ADD_SEALS(seals)).unwrap();
        }
        assert!(host.map_ram(fd.as_fd(), 0, 0, len as u64, true).is_err());
        assert_eq!(soc.check(), Err(BusError::Gone));
        assert_eq!(host.check(), Err(BusError::Gone));
    }
}

#[test]
fn what_is_mapped_anywhere_but_at_a_page_is_refused() {
    for iova in [1, 8, 64, 0x1800] {
        let (mut host, soc) = function();
        let ram = sealed_memfd("ram", 1 << 20).unwrap();
        assert!(host.map_ram(ram.as_fd(), 0, iova, 1 << 20, true).is_err(), "{iova:#x}");
        assert_eq!(soc.check(), Err(BusError::Gone));
        assert_eq!(soc.remote(0x2000, 64).load(0), u64::MAX);
    }
}

/// Listens with a queue of one connection, and never answers.
fn mute(path: &std::path::Path) -> OwnedFd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
    listen(&fd, Backlog::new(1).unwrap()).unwrap();
    fd
}

#[test]
fn a_listener_that_says_nothing_is_not_waited_for_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("f");
    let _listener = mute(&path);
    let start = Instant::now();
    scope(|scope| {
        // More than its queue holds: the last ones can't even connect.
        for client in (0..4).map(|_| scope.spawn(|| LocalSoc::dial(&path).unwrap_err().to_string())).collect::<Vec<_>>()
        {
            let why = client.join().unwrap();
            assert!(why.contains("does not greet within 10 s"), "{why}");
        }
    });
    assert!(start.elapsed() < Duration::from_secs(25));
}

#[test]
fn peers_that_are_no_shim_are_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let stream = std::os::unix::net::UnixListener::bind(path("stream")).unwrap();
    std::fs::write(path("file"), "").unwrap();
    for (name, says) in [("absent", "No such file"), ("file", "refused"), ("stream", "no host-kvm-shim's")] {
        let why = LocalSoc::dial(&path(name)).unwrap_err().to_string();
        assert!(why.contains(says), "{name}: {why}");
    }
    drop(stream);
    for packet in [&b"OUTBLOC1"[..], &[0xff; 48], &[0; 4096]] {
        let (ours, theirs) = pair();
        send(ours.as_raw_fd(), packet, nix::sys::socket::MsgFlags::empty()).unwrap();
        let why = LocalSoc::new(theirs).unwrap_err().to_string();
        assert!(why.contains("is not Outboard"), "{why}");
    }
    let (ours, theirs) = pair();
    drop(ours);
    assert!(LocalSoc::new(theirs).unwrap_err().to_string().contains("hung up"));
}

#[test]
fn a_host_end_gives_up_on_a_soc_that_breaks_the_protocol() {
    let (ours, theirs) = pair();
    let mut host = LocalHost::new(ours).unwrap();
    send(theirs.as_raw_fd(), &[0x55; 48], nix::sys::socket::MsgFlags::empty()).unwrap();
    let why = host.map_mailbox(4096, true).unwrap_err().to_string();
    assert!(why.contains("is not Outboard"), "{why}");
    assert_eq!(host.check(), Err(BusError::Gone));
    drop(theirs);
}
