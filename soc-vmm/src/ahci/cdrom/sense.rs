//! Sense data: why a command failed (SPC-4 §4.5).

use serde::{Deserialize, Serialize};

/// Sense key, additional sense code and its qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sense {
    /// 0–15.
    key: u8,
    code: u8,
    qualifier: u8,
}

impl Sense {
    pub(super) const NONE: Self = Self::new(0, 0, 0);
    pub(super) const NO_MEDIUM_TRAY_CLOSED: Self = Self::new(2, 0x3a, 1);
    pub(super) const NO_MEDIUM_TRAY_OPEN: Self = Self::new(2, 0x3a, 2);
    /// The medium could not be read.
    pub(in super::super) const UNREADABLE: Self = Self::new(3, 0x11, 0);
    pub(super) const UNKNOWN_COMMAND: Self = Self::new(5, 0x20, 0);
    pub(super) const BEHIND_THE_END: Self = Self::new(5, 0x21, 0);
    pub(super) const BAD_FIELD: Self = Self::new(5, 0x24, 0);
    pub(super) const NO_SAVED_PAGES: Self = Self::new(5, 0x39, 0);
    pub(super) const REMOVAL_PREVENTED: Self = Self::new(5, 0x53, 2);
    pub(super) const MEDIUM_CHANGED: Self = Self::new(6, 0x28, 0);

    const fn new(key: u8, code: u8, qualifier: u8) -> Self {
        Self { key, code, qualifier }
    }

    /// The sense key, which an ATAPI device also puts into the upper half of its error register.
    pub(in super::super) fn key(self) -> u8 {
        self.key
    }

    /// Fixed format, current error (SPC-4 §4.5.3).
    pub(super) fn data(self) -> [u8; 18] {
        let mut data = [0; 18];
        (data[0], data[2], data[7], data[12], data[13]) = (0x70, self.key, 10, self.code, self.qualifier);
        data
    }
}
