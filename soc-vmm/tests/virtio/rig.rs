//! A guest with one virtio device: memory, a driver that keeps the rules unless it is told otherwise, and what the device raised.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use nix::sys::eventfd::EventFd;
use pcie_function::local::sealed_memfd;
use soc_vmm::block::{BlockBackend, BlockError};
use soc_vmm::bus::{Access, Answer, Deferred, LateAnswer, RequestId, Wake};
use soc_vmm::interrupt::{InterruptLine, LineSink, Message, MessageRoute, MessageSink};
use soc_vmm::memory::{GuestMemory, MemoryError};
use soc_vmm::net::{HEADER, MAX_FRAME, NetBackend, NetError, Offloads};
use soc_vmm::pci::{ConfigSpace, Identity, Msix, MsixLayout, PciFunction};
use soc_vmm::virtio::{
    Config, Control, Interrupts, Lease, NotifyPages, Plumbing, Queue, Ring, RingFeatures, RingLayout, RingPosition,
    Session,
};

/// Bytes of RAM, from address 0.
pub(crate) const RAM: usize = 1 << 20;
/// Features that every driver here takes, as bits: VERSION_1.
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const INDIRECT: u64 = 1 << 28;
pub(crate) const EVENT_INDEX: u64 = 1 << 29;
/// Flags of descriptors.
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const TABLE: u16 = 4;
/// Bits of the device's status.
pub(crate) const NEEDS_RESET: u64 = 64;

/// RAM, in a file that others may map too.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) file: File,
    /// Reads and writes of the device.
    pub(crate) transfers: AtomicUsize,
    /// The device's writes alone.
    pub(crate) writes: AtomicUsize,
}

impl Default for Ram {
    fn default() -> Self {
        let file = sealed_memfd("ram", RAM as u64).unwrap().into();
        Self { file, transfers: AtomicUsize::new(0), writes: AtomicUsize::new(0) }
    }
}

impl Ram {
    pub(crate) fn get(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.file.read_exact_at(&mut data, addr).unwrap();
        data
    }

    pub(crate) fn set(&self, addr: u64, data: &[u8]) {
        Self::find(addr, data.len()).unwrap();
        self.file.write_all_at(data, addr).unwrap();
    }

    pub(crate) fn u16(&self, addr: u64) -> u16 {
        u16::from_le_bytes(self.get(addr, 2).try_into().unwrap())
    }

    pub(crate) fn u32(&self, addr: u64) -> u32 {
        u32::from_le_bytes(self.get(addr, 4).try_into().unwrap())
    }

    fn find(addr: u64, len: usize) -> Result<(), MemoryError> {
        let not_ram = MemoryError::NotRam { addr, len: len as u64 };
        addr.checked_add(len as u64).filter(|end| *end <= RAM as u64).ok_or(not_ram).map(drop)
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        Self::find(addr, data.len())?;
        self.transfers.fetch_add(1, Ordering::Relaxed);
        self.file.read_exact_at(data, addr).unwrap();
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        Self::find(addr, data.len())?;
        self.transfers.fetch_add(1, Ordering::Relaxed);
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.file.write_all_at(data, addr).unwrap();
        Ok(())
    }
}

/// A driver's side of a queue.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) at: RingLayout,
    pub(crate) ram: Arc<Ram>,
    /// The descriptor that is used next, and the indices.
    next: u16,
    pub(crate) available: u16,
    pub(crate) seen: u16,
    /// The device sees what is added after [`Driver::show`].
    pub(crate) quiet: bool,
}

impl Driver {
    /// A queue of `size` entries at `base`, a multiple of 16.
    pub(crate) fn new(ram: &Arc<Ram>, base: u64, size: u16) -> Self {
        let available = base + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(64);
        let at = RingLayout { size, descriptors: base, available, used };
        Self { at, ram: ram.clone(), next: 0, available: 0, seen: 0, quiet: false }
    }

    pub(crate) fn descriptor(&self, table: u64, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.ram.set(table + 16 * u64::from(index), &bytes);
    }

    /// Makes a chain of these buffers available: address, bytes, whether the device writes it. Its head.
    pub(crate) fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.next;
        for (i, (addr, len, writable)) in buffers.iter().enumerate() {
            let next = (self.next + 1) % self.at.size;
            let more = if i + 1 < buffers.len() { NEXT } else { 0 };
            let flags = more | if *writable { WRITE } else { 0 };
            self.descriptor(self.at.descriptors, self.next, *addr, *len, flags, next);
            self.next = next;
        }
        self.offer(head);
        head
    }

    /// The same with descriptors from `first` on, for chains that end in another order than they began.
    pub(crate) fn add_at(&mut self, first: u16, buffers: &[(u64, u32, bool)]) -> u16 {
        self.next = first;
        self.add(buffers)
    }

    /// The same by an indirect table at `table`.
    pub(crate) fn add_indirect(&mut self, table: u64, buffers: &[(u64, u32, bool)]) -> u16 {
        for (i, (addr, len, writable)) in (0..).zip(buffers) {
            let more = if usize::from(i) + 1 < buffers.len() { NEXT } else { 0 };
            self.descriptor(table, i, *addr, *len, more | if *writable { WRITE } else { 0 }, i + 1);
        }
        let head = self.next;
        self.descriptor(self.at.descriptors, head, table, 16 * buffers.len() as u32, TABLE, 0);
        self.next = (head + 1) % self.at.size;
        self.offer(head);
        head
    }

    /// Puts a head into the available ring.
    pub(crate) fn offer(&mut self, head: u16) {
        self.ram.set(self.at.available + 4 + 2 * u64::from(self.available % self.at.size), &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        if !self.quiet {
            self.show();
        }
    }

    /// Shows the device what is in the available ring.
    pub(crate) fn show(&self) {
        self.ram.set(self.at.available + 2, &self.available.to_le_bytes());
    }

    /// What the device says that it has used.
    pub(crate) fn used_index(&self) -> u16 {
        self.ram.u16(self.at.used + 2)
    }

    /// The next used chain, if there is one: head, bytes.
    pub(crate) fn take_used(&mut self) -> Option<(u32, u32)> {
        if self.used_index() == self.seen {
            return None;
        }
        let at = self.at.used + 4 + 8 * u64::from(self.seen % self.at.size);
        self.seen = self.seen.wrapping_add(1);
        Some((self.ram.u32(at), self.ram.u32(at + 4)))
    }

    /// Waits for the next used chain.
    pub(crate) fn wait_used(&mut self) -> (u32, u32) {
        eventually(|| self.take_used())
    }

    /// Says from which used index on it wants an interrupt.
    pub(crate) fn set_used_event(&self, index: u16) {
        self.ram.set(self.at.available + 4 + 2 * u64::from(self.at.size), &index.to_le_bytes());
    }

    /// From which available index on the device wants a kick.
    pub(crate) fn available_event(&self) -> u16 {
        self.ram.u16(self.at.used + 4 + 8 * u64::from(self.at.size))
    }
}

/// Asks again and again until there is an answer; for ever is too long.
pub(crate) fn eventually<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(Instant::now() < end, "the device does nothing");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Keeps the messages that are raised.
#[derive(Debug, Default)]
pub(crate) struct Messages(Arc<Mutex<Vec<Message>>>);

#[derive(Debug)]
struct Route {
    message: Mutex<Option<Message>>,
    raised: Arc<Mutex<Vec<Message>>>,
}

impl Messages {
    pub(crate) fn raised(&self) -> Vec<Message> {
        self.0.lock().unwrap().clone()
    }
}

impl MessageSink for Messages {
    fn route(&self) -> Box<dyn MessageRoute> {
        Box::new(Route { message: Mutex::new(None), raised: self.0.clone() })
    }
}

impl MessageRoute for Route {
    fn set(&self, message: Option<Message>) {
        *self.message.lock().unwrap() = message;
    }

    fn raise(&self) {
        self.raised.lock().unwrap().extend(*self.message.lock().unwrap());
    }
}

/// The level of INTA.
#[derive(Debug, Default)]
pub(crate) struct Pin(AtomicBool);

impl Pin {
    pub(crate) fn is_high(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl LineSink for Pin {
    fn set_level(&self, _: u32, high: bool) {
        self.0.store(high, Ordering::SeqCst);
    }
}

#[derive(Debug)]
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

/// What a device is plugged into.
pub(crate) struct Board {
    pub(crate) ram: Arc<Ram>,
    /// The same as the device reaches it.
    pub(crate) memory: Arc<dyn GuestMemory>,
    pub(crate) messages: Messages,
    pub(crate) pin: Arc<Pin>,
    pub(crate) notify: Arc<NotifyPages>,
}

impl Default for Board {
    fn default() -> Self {
        let ram = Arc::<Ram>::default();
        Self { memory: ram.clone(), ram, messages: Messages::default(), pin: Arc::default(), notify: Arc::default() }
    }
}

impl Board {
    pub(crate) fn plumbing(&self) -> Plumbing<'_> {
        Plumbing {
            memory: self.memory.clone(),
            messages: &self.messages,
            line: InterruptLine::new(0, self.pin.clone()),
            notify: self.notify.clone(),
            wake: Arc::new(NoWake),
        }
    }

    /// What an engine has to work with after DRIVER_OK, on the caller's thread. A queue that can't be is none.
    pub(crate) fn session(&self, features: u64, queues: &[RingLayout]) -> Session {
        let identity = Identity { vendor: 1, device: 2, revision: 0, class: 0, subsystem: (0, 0) };
        let layout = MsixLayout { vectors: 1, bar: 1, table: 0, pending: 0x800 };
        let msix = Msix::new(&mut ConfigSpace::endpoint(&identity), layout, &self.messages);
        let line = InterruptLine::new(0, self.pin.clone());
        let interrupts = Arc::new(Interrupts::new(queues.len(), msix.vectors(), line));
        interrupts.start();
        let control = Arc::new(Control::new(Lease::new(self.memory.clone())).unwrap());
        let ring_features =
            RingFeatures { indirect: features & INDIRECT != 0, event_index: features & EVENT_INDEX != 0 };
        let queue = |(index, at): (usize, &RingLayout)| {
            let ring = Ring::new(*at, ring_features, RingPosition::default(), control.lease.clone()).ok()?;
            let mut queue = Queue::new(ring, index, interrupts.clone(), Arc::new(EventFd::new().unwrap()));
            queue.start().ok()?;
            Some(queue)
        };
        let queues = queues.iter().enumerate().map(queue).collect();
        let config = Arc::new(Config::new(vec![0; 64], interrupts.clone()));
        Session { features, queues, control, config }
    }
}

/// A guest and its device.
pub(crate) struct Guest {
    pub(crate) board: Board,
    pub(crate) function: Box<dyn PciFunction>,
}

impl Guest {
    pub(crate) fn new(plug: impl FnOnce(Plumbing<'_>) -> std::io::Result<Box<dyn PciFunction>>) -> Self {
        Self::on(Board::default(), plug)
    }

    pub(crate) fn on(board: Board, plug: impl FnOnce(Plumbing<'_>) -> std::io::Result<Box<dyn PciFunction>>) -> Self {
        let function = plug(board.plumbing()).unwrap();
        Self { board, function }
    }

    pub(crate) fn access(&mut self, region: usize, offset: u64, len: u8, data: Option<u64>) -> u64 {
        let (late, _answers) = mpsc::channel::<LateAnswer>();
        let wake: Arc<dyn Wake> = Arc::new(NoWake);
        let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let answer = match data {
            Some(data) => self.function.write(region, offset, data, &access, reply),
            None => self.function.read(region, offset, &access, reply),
        };
        let Answer::Done(value) = answer else { panic!("{answer:?}") };
        value
    }

    pub(crate) fn get(&mut self, offset: u64, len: u8) -> u64 {
        self.access(4, offset, len, None)
    }

    pub(crate) fn put(&mut self, offset: u64, len: u8, data: u64) {
        self.access(4, offset, len, Some(data));
    }

    pub(crate) fn status(&mut self) -> u64 {
        self.get(0x14, 1)
    }

    pub(crate) fn offered(&mut self) -> u64 {
        [0, 1].into_iter().fold(0, |features, half| {
            self.put(0, 4, half);
            features | self.get(4, 4) << (32 * half)
        })
    }

    /// Negotiates as §3.1.1 has it, up to FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.put(0x14, 1, status);
        }
        for half in [0, 1] {
            self.put(8, 4, half);
            self.put(0xc, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.put(0x14, 1, 0xb);
        assert_eq!(self.status(), 0xb);
    }

    /// Sets a queue up, at 64 KiB and a multiple of it.
    pub(crate) fn queue(&mut self, index: u16, size: u16) -> Driver {
        let base = 0x1_0000 * (u64::from(index) + 1);
        self.board.ram.set(base, &vec![0; 0x1_0000]);
        let driver = Driver::new(&self.board.ram, base, size);
        self.set_queue(index, &driver.at);
        driver
    }

    pub(crate) fn set_queue(&mut self, index: u16, at: &RingLayout) {
        self.put(0x16, 2, index.into());
        self.put(0x18, 2, at.size.into());
        for (offset, addr) in [(0x20, at.descriptors), (0x28, at.available), (0x30, at.used)] {
            self.put(offset, 4, addr & 0xffff_ffff);
            self.put(offset + 4, 4, addr >> 32);
        }
        self.put(0x1c, 2, 1);
    }

    /// DRIVER_OK.
    pub(crate) fn go(&mut self) {
        self.put(0x14, 1, 0xf);
    }

    pub(crate) fn kick(&mut self, queue: u16) {
        self.put(0x3000 + 0x1000 * u64::from(queue), 2, queue.into());
    }

    /// Turns MSI-X on, with message 0x40 + n for vector n.
    pub(crate) fn enable_msix(&mut self, vectors: u16) {
        for vector in 0..u64::from(vectors) {
            self.access(1, 16 * vector, 8, Some(0xfee0_0000));
            self.access(1, 16 * vector + 8, 8, Some(0x40 + vector));
        }
        let msix = self.capability(0x11, |_, _| true);
        self.function.write_config(msix + 2, 2, 0x8000);
    }

    /// Where the first capability with that identifier is that `wanted` takes.
    pub(crate) fn capability(&mut self, id: u32, wanted: impl Fn(&mut Self, u16) -> bool) -> u16 {
        let mut at = self.function.read_config(0x34, 1) as u16;
        while at != 0 {
            if self.function.read_config(at, 1) == id && wanted(self, at) {
                return at;
            }
            at = self.function.read_config(at + 1, 1) as u16;
        }
        panic!("no capability {id:#x}");
    }
}

/// A disk on the heap, which insists on being asked for what it has.
pub(crate) struct HeapDisk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) read_only: bool,
    pub(crate) flushes: AtomicUsize,
    pub(crate) discards: AtomicUsize,
    /// Every call fails.
    pub(crate) fails: AtomicBool,
    /// What comes before a write, or else a read, at an offset.
    hook: Hook,
}

type Hook = Box<dyn Fn(bool, u64) -> Result<(), BlockError> + Send + Sync>;

impl HeapDisk {
    pub(crate) fn new(sectors: usize) -> Self {
        Self::hooked(sectors, |_, _| Ok(()))
    }

    /// One that waits or fails as it is told.
    pub(crate) fn hooked(
        sectors: usize,
        hook: impl Fn(bool, u64) -> Result<(), BlockError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            hook: Box::new(hook),
            bytes: Mutex::new(vec![0; sectors * 512]),
            read_only: false,
            flushes: AtomicUsize::new(0),
            discards: AtomicUsize::new(0),
            fails: AtomicBool::new(false),
        }
    }

    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, BlockError> {
        let size = self.size();
        if self.fails.load(Ordering::SeqCst) {
            return Err(BlockError::OutOfRange { offset, len, size });
        }
        assert!(offset + len <= size && offset.is_multiple_of(512) && len.is_multiple_of(512));
        Ok(offset as usize..(offset + len) as usize)
    }

    fn to_write(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, BlockError> {
        assert!(!self.read_only);
        self.range(offset, len)
    }
}

impl BlockBackend for HeapDisk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        (self.hook)(false, offset)?;
        let range = self.range(offset, buf.len() as u64)?;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[range]);
        Ok(())
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        (self.hook)(true, offset)?;
        let range = self.to_write(offset, data.len() as u64)?;
        self.bytes.lock().unwrap()[range].copy_from_slice(data);
        Ok(())
    }

    fn flush(&self) -> Result<(), BlockError> {
        self.range(0, 0)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.to_write(offset, len)?;
        self.discards.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> Result<(), BlockError> {
        let range = self.to_write(offset, len)?;
        self.bytes.lock().unwrap()[range].fill(0);
        Ok(())
    }
}

/// A network that is two lists of frames.
pub(crate) struct HeapNet {
    fd: EventFd,
    pub(crate) to_guest: VecDeque<Vec<u8>>,
    pub(crate) from_guest: Arc<Mutex<Vec<Vec<u8>>>>,
    /// Frames until it is gone.
    pub(crate) left: usize,
    /// What it does to a frame, whose header it insists on understanding; none: frames have none.
    pub(crate) offloads: Option<Offloads>,
}

impl HeapNet {
    pub(crate) fn new(to_guest: impl IntoIterator<Item = Vec<u8>>, left: usize) -> Self {
        Self {
            fd: EventFd::new().unwrap(),
            to_guest: to_guest.into_iter().collect(),
            from_guest: Arc::default(),
            left,
            offloads: None,
        }
    }

    fn take_one(&mut self) -> Result<(), NetError> {
        self.left = self.left.checked_sub(1).ok_or(NetError::Closed)?;
        Ok(())
    }
}

impl NetBackend for HeapNet {
    fn name(&self) -> &str {
        "heap"
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    fn offloads(&self) -> Option<Offloads> {
        self.offloads
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NetError> {
        let header = if let Some(offloads) = self.offloads { check_header(frame, offloads) } else { 0 };
        assert!((1..=MAX_FRAME).contains(&(frame.len() - header)));
        self.take_one()?;
        self.from_guest.lock().unwrap().push(frame.to_vec());
        // Every third finds no room.
        Ok(!self.left.is_multiple_of(3))
    }

    fn receive(&mut self) -> Result<Option<&[u8]>, NetError> {
        Ok(self.to_guest.front().map(|frame| &frame[..]))
    }

    fn consume(&mut self) {
        self.to_guest.pop_front();
    }
}

/// Insists on a header that asks for what can be done to its frame; its length.
fn check_header(packet: &[u8], offloads: Offloads) -> usize {
    let (header, frame) = packet.split_at(HEADER);
    let word = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
    let (flags, kind, segment, start) = (header[0], header[1], word(4), word(6));
    if flags == 0 {
        assert_eq!(header, [0; HEADER]);
        return HEADER;
    }
    assert!(flags == 1 && offloads.checksum && start + word(8) + 2 <= frame.len() && word(2) <= frame.len());
    match kind & 0x7f {
        0 => assert!(segment == 0 && kind == 0),
        1 => assert!(segment > 0 && offloads.tso4 && start + 20 <= word(2)),
        4 => assert!(segment > 0 && offloads.tso6 && start + 20 <= word(2)),
        other => panic!("segments of kind {other}"),
    }
    assert!(kind & 0x80 == 0 || offloads.ecn);
    HEADER
}
