//! The two header lines: how host and SoC find each other through memory alone.
//!
//! The *host header line* is the first line of card memory, stored by the host; the *SoC header line* is the first line of the
//! inbox, stored by the SoC by DMA. The word with the nonce is stored last. Both nonces together are the epoch: one connection.
//!
//! | word | host header line | SoC header line |
//! | --- | --- | --- |
//! | 0 | magic `OUTBOARD` | the same |
//! | 1 | lowest version, bits 0–15; highest, 16–31; feature bits, 32–63 | chosen version, 0–15; chosen features, 32–63 |
//! | 2 | IOVA of the inbox | the host nonce that this answers |
//! | 3 | IOVA of the outbox | 0 |
//! | 4 | bytes of inbox, 0–31; of outbox, 32–63 | 0 |
//! | 5 | offset of the region table in card memory, 0–31; its entries, 32–47; role, 48–55 | 0 |
//! | 6 | 0 | 0 |
//! | 7 | host nonce, not 0 | SoC nonce, not 0 |

use ioreq_ring::BusMemory;

/// `OUTBOARD` in memory.
pub const MAGIC: u64 = u64::from_le_bytes(*b"OUTBOARD");
/// The version of everything that this header leads to: lanes, channel, messages.
pub const VERSION: u16 = 1;
/// Feature bits this build knows; unknown ones are refused.
pub const FEATURES: u32 = 0;
/// Bytes of a header line.
pub const HEADER: usize = 64;

/// What a function is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs one VM at a time.
    Vm = 1,
    /// Serves the server itself: inventory, and later PCIe devices. No VM.
    Host = 2,
}

/// The host header line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostHeader {
    /// Lowest and highest version that the host speaks.
    pub versions: (u16, u16),
    /// Feature bits that the host offers.
    pub features: u32,
    /// IOVA of the inbox.
    pub inbox: u64,
    /// Bytes of the inbox.
    pub inbox_len: u32,
    /// IOVA of the outbox.
    pub outbox: u64,
    /// Bytes of the outbox.
    pub outbox_len: u32,
    /// Offset of the region table in card memory.
    pub table: u32,
    /// Entries of the region table.
    pub regions: u16,
    /// What the function is for.
    pub role: Role,
    /// Names this offer; never 0.
    pub nonce: u64,
}

/// The SoC header line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocHeader {
    /// The version chosen.
    pub version: u16,
    /// The features chosen.
    pub features: u32,
    /// The host nonce that this answers.
    pub host_nonce: u64,
    /// Names this connection; never 0.
    pub nonce: u64,
}

/// Why a header line can't be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeaderError {
    /// The magic is not ours: another device, or another program's memory. What stood there.
    Magic(u64),
    /// No common version: the peer's range.
    Version(u16, u16),
    /// Feature bits that this side doesn't know.
    Features(u32),
    /// A reserved bit, a role or an extent that can't be.
    Malformed,
}

impl std::fmt::Display for HeaderError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "the header starts with {found:#018x}, not with OUTBOARD"),
            Self::Version(low, high) => {
                write!(f, "the peer speaks versions {low} to {high}, this side {VERSION}; upgrade the older one")
            }
            Self::Features(bits) => {
                write!(f, "the peer insists on features {bits:#x}, unknown here; upgrade this side")
            }
            Self::Malformed => f.write_str("the header is malformed"),
        }
    }
}

impl std::error::Error for HeaderError {}

/// The words 0–7 of a header line, each loaded once, the nonce first: a header is whole once its nonce is there.
fn words(line: &impl BusMemory) -> [u64; 8] {
    let nonce = line.load(56);
    std::array::from_fn(|i| if i == 7 { nonce } else { line.load(i * 8) })
}

impl HostHeader {
    /// Stores the header at the start of card memory, the nonce last.
    pub fn store(&self, card: &impl BusMemory) {
        let (low, high) = self.versions;
        card.store_line(
            0,
            &[
                MAGIC,
                u64::from(low) | u64::from(high) << 16 | u64::from(self.features) << 32,
                self.inbox,
                self.outbox,
                u64::from(self.inbox_len) | u64::from(self.outbox_len) << 32,
                u64::from(self.table) | u64::from(self.regions) << 32 | (self.role as u64) << 48,
                0,
                self.nonce,
            ],
        );
    }

    /// Loads the header; `None` while no host offers.
    ///
    /// # Errors
    /// What stands there is no header that this side can use.
    pub fn load(card: &impl BusMemory) -> Result<Option<Self>, HeaderError> {
        let [magic, versions, inbox, outbox, lens, table, reserved, nonce] = words(card);
        if nonce == 0 {
            return Ok(None);
        }
        if magic != MAGIC {
            return Err(HeaderError::Magic(magic));
        }
        let (low, high) = (versions as u16, (versions >> 16) as u16);
        if low > VERSION || high < VERSION {
            return Err(HeaderError::Version(low, high));
        }
        let features = (versions >> 32) as u32;
        if features & !FEATURES != 0 {
            return Err(HeaderError::Features(features & !FEATURES));
        }
        let role = match table >> 48 {
            1 => Role::Vm,
            2 => Role::Host,
            _ => return Err(HeaderError::Malformed),
        };
        let header = Self {
            versions: (low, high),
            features,
            inbox,
            inbox_len: lens as u32,
            outbox,
            outbox_len: (lens >> 32) as u32,
            table: table as u32,
            regions: (table >> 32) as u16,
            role,
            nonce,
        };
        let extent = |iova: u64, len: u32| {
            len.is_multiple_of(4096) && iova.is_multiple_of(4096) && iova.checked_add(u64::from(len)).is_some()
        };
        let fits =
            (u64::from(header.table) + u64::from(header.regions) * crate::regions::ENTRY as u64) <= card.len() as u64;
        let legal = reserved == 0
            && header.inbox_len >= 4096
            && extent(inbox, header.inbox_len)
            && extent(outbox, header.outbox_len)
            && header.table.is_multiple_of(64)
            && fits;
        legal.then_some(Some(header)).ok_or(HeaderError::Malformed)
    }
}

impl SocHeader {
    /// Stores the header at the start of the inbox, the nonce last.
    pub fn store(&self, inbox: &impl BusMemory) {
        let chosen = u64::from(self.version) | u64::from(self.features) << 32;
        inbox.store_line(0, &[MAGIC, chosen, self.host_nonce, 0, 0, 0, 0, self.nonce]);
    }

    /// Loads the answer to the offer with `host_nonce`; `None` while there is none (an answer to an older offer is none).
    ///
    /// # Errors
    /// What stands there is no header that this side can use.
    pub fn load(inbox: &impl BusMemory, host_nonce: u64) -> Result<Option<Self>, HeaderError> {
        let [magic, chosen, answers, a, b, c, d, nonce] = words(inbox);
        if nonce == 0 || answers != host_nonce {
            return Ok(None);
        }
        if magic != MAGIC {
            return Err(HeaderError::Magic(magic));
        }
        let header = Self { version: chosen as u16, features: (chosen >> 32) as u32, host_nonce: answers, nonce };
        if header.version != VERSION {
            return Err(HeaderError::Version(header.version, header.version));
        }
        if header.features & !FEATURES != 0 {
            return Err(HeaderError::Features(header.features & !FEATURES));
        }
        (chosen >> 16 & 0xffff == 0 && [a, b, c, d] == [0; 4]).then_some(Some(header)).ok_or(HeaderError::Malformed)
    }
}

/// The 64-bit name of a connection, in every channel message: both nonces, mixed so that neither side's alone repeats it.
#[must_use]
pub fn epoch(host_nonce: u64, soc_nonce: u64) -> u64 {
    host_nonce.rotate_left(32) ^ soc_nonce
}
