//! The two pages of a SynIC, as host and guest share them (TLFS "SynIC Message Page" and "SynIC Event Flags Page").
//!
//! | bytes of a slot of the message page | |
//! | --- | --- |
//! | 0–3 | type; 0: empty. The guest empties the slot by storing 0, and then writes the EOM register if it finds *pending* set |
//! | 4 | bytes of payload |
//! | 5 | bit 0: pending, another message waits |
//! | 8–15 | the port that the message came by |
//! | 16–255 | payload |
//!
//! A slot of the event flags page has 2048 flags, which the guest clears.

use std::sync::atomic::{Ordering, fence};

use crate::memory::{GuestMemory, MemoryError};

/// Most bytes of a message.
pub const MESSAGE_PAYLOAD: usize = 240;
/// Bytes of a SINT's part of either page.
const SLOT: usize = 256;
/// Flags of a SINT.
pub(super) const FLAGS: u32 = 8 * SLOT as u32;
/// Bytes of a slot that go last.
const HEAD: usize = 8;

/// A message as it stands in its slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message([u8; SLOT]);

impl Message {
    /// A message of a type that isn't 0, by a port.
    pub(super) fn new(kind: u32, port: u32, payload: &[u8]) -> Self {
        let mut bytes = [0; SLOT];
        bytes[..4].copy_from_slice(&kind.to_le_bytes());
        bytes[4] = payload.len() as u8;
        bytes[8..12].copy_from_slice(&port.to_le_bytes());
        bytes[SLOT - MESSAGE_PAYLOAD..][..payload.len()].copy_from_slice(payload);
        Self(bytes)
    }

    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }

    /// A message from its bytes, if it is one: it has a type, no more payload than there is room for, and isn't marked.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let message = Self(bytes.try_into().ok()?);
        let [a, b, c, d, len, flags, 0, 0, ..] = message.0 else { return None };
        ([a, b, c, d] != [0; 4] && usize::from(len) <= MESSAGE_PAYLOAD && flags == 0).then_some(message)
    }
}

/// What became of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Put {
    /// It is in its slot.
    Sent,
    /// Another one is; the guest will say when it is not there any more.
    Busy,
}

/// Puts a message into the slot of a SINT.
pub(super) fn put_message(
    memory: &dyn GuestMemory,
    page: u64,
    sint: u8,
    message: &Message,
) -> Result<Put, MemoryError> {
    let slot = slot(page, sint);
    let is_empty = || {
        let mut kind = [0; 4];
        memory.read(slot, &mut kind).map(|()| kind == [0; 4])
    };
    if !is_empty()? {
        const PENDING: u64 = 5;
        let mut flags = [0];
        memory.read(slot + PENDING, &mut flags)?;
        memory.write(slot + PENDING, &[flags[0] | 1])?;
        // A guest that empties the slot looks for the flag behind that. So the flag must be there before the slot is looked at again:
        // then one of the two sees what the other did.
        fence(Ordering::SeqCst);
        if !is_empty()? {
            return Ok(Put::Busy);
        }
    }
    let (head, rest) = message.0.split_at(HEAD);
    memory.write(slot + HEAD as u64, rest)?;
    fence(Ordering::SeqCst);
    memory.write(slot, head)?;
    Ok(Put::Sent)
}

/// Sets a flag of a SINT, `flag` being below [`FLAGS`]; whether it was clear.
pub(super) fn set_flag(memory: &dyn GuestMemory, page: u64, sint: u8, flag: u32) -> Result<bool, MemoryError> {
    let at = slot(page, sint) + u64::from(flag / 8);
    let mut byte = [0];
    memory.read(at, &mut byte)?;
    let bit = 1 << (flag % 8);
    if byte[0] & bit != 0 {
        return Ok(false);
    }
    memory.write(at, &[byte[0] | bit])?;
    Ok(true)
}

/// Pages are aligned, so that no sum is past the end of addresses.
fn slot(page: u64, sint: u8) -> u64 {
    page + u64::from(sint) * SLOT as u64
}
