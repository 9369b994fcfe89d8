//! The guest's processor: what its model has, from what the host's KVM supports.

use api_channel::call::CpuidEntry;

use super::feature::FeatureSet;
use super::hyperv::Enlightenments;
use super::models::{MODELS, Model};
use super::spec::{CpuSpec, not_carried};
use super::words::{KVM_FEATURES, Register, WORDS};
use super::{CpuidConfig, CpuidError, INDEXED, KVM_SIGNATURE, empty, find, is_amd};

/// The guest's processor.
#[derive(Clone, Debug)]
pub struct Processor {
    /// The CPUID table but for what differs from vCPU to vCPU.
    pub(super) base: Vec<CpuidEntry>,
    pub(super) config: CpuidConfig,
    pub(super) amd: bool,
    pub(super) hyperv: Option<Enlightenments>,
}

impl Processor {
    /// The processor that `spec` asks for. `host` is what KVM supports (`KVM_GET_SUPPORTED_CPUID`).
    ///
    /// Its vendor is the host's, also of a model of another vendor: system calls of 32-bit programs differ between vendors in what
    /// KVM can't change, and a guest chooses by the vendor (QEMU has it so with KVM).
    ///
    /// # Errors
    /// The host lacks what was asked for, or `host` is no table of an x86 processor.
    pub fn new(host: &[CpuidEntry], spec: &CpuSpec, config: CpuidConfig) -> Result<Self, CpuidError> {
        let basic = find(host, 0, 0).ok_or(CpuidError::Incomplete { leaf: 0 })?;
        find(host, 1, 0).ok_or(CpuidError::Incomplete { leaf: 1 })?;
        let able = able(host, config.tsc_deadline);
        let features = spec.wanted(able);
        let missing = features.without(able).names();
        if !missing.is_empty() {
            return Err(CpuidError::Lacks(lacks(spec, &missing, able)));
        }
        if config.topology.apic_ids().any(|id| id >= XAPIC_IDS) && !features.has(FeatureSet::of_names("x2apic")) {
            return Err(CpuidError::NeedsX2apic);
        }
        let amd = is_amd(&basic);
        let mut base = match spec.model {
            None => as_host(host, features),
            Some(model) => as_model(host, model, features, amd),
        };
        if !spec.is_host() {
            fit_xsave(&mut base, host, features, spec.model.is_some());
        }
        Ok(Self { base, config, amd, hyperv: None })
    }

    /// The same, with Hyper-V's interfaces.
    #[must_use]
    pub fn with_hyperv(self, hyperv: Option<Enlightenments>) -> Self {
        Self { hyperv, ..self }
    }

    /// Physical address bits (leaf 0x80000008; 36 where there is none, Intel SDM volume 3A §4.1.4).
    pub fn physical_address_bits(&self) -> u8 {
        find(&self.base, 0x8000_0008, 0).map_or(36, |entry| entry.eax as u8)
    }

    /// The processor signature, which is also in EDX after reset (leaf 1 EAX).
    pub fn signature(&self) -> u32 {
        find(&self.base, 1, 0).map_or(0, |entry| entry.eax)
    }
}

/// APIC IDs from here on need x2APIC: 255 addresses all (Intel SDM volume 3A §11.6.1).
const XAPIC_IDS: u32 = 255;

/// All that a guest can have here.
pub(super) fn able(host: &[CpuidEntry], tsc_deadline: bool) -> FeatureSet {
    // KVM's local APIC has x2APIC whatever its table says; what the topology decides is ours.
    let ours = FeatureSet::of_names("x2apic hypervisor ht cmp-legacy");
    let deadline = FeatureSet::of_names("tsc-deadline");
    let table = FeatureSet::of_table(host);
    let able = if tsc_deadline { table | deadline } else { table.without(deadline) };
    (able | ours).without(not_carried())
}

/// What is missing, and what to do, in a line.
fn lacks(spec: &CpuSpec, missing: &[&str], able: FeatureSet) -> String {
    let name = spec.name();
    let missing = missing.join(", ");
    let usable = |model: &&'static Model| able.has(CpuSpec { model: Some(*model), ..CpuSpec::HOST }.wanted(able));
    let usable: Vec<_> = MODELS.iter().filter(usable).map(|model| model.name).collect();
    let instead = match (spec.model, &usable[..]) {
        (None, _) => "leave them out".to_owned(),
        (Some(model), usable) if usable.contains(&model.name) => "leave them out".to_owned(),
        (Some(_), []) => "use --cpu host, it can give no named model".to_owned(),
        (Some(_), usable) => format!("use --cpu host or one of: {}", usable.join(", ")),
    };
    format!("--cpu {name}: this host lacks {missing}; {instead}")
}

/// The host's table, its features being `features`.
fn as_host(host: &[CpuidEntry], features: FeatureSet) -> Vec<CpuidEntry> {
    // A leaf that has no sub-leaves has none of a host's making either, and what is there twice counts once: its features are looked
    // at in one place.
    let plain = |leaf| WORDS.iter().any(|w| w.leaf == leaf) && WORDS.iter().all(|w| w.leaf != leaf || w.subleaf == 0);
    let mut table: Vec<CpuidEntry> = Vec::new();
    for entry in host {
        let index = if plain(entry.function) { 0 } else { entry.index };
        // An entry without an index stands for all of them, so a leaf has either that one or those with. Of a host that says both, what
        // its first says counts, and nothing of what another hides.
        let first = host.iter().find(|first| first.function == entry.function);
        let is_odd = first.is_some_and(|first| (first.flags ^ entry.flags) & INDEXED != 0);
        let is_hidden = find(host, entry.function, index) != Some(*entry);
        let is_there = find(&table, entry.function, index).is_some();
        if !is_odd && !is_hidden && !is_there && (entry.flags & INDEXED == 0 || entry.index == index) {
            table.push(*entry);
        }
    }
    for (word, bits) in features.words() {
        for entry in table.iter_mut().filter(|e| e.function == word.leaf && is_subleaf(e, word.subleaf)) {
            let register = word.register.of_mut(entry);
            *register = *register & !word.mask() | bits;
        }
    }
    table
}

fn is_subleaf(entry: &CpuidEntry, index: u32) -> bool {
    entry.flags & INDEXED == 0 || entry.index == index
}

/// Leaf 1 EBX: CLFLUSH flushes 64 bytes.
const CLFLUSH_64: u32 = 8 << 8;
/// Leaf 1 EDX as AMD repeats it in leaf 0x80000001.
const REPEATED_BY_AMD: u32 = 0x0183_f3ff;

/// A model's table. Caches are the host's, so that guests tune themselves for what they run on; so is the width of addresses.
fn as_model(host: &[CpuidEntry], model: &Model, features: FeatureSet, amd: bool) -> Vec<CpuidEntry> {
    let signature = model.signature(amd);
    let host_leaf = |leaf| find(host, leaf, 0).unwrap_or_else(|| empty(leaf));
    let plain = |leaf| {
        let mut entry = empty(leaf);
        put(&mut entry, features);
        entry
    };
    let mut table = vec![
        CpuidEntry { eax: level(model, features), ..host_leaf(0) },
        CpuidEntry { eax: signature, ebx: CLFLUSH_64, ..plain(1) },
        plain(6),
        CpuidEntry { eax: xlevel(model, features), ..empty(0x8000_0000) },
        plain(0x8000_0007),
        plain(0x8000_0021),
    ];
    table.extend(structured(features));
    if let Some(signature) = find(host, KVM_SIGNATURE, 0) {
        table.extend([CpuidEntry { eax: KVM_FEATURES, ..signature }, plain(KVM_FEATURES)]);
    }
    let mut extended = plain(0x8000_0001);
    if amd {
        extended.eax = signature;
        extended.edx |= features.bits(1, 0, Register::Edx) & REPEATED_BY_AMD;
    }
    table.push(extended);
    table.extend(brand(model.name));
    let linear = if features.has(FeatureSet::of_names("la57")) { 57 } else { 48 };
    let physical = host_leaf(0x8000_0008).eax & 0xff;
    table.push(CpuidEntry { eax: linear << 8 | physical.max(36), ..plain(0x8000_0008) });
    let caches: &[u32] = if amd { &[0x8000_0005, 0x8000_0006] } else { &[2, 4, 0x8000_0006] };
    let places: &[u32] =
        if amd && features.has(FeatureSet::of_names("topoext")) { &[0x8000_001d, 0x8000_001e] } else { &[] };
    let tiles: &[u32] = if features.has(FeatureSet::of_names("amx-tile")) { &[0x1d, 0x1e] } else { &[] };
    let kept = |entry: &&CpuidEntry| [caches, places, tiles].iter().any(|leaves| leaves.contains(&entry.function));
    table.extend(host.iter().filter(kept));
    // KVM's answer to a leaf that isn't there is zeros, as is that of an empty one.
    table.retain(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx] != [0; 4] || entry.flags & INDEXED != 0);
    table
}

/// Stores the features of the entry's leaf and sub-leaf.
fn put(entry: &mut CpuidEntry, features: FeatureSet) {
    let place = (entry.function, entry.index);
    for (word, bits) in features.words().filter(|(word, _)| (word.leaf, word.subleaf) == place) {
        *word.register.of_mut(entry) |= bits;
    }
}

/// Leaf 7; EAX of its first sub-leaf says how many there are.
fn structured(features: FeatureSet) -> impl Iterator<Item = CpuidEntry> {
    let mut entries = [0, 1, 2].map(|index| CpuidEntry { index, flags: INDEXED, ..empty(7) });
    entries.iter_mut().for_each(|entry| put(entry, features));
    let used = |entry: &CpuidEntry| [entry.eax, entry.ebx, entry.ecx, entry.edx] != [0; 4];
    let last = entries.iter().rposition(used).unwrap_or(0);
    entries[0].eax = last as u32;
    entries.into_iter().take(last + 1)
}

fn level(model: &Model, features: FeatureSet) -> u32 {
    let tiles = if features.has(FeatureSet::of_names("amx-tile")) { 0x1e } else { 0 };
    let used =
        features.words().filter(|(word, bits)| *bits != 0 && word.leaf < KVM_SIGNATURE).map(|(word, _)| word.leaf);
    let xsave = if features.has(FeatureSet::of_names("xsave")) { 0xd } else { 0 };
    used.chain([tiles, xsave, model.level]).max().unwrap_or(model.level)
}

fn xlevel(model: &Model, features: FeatureSet) -> u32 {
    let used =
        features.words().filter(|(word, bits)| *bits != 0 && word.leaf >= 0x8000_0000).map(|(word, _)| word.leaf);
    used.chain([model.xlevel]).max().unwrap_or(model.xlevel)
}

/// The brand string (leaves 0x80000002 to 4).
fn brand(name: &str) -> impl Iterator<Item = CpuidEntry> {
    let mut text = [0; 48];
    let brand = format!("Virtual CPU ({name})");
    text.iter_mut().zip(brand.bytes().take(47)).for_each(|(to, from)| *to = from);
    (0x8000_0002..).zip(text.chunks_exact(16).map(<[u8]>::to_vec).collect::<Vec<_>>()).map(|(function, bytes)| {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        CpuidEntry { eax: word(0), ebx: word(4), ecx: word(8), edx: word(12), ..empty(function) }
    })
}

/// Parts of the extended state, and the features that they are for (Intel SDM volume 1 §13.1): bits of XCR0.
const STATE: [(u64, &str); 5] =
    [(1 << 2, "avx"), (3 << 3, "mpx"), (7 << 5, "avx512f"), (1 << 9, "pku"), (3 << 17, "amx-tile")];
/// x87 and SSE: wherever there is XSAVE.
const LEGACY_STATE: u64 = 3;
/// Shadow stacks: bits of IA32_XSS.
const SHADOW_STACK_STATE: u64 = 3 << 11;
/// Bytes of the legacy area and the header of an XSAVE area.
const XSAVE_MINIMUM: u32 = 576;

/// Makes leaf 0xd fit the features: KVM takes from it which parts of XCR0 and IA32_XSS the guest may set.
fn fit_xsave(table: &mut Vec<CpuidEntry>, host: &[CpuidEntry], features: FeatureSet, named: bool) {
    const LEAF: u32 = 0xd;
    table.retain(|entry| entry.function != LEAF);
    let has = |name: &str| features.has(FeatureSet::of_names(name));
    let part = |index| find(host, LEAF, index).filter(|entry| entry.flags & INDEXED != 0);
    let Some(first) = part(0).filter(|_| has("xsave")) else { return };
    let second = part(1).unwrap_or_else(|| CpuidEntry { index: 1, flags: INDEXED, ..empty(LEAF) });

    let (mut user, mut supervisor) = (wide(first.eax, first.edx), wide(second.ecx, second.edx));
    let on = |(bits, name): &(u64, &str)| if has(name) { *bits } else { 0 };
    let all: u64 = STATE.iter().map(|(bits, _)| bits).sum();
    let wanted = LEGACY_STATE | STATE.iter().map(on).sum::<u64>();
    // What we have no name for goes with the host's own processor only.
    user &= if named { wanted } else { wanted | !all };
    supervisor &= match () {
        () if !has("xsaves") => 0,
        () if has("shstk") || has("ibt") => SHADOW_STACK_STATE | if named { 0 } else { u64::MAX },
        () => {
            if named {
                0
            } else {
                !SHADOW_STACK_STATE
            }
        }
    };

    let parts = (2..u64::BITS).filter_map(part);
    let kept: Vec<_> = parts.filter(|entry| (user | supervisor) >> entry.index & 1 != 0).collect();
    let ends = kept.iter().filter(|entry| user >> entry.index & 1 != 0).map(|e| e.ebx.saturating_add(e.eax));
    let size = ends.max().unwrap_or(0).max(XSAVE_MINIMUM);
    // KVM computes EBX of both anew as the guest sets XCR0 and IA32_XSS.
    table.push(CpuidEntry { eax: user as u32, ebx: size, ecx: size, edx: (user >> 32) as u32, ..first });
    let mut variants = CpuidEntry { eax: 0, ecx: supervisor as u32, edx: (supervisor >> 32) as u32, ..second };
    put(&mut variants, features);
    table.push(variants);
    table.extend(kept);
}

/// A register pair's 64 bits.
fn wide(low: u32, high: u32) -> u64 {
    u64::from(low) | u64::from(high) << 32
}
