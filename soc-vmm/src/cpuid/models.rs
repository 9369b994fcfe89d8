//! The named CPU models: what their processors have, by the manufacturers' documents, with the names that QEMU and libvirt gave them.
//!
//! VMX, SVM and bits of MSRs are left out of all: we don't carry them.

use std::sync::LazyLock;

use super::feature::FeatureSet;

/// A model.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Model {
    /// Its name.
    pub(super) name: &'static str,
    /// The model, further up in the table, that it has all features of but `less`.
    pub(super) like: Option<&'static str>,
    /// Features beyond that.
    pub(super) more: &'static str,
    /// Features that `like` has and this one hasn't.
    pub(super) less: &'static str,
    /// Family, model, stepping; of two where the processors of both vendors have the level: Intel's, then AMD's.
    identity: &'static [Identity],
    /// Highest basic leaf, at least.
    pub(super) level: u32,
    /// Highest extended leaf, at least.
    pub(super) xlevel: u32,
}

/// Family, model, stepping.
type Identity = (u32, u32, u32);

impl Model {
    /// The model of that name.
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        MODELS.iter().find(|model| model.name == name)
    }

    /// All that it has.
    pub(super) fn features(&self) -> FeatureSet {
        features_of(self.name)
    }

    /// The processor signature (leaf 1 EAX; Intel SDM volume 2A figure 3-6), on a host whose vendor is AMD or not.
    pub(super) fn signature(&self, amd: bool) -> u32 {
        let identity = if amd { self.identity.last() } else { self.identity.first() };
        let (family, model, stepping) = identity.copied().unwrap_or_default();
        let (base, extended) = if family > 0xf { (0xf, family - 0xf) } else { (family, 0) };
        extended << 20 | (model >> 4) << 16 | base << 8 | (model & 0xf) << 4 | stepping
    }
}

/// The names of all models.
pub fn model_names() -> impl Iterator<Item = &'static str> {
    MODELS.iter().map(|model| model.name)
}

/// The features of the model of that name, looked up where they were put together.
fn features_of(name: &str) -> FeatureSet {
    static ALL: LazyLock<Vec<FeatureSet>> = LazyLock::new(|| {
        let mut all: Vec<FeatureSet> = Vec::new();
        for model in &MODELS {
            // It stands on one further up.
            let like = model.like.and_then(|like| MODELS[..all.len()].iter().position(|m| m.name == like));
            let base = like.map_or(FeatureSet::NONE, |i| all[i]);
            all.push(base.without(FeatureSet::of_names(model.less)) | FeatureSet::of_names(model.more));
        }
        all
    });
    MODELS.iter().position(|model| model.name == name).map_or(FeatureSet::NONE, |i| ALL[i])
}

/// A model that begins a line.
const fn first(name: &'static str, identity: &'static [Identity], levels: (u32, u32), features: &'static str) -> Model {
    Model { name, like: None, more: features, less: "", identity, level: levels.0, xlevel: levels.1 }
}

/// A model that follows another.
const fn after(
    name: &'static str,
    like: &'static str,
    identity: &'static [Identity],
    levels: (u32, u32),
    more: &'static str,
    less: &'static str,
) -> Model {
    Model { name, like: Some(like), more, less, identity, level: levels.0, xlevel: levels.1 }
}

/// Every model.
pub(super) static MODELS: [Model; 46] = [
    // The levels of the x86-64 psABI (§3.1.1, table 3.1): what a compiler may use, and what every system needs beside it. The identity
    // is that of the vendor's first server processor of the level, the same on all hosts of a vendor.
    first(
        "x86-64-v2",
        &[(6, 26, 3), (21, 1, 2)],
        (0xb, 0x8000_0008),
        "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm \
         pni ssse3 cx16 sse4.1 sse4.2 popcnt lahf-lm tsc-deadline arat",
    ),
    after(
        "x86-64-v3",
        "x86-64-v2",
        &[(6, 60, 1), (23, 1, 2)],
        (0xd, 0x8000_0008),
        "xsave avx avx2 bmi1 bmi2 f16c fma abm movbe",
        "",
    ),
    after(
        "x86-64-v4",
        "x86-64-v3",
        &[(6, 85, 4), (25, 17, 0)],
        (0xd, 0x8000_0008),
        "avx512f avx512bw avx512cd avx512dq avx512vl",
        "",
    ),
    // What nearly every 64-bit processor has.
    first(
        "qemu64",
        &[(15, 107, 1)],
        (0xd, 0x8000_000a),
        "fpu de pse tsc msr pae mce cx8 apic sep mtrr pge mca cmov pat pse36 clflush mmx fxsr sse sse2 syscall nx lm \
         pni cx16 lahf-lm",
    ),
    after("kvm64", "qemu64", &[(15, 6, 1)], (0xd, 0x8000_0008), "vme", "lahf-lm"),
    // Intel.
    after("Conroe", "qemu64", &[(6, 15, 3)], (0xa, 0x8000_0008), "ssse3 vme", "cx16"),
    after("Penryn", "Conroe", &[(6, 23, 3)], (0xa, 0x8000_0008), "cx16 sse4.1", ""),
    after("Nehalem", "Penryn", &[(6, 26, 3)], (0xb, 0x8000_0008), "popcnt sse4.2", ""),
    after("Nehalem-IBRS", "Nehalem", &[(6, 26, 3)], (0xb, 0x8000_0008), "spec-ctrl", ""),
    after("Westmere", "Nehalem", &[(6, 44, 1)], (0xb, 0x8000_0008), "aes arat pclmulqdq", ""),
    after("Westmere-IBRS", "Westmere", &[(6, 44, 1)], (0xb, 0x8000_0008), "spec-ctrl", ""),
    after("SandyBridge", "Westmere", &[(6, 42, 1)], (0xd, 0x8000_0008), "avx rdtscp tsc-deadline xsave xsaveopt", ""),
    after("SandyBridge-IBRS", "SandyBridge", &[(6, 42, 1)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("IvyBridge", "SandyBridge", &[(6, 58, 9)], (0xd, 0x8000_0008), "erms f16c fsgsbase rdrand smep", ""),
    after("IvyBridge-IBRS", "IvyBridge", &[(6, 58, 9)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after(
        "Haswell",
        "IvyBridge",
        &[(6, 60, 4)],
        (0xd, 0x8000_0008),
        "abm avx2 bmi1 bmi2 fma hle invpcid movbe pcid rtm",
        "",
    ),
    after("Haswell-noTSX", "Haswell", &[(6, 60, 1)], (0xd, 0x8000_0008), "", "hle rtm"),
    after("Haswell-IBRS", "Haswell", &[(6, 60, 4)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("Haswell-noTSX-IBRS", "Haswell-noTSX", &[(6, 60, 1)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("Broadwell", "Haswell", &[(6, 61, 2)], (0xd, 0x8000_0008), "3dnowprefetch adx rdseed smap", ""),
    after("Broadwell-noTSX", "Broadwell", &[(6, 61, 2)], (0xd, 0x8000_0008), "", "hle rtm"),
    after("Broadwell-IBRS", "Broadwell", &[(6, 61, 2)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("Broadwell-noTSX-IBRS", "Broadwell-noTSX", &[(6, 61, 2)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("Skylake-Client", "Broadwell", &[(6, 94, 3)], (0xd, 0x8000_0008), "xgetbv1 xsavec", ""),
    after("Skylake-Client-IBRS", "Skylake-Client", &[(6, 94, 3)], (0xd, 0x8000_0008), "spec-ctrl", ""),
    after("Skylake-Client-noTSX-IBRS", "Skylake-Client-IBRS", &[(6, 94, 3)], (0xd, 0x8000_0008), "", "hle rtm"),
    after(
        "Skylake-Server",
        "Skylake-Client",
        &[(6, 85, 4)],
        (0xd, 0x8000_0008),
        "avx512f avx512dq avx512cd avx512bw avx512vl clflushopt clwb pdpe1gb pku",
        "",
    ),
    after("Skylake-Server-IBRS", "Skylake-Server", &[(6, 85, 4)], (0xd, 0x8000_0008), "spec-ctrl", "clflushopt"),
    after("Skylake-Server-noTSX-IBRS", "Skylake-Server-IBRS", &[(6, 85, 4)], (0xd, 0x8000_0008), "", "hle rtm"),
    after("Cascadelake-Server", "Skylake-Server", &[(6, 85, 6)], (0xd, 0x8000_0008), "avx512vnni spec-ctrl ssbd", ""),
    after(
        "Cascadelake-Server-noTSX",
        "Cascadelake-Server",
        &[(6, 85, 6)],
        (0xd, 0x8000_0008),
        "arch-capabilities",
        "hle rtm",
    ),
    after(
        "Cooperlake",
        "Cascadelake-Server",
        &[(6, 85, 10)],
        (0xd, 0x8000_0008),
        "arch-capabilities avx512-bf16 stibp",
        "",
    ),
    after(
        "Icelake-Server",
        "Cascadelake-Server",
        &[(6, 134, 0)],
        (0xd, 0x8000_0008),
        "avx512vbmi avx512vbmi2 avx512bitalg avx512-vpopcntdq gfni vaes vpclmulqdq la57 umip wbnoinvd",
        "",
    ),
    after("Icelake-Server-noTSX", "Icelake-Server", &[(6, 134, 0)], (0xd, 0x8000_0008), "", "hle rtm"),
    after(
        "SapphireRapids",
        "Icelake-Server",
        &[(6, 143, 4)],
        (0x20, 0x8000_0008),
        "amx-bf16 amx-int8 amx-tile arch-capabilities avx-vnni avx512-bf16 avx512-fp16 avx512ifma bus-lock-detect fsrc fsrm fsrs fzrm \
         rdpid serialize sha-ni tsx-ldtrk xfd xsaves",
        "",
    ),
    // AMD.
    after("Opteron_G1", "kvm64", &[(15, 6, 1)], (5, 0x8000_0008), "", "cx16"),
    after("Opteron_G2", "qemu64", &[(15, 6, 1)], (5, 0x8000_0008), "vme", ""),
    after("Opteron_G3", "Opteron_G2", &[(16, 2, 3)], (5, 0x8000_0008), "abm misalignsse popcnt rdtscp sse4a", ""),
    after(
        "Opteron_G4",
        "Opteron_G3",
        &[(21, 1, 2)],
        (0xd, 0x8000_001a),
        "3dnowprefetch aes avx fma4 pclmulqdq pdpe1gb sse4.1 sse4.2 ssse3 xop xsave",
        "",
    ),
    after("Opteron_G5", "Opteron_G4", &[(21, 2, 0)], (0xd, 0x8000_001a), "f16c fma tbm", ""),
    after(
        "EPYC",
        "Opteron_G3",
        &[(23, 1, 2)],
        (0xd, 0x8000_001e),
        "3dnowprefetch adx aes arat avx avx2 bmi1 bmi2 clflushopt cr8legacy f16c fma fsgsbase fxsr-opt mmxext movbe osvw \
         pclmulqdq pdpe1gb rdrand rdseed sha-ni smap smep sse4.1 sse4.2 ssse3 topoext xgetbv1 xsave xsavec xsaveopt",
        "",
    ),
    after("EPYC-IBPB", "EPYC", &[(23, 1, 2)], (0xd, 0x8000_001e), "ibpb", ""),
    after(
        "EPYC-Rome",
        "EPYC-IBPB",
        &[(23, 49, 0)],
        (0xd, 0x8000_001e),
        "amd-stibp clwb clzero perfctr-core rdpid umip wbnoinvd xsaveerptr xsaves",
        "",
    ),
    after("EPYC-Milan", "EPYC-Rome", &[(25, 1, 1)], (0xd, 0x8000_001e), "amd-ssbd erms fsrm ibrs invpcid pcid pku", ""),
    after(
        "EPYC-Genoa",
        "EPYC-Milan",
        &[(25, 17, 0)],
        (0xd, 0x8000_0022),
        "amd-psfd auto-ibrs avx512-bf16 avx512-vpopcntdq avx512bitalg avx512bw avx512cd avx512dq avx512f avx512ifma avx512vbmi avx512vbmi2 \
         avx512vl avx512vnni gfni la57 lfence-always-serializing no-nested-data-bp null-sel-clr-base stibp-always-on vaes vpclmulqdq",
        "",
    ),
    // Hygon.
    after("Dhyana", "EPYC-IBPB", &[(24, 0, 1)], (0xd, 0x8000_001e), "", "aes pclmulqdq sha-ni"),
];
