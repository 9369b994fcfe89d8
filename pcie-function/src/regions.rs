//! The region table: where everything but the header is, as the host laid it out.
//!
//! An entry is 32 bytes: type (bits 0–15), version (16–31), space (32–39), rest 0 · offset in bytes · length in bytes · stride
//! (bits 0–31), count (32–63). Entries of unknown type are skipped. Offsets are multiples of 64 KiB in card memory, of 4 KiB in
//! the mailbox.

use ioreq_ring::BusMemory;
use ioreq_ring::wire::{LINE, POSTED_RING};

use crate::Windowed;

/// Bytes of a table entry.
pub const ENTRY: usize = 32;
/// Most entries that this side reads: a table is small.
pub const MOST: u16 = 64;
/// Offset of the table that this build writes.
pub const TABLE: u32 = 0x1000;

/// Which memory a region lies in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Space {
    /// Card memory.
    Card = 0,
    /// The inbox of the header.
    Inbox = 1,
    /// The outbox of the header.
    Outbox = 2,
}

/// What a region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Type(pub u16);

impl Type {
    /// Lines of the host: heartbeat, head of the request ring. Card memory.
    pub const HOST_LINES: Self = Self(1);
    /// Ring of replies. Card memory.
    pub const REPLIES: Self = Self(2);
    /// Ring of events and log records. Card memory.
    pub const EVENTS: Self = Self(3);
    /// Request lines of the lanes. Card memory.
    pub const LANE_REQUESTS: Self = Self(4);
    /// Control lines of the lanes. Card memory.
    pub const LANE_CONTROLS: Self = Self(5);
    /// Posted rings of the lanes. Card memory.
    pub const LANE_POSTED: Self = Self(6);
    /// Lines of the SoC: header, heartbeat, tail of the request ring, credits. Inbox.
    pub const SOC_LINES: Self = Self(7);
    /// Ring of channel requests. Inbox.
    pub const REQUESTS: Self = Self(8);
    /// Bulk data of replies, by slots. Outbox.
    pub const BULK: Self = Self(9);

    /// The memory that a region of this type lies in; `None` for types that this build doesn't know.
    #[must_use]
    pub fn space(self) -> Option<Space> {
        match self.0 {
            1..=6 => Some(Space::Card),
            7 | 8 => Some(Space::Inbox),
            9 => Some(Space::Outbox),
            _ => None,
        }
    }
}

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// What it holds.
    pub kind: Type,
    /// Layout version of what it holds.
    pub version: u16,
    /// Which memory it lies in.
    pub space: Space,
    /// First byte, in bytes from the start of that memory.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Bytes of an element.
    pub stride: u32,
    /// Elements.
    pub count: u32,
}

/// Why a region table is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableError {
    /// More than [`MOST`] entries.
    Size(u16),
    /// An entry that is malformed, misaligned, overlapping, in a memory that isn't its type's, or outside it.
    Entry(u16),
    /// A region that this side needs is missing.
    Missing(Type),
}

impl std::fmt::Display for TableError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Size(n) => write!(f, "the region table has {n} entries, at most {MOST} are read"),
            Self::Entry(i) => write!(f, "entry {i} of the region table is malformed or out of bounds"),
            Self::Missing(Type(t)) => write!(f, "the region table has no usable region of type {t}"),
        }
    }
}

impl std::error::Error for TableError {}

/// Sizes of the memories that a table speaks of, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Spaces {
    /// Card memory.
    pub card: u64,
    /// Inbox.
    pub inbox: u64,
    /// Outbox.
    pub outbox: u64,
}

impl Region {
    fn to_words(self) -> [u64; 4] {
        [
            u64::from(self.kind.0) | u64::from(self.version) << 16 | (self.space as u64) << 32,
            self.offset,
            self.len,
            u64::from(self.stride) | u64::from(self.count) << 32,
        ]
    }

    fn parse([kind, offset, len, shape]: [u64; 4], spaces: &Spaces) -> Option<Self> {
        let (space, size, align) = match kind >> 32 {
            0 => (Space::Card, spaces.card, 0x1_0000),
            1 => (Space::Inbox, spaces.inbox, 0x1000),
            2 => (Space::Outbox, spaces.outbox, 0x1000),
            _ => return None,
        };
        let region = Self {
            kind: Type(kind as u16),
            version: (kind >> 16) as u16,
            space,
            offset,
            len,
            stride: shape as u32,
            count: (shape >> 32) as u32,
        };
        let inside = offset.checked_add(len).is_some_and(|end| end <= size);
        let shaped = region.stride != 0
            && region.stride.is_multiple_of(8)
            && u64::from(region.stride).checked_mul(u64::from(region.count)).is_some_and(|bytes| bytes <= len);
        let at_home = region.kind.space().is_none_or(|home| home == space);
        (inside && shaped && at_home && offset % align == 0 && len % 8 == 0).then_some(region)
    }
}

/// Writes `regions` as the table of `card`; the header that names it is stored afterwards.
pub fn store(card: &impl BusMemory, regions: &[Region]) {
    for (i, region) in regions.iter().enumerate() {
        card.store_line(TABLE as usize + i * ENTRY, &region.to_words());
    }
}

/// Reads a table of `count` entries at `table`, each word once, and checks it against the memories it speaks of.
///
/// # Errors
/// The table has too many entries, or one that can't be. Unknown types are checked like known ones, then left to the caller.
pub fn load(card: &impl BusMemory, table: u32, count: u16, spaces: &Spaces) -> Result<Vec<Region>, TableError> {
    if count > MOST {
        return Err(TableError::Size(count));
    }
    let mut regions: Vec<Region> = Vec::with_capacity(count.into());
    for i in 0..count {
        let at = table as usize + usize::from(i) * ENTRY;
        let words = std::array::from_fn(|w| card.load(at + w * 8));
        let region = Region::parse(words, spaces).ok_or(TableError::Entry(i))?;
        let apart = |other: &Region| {
            other.space != region.space
                || other.offset + other.len <= region.offset
                || region.offset + region.len <= other.offset
        };
        if !regions.iter().all(apart) {
            return Err(TableError::Entry(i));
        }
        regions.push(region);
    }
    Ok(regions)
}

/// The region of `kind` with version 1, at least `count` elements of at least `stride` bytes.
///
/// # Errors
/// There is none.
pub fn find(regions: &[Region], kind: Type, stride: usize, count: u32) -> Result<Region, TableError> {
    regions
        .iter()
        .find(|r| r.kind == kind && r.version == 1 && r.stride as usize >= stride && r.count >= count)
        .copied()
        .ok_or(TableError::Missing(kind))
}

/// How this build lays out card memory of `card_len` bytes: as many lanes as fit, at most 1024.
///
/// # Errors
/// Card memory is too small for one lane.
pub fn layout(card_len: u64) -> Result<Layout, TableError> {
    const STEP: u64 = 0x1_0000;
    // Header and table · host lines · replies · events: fixed. Then the lanes.
    let fixed = STEP * 6;
    let steps = |bytes: u64| bytes.div_ceil(STEP) * STEP;
    let room = |lanes: u64| fixed + steps(lanes * LINE as u64) * 2 + steps(lanes * POSTED_RING as u64);
    let lanes = (0..=10).rev().map(|bit| 1u64 << bit).find(|&lanes| room(lanes) <= card_len);
    let lanes = lanes.ok_or(TableError::Missing(Type::LANE_REQUESTS))?;
    let mut regions = Vec::new();
    let mut next = STEP;
    let mut card = |kind, stride: usize, count: u64| {
        let len = stride as u64 * count;
        let region = Region {
            kind,
            version: 1,
            space: Space::Card,
            offset: next,
            len,
            stride: stride as u32,
            count: count as u32,
        };
        next += steps(len);
        regions.push(region);
    };
    card(Type::HOST_LINES, LINE, 16);
    card(Type::REPLIES, LINE, 2 * STEP / LINE as u64);
    card(Type::EVENTS, LINE, 2 * STEP / LINE as u64);
    card(Type::LANE_REQUESTS, LINE, lanes);
    card(Type::LANE_CONTROLS, LINE, lanes);
    card(Type::LANE_POSTED, POSTED_RING, lanes);
    let mailbox = |kind, space, offset: usize, stride: usize, count: usize| Region {
        kind,
        version: 1,
        space,
        offset: offset as u64,
        len: (stride * count) as u64,
        stride: stride as u32,
        count: count as u32,
    };
    regions.push(mailbox(Type::SOC_LINES, Space::Inbox, 0, LINE, 16));
    regions.push(mailbox(Type::REQUESTS, Space::Inbox, 0x1000, LINE, (INBOX - 0x1000) / LINE));
    regions.push(mailbox(Type::BULK, Space::Outbox, 0, BULK_SLOT, BULK_SLOTS));
    Ok(Layout { regions, lanes: lanes as u32 })
}

/// Bytes of the inbox that an idle function pins: the SoC's lines and the request ring.
pub const INBOX: usize = 0x1_1000;
/// Bytes of a bulk slot.
pub const BULK_SLOT: usize = 0x1_0000;
/// Bulk slots.
pub const BULK_SLOTS: usize = 2;
/// Bytes of the outbox that an idle function pins.
pub const OUTBOX: usize = BULK_SLOT * BULK_SLOTS;

/// A layout of card memory and of the idle mailbox.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The table.
    pub regions: Vec<Region>,
    /// How many lanes there is room for.
    pub lanes: u32,
}

/// Cuts a region's window out of its memory's.
#[must_use]
pub fn window<W: Windowed>(memory: &W, region: &Region) -> Option<W> {
    memory.cut(usize::try_from(region.offset).ok()?, usize::try_from(region.len).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_fit_their_memory_and_grow_with_it() {
        for (len, lanes) in [(0x9_0000, 32), (0xa_0000, 64), (0x10_0000, 256), (0x40_0000, 1024), (0x100_0000, 1024)] {
            let layout = layout(len).unwrap();
            assert_eq!(layout.lanes, lanes, "{len:#x}");
            let spaces = Spaces { card: len, inbox: INBOX as u64, outbox: OUTBOX as u64 };
            for region in &layout.regions {
                assert_eq!(Region::parse(region.to_words(), &spaces), Some(*region));
            }
        }
        assert!(layout(0x8_ffff).is_err());
    }

    #[test]
    fn a_region_lies_in_the_memory_of_its_type() {
        let spaces = Spaces { card: 1 << 20, inbox: 1 << 20, outbox: 1 << 20 };
        let good = layout(1 << 20).unwrap().regions;
        for region in good {
            for space in [Space::Card, Space::Inbox, Space::Outbox] {
                let parsed = Region::parse(Region { offset: 0x1_0000, space, ..region }.to_words(), &spaces);
                assert_eq!(parsed.is_some(), space == region.space, "{region:?} in {space:?}");
            }
            let unknown = Region { kind: Type(77), ..region };
            assert_eq!(Region::parse(unknown.to_words(), &spaces), Some(unknown));
        }
    }
}
