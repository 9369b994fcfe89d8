//! Guest memory: RAM, memslots, the dirty log.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a page in every call.
pub const PAGE: u64 = 4096;

/// Allocates memory for the guest. The host maps it for the device at IOVA = `iova` if it can.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct RamRequest {
    /// The SoC's name for it: 0–63, not in use.
    pub id: u32,
    /// Host NUMA node, or -1.
    pub node: i32,
    /// Bytes, a multiple of the page size.
    pub len: u64,
    /// The IOVA wanted: where the guest sees the memory, if it sees it in one place.
    pub iova: u64,
    /// Bytes of a huge page: 0 (none), 2 MiB or 1 GiB.
    pub huge: u64,
}

/// Part of an allocation as the device sees it. The reply to [`RamRequest`] is a list of these that covers it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Extent {
    /// Offset within the allocation, in bytes.
    pub offset: u64,
    /// IOVA of its first byte.
    pub iova: u64,
    /// Bytes.
    pub len: u64,
}

/// Flags of a memslot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotFlags;

impl SlotFlags {
    /// The guest can't write; its writes are exits.
    pub const READ_ONLY: u32 = 1;
}

/// A memslot: guest-physical addresses backed by part of an allocation.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Memslot {
    /// First guest-physical address, page-aligned.
    pub base: u64,
    /// Bytes, whole pages.
    pub len: u64,
    /// Offset within the allocation, page-aligned.
    pub offset: u64,
    /// The allocation.
    pub ram: u32,
    /// [`SlotFlags`].
    pub flags: u32,
}

/// Memory that the guest doesn't need: the host takes it back, and it reads as zeros when it is next touched. The SoC has ended every
/// use of its own before it asks.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Discard {
    /// The allocation, of normal pages.
    pub ram: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Offset within it, page-aligned.
    pub offset: u64,
    /// Bytes, whole pages.
    pub len: u64,
}

/// Fetches dirty pages.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct DirtyFetch {
    /// The allocation.
    pub ram: u32,
    /// [`DirtyFetch::CLEAR`], [`DirtyFetch::AS_READ`].
    pub flags: u32,
    /// First page of the allocation to look at.
    pub first: u64,
    /// How many pages to look at.
    pub pages: u64,
}

/// Dirty pages in a row. A fetch's reply says where to go on (one number: the first page that was not looked at); its bulk is a
/// list of these.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct DirtyRun {
    /// First page, counted from the allocation's start.
    pub first: u64,
    /// How many.
    pub pages: u64,
}

impl DirtyFetch {
    /// [`DirtyFetch::flags`]: clear what is fetched, so that the next write is logged again.
    pub const CLEAR: u32 = 1;
    /// [`DirtyFetch::flags`]: of dirty rings, tell what was last read from them, and leave them as they are: a look at all of memory takes
    /// several fetches, and gives each vCPU a ring to fill once.
    pub const AS_READ: u32 = 2;
}

/// How fast a vCPU may write pages that were clean, of a VM with dirty rings while its dirty log is on. Where it writes faster it stands
/// still in between, once its ring is full.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct DirtyLimit {
    /// The vCPU, or [`super::VCPU_ALL`].
    pub vcpu: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Pages a second; 0: as fast as it can.
    pub pages: u64,
}

/// Pages of an allocation in a row, of those that come after the guest has started.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct LateRun {
    /// The allocation.
    pub ram: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// First page, counted from the allocation's start; of an allocation of huge pages, the first of one.
    pub first: u64,
    /// How many; whole huge pages of such an allocation.
    pub pages: u64,
}
