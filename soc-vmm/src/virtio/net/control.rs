//! The control queue (virtio 1.2 §5.1.6.5): what a driver says of itself.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_ANNOUNCE, VIRTIO_NET_CTRL_ANNOUNCE_ACK, VIRTIO_NET_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, VIRTIO_NET_CTRL_MAC, VIRTIO_NET_CTRL_MAC_ADDR_SET,
    VIRTIO_NET_CTRL_MAC_TABLE_SET, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_CTRL_RX,
    VIRTIO_NET_CTRL_RX_ALLMULTI, VIRTIO_NET_CTRL_RX_ALLUNI, VIRTIO_NET_CTRL_RX_NOBCAST, VIRTIO_NET_CTRL_RX_NOMULTI,
    VIRTIO_NET_CTRL_RX_NOUNI, VIRTIO_NET_CTRL_RX_PROMISC, VIRTIO_NET_CTRL_VLAN, VIRTIO_NET_CTRL_VLAN_ADD,
    VIRTIO_NET_CTRL_VLAN_DEL, VIRTIO_NET_ERR, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_CTRL_RX, VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_MQ, VIRTIO_NET_OK,
};

use super::features::Features;
use super::filter::{ADDRESS, Filter};
use crate::net::Offloads;
use crate::virtio::{Chain, Queue, QueueError};

/// Commands before frames have their turn.
const TURN: usize = 16;
/// Bytes of a command: its class and number, and what is said with it at most. Tables of addresses are the longest, of 64 each mostly.
const COMMAND: usize = 2;
const MAX_DATA: usize = 16 << 10;

/// What a driver has said since its reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) features: Features,
    /// Pairs of queues that there are, and that it uses.
    pub(super) pairs: usize,
    pub(super) active: usize,
    /// What it finishes of frames.
    pub(super) guest: Offloads,
    pub(super) filter: Filter,
    /// It is asked to announce itself, and has not said that it did.
    pub(super) announcing: bool,
}

impl Said {
    /// What a driver with those features has said that says nothing.
    pub(super) fn new(features: Features, pairs: usize, mac: [u8; ADDRESS]) -> Self {
        let filter = Filter::new(mac, features.controls(VIRTIO_NET_F_CTRL_VLAN));
        Self { features, pairs, active: 1, guest: features.guest_offloads(), filter, announcing: false }
    }

    /// The place of the control queue (§5.1.2).
    pub(super) fn control_queue(&self) -> usize {
        2 * if self.features.has(VIRTIO_NET_F_MQ) { self.pairs } else { 1 }
    }

    /// Obeys what is in the queue; whether there is more. Commands are few, so their kicks are always welcome, and an empty queue costs one
    /// look.
    pub(super) fn listen(&mut self, queue: &mut Queue, chain: &mut Chain) -> Result<bool, QueueError> {
        for count in 0..TURN {
            if !queue.pop(chain)? {
                queue.publish()?;
                return if count > 0 { queue.allow_kicks() } else { Ok(false) };
            }
            if chain.readable() < COMMAND as u64 || chain.writable() == 0 {
                return Err(QueueError::Broken("a command without a number or a place for its answer"));
            }
            let mut command = [0; COMMAND];
            chain.read(queue.lease(), &mut command)?;
            let len = chain.readable() as usize;
            let mut obeyed = false;
            if len <= MAX_DATA {
                let mut data = vec![0; len];
                chain.read(queue.lease(), &mut data)?;
                obeyed = self.obey(command, &data);
            }
            let answer = if obeyed { VIRTIO_NET_OK } else { VIRTIO_NET_ERR };
            chain.write(queue.lease(), &[answer as u8])?;
            queue.push(chain.head(), 1)?;
        }
        queue.publish()?;
        Ok(true)
    }

    /// Does what one command says; false: it can't be done, and nothing is changed.
    fn obey(&mut self, [class, command]: [u8; COMMAND], data: &[u8]) -> bool {
        let may = |bit| self.features.controls(bit);
        let command = u32::from(command);
        match u32::from(class) {
            VIRTIO_NET_CTRL_RX if may(VIRTIO_NET_F_CTRL_RX) => self.set_mode(command, data),
            VIRTIO_NET_CTRL_MAC => match (command, data.first_chunk::<ADDRESS>()) {
                (VIRTIO_NET_CTRL_MAC_TABLE_SET, _) if may(VIRTIO_NET_F_CTRL_RX) => self.filter.set_tables(data),
                // The configuration keeps the address that the interface came with: after a reset it is that again.
                (VIRTIO_NET_CTRL_MAC_ADDR_SET, Some(mac))
                    if may(VIRTIO_NET_F_CTRL_MAC_ADDR) && data.len() == ADDRESS =>
                {
                    self.filter.own = *mac;
                    true
                }
                _ => false,
            },
            VIRTIO_NET_CTRL_VLAN => match (command, word(data)) {
                (VIRTIO_NET_CTRL_VLAN_ADD, Some(id)) => self.filter.set_vlan(id, true),
                (VIRTIO_NET_CTRL_VLAN_DEL, Some(id)) => self.filter.set_vlan(id, false),
                _ => false,
            },
            VIRTIO_NET_CTRL_ANNOUNCE if may(VIRTIO_NET_F_GUEST_ANNOUNCE) => {
                let right = command == VIRTIO_NET_CTRL_ANNOUNCE_ACK && data.is_empty();
                self.announcing &= !right;
                right
            }
            VIRTIO_NET_CTRL_MQ if may(VIRTIO_NET_F_MQ) => match (command, word(data).map(usize::from)) {
                (VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, Some(count)) if (1..=self.pairs).contains(&count) => {
                    self.active = count;
                    true
                }
                _ => false,
            },
            VIRTIO_NET_CTRL_GUEST_OFFLOADS if may(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) => {
                let bits = <[u8; 8]>::try_from(data).map(u64::from_le_bytes);
                match (command, bits) {
                    (VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET, Ok(bits)) if bits & !self.features.guest_bits() == 0 => {
                        self.guest = Features(bits).guest_offloads();
                        true
                    }
                    _ => false,
                }
            }
            _ => false,
        }
    }

    fn set_mode(&mut self, command: u32, data: &[u8]) -> bool {
        let extra = self.features.controls(VIRTIO_NET_F_CTRL_RX_EXTRA);
        let filter = &mut self.filter;
        let mode = match command {
            VIRTIO_NET_CTRL_RX_PROMISC => &mut filter.promiscuous,
            VIRTIO_NET_CTRL_RX_ALLMULTI => &mut filter.all_groups,
            VIRTIO_NET_CTRL_RX_ALLUNI if extra => &mut filter.all_stations,
            VIRTIO_NET_CTRL_RX_NOMULTI if extra => &mut filter.no_groups,
            VIRTIO_NET_CTRL_RX_NOUNI if extra => &mut filter.no_stations,
            VIRTIO_NET_CTRL_RX_NOBCAST if extra => &mut filter.no_broadcast,
            _ => return false,
        };
        let [on] = data else { return false };
        *mode = *on != 0;
        true
    }
}

fn word(data: &[u8]) -> Option<u16> {
    data.try_into().map(u16::from_le_bytes).ok()
}
