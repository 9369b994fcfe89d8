//! Messages as they are on the socket. Numbers are in the machine's own byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's version, in the flags of each message.
pub const VERSION: u32 = 1;
/// Bits of a message's flags that are the version.
pub const VERSION_MASK: u32 = 3;
/// Flag: it is an answer.
pub const REPLY: u32 = 1 << 2;
/// Flag: an answer is wanted where the message has none of its own.
pub const NEED_REPLY: u32 = 1 << 3;
/// Bytes of a device's configuration at most.
pub const MAX_CONFIG: usize = 256;
/// Regions of memory at most.
pub const MAX_REGIONS: usize = 8;
/// Bytes behind the header of a message to the front end at most.
pub const MAX_PAYLOAD: usize = 4096;

/// Virtio feature (of the reserved ones): the protocol has features of its own.
pub const F_PROTOCOL_FEATURES: u32 = 30;

/// Virtio feature (of the reserved ones): it logs which memory it writes.
pub const F_LOG_ALL: u32 = 26;
/// Flag of a [`VringAddr`]: its used ring is logged.
pub const VRING_LOG: u32 = 1;

/// Protocol features: their bits.
pub mod protocol {
    /// More queues than a device of its kind has at least; how many can be asked.
    pub const MQ: u32 = 0;
    /// It logs which memory it writes, in memory that it is given.
    pub const LOG_SHMFD: u32 = 1;
    /// It tells its network that a guest has moved to it.
    pub const RARP: u32 = 2;
    /// Every message is answered on request.
    pub const REPLY_ACK: u32 = 3;
    /// The back end sends messages too.
    pub const BACKEND_REQ: u32 = 5;
    /// It has the device's configuration.
    pub const CONFIG: u32 = 9;
    /// It keeps a record of what is in flight, in memory that outlives it.
    pub const INFLIGHT_SHMFD: u32 = 12;
}

/// Messages to the back end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    /// Virtio features.
    GetFeatures = 1,
    /// See [`Request::GetFeatures`].
    SetFeatures = 2,
    /// The connection has an owner.
    SetOwner = 3,
    /// Memory, by descriptor.
    SetMemTable = 5,
    /// A log of the memory that it writes, by descriptor.
    SetLogBase = 6,
    /// Size of a queue.
    SetVringNum = 8,
    /// Where a queue is.
    SetVringAddr = 9,
    /// The entry of the available ring that comes first.
    SetVringBase = 10,
    /// Stops a queue.
    GetVringBase = 11,
    /// A queue's kick, by descriptor.
    SetVringKick = 12,
    /// A queue's call, by descriptor.
    SetVringCall = 13,
    /// Protocol features.
    GetProtocolFeatures = 15,
    /// See [`Request::GetProtocolFeatures`].
    SetProtocolFeatures = 16,
    /// How many queues there are.
    GetQueueNum = 17,
    /// Turns a queue on or off.
    SetVringEnable = 18,
    /// The guest with that address is here now.
    SendRarp = 19,
    /// The channel for messages of the back end, by descriptor.
    SetBackendReqFd = 21,
    /// Reads the device's configuration.
    GetConfig = 24,
    /// How large a record of what is in flight is.
    GetInflightFd = 31,
    /// The record, by descriptor.
    SetInflightFd = 32,
}

/// A message of the back end: the configuration has changed.
pub const CONFIG_CHANGED: u32 = 2;

/// What a message begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Which message it is.
    pub request: u32,
    /// Version and flags.
    pub flags: u32,
    /// Bytes behind the header.
    pub size: u32,
}

/// A number of a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringState {
    /// The queue.
    pub index: u32,
    /// The number.
    pub num: u32,
}

/// Where a queue is, in the front end's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct VringAddr {
    /// The queue.
    pub index: u32,
    /// Whether its used ring is logged: [`VRING_LOG`].
    pub flags: u32,
    /// Descriptor table.
    pub descriptors: u64,
    /// Used ring.
    pub used: u64,
    /// Available ring.
    pub available: u64,
    /// Where it is logged: its guest-physical address.
    pub log: u64,
}

/// What a table of memory begins with; its regions follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemTable {
    /// Regions: 1 to [`MAX_REGIONS`].
    pub count: u32,
    /// Zero.
    pub padding: u32,
}

/// A region of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct MemRegion {
    /// First address, as descriptors have it.
    pub guest: u64,
    /// Bytes.
    pub size: u64,
    /// First address, as [`VringAddr`] has it.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// A log of memory that is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LogBase {
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
}

/// A record of what is in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Inflight {
    /// Bytes.
    pub size: u64,
    /// Offset in the file.
    pub offset: u64,
    /// Queues.
    pub queues: u16,
    /// Entries of each, at most.
    pub entries: u16,
    /// Zero.
    pub padding: u32,
}

/// Part of a device's configuration; the bytes follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ConfigPart {
    /// First byte.
    pub offset: u32,
    /// Bytes.
    pub size: u32,
    /// Zero.
    pub flags: u32,
}

const _: () = {
    assert!(size_of::<Header>() == 12);
    assert!(size_of::<VringState>() == 8);
    assert!(size_of::<VringAddr>() == 40 && std::mem::offset_of!(VringAddr, available) == 24);
    assert!(size_of::<MemTable>() == 8);
    assert!(size_of::<MemRegion>() == 32 && std::mem::offset_of!(MemRegion, user) == 16);
    assert!(size_of::<Inflight>() == 24 && std::mem::offset_of!(Inflight, queues) == 16);
    assert!(size_of::<ConfigPart>() == 12);
};
