//! Sets of CPU features.

use api_channel::call::CpuidEntry;

use super::find;
use super::words::{ALIASES, COUNT, OF_ARCH_CAPABILITIES, Register, WORDS, Word};

/// Features, as bits of [`WORDS`].
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct FeatureSet([u32; COUNT]);

impl FeatureSet {
    /// None.
    pub(super) const NONE: Self = Self([0; COUNT]);

    /// The bits behind a name.
    ///
    /// # Errors
    /// It is no feature's, or one of an MSR's.
    pub(super) fn named(name: &str) -> Result<Self, NameError> {
        let plain = name.replace('_', "-");
        let plain = ALIASES.iter().find(|(alias, _)| *alias == plain).map_or(&*plain, |(_, name)| name);
        let mut set = Self::NONE;
        for (bits, word) in set.0.iter_mut().zip(&WORDS) {
            *bits = word.bits.iter().filter(|(_, name)| *name == plain).fold(0, |bits, (bit, _)| bits | 1 << bit);
        }
        match () {
            () if !set.is_empty() => Ok(set),
            () if OF_ARCH_CAPABILITIES.contains(&plain) => Err(NameError::OfMsr(name.to_owned())),
            () => Err(NameError::Unknown(name.to_owned())),
        }
    }

    /// The features of a list of names, apart by blanks. For the tables of this program.
    ///
    /// # Panics
    /// A name is none.
    pub(super) fn of_names(names: &str) -> Self {
        let set = |name| Self::named(name).unwrap_or_else(|e| panic!("{e}"));
        names.split_whitespace().fold(Self::NONE, |all, name| all | set(name))
    }

    /// The features that a CPUID table has.
    pub(super) fn of_table(table: &[CpuidEntry]) -> Self {
        let mut set = Self::NONE;
        for (bits, word) in set.0.iter_mut().zip(&WORDS) {
            *bits = find(table, word.leaf, word.subleaf).map_or(0, |entry| word.register.of(&entry) & word.mask());
        }
        set
    }

    /// Each word, and its bits in this set.
    pub(super) fn words(&self) -> impl Iterator<Item = (&'static Word, u32)> + use<> {
        WORDS.iter().zip(self.0)
    }

    /// The bits of the set in one register.
    pub(super) fn bits(&self, leaf: u32, subleaf: u32, register: Register) -> u32 {
        let here = |word: &Word| (word.leaf, word.subleaf, word.register) == (leaf, subleaf, register);
        self.words().find(|(word, _)| here(word)).map_or(0, |(_, bits)| bits)
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        *self == Self::NONE
    }

    /// Whether all of `other` are in it.
    pub(super) fn has(&self, other: Self) -> bool {
        other.without(*self).is_empty()
    }

    /// Whether any of `other` is in it.
    pub(super) fn has_any(&self, other: Self) -> bool {
        self.without(other) != *self
    }

    /// The set less `other`.
    #[must_use]
    pub(super) fn without(self, other: Self) -> Self {
        let mut rest = self;
        rest.0.iter_mut().zip(other.0).for_each(|(bits, gone)| *bits &= !gone);
        rest
    }

    /// Names, each once, in the order of the words.
    pub(super) fn names(&self) -> Vec<&'static str> {
        let mut names = Vec::new();
        for (word, bits) in self.words() {
            for (bit, name) in word.bits {
                if bits >> bit & 1 != 0 && !names.contains(name) {
                    names.push(*name);
                }
            }
        }
        names
    }
}

impl std::ops::BitOr for FeatureSet {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        let mut all = self;
        all.0.iter_mut().zip(other.0).for_each(|(bits, more)| *bits |= more);
        all
    }
}

impl std::ops::BitAnd for FeatureSet {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        let mut both = self;
        both.0.iter_mut().zip(other.0).for_each(|(bits, others)| *bits &= others);
        both
    }
}

impl std::fmt::Debug for FeatureSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.names()).finish()
    }
}

/// Why a name stands for no features.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nobody's name.
    #[error("there is no CPU feature '{0}'; the names are QEMU's, see docs/operations.md")]
    Unknown(String),
    /// Not a CPUID bit. KVM gives the guest what the host has of these; no guest is told of a host's flaw that this host lacks.
    #[error("'{0}' can't be switched: with arch-capabilities the guest sees what the host has of it; leave it out")]
    OfMsr(String),
}
