//! Hyper-V's enlightenments: the switches of `--cpu` that begin with `hv-`, with QEMU's names, and the CPUID leaves that they make
//! (Hypervisor Top-Level Functional Specification, TLFS, "Feature and Interface Discovery").
//!
//! KVM does the work. A guest that sees these leaves sees KVM's own 0x100 further up.

use api_channel::call::CpuidEntry;

use super::spec::CpuSpecError;
use super::words::{KVM_FEATURES, Register};
use super::{CpuidError, KVM_SIGNATURE, MAX_CPUS, empty, find};

/// Leaves: vendor and the last leaf, interface, version, features, recommendations, limits.
const VENDOR: u32 = 0x4000_0000;
const INTERFACE: u32 = 0x4000_0001;
const VERSION: u32 = 0x4000_0002;
const FEATURES: u32 = 0x4000_0003;
const RECOMMENDED: u32 = 0x4000_0004;
const LIMITS: u32 = 0x4000_0005;
/// How far KVM's leaves move.
const MOVE: u32 = 0x100;

/// A switch.
struct Switch {
    name: &'static str,
    /// What it sets, all of which the host's KVM must give.
    bits: &'static [(u32, Register, u32)],
    /// Switches that must be on, too.
    needs: &'static [&'static str],
}

const fn switch(name: &'static str, bits: &'static [(u32, Register, u32)], needs: &'static [&'static str]) -> Switch {
    Switch { name, bits, needs }
}

/// Every switch that is on or off. One stands below what it needs.
static SWITCHES: [Switch; 16] = {
    use Register::{Eax, Edx};
    [
        switch("hv-relaxed", &[(RECOMMENDED, Eax, 1 << 5)], &[]),
        switch("hv-vapic", &[(FEATURES, Eax, 1 << 4), (RECOMMENDED, Eax, 1 << 3)], &[]),
        switch("hv-vpindex", &[(FEATURES, Eax, 1 << 6)], &[]),
        switch("hv-runtime", &[(FEATURES, Eax, 1)], &[]),
        switch("hv-time", &[(FEATURES, Eax, 1 << 1 | 1 << 9)], &[]),
        switch("hv-synic", &[(FEATURES, Eax, 1 << 2)], &["hv-vpindex"]),
        switch("hv-stimer", &[(FEATURES, Eax, 1 << 3)], &["hv-synic", "hv-time"]),
        switch("hv-stimer-direct", &[(FEATURES, Edx, 1 << 19)], &["hv-stimer"]),
        switch("hv-reset", &[(FEATURES, Eax, 1 << 7)], &[]),
        switch("hv-frequencies", &[(FEATURES, Eax, 1 << 11), (FEATURES, Edx, 1 << 8)], &[]),
        switch("hv-reenlightenment", &[(FEATURES, Eax, 1 << 13)], &[]),
        switch("hv-tlbflush", &[(RECOMMENDED, Eax, 1 << 2 | 1 << 11)], &["hv-vpindex"]),
        switch("hv-tlbflush-ext", &[(FEATURES, Edx, 1 << 14)], &["hv-tlbflush"]),
        switch("hv-ipi", &[(RECOMMENDED, Eax, 1 << 10 | 1 << 11)], &["hv-vpindex"]),
        switch("hv-avic", &[(RECOMMENDED, Eax, 1 << 9)], &[]),
        switch("hv-xmm-input", &[(FEATURES, Edx, 1 << 4)], &[]),
    ]
};

/// Another name of `hv-avic`.
const APICV: &str = "hv-apicv";

/// Names of QEMU's that mean nested virtualization, a debugger, crash reports, or refusing what isn't told: no guest has them.
const NOT_CARRIED: [&str; 7] = [
    "hv-evmcs",
    "hv-emsr-bitmap",
    "hv-tlbflush-direct",
    "hv-syndbg",
    "hv-crash",
    "hv-enforce-cpuid",
    "hv-no-nonarch-coresharing",
];

/// A guest of fewer attempts at a lock would call the hypervisor all the time (QEMU's limit).
const LEAST_SPINLOCKS: u32 = 0xfff;
/// The guest isn't to tell of locks.
const NEVER: u32 = u32::MAX;

/// Switches, as bits by their places in [`SWITCHES`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Set(u32);

impl Set {
    fn named(name: &str) -> Option<Self> {
        let name = if name == APICV { "hv-avic" } else { name };
        SWITCHES.iter().position(|switch| switch.name == name).map(|place| Self(1 << place))
    }

    /// The set of names of the table.
    fn of(names: &[&str]) -> Self {
        names.iter().fold(Self::default(), |set, name| Self(set.0 | Self::named(name).map_or(0, |one| one.0)))
    }

    fn has(self, other: Self) -> bool {
        other.0 & !self.0 == 0
    }

    fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    fn switches(self) -> impl Iterator<Item = &'static Switch> {
        SWITCHES.iter().enumerate().filter(move |(place, _)| self.0 >> place & 1 != 0).map(|(_, switch)| switch)
    }

    fn names(self) -> String {
        self.switches().map(|switch| switch.name).collect::<Vec<_>>().join(", ")
    }

    /// The set less what needs something that isn't in it.
    fn with_their_needs(self) -> Self {
        self.switches().fold(self, |set, switch| {
            if set.has(Self::of(switch.needs)) { set } else { set.without(Self::of(&[switch.name])) }
        })
    }
}

/// What `--cpu` says of Hyper-V's enlightenments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HypervSpec {
    /// All that the host's KVM gives.
    passthrough: bool,
    on: Set,
    off: Set,
    spinlocks: Option<u32>,
    vendor: Option<[u8; 12]>,
}

impl HypervSpec {
    /// Nothing.
    pub(super) const NONE: Self = Self { passthrough: false, on: Set(0), off: Set(0), spinlocks: None, vendor: None };

    /// Takes a switch of `--cpu` if it is one of these: `name`, `+name`, `-name`, `name=value`, with `_` as good as `-` in the name.
    pub(super) fn take(&mut self, switch: &str) -> Result<bool, CpuSpecError> {
        let (name, value) = match (switch.strip_prefix('+'), switch.strip_prefix('-'), switch.split_once('=')) {
            (Some(name), ..) => (name, "on"),
            (_, Some(name), _) => (name, "off"),
            (.., Some((name, value))) => (name, value),
            _ => (switch, "on"),
        };
        let name = name.replace('_', "-");
        if !name.starts_with("hv-") {
            return Ok(false);
        }
        match &*name {
            "hv-spinlocks" => self.spinlocks = Some(spinlocks(value).ok_or(CpuSpecError::Spinlocks)?),
            "hv-vendor-id" => self.vendor = Some(vendor(value).ok_or(CpuSpecError::HypervVendor)?),
            name => {
                let is_on = match value {
                    "on" => true,
                    "off" => false,
                    _ => return Err(CpuSpecError::Switch(switch.to_owned())),
                };
                self.set(name, is_on)?;
            }
        }
        Ok(true)
    }

    fn set(&mut self, name: &str, is_on: bool) -> Result<(), CpuSpecError> {
        if name == "hv-passthrough" {
            self.passthrough = is_on;
            return Ok(());
        }
        if NOT_CARRIED.contains(&name) {
            return if is_on { Err(CpuSpecError::NotCarried(name.to_owned())) } else { Ok(()) };
        }
        let Some(one) = Set::named(name) else { return Err(CpuSpecError::Hyperv(name.to_owned())) };
        let (on, off) = (self.on.without(one), self.off.without(one));
        (self.on, self.off) = if is_on { (Set(on.0 | one.0), off) } else { (on, Set(off.0 | one.0)) };
        Ok(())
    }

    /// Whether anything is asked for. A vendor alone is nothing.
    pub(super) fn is_asked(&self) -> bool {
        self.passthrough || self.on != Set::default() || self.spinlocks.is_some_and(|spinlocks| spinlocks != NEVER)
    }

    /// What the guest gets, of what the host's KVM supports (`KVM_GET_SUPPORTED_HV_CPUID`); `None` if all of nothing was asked for.
    ///
    /// # Errors
    /// The host lacks what was asked for, or a switch is on without what it needs.
    pub fn given(&self, host: &[CpuidEntry]) -> Result<Option<Enlightenments>, CpuidError> {
        let able = able(host);
        let has_interface = find(host, INTERFACE, 0).is_some();
        let missing = self.on.without(able);
        if missing != Set::default() {
            let why = format!("--cpu: this host's KVM lacks {}; leave them out", missing.names());
            return Err(CpuidError::Lacks(why));
        }
        if !has_interface {
            return match (self.passthrough, self.spinlocks) {
                (true, None) => Ok(None),
                _ => {
                    let why = "--cpu: this host's KVM lacks Hyper-V's interfaces; leave hv-spinlocks out";
                    Err(CpuidError::Lacks(why.to_owned()))
                }
            };
        }
        let all = if self.passthrough { able } else { Set::default() };
        let set = Set(all.0 | self.on.0).without(self.off);
        for switch in self.on.switches() {
            let missing = Set::of(switch.needs).without(set);
            if missing != Set::default() {
                let why = format!("--cpu: {} needs {}; switch that on, too", switch.name, missing.names());
                return Err(CpuidError::Lacks(why));
            }
        }
        let of_host = |leaf| find(host, leaf, 0).filter(|_| self.passthrough);
        let vendor = of_host(VENDOR).map_or(*b"Microsoft Hv", |leaf| text([leaf.ebx, leaf.ecx, leaf.edx]));
        let spinlocks = of_host(RECOMMENDED).map_or(NEVER, |leaf| leaf.ebx);
        Ok(Some(Enlightenments {
            set: set.with_their_needs(),
            spinlocks: self.spinlocks.unwrap_or(spinlocks),
            vendor: self.vendor.unwrap_or(vendor),
            version: of_host(VERSION).map_or(WINDOWS_2016, |leaf| (leaf.eax, leaf.ebx)),
        }))
    }
}

/// Build and version of what the guest takes for its hypervisor: Windows Server 2016, as QEMU has it.
const WINDOWS_2016: (u32, u32) = (0x3839, 0xa_0000);

/// The enlightenments of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Enlightenments {
    set: Set,
    spinlocks: u32,
    vendor: [u8; 12],
    version: (u32, u32),
}

impl Enlightenments {
    /// Whether the vCPUs need a SynIC.
    pub fn has_synic(&self) -> bool {
        self.set.has(Set::of(&["hv-synic"]))
    }

    /// Puts the leaves into a vCPU's table, and moves KVM's own out of their way.
    pub(super) fn apply(&self, table: &mut Vec<CpuidEntry>) {
        // Of KVM's, those that a guest looks for wherever they begin.
        table.retain(|entry| !(KVM_SIGNATURE..KVM_SIGNATURE + MOVE).contains(&entry.function) || is_kvm_s(entry));
        for entry in table.iter_mut().filter(|entry| is_kvm_s(entry)) {
            entry.function += MOVE;
            if entry.function == KVM_SIGNATURE + MOVE {
                entry.eax = KVM_FEATURES + MOVE;
            }
        }
        table.extend(self.leaves());
    }

    fn leaves(&self) -> [CpuidEntry; 6] {
        /// "Hv#1".
        const SIGNATURE: u32 = 0x3123_7648;
        /// Hypercalls, which come with any of it.
        const HYPERCALLS: u32 = 1 << 5;
        /// Posting messages and signalling events.
        const CONNECTIONS: u32 = 1 << 4 | 1 << 5;
        let mut features = CpuidEntry { eax: HYPERCALLS, ..empty(FEATURES) };
        let mut recommended = CpuidEntry { ebx: self.spinlocks, ..empty(RECOMMENDED) };
        for &(leaf, register, bits) in self.set.switches().flat_map(|switch| switch.bits) {
            *register.of_mut(if leaf == FEATURES { &mut features } else { &mut recommended }) |= bits;
        }
        if self.has_synic() {
            features.ebx |= CONNECTIONS;
        }
        let [ebx, ecx, edx] = words(&self.vendor);
        let (build, version) = self.version;
        [
            CpuidEntry { eax: LIMITS, ebx, ecx, edx, ..empty(VENDOR) },
            CpuidEntry { eax: SIGNATURE, ..empty(INTERFACE) },
            CpuidEntry { eax: build, ebx: version, ..empty(VERSION) },
            features,
            recommended,
            // Virtual processors, and logical ones.
            CpuidEntry { eax: MAX_CPUS, ebx: MAX_CPUS, ..empty(LIMITS) },
        ]
    }
}

/// What the host's KVM gives.
fn able(host: &[CpuidEntry]) -> Set {
    let gives = |&(leaf, register, bits): &(u32, Register, u32)| {
        find(host, leaf, 0).is_some_and(|entry| register.of(&entry) & bits == bits)
    };
    let able = SWITCHES.iter().enumerate().filter(|(_, switch)| switch.bits.iter().all(gives));
    Set(able.fold(0, |set, (place, _)| set | 1 << place)).with_their_needs()
}

fn is_kvm_s(entry: &CpuidEntry) -> bool {
    matches!(entry.function, KVM_SIGNATURE | KVM_FEATURES)
}

fn words(text: &[u8; 12]) -> [u32; 3] {
    let (words, _) = text.as_chunks::<4>();
    [words[0], words[1], words[2]].map(u32::from_le_bytes)
}

fn text(words: [u32; 3]) -> [u8; 12] {
    let mut text = [0; 12];
    text.iter_mut().zip(words.into_iter().flat_map(u32::to_le_bytes)).for_each(|(to, from)| *to = from);
    text
}

/// A number, also hexadecimal with 0x.
fn spinlocks(value: &str) -> Option<u32> {
    let number = match value.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => value.parse(),
    };
    number.ok().filter(|number| *number >= LEAST_SPINLOCKS)
}

/// 1 to 12 printable characters.
fn vendor(value: &str) -> Option<[u8; 12]> {
    let mut vendor = [0; 12];
    let fits = (1..=12).contains(&value.len()) && value.bytes().all(|byte| (b' '..=b'~').contains(&byte));
    vendor.iter_mut().zip(value.bytes()).for_each(|(to, from)| *to = from);
    fits.then_some(vendor)
}
