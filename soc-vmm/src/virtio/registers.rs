//! The common configuration: features, status, queues (virtio 1.2 §4.1.4.3), and the rules of initialisation (§3.1).

use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};

use super::RingLayout;
use super::interrupt::NO_VECTOR;

/// Bytes of the common configuration.
pub(super) const COMMON_SIZE: usize = 0x3c;
/// Offset of the device's status in it.
pub(super) const STATUS: usize = 0x14;

const DRIVER_OK: u8 = VIRTIO_CONFIG_S_DRIVER_OK as u8;
const FEATURES_OK: u8 = VIRTIO_CONFIG_S_FEATURES_OK as u8;
const NEEDS_RESET: u8 = VIRTIO_CONFIG_S_NEEDS_RESET as u8;

/// All that a driver sets, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    offered_select: u32,
    accepted_select: u32,
    /// Accepted features.
    pub accepted: u64,
    /// Device status, without DEVICE_NEEDS_RESET.
    pub status: u8,
    /// MSI-X vector of the configuration.
    pub config_vector: u16,
    queue_select: u16,
    /// The queues.
    pub queues: Vec<QueueRegisters>,
}

/// A queue's registers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueRegisters {
    /// Where it is, and its size, which is 0 for no queue at all.
    pub layout: RingLayout,
    /// MSI-X vector.
    pub vector: u16,
    /// Whether the driver has enabled it.
    pub enabled: bool,
}

/// What never changes of a device's registers.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    /// Offered features.
    pub(super) offered: u64,
    /// Size of each queue.
    pub(super) queues: Vec<u16>,
    /// MSI-X vectors.
    pub(super) vectors: u16,
}

/// What a write makes necessary outside the registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    Nothing,
    /// Status 0 was written.
    Reset,
    /// DRIVER_OK was set.
    Start,
    /// The vector of a queue, or of the configuration behind the last queue, is another one.
    Route(usize, u16),
}

impl Registers {
    pub(super) fn new(limits: &Limits) -> Self {
        let queue = |size: &u16| QueueRegisters {
            layout: RingLayout { size: *size, ..RingLayout::default() },
            vector: NO_VECTOR,
            enabled: false,
        };
        Self {
            offered_select: 0,
            accepted_select: 0,
            accepted: 0,
            status: 0,
            config_vector: NO_VECTOR,
            queue_select: 0,
            queues: limits.queues.iter().map(queue).collect(),
        }
    }

    /// The registers as bytes, in which a read of any width finds its own.
    pub(super) fn image(&self, limits: &Limits, needs_reset: bool, generation: u8) -> [u8; COMMON_SIZE] {
        let mut image = [0; COMMON_SIZE];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.offered_select.to_le_bytes());
        put(0x04, &half(limits.offered, self.offered_select).to_le_bytes());
        put(0x08, &self.accepted_select.to_le_bytes());
        put(0x0c, &half(self.accepted, self.accepted_select).to_le_bytes());
        put(0x10, &self.config_vector.to_le_bytes());
        put(0x12, &(limits.queues.len() as u16).to_le_bytes());
        put(STATUS, &[self.status | if needs_reset { NEEDS_RESET } else { 0 }, generation]);
        put(0x16, &self.queue_select.to_le_bytes());
        if let Some(queue) = self.queues.get(usize::from(self.queue_select)) {
            put(0x18, &queue.layout.size.to_le_bytes());
            put(0x1a, &queue.vector.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            // The place of its kick: its index.
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.layout.descriptors.to_le_bytes());
            put(0x28, &queue.layout.available.to_le_bytes());
            put(0x30, &queue.layout.used.to_le_bytes());
        } else {
            put(0x1a, &NO_VECTOR.to_le_bytes());
        }
        image
    }

    /// A driver's write: of one register, or of a half of a 64-bit one (§4.1.3.1). Any other does nothing.
    pub(super) fn write(&mut self, offset: u64, len: u8, data: u64, limits: &Limits) -> Effect {
        match (offset, len) {
            (0x00, 4) => self.offered_select = data as u32,
            (0x08, 4) => self.accepted_select = data as u32,
            (0x0c, 4) => self.accept(data as u32),
            (0x10, 2) => {
                self.config_vector = vector(data, limits);
                return Effect::Route(self.queues.len(), self.config_vector);
            }
            (0x14, 1) => return self.set_status(data as u8, limits),
            (0x16, 2) => self.queue_select = data as u16,
            (0x18.., _) => return self.write_queue(offset, len, data, limits),
            _ => {}
        }
        Effect::Nothing
    }

    /// Whether a driver could have made them what they are, but for the features, which are
    /// [`Registers::agreed`]'s.
    ///
    /// # Errors
    /// What it could not.
    pub(super) fn check(&self, limits: &Limits) -> Result<(), &'static str> {
        let has = |bit: u8| self.status & bit != 0;
        let is_vector = |vector: u16| vector == NO_VECTOR || vector < limits.vectors;
        if self.queues.len() != limits.queues.len() {
            return Err("it has another number of queues than here: start this machine with the source's options");
        }
        let sizes = || self.queues.iter().map(|queue| queue.layout.size).zip(&limits.queues);
        if sizes().any(|(size, most)| !size.is_power_of_two() || size > *most) {
            return Err("it has a queue of a size that none has here: start this machine with the source's options");
        }
        if !is_vector(self.config_vector) || !self.queues.iter().all(|queue| is_vector(queue.vector)) {
            return Err("it has a vector that there isn't");
        }
        if has(NEEDS_RESET) || has(DRIVER_OK) && !has(FEATURES_OK) {
            return Err("it has a status that no driver can set");
        }
        if has(FEATURES_OK) && self.accepted >> VIRTIO_F_VERSION_1 & 1 == 0 {
            return Err("its driver doesn't know VIRTIO_F_VERSION_1");
        }
        Ok(())
    }

    /// The features that the driver and the device have agreed on.
    pub(super) fn agreed(&self) -> u64 {
        if self.status & FEATURES_OK == 0 { 0 } else { self.accepted }
    }

    /// Whether the driver has set DRIVER_OK.
    pub(super) fn is_running(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    /// Device reset (§2.4).
    pub(super) fn reset(&mut self, limits: &Limits) {
        *self = Self::new(limits);
    }

    fn accept(&mut self, half: u32) {
        // Once they are agreed on they stay (§3.1.1).
        if self.status & FEATURES_OK == 0 && self.accepted_select < 2 {
            let shift = 32 * self.accepted_select;
            self.accepted = self.accepted & !(0xffff_ffff << shift) | u64::from(half) << shift;
        }
    }

    fn set_status(&mut self, status: u8, limits: &Limits) -> Effect {
        if status == 0 {
            return Effect::Reset;
        }
        let was = self.status;
        // A driver can't take a bit back but by a reset (§2.1.1).
        let mut now = was | status & !NEEDS_RESET;
        if self.accepted & !limits.offered != 0 || self.accepted >> VIRTIO_F_VERSION_1 & 1 == 0 {
            now &= !FEATURES_OK;
        }
        if now & FEATURES_OK == 0 {
            now &= !DRIVER_OK;
        }
        self.status = now;
        if now & !was & DRIVER_OK != 0 { Effect::Start } else { Effect::Nothing }
    }

    fn write_queue(&mut self, offset: u64, len: u8, data: u64, limits: &Limits) -> Effect {
        let index = usize::from(self.queue_select);
        let running = self.status & DRIVER_OK != 0;
        let Some(queue) = self.queues.get_mut(index) else { return Effect::Nothing };
        if (offset, len) == (0x1a, 2) {
            queue.vector = vector(data, limits);
            return Effect::Route(index, queue.vector);
        }
        // An enabled queue stays as it is (§4.1.4.3.2).
        if queue.enabled || running {
            return Effect::Nothing;
        }
        let layout = &mut queue.layout;
        match (offset, len) {
            (0x18, 2) => {
                let size = data as u16;
                if size.is_power_of_two() && size <= limits.queues[index] {
                    layout.size = size;
                }
            }
            (0x1c, 2) => queue.enabled = data == 1,
            (0x20 | 0x24, _) => put(&mut layout.descriptors, offset - 0x20, len, data),
            (0x28 | 0x2c, _) => put(&mut layout.available, offset - 0x28, len, data),
            (0x30 | 0x34, _) => put(&mut layout.used, offset - 0x30, len, data),
            _ => {}
        }
        Effect::Nothing
    }
}

fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

/// A vector that there is, or none (§4.1.5.1.2).
fn vector(data: u64, limits: &Limits) -> u16 {
    if data < u64::from(limits.vectors) { data as u16 } else { NO_VECTOR }
}

/// Writes an address, whole or by halves.
fn put(address: &mut u64, at: u64, len: u8, data: u64) {
    match (at, len) {
        (0, 8) => *address = data,
        (0, 4) => *address = *address & !0xffff_ffff | data & 0xffff_ffff,
        (4, 4) => *address = *address & 0xffff_ffff | data << 32,
        _ => {}
    }
}
