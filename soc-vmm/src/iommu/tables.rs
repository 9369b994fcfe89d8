//! What a guest puts into memory for the unit: entries of its tables (VT-d specification §9), copied before they are looked at.

/// A page of the unit's tables and of DMA.
pub(super) const PAGE: u64 = 0x1000;
/// Guest-physical page of an entry that points to one.
pub(super) const PAGE_MASK: u64 = 0x000f_ffff_ffff_f000;

/// A root entry (§9.1): the context table of a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RootEntry(pub(super) u128);

impl RootEntry {
    pub(super) fn is_present(self) -> bool {
        self.0 & 1 != 0
    }

    pub(super) fn is_sound(self) -> bool {
        self.0 >> 64 == 0 && self.0 & 0xffe == 0
    }

    pub(super) fn contexts(self) -> u64 {
        self.0 as u64 & PAGE_MASK
    }
}

/// A context entry (§9.3): what becomes of a function's requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ContextEntry(pub(super) u128);

/// How requests are translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Domain {
    /// Not at all, up to so many address bits.
    Through {
        /// Address bits.
        bits: u32,
    },
    /// By second-level tables.
    Paged {
        /// The first table.
        table: u64,
        /// How many tables a walk goes through.
        levels: u32,
    },
}

impl ContextEntry {
    pub(super) fn is_present(self) -> bool {
        self.0 & 1 != 0
    }

    /// Faults of this function's are not recorded.
    pub(super) fn is_quiet(self) -> bool {
        self.0 & 2 != 0
    }

    pub(super) fn is_sound(self) -> bool {
        const RESERVED: u128 = 0xff0 | 1 << (64 + 7) | 0xffff_ffff_ff00_0000 << 64;
        self.0 & RESERVED == 0
    }

    /// None: an address width or a translation type that the unit doesn't have.
    pub(super) fn domain(self) -> Option<Domain> {
        const UNTRANSLATED_ONLY: u8 = 0;
        const PASS_THROUGH: u8 = 2;
        let levels = match (self.0 >> 64) as u8 & 7 {
            1 => 3,
            2 => 4,
            _ => return None,
        };
        match (self.0 >> 2) as u8 & 3 {
            UNTRANSLATED_ONLY => Some(Domain::Paged { table: self.0 as u64 & PAGE_MASK, levels }),
            PASS_THROUGH => Some(Domain::Through { bits: address_bits(levels) }),
            _ => None,
        }
    }
}

/// Address bits that so many levels translate.
pub(super) fn address_bits(levels: u32) -> u32 {
    12 + 9 * levels
}

/// A second-level paging entry (§9.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct PageEntry(pub(super) u64);

impl PageEntry {
    pub(super) const READ: u64 = 1;
    pub(super) const WRITE: u64 = 2;
    const LARGE: u64 = 1 << 7;
    /// Snooping and device TLBs, which the unit has not.
    const RESERVED: u64 = 1 << 11 | 1 << 62;

    /// Whether the walk ends here, at `level` (1: a table of pages).
    pub(super) fn is_leaf(self, level: u32) -> bool {
        level == 1 || self.0 & Self::LARGE != 0
    }

    pub(super) fn is_sound(self, level: u32) -> bool {
        let large = level > 1 && self.0 & Self::LARGE != 0;
        let below = if large { (1 << (12 + 9 * (level - 1))) - PAGE } else { 0 };
        self.0 & (Self::RESERVED | below) == 0 && !(large && level > 3)
    }

    pub(super) fn address(self) -> u64 {
        self.0 & PAGE_MASK
    }
}

/// An interrupt remapping table entry (§9.10).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InterruptEntry(pub(super) u128);

impl InterruptEntry {
    pub(super) fn is_present(self) -> bool {
        self.0 & 1 != 0
    }

    /// Faults of this entry's are not recorded.
    pub(super) fn is_quiet(self) -> bool {
        self.0 & 2 != 0
    }

    pub(super) fn is_sound(self) -> bool {
        // Posted mode is among them.
        const RESERVED: u128 = 0xf000 | 0xff00_0000 | 0xffff_ffff_fff0_0000 << 64;
        self.0 & RESERVED == 0 && self.validation() != 3
    }

    fn validation(self) -> u8 {
        (self.0 >> 82) as u8 & 3
    }

    /// Whether a request of the function with this ID may use the entry.
    pub(super) fn admits(self, requester: u16) -> bool {
        let wanted = (self.0 >> 64) as u16;
        match self.validation() {
            0 => true,
            1 => {
                let ignored = [0, 0b100, 0b110, 0b111][(self.0 >> 80) as usize & 3];
                (wanted ^ requester) & !ignored == 0
            }
            2 => {
                let [first, last] = wanted.to_be_bytes();
                (first..=last).contains(&requester.to_be_bytes()[0])
            }
            _ => false,
        }
    }

    /// Vector and delivery mode as in a message's data.
    pub(super) fn vector_and_mode(self) -> u32 {
        (self.0 >> 16) as u32 & 0xff | ((self.0 >> 5) as u32 & 7) << 8
    }

    pub(super) fn is_level(self) -> bool {
        self.0 >> 4 & 1 != 0
    }

    pub(super) fn is_logical(self) -> bool {
        self.0 >> 2 & 1 != 0
    }

    pub(super) fn is_redirectable(self) -> bool {
        self.0 >> 3 & 1 != 0
    }

    /// The destination: with `extended` its 32 bits, else the 8 that an xAPIC has.
    pub(super) fn destination(self, extended: bool) -> u32 {
        let field = (self.0 >> 32) as u32;
        if extended { field } else { field >> 8 & 0xff }
    }
}
