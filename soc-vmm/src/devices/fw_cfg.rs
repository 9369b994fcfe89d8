//! QEMU's firmware configuration device (QEMU docs/specs/fw_cfg.rst): named byte strings that firmware selects and reads, by a data
//! port or by DMA.
//!
//! | port | access | what |
//! | --- | --- | --- |
//! | 0x510 | 2 bytes written | selects an item, and its first byte |
//! | 0x511 | 1 byte read | the next byte of the item; zero behind its end |
//! | 0x514 | 4 bytes written, big-endian | upper half of a DMA descriptor's address |
//! | 0x518 | 4 bytes written, big-endian | lower half; starts the transfer, which is done when the write is |
//! | 0x514–0x51b | read | `QEMU CFG` |

mod builder;
mod dma;
mod items;
#[cfg(test)]
pub(crate) mod test_guest;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::memory::GuestMemory;
use crate::persist::Hex;

pub use builder::{Builder, FwCfgError, Make};
pub use items::{E820Entry, E820Kind, key};

/// First port.
pub const FW_CFG_PORT: u16 = 0x510;
/// Ports from [`FW_CFG_PORT`] on that belong to the device.
pub const FW_CFG_LEN: u8 = 12;

// Offsets within the claims: the second one's begin behind the first one's.
const SELECTOR: u64 = 0;
const DMA: u64 = 2;
const DMA_LOW: u64 = DMA + 4;
const END: u64 = DMA + 8;
/// What the DMA ports give when they are read.
const DMA_SIGNATURE: [u8; 8] = *b"QEMU CFG";
/// A selector's bit that once meant "to be written": no part of the key.
const WRITE_CHANNEL: u16 = 1 << 14;

/// The device.
pub struct FwCfg {
    items: BTreeMap<u16, Item>,
    memory: Arc<dyn GuestMemory>,
    selected: u16,
    /// The next byte of the item.
    offset: u32,
    /// The upper half of the descriptor's address.
    dma_high: u32,
}

/// Saved state of a [`FwCfg`]. No transfer is ever under way: each is done when the write that asks for it is.
///
/// Items that never change are this machine's own. A guest that reads one while it moves to a soc-vmm of another version may get the
/// beginning of the one and the end of the other: firmware reads them in its first moments, and a kernel reads none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FwCfgState {
    /// Key of the selected item.
    pub selected: u16,
    /// The next byte of it.
    pub offset: u32,
    /// The upper half of the DMA descriptor's address.
    pub dma_high: u32,
    /// Items that were made or written since the reset: key and bytes.
    pub contents: Vec<(u16, Hex)>,
}

/// What a key stands for.
struct Item {
    bytes: Vec<u8>,
    origin: Origin,
}

/// Where the bytes of an item come from.
enum Origin {
    /// They are as they are.
    Fixed,
    /// The guest may write them; after a reset they are these.
    Writable(Vec<u8>),
    /// They are made when the item is first selected after a reset.
    Made { make: Make, made: bool },
}

impl FwCfg {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(FW_CFG_PORT as u64, 2), claim(FW_CFG_PORT as u64 + 4, 8)]);

    /// A device to fill; `memory` is what its DMA reaches.
    pub fn builder(memory: Arc<dyn GuestMemory>) -> Builder {
        Builder::new(memory)
    }

    /// What the guest wrote to the writable file `key`, or what it would read of any other item.
    pub fn item(&self, key: u16) -> Option<&[u8]> {
        self.items.get(&key).map(|item| &item.bytes[..])
    }

    fn select(&mut self, key: u16) {
        self.selected = key & !WRITE_CHANNEL;
        self.offset = 0;
        let Some(item) = self.items.get_mut(&self.selected) else { return };
        if let Origin::Made { make, made: made @ false } = &mut item.origin {
            *made = true;
            // The directory has told the length.
            let len = item.bytes.len();
            item.bytes = make();
            item.bytes.resize(len, 0);
        }
    }

    /// The bytes of the selected item that were not read yet; none of an item that is not there.
    fn rest(&self) -> &[u8] {
        let item = self.items.get(&self.selected).map_or(&[][..], |item| &item.bytes);
        item.get(self.offset as usize..).unwrap_or_default()
    }

    fn next_byte(&mut self) -> u8 {
        let Some(&byte) = self.rest().first() else { return 0 };
        self.offset += 1;
        byte
    }
}

impl Device for FwCfg {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        match (offset, access.len) {
            (SELECTOR..DMA, 1) => Answer::Done(self.next_byte().into()),
            (SELECTOR..DMA, _) => Answer::Done(u64::MAX),
            _ => Answer::Done(super::bytes::read(access, offset, END, |at| DMA_SIGNATURE[(at - DMA) as usize])),
        }
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        match (offset, access.len) {
            (SELECTOR, 2) => self.select(data as u16),
            (DMA, 4) => self.dma_high = (data as u32).swap_bytes(),
            (DMA_LOW, 4) => {
                let high = std::mem::take(&mut self.dma_high);
                self.transfer(u64::from(high) << 32 | u64::from((data as u32).swap_bytes()));
            }
            // The data port takes no writes.
            _ => {}
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        (self.selected, self.offset, self.dma_high) = (0, 0, 0);
        for item in self.items.values_mut() {
            match &mut item.origin {
                Origin::Fixed => {}
                Origin::Writable(initial) => item.bytes.clone_from(initial),
                Origin::Made { made, .. } => *made = false,
            }
        }
    }
}

impl Persist for FwCfg {
    const NAME: &'static str = "fw-cfg";
    type State = FwCfgState;

    fn save(&self) -> FwCfgState {
        let changed = self.items.iter().filter(|(_, item)| match &item.origin {
            Origin::Fixed => false,
            Origin::Writable(initial) => *initial != item.bytes,
            Origin::Made { made, .. } => *made,
        });
        FwCfgState {
            selected: self.selected,
            offset: self.offset,
            dma_high: self.dma_high,
            contents: changed.map(|(key, item)| (*key, Hex(item.bytes.clone()))).collect(),
        }
    }

    fn restore(&mut self, state: &FwCfgState) -> Result<(), RestoreError> {
        for (key, bytes) in &state.contents {
            let item = self.items.get(key).filter(|item| !matches!(item.origin, Origin::Fixed));
            check(item.is_some(), "fw_cfg", "an item that does not change has changed")?;
            check(item.is_some_and(|item| item.bytes.len() == bytes.0.len()), "fw_cfg", "an item has another length")?;
        }
        self.reset();
        (self.selected, self.offset, self.dma_high) = (state.selected & !WRITE_CHANNEL, state.offset, state.dma_high);
        for (key, bytes) in &state.contents {
            if let Some(item) = self.items.get_mut(key) {
                item.bytes.clone_from(&bytes.0);
                if let Origin::Made { made, .. } = &mut item.origin {
                    *made = true;
                }
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for FwCfg {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { items, selected, offset, .. } = self;
        f.debug_struct("FwCfg")
            .field("items", &items.len())
            .field("selected", selected)
            .field("offset", offset)
            .finish_non_exhaustive()
    }
}
