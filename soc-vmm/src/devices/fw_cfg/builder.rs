//! What a [`FwCfg`] is filled with.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::items::{self, E820Entry, key};
use super::{FwCfg, Item, Origin};
use crate::devices::SLEEP_TYPE_S5;
use crate::memory::GuestMemory;

/// Makes an item's bytes; called with the machine's locks free.
pub type Make = Box<dyn Fn() -> Vec<u8> + Send>;

/// Bytes of a name in the directory, its NUL included.
const NAME_LEN: usize = 56;
/// The most files: their keys end before the one that means "nothing".
const FILES_MAX: usize = 0x400;

/// Fills a [`FwCfg`].
pub struct Builder {
    memory: Arc<dyn GuestMemory>,
    items: BTreeMap<u16, Item>,
    files: Vec<(String, Item)>,
}

/// Why there is no such device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FwCfgError {
    /// The directory has no room for it.
    #[error("fw_cfg: the name {name:?} is empty, longer than 55 bytes, or has a NUL: take another")]
    Name {
        /// The name.
        name: String,
    },
    /// Two files of one name.
    #[error("fw_cfg: there are two files called {name:?}: leave one out")]
    Twice {
        /// The name.
        name: String,
    },
    /// Too many.
    #[error("fw_cfg: {count} files are more than {FILES_MAX}: leave some out")]
    TooMany {
        /// How many.
        count: usize,
    },
    /// Longer than its length can tell.
    #[error("fw_cfg: the file {name:?} is longer than 4 GiB: take a shorter one")]
    TooLong {
        /// The name.
        name: String,
    },
}

impl Builder {
    pub(super) fn new(memory: Arc<dyn GuestMemory>) -> Self {
        let builder = Self { memory, items: BTreeMap::new(), files: Vec::new() };
        builder
            .item(key::SIGNATURE, b"QEMU".to_vec())
            .item(key::ID, items::INTERFACES.to_le_bytes().to_vec())
            .item(key::NO_GRAPHIC, 1u16.to_le_bytes().to_vec())
            .item(key::IRQ0_OVERRIDE, 1u32.to_le_bytes().to_vec())
            .boot_menu(false)
            .file("etc/system-states", items::system_states(SLEEP_TYPE_S5))
    }

    /// An item without a name; the last one of a key counts.
    pub fn item(mut self, key: u16, bytes: impl Into<Vec<u8>>) -> Self {
        self.items.insert(key, Item { bytes: bytes.into(), origin: Origin::Fixed });
        self
    }

    /// The machine's UUID.
    pub fn uuid(self, uuid: [u8; 16]) -> Self {
        self.item(key::UUID, uuid)
    }

    /// RAM: its bytes all together, and what `etc/e820` tells of it.
    pub fn memory(self, ram: u64, map: &[E820Entry]) -> Self {
        self.item(key::RAM_SIZE, ram.to_le_bytes()).file("etc/e820", items::e820(map))
    }

    /// The processors: how many start after a reset, and a number above every APIC ID.
    pub fn cpus(mut self, count: impl Fn() -> u16 + Send + 'static, apic_id_limit: u16) -> Self {
        let make: Make = Box::new(move || count().to_le_bytes().to_vec());
        self.items.insert(key::CPUS, Item { bytes: vec![0; 2], origin: Origin::Made { make, made: false } });
        self.item(key::MAX_CPUS, apic_id_limit.to_le_bytes())
    }

    /// NUMA nodes: the node of each APIC ID from 0 on, and the bytes of each node.
    pub fn numa(self, nodes_of: &[u32], sizes: &[u64]) -> Self {
        self.item(key::NUMA, items::numa(nodes_of, sizes))
    }

    /// Whether SeaBIOS offers its boot menu, and waits for a key.
    pub fn boot_menu(self, shown: bool) -> Self {
        self.item(key::BOOT_MENU, u16::from(shown).to_le_bytes())
    }

    /// Firmware device paths, in the order in which they are to be tried.
    pub fn boot_order<'a>(self, paths: impl IntoIterator<Item = &'a str>) -> Self {
        let mut lines: Vec<u8> = paths.into_iter().collect::<Vec<_>>().join("\n").into_bytes();
        lines.push(0);
        self.file("bootorder", lines)
    }

    /// A file.
    pub fn file(mut self, name: &str, bytes: impl Into<Vec<u8>>) -> Self {
        self.files.push((name.to_owned(), Item { bytes: bytes.into(), origin: Origin::Fixed }));
        self
    }

    /// A file that the guest may write; a reset brings `initial` back.
    pub fn writable(mut self, name: &str, initial: impl Into<Vec<u8>>) -> Self {
        let initial = initial.into();
        self.files.push((name.to_owned(), Item { bytes: initial.clone(), origin: Origin::Writable(initial) }));
        self
    }

    /// A file of `len` bytes that `make` makes when the guest first selects it after a reset; what it makes is cut to that length, or
    /// filled up with zeros.
    pub fn made(mut self, name: &str, len: usize, make: impl Fn() -> Vec<u8> + Send + 'static) -> Self {
        let origin = Origin::Made { make: Box::new(make), made: false };
        self.files.push((name.to_owned(), Item { bytes: vec![0; len], origin }));
        self
    }

    /// The device.
    ///
    /// # Errors
    /// The directory can't have the files.
    pub fn build(self) -> Result<FwCfg, FwCfgError> {
        let Self { memory, mut items, mut files } = self;
        if files.len() > FILES_MAX {
            return Err(FwCfgError::TooMany { count: files.len() });
        }
        files.sort_by(|(a, _), (b, _)| a.cmp(b));
        if let Some(pair) = files.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(FwCfgError::Twice { name: pair[0].0.clone() });
        }
        let mut directory = (files.len() as u32).to_be_bytes().to_vec();
        for (key, (name, item)) in (key::FIRST_FILE..).zip(files) {
            if name.is_empty() || name.len() >= NAME_LEN || name.contains('\0') {
                return Err(FwCfgError::Name { name });
            }
            let Ok(len) = u32::try_from(item.bytes.len()) else { return Err(FwCfgError::TooLong { name }) };
            directory.extend(len.to_be_bytes());
            directory.extend(key.to_be_bytes());
            directory.extend([0; 2]);
            let end = directory.len() + NAME_LEN;
            directory.extend(name.as_bytes());
            directory.resize(end, 0);
            items.insert(key, item);
        }
        items.insert(key::DIRECTORY, Item { bytes: directory, origin: Origin::Fixed });
        Ok(FwCfg { items, memory, selected: 0, offset: 0, dma_high: 0 })
    }
}

impl std::fmt::Debug for Builder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<_> = self.files.iter().map(|(name, _)| name).collect();
        f.debug_struct("Builder").field("files", &names).finish_non_exhaustive()
    }
}
