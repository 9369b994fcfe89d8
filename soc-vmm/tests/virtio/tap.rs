//! An interface over a TAP interface of a network namespace that is the test's own: the other end is the kernel.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sched::{CloneFlags, unshare};
use soc_vmm::net::{NetBackend, NetError, NetSource, Offloads, TapBackend, TapSource};
use soc_vmm::virtio::net::{self, NetConfig, NetCounters};

use super::rig::{Driver, EVENT_INDEX, Guest, VERSION_1, eventually};

const CSUM: u64 = 1;
const GUEST_CSUM: u64 = 1 << 1;
const GUEST_TSO4: u64 = 1 << 7;
const HOST_TSO4: u64 = 1 << 11;
const MERGEABLE: u64 = 1 << 15;
const CONTROL: u64 = 1 << 17;
const MULTIQUEUE: u64 = 1 << 22;

/// Addresses: ours is the guest's.
const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
const HOST_MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
const IP: [u8; 4] = [10, 0, 0, 2];
const HOST_IP: [u8; 4] = [10, 0, 0, 1];

const RECEIVED: u64 = 0x8_0000;
const SENT: u64 = 0xe_0000;
/// Bytes of a buffer for frames, and how many there are.
const BUFFER: u64 = 0x1000;
const BUFFERS: u64 = 64;

/// Runs a test in a network namespace of its own, where this user can have one with TAP interfaces.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(|| {
        if unshare(CloneFlags::CLONE_NEWNET).is_err() || std::fs::File::open("/dev/net/tun").is_err() {
            eprintln!("skipped: this user can't make a network namespace with TAP interfaces");
            return;
        }
        // Nothing but what the test sends.
        let _ = std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
        test();
    });
    thread.join().unwrap();
}

fn ip(arguments: &str) {
    assert!(Command::new("ip").args(arguments.split(' ')).status().unwrap().success(), "ip {arguments}");
}

/// An interface that is up, and knows where the guest is.
fn make(name: &str, more: &str) {
    ip(format!("tuntap add mode tap name {name} {more}").trim());
    ip(&format!("link set {name} address 52:54:00:00:00:01 up"));
    ip(&format!("addr add 10.0.0.1/24 dev {name}"));
    ip(&format!("neigh add 10.0.0.2 lladdr 52:54:00:00:00:02 dev {name}"));
}

/// Waits until the kernel has noticed that somebody is at the other end: what it sends before is dropped.
fn carrier(name: &str) {
    eventually(|| {
        let shown = Command::new("ip").args(["-o", "link", "show", name]).output().unwrap().stdout;
        String::from_utf8(shown).unwrap().contains("state UP").then_some(())
    });
}

/// A socket of the host's that doesn't wait for ever.
fn host_socket() -> UdpSocket {
    let socket = UdpSocket::bind((Ipv4Addr::from(HOST_IP), 0)).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    socket
}

fn named(name: &str, queues: u16) -> TapSource {
    TapSource::Named { name: name.into(), queues }
}

fn refusal(source: TapSource) -> String {
    soc_vmm::net::open(&NetSource::Tap(source)).err().expect("it can't be opened").to_string()
}

struct Wire {
    guest: Guest,
    counters: Arc<NetCounters>,
    receive: Driver,
    transmit: Driver,
}

impl Wire {
    fn new(source: &TapSource, features: u64) -> Self {
        let mut wire = Self::prepare(soc_vmm::net::open(&NetSource::Tap(source.clone())).unwrap(), features);
        wire.guest.go();
        wire
    }

    /// All but DRIVER_OK.
    fn prepare(backends: Vec<Box<dyn NetBackend>>, features: u64) -> Self {
        let counters = Arc::new(NetCounters::default());
        let config = NetConfig::new("net0".into(), backends, MAC).unwrap();
        let config = NetConfig { counters: counters.clone(), ..config };
        let mut guest = Guest::new(|plumbing| net::new(config, plumbing));
        guest.enable_msix(3);
        guest.negotiate(VERSION_1 | features);
        let (receive, transmit) = (guest.queue(0, 64), guest.queue(1, 64));
        for queue in [0, 1] {
            guest.put(0x16, 2, queue);
            guest.put(0x1a, 2, queue);
        }
        let mut wire = Self { guest, counters, receive, transmit };
        carrier("t0");
        for number in 0..BUFFERS {
            wire.receive.add(&[(RECEIVED + BUFFER * number, BUFFER as u32, true)]);
        }
        wire
    }

    /// The next frame of IPv4 with its header, over as many buffers as it has.
    fn receives(&mut self) -> (Vec<u8>, Vec<u8>) {
        loop {
            let mut bytes = self.buffer();
            for _ in 1..u16::from_le_bytes([bytes[10], bytes[11]]) {
                let more = self.buffer();
                bytes.extend(more);
            }
            let frame = bytes.split_off(12);
            if frame[12..14] == [8, 0] {
                return (bytes, frame);
            }
        }
    }

    /// A used buffer, which is offered again.
    fn buffer(&mut self) -> Vec<u8> {
        let (head, len) = self.receive.wait_used();
        let bytes = self.guest.board.ram.get(RECEIVED + BUFFER * u64::from(head), len as usize);
        self.receive.offer(head as u16);
        self.guest.kick(0);
        bytes
    }

    fn sends(&mut self, header: [u8; 12], frame: &[u8]) {
        self.guest.board.ram.set(SENT, &[&header, frame].concat());
        self.transmit.add(&[(SENT, 12 + frame.len() as u32, false)]);
        self.guest.kick(1);
        self.transmit.wait_used();
    }

    fn interrupts(&self, vector: u32) -> usize {
        self.guest.board.messages.raised().iter().filter(|message| message.data == 0x40 + vector).count()
    }
}

/// The sum of the words of `bytes`, as checksums have it.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0)));
    let mut sum = words.sum::<u32>();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum
}

/// A packet to the host whose checksum is left to it: in its place there is the sum of the pseudo header alone.
fn packet(protocol: u8, checksum: usize, segment: &[u8]) -> Vec<u8> {
    let len = segment.len() as u16;
    let mut packet = vec![0x45, 0];
    packet.extend((20 + len).to_be_bytes());
    packet.extend([0, 0, 0x40, 0, 64, protocol, 0, 0]);
    packet.extend([IP, HOST_IP].concat());
    let own = !(sum(&packet) as u16);
    packet[10..12].copy_from_slice(&own.to_be_bytes());
    let pseudo = [&IP[..], &HOST_IP, &[0, protocol], &len.to_be_bytes()].concat();
    let mut segment = segment.to_vec();
    segment[checksum..checksum + 2].copy_from_slice(&(sum(&pseudo) as u16).to_be_bytes());
    [&HOST_MAC[..], &MAC, &[8, 0], &packet, &segment].concat()
}

fn datagram(port: u16, data: &[u8]) -> Vec<u8> {
    let ports = [9u16, port, 8 + data.len() as u16, 0].map(u16::to_be_bytes).concat();
    packet(17, 6, &[&ports[..], data].concat())
}

/// A header that asks for the checksum of what is behind an IPv4 header, and for segments of that many bytes.
fn header(offset: u8, segment: u16) -> [u8; 12] {
    let [low, high] = segment.to_le_bytes();
    [1, u8::from(segment > 0), 0, 0, low, high, 34, 0, offset, 0, 0, 0]
}

#[test]
fn datagrams_pass_with_checksums_that_somebody_else_makes() {
    in_namespace(|| {
        make("t0", "");
        let host = host_socket();
        let port = host.local_addr().unwrap().port();
        for (features, flags) in [(0, 0), (GUEST_CSUM, 1), (GUEST_CSUM | MERGEABLE | EVENT_INDEX, 1)] {
            let mut wire = Wire::new(&named("t0", 1), features | CSUM);
            wire.sends(header(6, 0), &datagram(port, b"from the guest"));
            let mut data = [0; 100];
            let (len, from) = host.recv_from(&mut data).unwrap();
            assert_eq!((&data[..len], from.ip()), (&b"from the guest"[..], Ipv4Addr::from(IP).into()));
            host.send_to(b"from the host", (Ipv4Addr::from(IP), 9)).unwrap();
            let (how, frame) = wire.receives();
            assert_eq!(
                (how[0], &how[10..], &frame[..6], &frame[42..]),
                (flags, &[1, 0][..], &MAC[..], &b"from the host"[..])
            );
            // Where the guest doesn't do it, it is done.
            let len = [0, 0, 0, 17, 0, frame[39]];
            assert_eq!(sum(&[&HOST_IP[..], &IP, &len[2..], &frame[34..]].concat()) == 0xffff, flags == 0);
            assert_eq!((wire.counters.sent(), wire.counters.unsent()), (1, 0));
        }
    });
}

#[test]
fn large_segments_of_tcp_pass_both_ways() {
    in_namespace(|| {
        make("t0", "");
        let listener = TcpListener::bind((Ipv4Addr::from(HOST_IP), 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut wire = Wire::new(&named("t0", 1), CSUM | HOST_TSO4 | GUEST_CSUM | GUEST_TSO4 | MERGEABLE);
        let tcp = |sequence: u32, acknowledged: u32, flags: u8, data: &[u8]| {
            let mut segment = [1000u16, port].map(u16::to_be_bytes).concat();
            segment.extend([sequence, acknowledged].map(u32::to_be_bytes).concat());
            segment.extend([0x50, flags, 0xff, 0xff, 0, 0, 0, 0]);
            segment.extend(data);
            packet(6, 16, &segment)
        };
        let number = |frame: &[u8], at: usize| u32::from_be_bytes(frame[at..at + 4].try_into().unwrap());
        wire.sends(header(16, 0), &tcp(100, 0, 2, &[]));
        let (_, answer) = wire.receives();
        assert_eq!((answer[47], number(&answer, 42)), (0x12, 101));
        let sequence = number(&answer, 38) + 1;
        wire.sends(header(16, 0), &tcp(101, sequence, 0x10, &[]));
        let (mut host, _) = listener.accept().unwrap();
        // One frame of ours is twenty of the network's.
        let data: Vec<u8> = (0..20_000u32).map(|i| (i * 7) as u8).collect();
        wire.sends(header(16, 1000), &tcp(101, sequence, 0x18, &data));
        let mut got = vec![0; data.len()];
        host.read_exact(&mut got).unwrap();
        assert_eq!((got == data, wire.counters.sent()), (true, 3));
        host.write_all(&data).unwrap();
        let (mut came, mut largest) = (0, 0);
        while came < data.len() {
            let (how, frame) = wire.receives();
            let payload = &frame[54..14 + usize::from(u16::from_be_bytes([frame[16], frame[17]]))];
            if payload.is_empty() {
                continue;
            }
            let at = number(&frame, 38).wrapping_sub(sequence) as usize;
            assert_eq!((at, payload == &data[at..at + payload.len()]), (came, true));
            came += payload.len();
            if frame.len() > 1514 {
                // NEEDS_CSUM, TCPV4, and segments as long as fit.
                assert_eq!((how[0], how[1], how[4..6] != [0, 0]), (1, 1, true));
            }
            largest = largest.max(frame.len());
            wire.sends(header(16, 0), &tcp(101 + 20_000, sequence + came as u32, 0x10, &[]));
        }
        assert!(largest > 4096, "no large frame came, or none over several buffers: {largest}");
    });
}

#[test]
fn what_the_kernel_would_stumble_over_is_dropped() {
    in_namespace(|| {
        make("t0", "");
        let host = host_socket();
        let good = datagram(host.local_addr().unwrap().port(), b"good");
        let mut wire = Wire::new(&named("t0", 1), CSUM | HOST_TSO4);
        let mut past_the_end = header(6, 0);
        past_the_end[7] = 0xff;
        for header in [past_the_end, header(0xff, 0), header(6, 1000), header(16, 0).map(|byte| byte | 0x80)] {
            wire.sends(header, &good);
        }
        // Too short for the kernel, which says so: the interface goes on.
        wire.sends([0; 12], &[1; 5]);
        assert_eq!((wire.counters.sent(), wire.counters.unsent()), (0, 5));
        wire.sends(header(6, 0), &good);
        assert_eq!(host.recv(&mut [0; 9]).unwrap(), 4);
        // The host takes it down and up again.
        ip("link set t0 down");
        wire.sends(header(6, 0), &good);
        assert_eq!((wire.counters.unsent(), wire.guest.get(0x2006, 2)), (6, 1));
        ip("link set t0 up");
        wire.sends(header(6, 0), &good);
        assert_eq!(host.recv(&mut [0; 9]).unwrap(), 4);
    });
}

#[test]
fn one_that_is_deleted_is_a_link_that_is_down() {
    in_namespace(|| {
        for queues in [1, 2] {
            make("t0", if queues > 1 { "multi_queue" } else { "" });
            let mut wire = Wire::new(&named("t0", queues), CSUM);
            assert_eq!(wire.guest.get(0x2006, 2), 1);
            ip("link del t0");
            eventually(|| (wire.guest.get(0x2006, 2) == 0).then_some(()));
            wire.sends([0; 12], &[0; 60]);
            assert_eq!((wire.counters.unsent(), wire.guest.status()), (1, 0xf));
        }
    });
}

#[test]
fn pairs_of_queues_are_used_as_the_driver_says() {
    in_namespace(|| {
        make("t0", "multi_queue");
        let host = host_socket();
        let port = host.local_addr().unwrap().port();
        let backends = soc_vmm::net::open(&NetSource::Tap(named("t0", 2))).unwrap();
        let config = NetConfig::new("net0".into(), backends, MAC).unwrap();
        let mut guest = Guest::new(|plumbing| net::new(config, plumbing));
        assert_eq!((guest.get(0x12, 2), guest.get(0x2008, 2)), (5, 2));
        guest.negotiate(VERSION_1 | MULTIQUEUE | CONTROL | MERGEABLE);
        let mut queues = [0, 1, 2, 3, 4].map(|index| guest.queue(index, 64));
        guest.go();
        carrier("t0");
        let ram = guest.board.ram.clone();
        // From the second pair, once it is in use, frames leave, and some flows come to it.
        for pairs in [2u8, 1, 2] {
            ram.set(SENT, &[4, 0, pairs, 0]);
            queues[4].add(&[(SENT, 4, false), (SENT + 8, 1, true)]);
            guest.kick(4);
            assert_eq!((queues[4].wait_used().1, ram.get(SENT + 8, 1)), (1, vec![0]));
        }
        for pair in [0, 2] {
            for number in 0..32 {
                queues[pair].add(&[(RECEIVED + BUFFER * (number + 32 * (pair as u64 / 2)), BUFFER as u32, true)]);
            }
            guest.kick(pair as u16);
            let mut frame = datagram(port, &[pair as u8]);
            // Without checksums.
            frame[40..42].fill(0);
            ram.set(SENT, &[vec![0; 12], frame].concat());
            queues[pair + 1].add(&[(SENT, 12 + 43, false)]);
            guest.kick(pair as u16 + 1);
            let mut data = [9; 2];
            assert_eq!((host.recv(&mut data).unwrap(), data[0]), (1, pair as u8));
        }
        let mut came = [0, 0];
        while came.contains(&0) {
            let flow = host_socket();
            flow.send_to(b"x", (Ipv4Addr::from(IP), 9)).unwrap();
            let pair = eventually(|| [0, 2].into_iter().find(|pair| queues[*pair].take_used().is_some()));
            came[pair / 2] += 1;
            assert!(came.iter().sum::<u32>() < 32, "no flow comes to one of two queues: {came:?}");
        }
    });
}

/// Counts what costs a system call.
struct Counted {
    inner: Box<dyn NetBackend>,
    calls: Arc<[AtomicUsize; 2]>,
}

impl NetBackend for Counted {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.inner.fd()
    }

    fn offloads(&self) -> Option<Offloads> {
        self.inner.offloads()
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> Result<(), NetError> {
        self.inner.set_guest_offloads(offloads)
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NetError> {
        self.calls[0].fetch_add(1, SeqCst);
        self.inner.send(frame)
    }

    fn receive(&mut self) -> Result<Option<&[u8]>, NetError> {
        self.calls[1].fetch_add(1, SeqCst);
        self.inner.receive()
    }

    fn consume(&mut self) {
        self.inner.consume();
    }
}

#[test]
fn many_frames_share_an_interrupt() {
    const FRAMES: usize = 48;
    in_namespace(|| {
        make("t0", "");
        let host = host_socket();
        let frame = datagram(host.local_addr().unwrap().port(), &[7; 1000]);
        for features in [EVENT_INDEX, 0] {
            let calls = Arc::<[AtomicUsize; 2]>::default();
            let inner = soc_vmm::net::open(&NetSource::Tap(named("t0", 1))).unwrap().remove(0);
            let backend = Box::new(Counted { inner, calls: calls.clone() });
            // All of them are there when the device first looks.
            let mut wire = Wire::prepare(vec![backend], features | CSUM);
            for _ in 0..FRAMES {
                host.send_to(&[8; 1000], (Ipv4Addr::from(IP), 9)).unwrap();
                wire.guest.board.ram.set(SENT, &[&header(6, 0)[..], &frame].concat());
                wire.transmit.add(&[(SENT, 12 + frame.len() as u32, false)]);
            }
            let transfers = wire.guest.board.ram.transfers.load(SeqCst);
            wire.guest.go();
            eventually(|| (wire.counters.received() + wire.counters.sent() == 2 * FRAMES as u64).then_some(()));
            eventually(|| (usize::from(wire.receive.used_index()) == FRAMES).then_some(()));
            // An interrupt a queue; a call a frame, and one more to see the end; a frame's descriptor in one transfer and its header and
            // bytes in another, beside what the rings take together.
            eventually(|| (wire.interrupts(0) > 0 && wire.interrupts(1) > 0).then_some(()));
            assert_eq!([wire.interrupts(0), wire.interrupts(1)], [1, 1]);
            let [sends, receives] = [0, 1].map(|way: usize| calls[way].load(SeqCst));
            assert!(sends == FRAMES && (FRAMES + 1..FRAMES + 4).contains(&receives), "{sends} {receives}");
            let transfers = wire.guest.board.ram.transfers.load(SeqCst) - transfers;
            assert!(transfers <= 2 * 2 * FRAMES + 32, "{transfers}");
            for _ in 0..FRAMES {
                assert_eq!(host.recv(&mut [0; 1001]).unwrap(), 1000);
            }
        }
    });
}

#[test]
fn interfaces_that_can_not_be_had_are_named() {
    in_namespace(|| {
        assert!(refusal(named("t0", 1)).starts_with("there is no interface t0: "));
        assert!(refusal(named("lo", 1)).contains("lo is no TAP interface"), "{}", refusal(named("lo", 1)));
        ip("tuntap add mode tun name u0");
        assert!(refusal(named("u0", 1)).contains("u0 is no TAP interface"));
        make("t0", "");
        assert!(refusal(named("t0", 2)).contains("make it with multi_queue"));
        let one = TapBackend::open(&named("t0", 1)).unwrap();
        assert!(refusal(named("t0", 1)).starts_with("interface t0 is in use"));
        drop(one);
        assert!(TapBackend::open(&named("t0", 1)).is_ok());
        ip("tuntap add mode tap name t1 multi_queue");
        // Many queues can be one.
        assert_eq!(
            (TapBackend::open(&named("t1", 1)).unwrap().len(), TapBackend::open(&named("t1", 4)).unwrap().len()),
            (1, 4)
        );
    });
}

#[test]
fn descriptors_that_were_passed() {
    in_namespace(|| {
        make("t0", "");
        let refused = |fd: &dyn AsFd| refusal(TapSource::Inherited(vec![fd.as_fd().as_raw_fd()]));
        let inherit = |fd: &dyn AsFd| fcntl(fd.as_fd(), FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let queue = TapBackend::open(&named("t0", 1)).unwrap().remove(0);
        // One that this process owns is none that it was started with.
        assert!(refused(&queue.fd()).contains("was not passed to this process"));
        let passed = queue.fd().try_clone_to_owned().unwrap();
        inherit(&passed);
        let number = std::os::fd::IntoRawFd::into_raw_fd(passed);
        let mut wire = Wire::new(&TapSource::Inherited(vec![number]), CSUM | GUEST_CSUM);
        assert!(refusal(TapSource::Inherited(vec![number])).contains("was not passed"), "twice");
        let host = host_socket();
        host.send_to(b"x", (Ipv4Addr::from(IP), 9)).unwrap();
        assert_eq!(wire.receives().1[42..], *b"x");
        let other = std::fs::File::open("/dev/null").unwrap().as_fd().try_clone_to_owned().unwrap();
        inherit(&other);
        let number = std::os::fd::IntoRawFd::into_raw_fd(other);
        assert!(refusal(TapSource::Inherited(vec![number])).contains("is no TAP interface"));
        assert!(refusal(TapSource::Inherited(vec![12345])).contains("12345 was not passed"));
    });
}

#[test]
fn what_was_queued_for_another_driver_is_dropped() {
    in_namespace(|| {
        make("t0", "");
        let mut queue = TapBackend::open(&named("t0", 1)).unwrap().remove(0);
        carrier("t0");
        let host = host_socket();
        let mut ask = |done: bool, receives: bool| {
            queue.set_guest_offloads(Offloads { checksum: done, ..Offloads::NONE }).unwrap();
            host.send_to(b"x", (Ipv4Addr::from(IP), 9)).unwrap();
            if receives {
                let flags = queue.receive().unwrap().map(|packet| packet[0]);
                queue.consume();
                return flags;
            }
            None
        };
        assert_eq!((ask(true, true), ask(false, true)), (Some(1), Some(0)));
        // One whose checksum is left to a driver that is gone, then one that is finished.
        ask(true, false);
        assert_eq!((ask(false, true), ask(false, true)), (None, Some(0)));
    });
}
