//! A virtio device as a PCI function, without the legacy interface (virtio 1.2 §4.1).

mod missing;
mod state;

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::{VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::notify::Kick;
use super::registers::{COMMON_SIZE, Effect, Limits, QueueRegisters, Registers, STATUS};
use super::session::{Config, Control, Engine, Queue, Session, eventfd, ring_bell};
use super::word::DriverWord;
use super::worker::Worker;
use super::{Interrupts, Lease, Plumbing, QueueError, Ring, RingFeatures, RingPosition};
use crate::bus::{Access, Answer, Deferred};
use crate::memory::GuestMemory;
use crate::pci::{
    Bar, CAP_EXPRESS, ConfigSpace, Identity, Msix, MsixLayout, PciFunction, Signal, Space, Window, bar_windows, command,
};

/// BAR of the MSI-X table.
const MSIX_BAR: usize = 1;
/// BAR of everything else.
const REGISTERS: usize = 4;
/// A structure has a page of it: the common configuration, ISR status, the device's configuration; and then each queue's kicks.
const PAGE: u64 = 0x1000;
const NOTIFY: u64 = 3 * PAGE;
/// Bytes from one queue's kick to the next one's: whole pages on every function, whether it has notify pages or not, so that the device is
/// the same wherever its VM goes.
const NOTIFY_STEP: u64 = PAGE;

/// Capability: vendor-specific.
const CAP_VENDOR: u8 = 0x09;
/// Kinds of virtio's capabilities (§4.1.4).
const CAP_COMMON: u8 = 1;
const CAP_NOTIFY: u8 = 2;
const CAP_ISR: u8 = 3;
const CAP_DEVICE: u8 = 4;
const CAP_PCI: u8 = 5;

/// What makes a function the device that it is.
pub(super) struct Model {
    /// For the log, and the thread's name.
    pub(super) name: String,
    /// Device type (§5).
    pub(super) kind: u32,
    /// PCI class, as `0xccsspp`.
    pub(super) class: u32,
    /// Its own features.
    pub(super) features: u64,
    /// Size of each queue: powers of 2.
    pub(super) queues: Vec<u16>,
    /// Its configuration.
    pub(super) config: Vec<u8>,
    /// Its engine's state: name and version.
    pub(super) state: (&'static str, u32),
}

/// A virtio device behind PCI registers.
pub struct VirtioPci {
    config: ConfigSpace,
    msix: Msix,
    interrupts: Arc<Interrupts>,
    limits: Limits,
    registers: Registers,
    /// The device's own configuration.
    device: Arc<Config>,
    /// What of it the driver writes.
    words: Vec<Arc<DriverWord>>,
    kicks: Vec<Kick>,
    memory: Arc<dyn GuestMemory>,
    session: Option<Arc<Control>>,
    /// The last one whose memory was lent when it was over, and the status that the driver had given the device.
    ending: Option<(Arc<Control>, u8)>,
    worker: Worker,
    /// Device type.
    kind: u32,
    /// Why it can't move.
    blocker: Option<String>,
    /// Name and version of its engine's state.
    state: (&'static str, u32),
    /// The capability that reaches BARs through configuration space (§4.1.4.9).
    window: u16,
}

impl VirtioPci {
    /// # Errors
    /// This process can have no more threads or descriptors.
    pub(super) fn new(model: Model, engine: Box<dyn Engine>, plumbing: Plumbing<'_>) -> io::Result<Self> {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1040 + model.kind as u16,
            revision: 1,
            class: model.class,
            subsystem: (0x1af4, 0x1100),
        };
        let mut config = ConfigSpace::endpoint(&identity).with_pin();
        config.add_bar(MSIX_BAR, Bar { space: Space::Memory32, size: PAGE, prefetchable: false });
        let size = registers_size(model.queues.len());
        config.add_bar(REGISTERS, Bar { space: Space::Memory64, size, prefetchable: true });
        let vectors = model.queues.len() as u16 + 1;
        let layout = MsixLayout { vectors, bar: MSIX_BAR as u8, table: 0, pending: 0x800 };
        let msix = Msix::new(&mut config, layout, plumbing.messages);
        let window = add_capabilities(&mut config, model.queues.len());
        add_express(&mut config);

        let interrupts = Arc::new(Interrupts::new(model.queues.len(), msix.vectors(), plumbing.line));
        let common =
            [VIRTIO_F_VERSION_1, VIRTIO_F_ORDER_PLATFORM, VIRTIO_RING_F_INDIRECT_DESC, VIRTIO_RING_F_EVENT_IDX];
        let offered = common.iter().fold(model.features, |features, bit| features | 1 << bit);
        let kicks = plumbing.notify.kicks(model.queues.len())?;
        let limits = Limits { offered, queues: model.queues, vectors };
        Ok(Self {
            registers: Registers::new(&limits),
            device: Arc::new(Config::new(model.config, interrupts.clone())),
            words: Vec::new(),
            worker: Worker::new(model.name, engine, interrupts.clone(), plumbing.wake)?,
            kind: model.kind,
            blocker: None,
            state: model.state,
            session: None,
            ending: None,
            memory: plumbing.memory,
            config,
            msix,
            interrupts,
            limits,
            kicks,
            window,
        })
    }

    /// Lets the driver write these words of the device's configuration (§2.5).
    pub(super) fn with_words(mut self, words: Vec<Arc<DriverWord>>) -> Self {
        self.words = words;
        self
    }

    /// Keeps it in this process, for that reason, if there is one.
    pub(super) fn kept_by(mut self, blocker: Option<String>) -> Self {
        self.blocker = blocker;
        self
    }

    /// Takes features back that its queues don't have.
    pub(super) fn without(mut self, features: u64) -> Self {
        self.limits.offered &= !features;
        self
    }

    /// Has kicks of the first `queues` queues go past this process, to whom the engine gives their eventfds, where the host signals them.
    ///
    /// # Errors
    /// This process can have no more descriptors.
    pub(super) fn with_bypass(mut self, queues: usize) -> io::Result<Self> {
        for kick in self.kicks.iter_mut().take(queues) {
            kick.bypass = Some(Arc::new(eventfd()?));
        }
        Ok(self)
    }

    /// DRIVER_OK: hands the queues to the engine.
    fn start(&mut self) {
        // Descriptors are the one thing that can be missing. The driver finds a device that doesn't work; the VM goes on.
        let Ok(control) = Control::new(Lease::new(self.memory.clone())) else {
            tracing::error!("no more descriptors in this process: a virtio device doesn't start");
            return;
        };
        let control = Arc::new(control);
        self.interrupts.start();
        match self.open(&self.registers, &control, |_| RingPosition::default()) {
            Ok(session) => self.worker.start(session),
            Err(_) => {
                control.ask_for_reset();
                self.interrupts.config();
            }
        }
        self.session = Some(control);
    }

    /// A session over the queues as `registers` have them, each at its position.
    fn open(
        &self,
        registers: &Registers,
        control: &Arc<Control>,
        position: impl Fn(usize) -> RingPosition,
    ) -> Result<Session, QueueError> {
        let has = |bit: u32| registers.accepted >> bit & 1 != 0;
        let features =
            RingFeatures { indirect: has(VIRTIO_RING_F_INDIRECT_DESC), event_index: has(VIRTIO_RING_F_EVENT_IDX) };
        let queue = |(index, (registers, kick)): (usize, (&QueueRegisters, &Kick))| {
            if !registers.enabled {
                return Ok(None);
            }
            let ring = Ring::new(registers.layout, features, position(index), control.lease.clone())?;
            let queue = Queue::new(ring, index, self.interrupts.clone(), kick.event.clone());
            Ok(Some(queue.with_bypass(kick.bypass.clone())))
        };
        let queues = registers.queues.iter().zip(&self.kicks).enumerate().map(queue).collect::<Result<_, _>>()?;
        let (control, config) = (control.clone(), self.device.clone());
        Ok(Session { features: registers.accepted, queues, control, config })
    }

    /// Device reset: the guest's memory is its own again.
    fn reset_device(&mut self) {
        if let Some(session) = self.session.take() {
            session.end();
            self.worker.forget();
            if session.is_lent() {
                self.ending = Some((session, self.registers.status));
            }
        }
        self.registers.reset(&self.limits);
        self.interrupts.reset();
        self.words.iter().for_each(|word| word.reset());
    }

    fn read_bar(&mut self, bar: usize, offset: u64, len: u8) -> u64 {
        let mut data = [0; 8];
        let bytes = &mut data[..usize::from(len.min(8))];
        match (bar, offset / PAGE) {
            (MSIX_BAR, _) => return self.msix.read(offset, len),
            (REGISTERS, 0) => {
                let needs_reset = self.session.as_ref().is_some_and(|session| session.needs_reset());
                let mut image = self.registers.image(&self.limits, needs_reset, self.device.generation());
                self.ending.take_if(|(session, _)| !session.is_lent());
                if let Some((_, status)) = &self.ending
                    && self.registers.status == 0
                {
                    // A reset is over when the device reaches the driver's memory no more (§4.1.4.3.1).
                    image[STATUS] = *status;
                }
                for (to, from) in bytes.iter_mut().zip(image.iter().skip(offset as usize)) {
                    *to = *from;
                }
            }
            (REGISTERS, 1) if offset == PAGE => bytes[0] = self.interrupts.take_status(),
            (REGISTERS, 2) => {
                let offset = offset - 2 * PAGE;
                self.device.read(offset as usize, bytes);
                self.words.iter().for_each(|word| word.show(offset, bytes));
            }
            _ => {}
        }
        u64::from_le_bytes(data)
    }

    fn write_bar(&mut self, bar: usize, offset: u64, len: u8, data: u64) {
        let data = if len < 8 { data & !(u64::MAX << (8 * len)) } else { data };
        match (bar, offset / PAGE) {
            (MSIX_BAR, _) => self.msix.write(offset, len, data),
            (REGISTERS, 0) => match self.registers.write(offset, len, data, &self.limits) {
                Effect::Nothing => {}
                Effect::Reset => self.reset_device(),
                Effect::Start => self.start(),
                Effect::Route(index, vector) => self.interrupts.set_route(index, vector),
            },
            (REGISTERS, 2) => self.words.iter().for_each(|word| word.write(offset - 2 * PAGE, len, data)),
            (REGISTERS, 3..) => {
                let kick = self.kicks.get(((offset - NOTIFY) / NOTIFY_STEP) as usize);
                if let Some(kick) = kick.filter(|_| self.session.is_some()) {
                    ring_bell(&kick.event);
                }
            }
            _ => {}
        }
    }

    /// BAR, offset and length that the window in configuration space is at, if it is anywhere.
    fn windowed(&self) -> Option<(usize, u64, u8)> {
        let bar = self.config.read(self.window + 4, 1) as usize;
        let offset = u64::from(self.config.read(self.window + 8, 4));
        let len = self.config.read(self.window + 12, 4);
        let size = match bar {
            MSIX_BAR => PAGE,
            REGISTERS => registers_size(self.kicks.len()),
            _ => return None,
        };
        let legal = matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len.into()) && offset < size;
        legal.then_some((bar, offset, len as u8))
    }

    /// Whether a configuration access touches the window's data.
    fn in_window(&self, offset: u16, len: u8) -> bool {
        let data = self.window + 16;
        offset < data + 4 && offset + u16::from(len) > data
    }

    fn update_pin(&mut self) {
        self.interrupts.enable_pin(self.config.command() & command::INTX_DISABLE != 0);
    }
}

impl PciFunction for VirtioPci {
    fn config(&self) -> &ConfigSpace {
        &self.config
    }

    fn config_mut(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn read_config(&mut self, offset: u16, len: u8) -> u32 {
        if self.in_window(offset, len)
            && let Some((bar, at, width)) = self.windowed()
        {
            let value = self.read_bar(bar, at, width) as u32;
            self.config.put(self.window + 16, &value.to_le_bytes()[..width.into()]);
        }
        self.config.show_interrupt(self.interrupts.is_asserted());
        self.config.read(offset, len)
    }

    fn write_config(&mut self, offset: u16, len: u8, value: u32) {
        self.config.write(offset, len, value);
        self.msix.configure(&self.config);
        self.update_pin();
        if self.in_window(offset, len)
            && let Some((bar, at, width)) = self.windowed()
        {
            let data = self.config.read(self.window + 16, width);
            self.write_bar(bar, at, width, data.into());
        }
    }

    /// Kicks: a kick says nothing but that the rings in memory are to be looked at, and one too many or too late costs nothing.
    fn posted(&self) -> Vec<Window> {
        let registers = bar_windows(&self.config).into_iter().filter(|window| window.region == REGISTERS);
        let kicks = |window: Window| Window {
            base: window.base + NOTIFY,
            len: NOTIFY_STEP * self.kicks.len() as u64,
            ..window
        };
        registers.map(kicks).collect()
    }

    fn signals(&self) -> Vec<Signal> {
        let registers = bar_windows(&self.config).into_iter().find(|window| window.region == REGISTERS);
        let Some(registers) = registers else { return Vec::new() };
        let signal = |(kick, index): (&Kick, u64)| {
            let base = registers.base + NOTIFY + NOTIFY_STEP * index;
            let window = Window { base, len: NOTIFY_STEP, ..registers };
            let event = kick.bypass.as_ref().unwrap_or(&kick.event).clone();
            Signal { window, event, page: kick.page() }
        };
        self.kicks.iter().zip(0..).map(signal).collect()
    }

    fn read(&mut self, region: usize, offset: u64, access: &Access, _: Deferred<'_>) -> Answer {
        Answer::Done(self.read_bar(region, offset, access.len))
    }

    fn write(&mut self, region: usize, offset: u64, data: u64, access: &Access, _: Deferred<'_>) -> Answer {
        self.write_bar(region, offset, access.len, data);
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.reset_device();
        self.config.reset();
        self.msix.reset();
        self.update_pin();
    }
}

impl Drop for VirtioPci {
    fn drop(&mut self) {
        self.reset_device();
    }
}

impl std::fmt::Debug for VirtioPci {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VirtioPci")
            .field("limits", &self.limits)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

/// Bytes of the BAR of a device with so many queues.
fn registers_size(queues: usize) -> u64 {
    (NOTIFY + NOTIFY_STEP * queues as u64).next_power_of_two()
}

/// Adds virtio's own capabilities; the offset of the one that is a window.
fn add_capabilities(config: &mut ConfigSpace, queues: usize) -> u16 {
    let kicks = NOTIFY_STEP * queues as u64;
    let pages = [(CAP_COMMON, COMMON_SIZE as u64), (CAP_ISR, PAGE), (CAP_DEVICE, PAGE), (CAP_NOTIFY, kicks)];
    for (page, (kind, len)) in (0..).zip(pages) {
        let mut body = capability(kind, REGISTERS as u8, page * PAGE as u32, len as u32);
        if kind == CAP_NOTIFY {
            body.extend((NOTIFY_STEP as u32).to_le_bytes());
        }
        add_vendor(config, body, &[]);
    }
    let mut body = capability(CAP_PCI, 0, 0, 0);
    body.extend([0; 4]);
    // BAR; offset, length, data.
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    add_vendor(config, body, &writable)
}

/// A capability behind its first three bytes: kind, BAR, identifier, padding, offset, length.
fn capability(kind: u8, bar: u8, offset: u32, len: u32) -> Vec<u8> {
    let mut body = vec![kind, bar, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body
}

fn add_vendor(config: &mut ConfigSpace, mut body: Vec<u8>, writable: &[u8]) -> u16 {
    body.insert(0, body.len() as u8 + 3);
    config.add_capability(CAP_VENDOR, &body, writable)
}

/// A PCI Express endpoint (PCI Express Base §7.5.3), as it sits behind a root port.
fn add_express(config: &mut ConfigSpace) {
    let mut body = [0; 58];
    let mut writable = [0; 58];
    let put = |to: &mut [u8; 58], at: usize, bytes: &[u8]| to[at - 2..][..bytes.len()].copy_from_slice(bytes);
    // Version 2, an endpoint; role-based error reporting; a link of one lane at 2.5 GT/s, and that is what it runs at.
    put(&mut body, 0x02, &2u16.to_le_bytes());
    put(&mut body, 0x04, &(1u32 << 15).to_le_bytes());
    put(&mut body, 0x0c, &(1u32 | 1 << 4).to_le_bytes());
    put(&mut body, 0x12, &(1u16 | 1 << 4).to_le_bytes());
    put(&mut body, 0x2c, &2u32.to_le_bytes());
    put(&mut body, 0x30, &1u16.to_le_bytes());
    // Device control, link control, device control 2.
    put(&mut writable, 0x08, &[0xff, 0x7f]);
    put(&mut writable, 0x10, &[0xdb, 0x00]);
    put(&mut writable, 0x28, &[0x3f, 0x00]);
    let express = config.add_capability(CAP_EXPRESS, &body, &writable);
    // Device status: errors.
    config.allow_clear(express + 0x0a, &[0x0f]);
}
