//! Bulk: what is too long for a reply. It lies in the outbox from its start when the reply is sent; the SoC fetches it by DMA and
//! then counts [`crate::lines::soc::BULK_FETCHED`] up; until it has, the host answers no further request.

/// Most bytes of bulk that a reply can have: the outbox's region must be as large.
pub const MOST: usize = 128 << 10;
