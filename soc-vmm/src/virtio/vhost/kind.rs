//! What the kinds of devices differ in: features, queues, configuration.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_GEOMETRY, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_FS, VIRTIO_ID_NET};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_GUEST_UFO, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4,
    VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::control::CONTROL_SIZE;
use super::direct::Way;
use super::pool::PAGE;
use super::shadow::{Conduct, Loss, Shadow};
use crate::vhost_user::VhostUserError;

/// Most queues (block), pairs of queues (net) or queues of requests (fs) of a device.
pub const MAX_QUEUES: u16 = 16;
/// Bytes of a file system's tag at most (virtio 1.2 §5.11.4).
pub const MAX_TAG: usize = 36;

/// Entries of a queue: what every back end has, and QEMU asks for if nobody says else.
const BLOCK_SIZE: u16 = 128;
const NET_SIZE: u16 = 256;
const FS_SIZE: u16 = 128;
/// Pages of bounce buffers of a queue.
const BLOCK_PAGES: usize = (8 << 20) / PAGE;
const NET_PAGES: usize = (4 << 20) / PAGE;
const FS_PAGES: usize = (8 << 20) / PAGE;
/// Pages of the queue of short messages of a file system.
const URGENT_PAGES: usize = 64;

/// What a disk's driver is told of a request's size: any that keeps to it fits into its queue's buffers.
const SEGMENTS: u32 = 126;
const SEGMENT_BYTES: u32 = 32 << 10;
const _: () = assert!(((SEGMENTS + 2) * SEGMENT_BYTES) as usize <= BLOCK_PAGES * PAGE / 2);
/// Features: a disk says how large a request may be.
const SIZES: u64 = 1 << VIRTIO_BLK_F_SIZE_MAX | 1 << VIRTIO_BLK_F_SEG_MAX;
/// Bytes of a disk's configuration (virtio 1.2 §5.2.4), and offsets in it.
const BLOCK_CONFIG: usize = 60;
const SIZE_MAX: usize = 8;
const SEG_MAX: usize = 12;
const NUM_QUEUES: usize = 34;

/// What a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VhostKind {
    /// A disk.
    Block,
    /// A network interface.
    Net,
    /// A file system of the SoC's.
    Fs {
        /// The name by which the guest mounts it: 1 to [`MAX_TAG`] bytes.
        tag: String,
    },
}

impl VhostKind {
    /// Device type (§5) and PCI class.
    pub(super) fn identity(&self) -> (u32, u32) {
        match self {
            Self::Block => (VIRTIO_ID_BLOCK, 0x01_0000),
            Self::Net => (VIRTIO_ID_NET, 0x02_0000),
            Self::Fs { .. } => (VIRTIO_ID_FS, 0x01_8000),
        }
    }

    /// What the log calls its kind.
    pub(super) fn word(&self) -> &'static str {
        match self {
            Self::Block => "vhost-blk",
            Self::Net => "vhost-net",
            Self::Fs { .. } => "vhost-fs",
        }
    }

    /// Features that are the back end's, where it has them.
    pub(super) fn passed(&self, queues: u16, way: Way) -> u64 {
        let bits: &[u32] = match self {
            Self::Block => &[
                VIRTIO_BLK_F_GEOMETRY,
                VIRTIO_BLK_F_RO,
                VIRTIO_BLK_F_BLK_SIZE,
                VIRTIO_BLK_F_FLUSH,
                VIRTIO_BLK_F_TOPOLOGY,
                VIRTIO_BLK_F_MQ,
                VIRTIO_BLK_F_DISCARD,
                VIRTIO_BLK_F_WRITE_ZEROES,
            ],
            Self::Net => &[
                VIRTIO_NET_F_CSUM,
                VIRTIO_NET_F_GUEST_CSUM,
                VIRTIO_NET_F_GUEST_TSO4,
                VIRTIO_NET_F_GUEST_TSO6,
                VIRTIO_NET_F_GUEST_ECN,
                VIRTIO_NET_F_GUEST_UFO,
                VIRTIO_NET_F_HOST_TSO4,
                VIRTIO_NET_F_HOST_TSO6,
                VIRTIO_NET_F_HOST_ECN,
                VIRTIO_NET_F_HOST_UFO,
                VIRTIO_NET_F_MRG_RXBUF,
                VIRTIO_NET_F_MQ,
            ],
            Self::Fs { .. } => &[],
        };
        let single = match self {
            _ if queues > 1 => 0,
            Self::Block => 1 << VIRTIO_BLK_F_MQ,
            Self::Net => 1 << VIRTIO_NET_F_MQ,
            Self::Fs { .. } => 0,
        };
        // What it says of a request's size counts where it gets the guest's own.
        let sizes = if *self == Self::Block && way == Way::Direct { SIZES } else { 0 };
        bits.iter().fold(sizes, |features, bit| features | 1 << bit) & !single
    }

    /// Features that are soc-vmm's own.
    pub(super) fn own(&self, queues: u16, way: Way) -> u64 {
        match self {
            Self::Block if way == Way::Direct => 0,
            Self::Block => SIZES,
            Self::Net => {
                let control = if queues > 1 { 1 << VIRTIO_NET_F_CTRL_VQ } else { 0 };
                1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS | control
            }
            Self::Fs { .. } => 0,
        }
    }

    /// Refuses a back end that has too little for so many queues. `has`: the queues of a disk or file system, or a network's pairs.
    pub(super) fn check(&self, queues: u16, features: u64, has: Option<u64>) -> Result<(), VhostUserError> {
        let (wanted, least) = match self {
            Self::Block | Self::Net => (usize::from(queues), 1),
            Self::Fs { .. } => (usize::from(queues) + 1, 2),
        };
        let has = has.unwrap_or(least);
        if has < wanted as u64 {
            return Err(VhostUserError::Queues { has, wanted });
        }
        let several = match self {
            Self::Block => Some(VIRTIO_BLK_F_MQ),
            Self::Net => Some(VIRTIO_NET_F_MQ),
            Self::Fs { .. } => None,
        };
        match several {
            Some(bit) if queues > 1 && features >> bit & 1 == 0 => Err(VhostUserError::Queues { has: 1, wanted }),
            _ => Ok(()),
        }
    }

    /// Whether it is one that goes on with the next back end only where that finds what was in flight.
    pub(super) fn needs_record(&self) -> bool {
        *self == Self::Block
    }

    /// Why the device `name` of that kind can't move to another process, if it can't.
    pub(super) fn blocker(&self, name: &str) -> Option<String> {
        let why =
            "its back end keeps what the guest has open, and nobody carries that (VHOST_USER_PROTOCOL_F_DEVICE_STATE)";
        matches!(self, Self::Fs { .. }).then(|| format!("{name} can't move: {why}; unplug it"))
    }

    /// What its own state is called.
    pub(super) fn state_name(&self) -> &'static str {
        match self {
            Self::Block => "vhost-user-blk",
            Self::Net => "vhost-user-net",
            Self::Fs { .. } => "vhost-user-fs",
        }
    }

    /// Sizes of the queues that are the back end's.
    pub(super) fn sizes(&self, queues: u16) -> Vec<u16> {
        match self {
            Self::Block => vec![BLOCK_SIZE; queues.into()],
            Self::Net => vec![NET_SIZE; 2 * usize::from(queues)],
            Self::Fs { .. } => vec![FS_SIZE; usize::from(queues) + 1],
        }
    }

    /// Their shadows.
    pub(super) fn shadows(&self, queues: u16, indirect: bool) -> Vec<Shadow> {
        let shadow = |(index, size): (usize, u16)| {
            let conduct = |loss, whole| Conduct { loss, whole };
            let (pages, conduct) = match self {
                Self::Block => (BLOCK_PAGES, conduct(Loss::Replay, true)),
                // Frames to the guest: its buffers stay where they are.
                Self::Net if index.is_multiple_of(2) => (NET_PAGES, conduct(Loss::Replay, false)),
                Self::Net => (NET_PAGES, conduct(Loss::Drop, false)),
                Self::Fs { .. } if index == 0 => (URGENT_PAGES, conduct(Loss::Fuse, false)),
                Self::Fs { .. } => (FS_PAGES, conduct(Loss::Fuse, false)),
            };
            Shadow::new(index, size, pages, conduct, indirect)
        };
        self.sizes(queues).into_iter().enumerate().map(shadow).collect()
    }

    /// Sizes of the queues that are soc-vmm's own, behind the back end's.
    pub(super) fn own_queues(&self, queues: u16) -> &'static [u16] {
        match self {
            Self::Net if queues > 1 => &[CONTROL_SIZE],
            _ => &[],
        }
    }

    /// How many bytes of its configuration are the back end's.
    pub(super) fn asked(&self) -> usize {
        if *self == Self::Block { BLOCK_CONFIG } else { 0 }
    }

    /// The configuration that the guest sees, made of the back end's part. `mac`: a network interface's address.
    pub(super) fn config(&self, mut part: Vec<u8>, mac: [u8; 6], queues: u16, way: Way) -> Vec<u8> {
        match self {
            Self::Block => {
                let mut put = |at: usize, bytes: &[u8]| part[at..at + bytes.len()].copy_from_slice(bytes);
                if way == Way::Shadow {
                    put(SIZE_MAX, &SEGMENT_BYTES.to_le_bytes());
                    put(SEG_MAX, &SEGMENTS.to_le_bytes());
                }
                put(NUM_QUEUES, &queues.to_le_bytes());
                part
            }
            Self::Net => {
                let words = [VIRTIO_NET_S_LINK_UP as u16, queues, 0];
                mac.into_iter().chain(words.into_iter().flat_map(u16::to_le_bytes)).collect()
            }
            Self::Fs { tag } => {
                let mut config = tag.as_bytes().to_vec();
                config.resize(MAX_TAG, 0);
                config.extend(u32::from(queues).to_le_bytes());
                config
            }
        }
    }

    /// How many of the back end's queues a driver with those features uses.
    pub(super) fn used(&self, features: u64, queues: u16) -> usize {
        match self {
            Self::Block => queues.into(),
            Self::Net if features >> VIRTIO_NET_F_MQ & 1 == 0 => 2,
            Self::Net => 2 * usize::from(queues),
            Self::Fs { .. } => usize::from(queues) + 1,
        }
    }
}
