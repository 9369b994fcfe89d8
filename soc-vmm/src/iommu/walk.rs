//! From a function's address to a guest-physical one (VT-d specification §3.4, §3.7): at most six reads of guest memory.

use super::faults::Reason;
use super::tables::{ContextEntry, Domain, PAGE, PageEntry, RootEntry, address_bits};
use crate::memory::GuestMemory;

/// Where a page goes, and who may use it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    /// Guest-physical address of the page.
    pub(super) page: u64,
    /// Bits of [`PageEntry`].
    pub(super) rights: u64,
}

/// Why a request is blocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocked {
    pub(super) reason: Reason,
    /// The guest doesn't want to hear of it.
    pub(super) quiet: bool,
}

impl Blocked {
    fn loud(reason: Reason) -> Self {
        Self { reason, quiet: false }
    }
}

/// The way of a write or of a read.
pub(super) fn right(write: bool) -> u64 {
    if write { PageEntry::WRITE } else { PageEntry::READ }
}

/// Why a page without the right for it is not reached.
pub(super) fn denied(write: bool) -> Reason {
    if write { Reason::WRITE_DENIED } else { Reason::READ_DENIED }
}

/// Where the page of `address` goes for the function `requester`.
pub(super) fn translate(
    memory: &dyn GuestMemory,
    root: u64,
    requester: u16,
    address: u64,
    write: bool,
) -> Result<Mapping, Blocked> {
    let context = context(memory, root, requester)?;
    let blocked = |reason| Blocked { reason, quiet: context.is_quiet() };
    let page = address & !(PAGE - 1);
    match context.domain().ok_or_else(|| blocked(Reason::CONTEXT_INVALID))? {
        Domain::Through { bits } if address >> bits != 0 => Err(blocked(Reason::BEYOND_WIDTH)),
        Domain::Through { .. } => Ok(Mapping { page, rights: PageEntry::READ | PageEntry::WRITE }),
        Domain::Paged { levels, .. } if address >> address_bits(levels) != 0 => Err(blocked(Reason::BEYOND_WIDTH)),
        Domain::Paged { table, levels } => walk(memory, table, levels, page, write).map_err(blocked),
    }
}

/// The function's context entry.
fn context(memory: &dyn GuestMemory, root: u64, requester: u16) -> Result<ContextEntry, Blocked> {
    let [bus, devfn] = requester.to_be_bytes();
    let root = RootEntry(entry(memory, root, bus.into()).ok_or(Blocked::loud(Reason::ROOT_UNREACHABLE))?);
    if !root.is_present() {
        return Err(Blocked::loud(Reason::ROOT_ABSENT));
    }
    if !root.is_sound() {
        return Err(Blocked::loud(Reason::ROOT_RESERVED));
    }
    let context = entry(memory, root.contexts(), devfn.into()).ok_or(Blocked::loud(Reason::CONTEXT_UNREACHABLE))?;
    let context = ContextEntry(context);
    let blocked = |reason| Err(Blocked { reason, quiet: context.is_quiet() });
    match () {
        () if !context.is_present() => blocked(Reason::CONTEXT_ABSENT),
        () if !context.is_sound() => blocked(Reason::CONTEXT_RESERVED),
        () => Ok(context),
    }
}

fn walk(memory: &dyn GuestMemory, table: u64, levels: u32, page: u64, write: bool) -> Result<Mapping, Reason> {
    let mut table = table;
    let mut rights = PageEntry::READ | PageEntry::WRITE;
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * (level - 1);
        let mut bytes = [0; 8];
        let at = table + (page >> shift & 0x1ff) * 8;
        memory.read(at, &mut bytes).map_err(|_| Reason::TABLE_UNREACHABLE)?;
        let entry = PageEntry(u64::from_le_bytes(bytes));
        rights &= entry.0;
        if rights & right(write) == 0 {
            return Err(denied(write));
        }
        if !entry.is_sound(level) {
            return Err(Reason::TABLE_RESERVED);
        }
        if entry.is_leaf(level) {
            let within = page & ((1 << shift) - 1);
            return Ok(Mapping { page: entry.address() | within, rights });
        }
        table = entry.address();
    }
    // A table of pages has leaves alone.
    Err(Reason::TABLE_RESERVED)
}

/// Entry `index` of a table of 16-byte entries.
pub(super) fn entry(memory: &dyn GuestMemory, table: u64, index: u64) -> Option<u128> {
    let mut bytes = [0; 16];
    memory.read(table.checked_add(index * 16)?, &mut bytes).ok()?;
    Some(u128::from_le_bytes(bytes))
}
