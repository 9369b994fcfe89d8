//! What an interface offers, and what of it a driver took (virtio 1.2 §5.1.3).

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_MAC_ADDR, VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA, VIRTIO_NET_F_CTRL_VLAN, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use crate::net::Offloads;

/// What every interface offers. Filtering costs no more here than in the guest, and what is filtered crosses no bus.
const ALWAYS: [u32; 9] = [
    VIRTIO_NET_F_MAC,
    VIRTIO_NET_F_STATUS,
    VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_CTRL_VQ,
    VIRTIO_NET_F_CTRL_RX,
    VIRTIO_NET_F_CTRL_RX_EXTRA,
    VIRTIO_NET_F_CTRL_VLAN,
    VIRTIO_NET_F_CTRL_MAC_ADDR,
    VIRTIO_NET_F_GUEST_ANNOUNCE,
];

/// Features as bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Features(pub(super) u64);

impl Features {
    /// What is offered with a back end that does `offloads`. One without a header before its frames takes finished frames alone: what the
    /// guest's CPU does to them while it touches them anyway, the SoC would have to do instead.
    pub(super) fn offered(offloads: Option<Offloads>, has_mtu: bool, pairs: usize) -> Self {
        let mut bits = ALWAYS.iter().fold(0, |bits, bit| bits | 1 << bit);
        let mut offer = |bit: u32, offered: bool| bits |= u64::from(offered) << bit;
        offer(VIRTIO_NET_F_MTU, has_mtu);
        offer(VIRTIO_NET_F_MQ, pairs > 1);
        if let Some(Offloads { checksum, tso4, tso6, ecn }) = offloads.map(Offloads::consistent) {
            offer(VIRTIO_NET_F_CSUM, checksum);
            offer(VIRTIO_NET_F_HOST_TSO4, tso4);
            offer(VIRTIO_NET_F_HOST_TSO6, tso6);
            offer(VIRTIO_NET_F_HOST_ECN, ecn);
            offer(VIRTIO_NET_F_GUEST_CSUM, checksum);
            offer(VIRTIO_NET_F_GUEST_TSO4, tso4);
            offer(VIRTIO_NET_F_GUEST_TSO6, tso6);
            offer(VIRTIO_NET_F_GUEST_ECN, ecn);
            offer(VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, checksum);
        }
        Self(bits)
    }

    pub(super) fn has(self, bit: u32) -> bool {
        self.0 >> bit & 1 != 0
    }

    /// Whether the driver has the control queue and that which is ordered by it.
    pub(super) fn controls(self, bit: u32) -> bool {
        self.has(VIRTIO_NET_F_CTRL_VQ) && self.has(bit)
    }

    /// What the driver may leave to its network.
    pub(super) fn host_offloads(self) -> Offloads {
        Offloads {
            checksum: self.has(VIRTIO_NET_F_CSUM),
            tso4: self.has(VIRTIO_NET_F_HOST_TSO4),
            tso6: self.has(VIRTIO_NET_F_HOST_TSO6),
            ecn: self.has(VIRTIO_NET_F_HOST_ECN),
        }
        .consistent()
    }

    /// What its network may leave to the driver. The same bits stand for it in a command that changes it (§5.1.6.5.6.1).
    pub(super) fn guest_offloads(self) -> Offloads {
        Offloads {
            checksum: self.has(VIRTIO_NET_F_GUEST_CSUM),
            tso4: self.has(VIRTIO_NET_F_GUEST_TSO4),
            tso6: self.has(VIRTIO_NET_F_GUEST_TSO6),
            ecn: self.has(VIRTIO_NET_F_GUEST_ECN),
        }
        .consistent()
    }

    /// The bits of such a command.
    pub(super) fn of_guest(offloads: Offloads) -> Self {
        let Offloads { checksum, tso4, tso6, ecn } = offloads;
        let bits = [
            (VIRTIO_NET_F_GUEST_CSUM, checksum),
            (VIRTIO_NET_F_GUEST_TSO4, tso4),
            (VIRTIO_NET_F_GUEST_TSO6, tso6),
            (VIRTIO_NET_F_GUEST_ECN, ecn),
        ];
        Self(bits.into_iter().fold(0, |all, (bit, on)| all | u64::from(on) << bit))
    }

    /// Which of its bits can be in such a command.
    pub(super) fn guest_bits(self) -> u64 {
        let bits = [VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_ECN];
        self.0 & bits.iter().fold(0, |bits, bit| bits | 1 << bit)
    }
}
