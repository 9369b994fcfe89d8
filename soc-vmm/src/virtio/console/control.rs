//! Control messages (virtio 1.2 §5.3.6.2).

use crate::virtio::{Chain, Lease, QueueError};

/// Bytes of a message, before a name.
const LEN: usize = 8;

/// What a message is about.
pub(super) const DEVICE_READY: u16 = 0;
pub(super) const DEVICE_ADD: u16 = 1;
pub(super) const DEVICE_REMOVE: u16 = 2;
pub(super) const PORT_READY: u16 = 3;
pub(super) const PORT_OPEN: u16 = 6;
pub(super) const PORT_NAME: u16 = 7;

/// A message of the driver's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) port: u32,
    pub(super) event: u16,
    pub(super) value: u16,
}

impl Message {
    pub(super) fn read(chain: &mut Chain, lease: &Lease) -> Result<Self, QueueError> {
        if chain.readable() < LEN as u64 || chain.writable() > 0 {
            return Err(QueueError::Broken("what is no control message"));
        }
        let mut bytes = [0; LEN];
        chain.read(lease, &mut bytes)?;
        let [a, b, c, d, event @ ..] = bytes;
        let [event_low, event_high, value_low, value_high] = event;
        Ok(Self {
            port: u32::from_le_bytes([a, b, c, d]),
            event: u16::from_le_bytes([event_low, event_high]),
            value: u16::from_le_bytes([value_low, value_high]),
        })
    }

    /// The message to the driver, with a port's name behind it or nothing.
    pub(super) fn bytes(self, name: &str) -> Vec<u8> {
        let mut bytes = self.port.to_le_bytes().to_vec();
        bytes.extend(self.event.to_le_bytes());
        bytes.extend(self.value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}
