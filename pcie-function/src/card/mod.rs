//! The card interface of `docs/card.md`, as numbers: ids, BARs, registers; [`queue`] has what stands in the DMA rings.
//!
//! Shared by the programs that drive a card and by the card in software. [`soc`] is the driver of its SoC side.

mod engine;
pub mod profile;
pub mod queue;
pub mod soc;

use crate::FunctionError;

/// PCI ids of the software card (docs/card.md §1).
pub mod id {
    /// Vendor: nobody's; a product uses its maker's own.
    pub const VENDOR: u16 = 0x0b0d;
    /// Host side of a vm function.
    pub const HOST_VM: u16 = 0x0001;
    /// Host side of the host function.
    pub const HOST_HOST: u16 = 0x0002;
    /// SoC side of a vm function.
    pub const SOC_VM: u16 = 0x0101;
    /// SoC side of the host function.
    pub const SOC_HOST: u16 = 0x0102;
    /// Class code: base class, subclass, programming interface (processing accelerator).
    pub const CLASS: u32 = 0x12_0000;
    /// Revision.
    pub const REVISION: u8 = 1;
}

/// BAR numbers and sizes (docs/card.md §2).
pub mod bar {
    /// Registers and doorbells.
    pub const REGISTERS: u32 = 0;
    /// Card memory, 64-bit.
    pub const MEMORY: u32 = 2;
    /// MSI-X table and PBA.
    pub const MSIX: u32 = 4;
    /// Notify pages, on the host side of a vm function: nothing else is in it.
    pub const NOTIFY: u32 = 5;
    /// Bytes of a notify page.
    pub const NOTIFY_PAGE: u64 = 0x1000;
    /// Bytes of [`REGISTERS`].
    pub const REGISTERS_SIZE: u64 = 0x1_0000;
    /// Bytes of [`MSIX`].
    pub const MSIX_SIZE: u64 = 0x1_0000;
    /// Offset of the pending-bit array within [`MSIX`]; the table is at 0.
    pub const MSIX_PBA: u32 = 0x8000;
    /// The least [`MEMORY`] a card may have.
    pub const MEMORY_MIN: u64 = 1 << 20;
    /// Bytes of the host header line, at the start of [`MEMORY`]: what a reset clears.
    pub const HEADER_LINE: usize = 64;
}

/// Register offsets in BAR 0 (docs/card.md §3).
pub mod register {
    /// 4 bytes, read-only: [`super::MAGIC`].
    pub const MAGIC: u64 = 0x00;
    /// 4 bytes, read-only: major << 16 | minor.
    pub const VERSION: u64 = 0x04;
    /// 8 bytes, read-only: [`super::feature`] bits.
    pub const FEATURES: u64 = 0x08;
    /// 8 bytes, read-only: unique among cards.
    pub const CARD_ID: u64 = 0x10;
    /// 4 bytes, read-only: the function's number on its card.
    pub const FUNCTION: u64 = 0x18;
    /// 4 bytes, read-only: [`super::ROLE_VM`] or [`super::ROLE_HOST`].
    pub const ROLE: u64 = 0x1c;
    /// 8 bytes, read-only: bytes of card memory.
    pub const MEMORY_SIZE: u64 = 0x20;
    /// 4 bytes, read-only: MSI-X vectors of the host function.
    pub const VECTORS: u64 = 0x28;
    /// 4 bytes, read-only: notify pages; 0 on a card of version 1.0.
    pub const NOTIFY_PAGES: u64 = 0x2c;
    /// 4 bytes, read-only: [`super::STATUS_LINK`]. One aligned 8-byte load gives it and [`GENERATION`].
    pub const STATUS: u64 = 0x30;
    /// 4 bytes, read-only: resets and link losses, from 1.
    pub const GENERATION: u64 = 0x34;
    /// SoC side, 4 bytes, write one to clear: [`super::event`] bits.
    pub const EVENTS: u64 = 0x38;
    /// Host side, 4 bytes, write-only: rings the doorbell of this number.
    pub const DOORBELL: u64 = 0x1000;
    /// SoC side, 4 bytes, write-only: raises this host vector at once.
    pub const RAISE: u64 = 0x1000;
    /// SoC side, 8 bytes: SoC IOVA of the submission ring.
    pub const DMA_SUBMISSION: u64 = 0x2000;
    /// SoC side, 8 bytes: SoC IOVA of the done ring.
    pub const DMA_DONE: u64 = 0x2008;
    /// SoC side, 4 bytes: entries of each ring.
    pub const DMA_ENTRIES: u64 = 0x2010;
    /// SoC side, 4 bytes: [`super::DMA_ENABLE`].
    pub const DMA_CONTROL: u64 = 0x2014;
    /// SoC side, 4 bytes, read-only: [`super::DMA_ENABLE`] while enabled, [`super::queue_error`] in bits 8–15.
    pub const DMA_STATUS: u64 = 0x2018;
    /// SoC side, 4 bytes, read-only: descriptors finished.
    pub const DMA_HEAD: u64 = 0x201c;
    /// SoC side, 4 bytes, write-only: descriptors submitted.
    pub const DMA_TAIL: u64 = 0x2020;
}

/// `MAGIC`: the bytes `OBRD`.
pub const MAGIC: u32 = u32::from_le_bytes(*b"OBRD");
/// Major version of the interface.
pub const VERSION_MAJOR: u16 = 1;
/// Minor version of the interface.
pub const VERSION_MINOR: u16 = 1;
/// `VERSION`.
pub const VERSION: u32 = (VERSION_MAJOR as u32) << 16 | VERSION_MINOR as u32;
/// Whether what starts with these two registers is a card that this side can drive.
///
/// # Errors
/// It is none, or of another major version.
pub fn check_version(magic: u32, version: u32) -> Result<(), FunctionError> {
    let why = match (magic, version >> 16) {
        (MAGIC, major) if major == u32::from(VERSION_MAJOR) => return Ok(()),
        (MAGIC, major) => format!("is a card of version {major}, this side knows {VERSION_MAJOR}"),
        (magic, _) => format!("is no card of docs/card.md: its registers start with {magic:#010x}"),
    };
    Err(FunctionError::Unusable(format!("what is plugged in {why}")))
}

/// `ROLE` of a function that a VM owns.
pub const ROLE_VM: u32 = 0;
/// `ROLE` of the function for the server itself.
pub const ROLE_HOST: u32 = 1;
/// `STATUS` bit: the host's link is up and the host function is there.
pub const STATUS_LINK: u32 = 1 << 0;
/// `DMA_CONTROL` and `DMA_STATUS` bit: the queue runs.
pub const DMA_ENABLE: u32 = 1 << 0;
/// Bits that the queue's error is shifted by in `DMA_STATUS`.
pub const DMA_ERROR_SHIFT: u32 = 8;

/// `FEATURES` bits.
pub mod feature {
    /// A DMA write to the host pushes the host's earlier posted writes ahead of it.
    pub const PUSH: u64 = 1 << 0;
    /// The SoC can reach host memory by posted writes.
    pub const APERTURE: u64 = 1 << 1;
}

/// `EVENTS` bits.
pub mod event {
    /// The host's link was lost.
    pub const LINK_LOST: u32 = 1 << 0;
    /// The host's link came up.
    pub const LINK_UP: u32 = 1 << 1;
    /// The host function was reset.
    pub const HOST_RESET: u32 = 1 << 2;
    /// The host function is gone for good.
    pub const REMOVED: u32 = 1 << 3;
    /// The DMA queue stopped with an error; `DMA_STATUS` has it.
    pub const QUEUE_ERROR: u32 = 1 << 4;
}

/// What stops a DMA queue (`DMA_STATUS` bits 8–15).
pub mod queue_error {
    /// None.
    pub const NONE: u32 = 0;
    /// Ring addresses or entries are illegal.
    pub const CONFIGURATION: u32 = 1;
    /// The tail is further ahead than the ring has entries.
    pub const OVERRUN: u32 = 2;
    /// A ring's memory faulted.
    pub const RING_FAULT: u32 = 3;
}

/// Vectors of the SoC function (docs/card.md §3). Vector *n* below [`soc_vector::DOORBELLS`] is doorbell *n*.
pub mod soc_vector {
    /// How many doorbells the host has.
    pub const DOORBELLS: u32 = 4;
    /// A done record with [`super::queue::flag::INTERRUPT`] was stored.
    pub const DMA_DONE: u32 = 4;
    /// An `EVENTS` bit was set.
    pub const EVENT: u32 = 5;
    /// Vectors that every SoC function has. The first behind them is notify page 0's, and each page has one.
    pub const COUNT: u32 = 8;
}

/// The most notify pages a function may have: MSI-X has 2048 vectors.
pub const NOTIFY_PAGES_MAX: u32 = 2040;
/// The least number of vectors a host function has.
pub const HOST_VECTORS_MIN: u32 = 128;
