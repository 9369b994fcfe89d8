//! Which CPUID bits are features, and their names.
//!
//! Names are those of QEMU and libvirt, `-` and `_` being the same. Bits are those of the Intel SDM (volume 2A "CPUID", tables 3-8 to
//! 3-22), the AMD APM (volume 3 appendix E) and KVM (cpuid.rst).

use api_channel::call::CpuidEntry;

/// A register of a CPUID leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Register {
    /// The register in an entry.
    pub(super) fn of(self, entry: &CpuidEntry) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    /// The same, to be changed.
    pub(super) fn of_mut(self, entry: &mut CpuidEntry) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }
}

/// A register whose bits are features.
#[derive(Debug)]
pub(super) struct Word {
    pub(super) leaf: u32,
    pub(super) subleaf: u32,
    pub(super) register: Register,
    /// Bits and names; bits of one name go together.
    pub(super) bits: &'static [(u8, &'static str)],
}

impl Word {
    const fn new(leaf: u32, subleaf: u32, register: Register, bits: &'static [(u8, &'static str)]) -> Self {
        Self { leaf, subleaf, register, bits }
    }

    /// The bits that have names.
    pub(super) fn mask(&self) -> u32 {
        self.bits.iter().fold(0, |mask, (bit, _)| mask | 1 << bit)
    }
}

/// How many words there are.
pub(super) const COUNT: usize = 17;

/// Every feature by its place. OSXSAVE and OSPKE are not here: they follow what the guest's system does.
pub(super) static WORDS: [Word; COUNT] = {
    use Register::{Eax, Ebx, Ecx, Edx};
    [
        Word::new(
            1,
            0,
            Edx,
            &[
                (0, "fpu"),
                (1, "vme"),
                (2, "de"),
                (3, "pse"),
                (4, "tsc"),
                (5, "msr"),
                (6, "pae"),
                (7, "mce"),
                (8, "cx8"),
                (9, "apic"),
                (11, "sep"),
                (12, "mtrr"),
                (13, "pge"),
                (14, "mca"),
                (15, "cmov"),
                (16, "pat"),
                (17, "pse36"),
                (18, "pn"),
                (19, "clflush"),
                (21, "ds"),
                (22, "acpi"),
                (23, "mmx"),
                (24, "fxsr"),
                (25, "sse"),
                (26, "sse2"),
                (27, "ss"),
                (28, "ht"),
                (29, "tm"),
                (31, "pbe"),
            ],
        ),
        Word::new(
            1,
            0,
            Ecx,
            &[
                (0, "pni"),
                (1, "pclmulqdq"),
                (2, "dtes64"),
                (3, "monitor"),
                (4, "ds-cpl"),
                (5, "vmx"),
                (6, "smx"),
                (7, "est"),
                (8, "tm2"),
                (9, "ssse3"),
                (10, "cid"),
                (12, "fma"),
                (13, "cx16"),
                (14, "xtpr"),
                (15, "pdcm"),
                (17, "pcid"),
                (18, "dca"),
                (19, "sse4.1"),
                (20, "sse4.2"),
                (21, "x2apic"),
                (22, "movbe"),
                (23, "popcnt"),
                (24, "tsc-deadline"),
                (25, "aes"),
                (26, "xsave"),
                (28, "avx"),
                (29, "f16c"),
                (30, "rdrand"),
                (31, "hypervisor"),
            ],
        ),
        Word::new(6, 0, Eax, &[(2, "arat")]),
        Word::new(
            7,
            0,
            Ebx,
            &[
                (0, "fsgsbase"),
                (1, "tsc-adjust"),
                (2, "sgx"),
                (3, "bmi1"),
                (4, "hle"),
                (5, "avx2"),
                (7, "smep"),
                (8, "bmi2"),
                (9, "erms"),
                (10, "invpcid"),
                (11, "rtm"),
                (14, "mpx"),
                (16, "avx512f"),
                (17, "avx512dq"),
                (18, "rdseed"),
                (19, "adx"),
                (20, "smap"),
                (21, "avx512ifma"),
                (23, "clflushopt"),
                (24, "clwb"),
                (25, "intel-pt"),
                (26, "avx512pf"),
                (27, "avx512er"),
                (28, "avx512cd"),
                (29, "sha-ni"),
                (30, "avx512bw"),
                (31, "avx512vl"),
            ],
        ),
        Word::new(
            7,
            0,
            Ecx,
            &[
                (1, "avx512vbmi"),
                (2, "umip"),
                (3, "pku"),
                (5, "waitpkg"),
                (6, "avx512vbmi2"),
                (7, "shstk"),
                (8, "gfni"),
                (9, "vaes"),
                (10, "vpclmulqdq"),
                (11, "avx512vnni"),
                (12, "avx512bitalg"),
                (14, "avx512-vpopcntdq"),
                (16, "la57"),
                (22, "rdpid"),
                (24, "bus-lock-detect"),
                (25, "cldemote"),
                (27, "movdiri"),
                (28, "movdir64b"),
                (30, "sgxlc"),
                (31, "pks"),
            ],
        ),
        Word::new(
            7,
            0,
            Edx,
            &[
                (2, "avx512-4vnniw"),
                (3, "avx512-4fmaps"),
                (4, "fsrm"),
                (8, "avx512-vp2intersect"),
                (10, "md-clear"),
                (14, "serialize"),
                (16, "tsx-ldtrk"),
                (19, "arch-lbr"),
                (20, "ibt"),
                (22, "amx-bf16"),
                (23, "avx512-fp16"),
                (24, "amx-tile"),
                (25, "amx-int8"),
                (26, "spec-ctrl"),
                (27, "stibp"),
                (28, "flush-l1d"),
                (29, "arch-capabilities"),
                (30, "core-capability"),
                (31, "ssbd"),
            ],
        ),
        Word::new(
            7,
            1,
            Eax,
            &[
                (4, "avx-vnni"),
                (5, "avx512-bf16"),
                (7, "cmpccxadd"),
                (10, "fzrm"),
                (11, "fsrs"),
                (12, "fsrc"),
                (17, "fred"),
                (18, "lkgs"),
                (19, "wrmsrns"),
                (21, "amx-fp16"),
                (23, "avx-ifma"),
                (26, "lam"),
            ],
        ),
        Word::new(
            7,
            1,
            Edx,
            &[
                (4, "avx-vnni-int8"),
                (5, "avx-ne-convert"),
                (8, "amx-complex"),
                (10, "avx-vnni-int16"),
                (14, "prefetchiti"),
            ],
        ),
        Word::new(
            7,
            2,
            Edx,
            &[(0, "intel-psfd"), (1, "ipred-ctrl"), (2, "rrsba-ctrl"), (3, "ddpd-u"), (4, "bhi-ctrl"), (5, "mcdt-no")],
        ),
        Word::new(0xd, 1, Eax, &[(0, "xsaveopt"), (1, "xsavec"), (2, "xgetbv1"), (3, "xsaves"), (4, "xfd")]),
        Word::new(
            KVM_FEATURES,
            0,
            Eax,
            &[
                (0, "kvmclock"),
                (1, "kvm-nopiodelay"),
                (3, "kvmclock"),
                (4, "kvm-asyncpf"),
                (5, "kvm-steal-time"),
                (6, "kvm-pv-eoi"),
                (7, "kvm-pv-unhalt"),
                (9, "kvm-pv-tlb-flush"),
                (10, "kvm-asyncpf-vmexit"),
                (11, "kvm-pv-ipi"),
                (12, "kvm-poll-control"),
                (13, "kvm-pv-sched-yield"),
                (14, "kvm-asyncpf-int"),
                (24, "kvmclock-stable-bit"),
            ],
        ),
        Word::new(KVM_FEATURES, 0, Edx, &[(0, "kvm-hint-dedicated")]),
        // AMD repeats bits of leaf 1 here; they have their names there.
        Word::new(
            0x8000_0001,
            0,
            Edx,
            &[
                (11, "syscall"),
                (20, "nx"),
                (22, "mmxext"),
                (25, "fxsr-opt"),
                (26, "pdpe1gb"),
                (27, "rdtscp"),
                (29, "lm"),
                (30, "3dnowext"),
                (31, "3dnow"),
            ],
        ),
        Word::new(
            0x8000_0001,
            0,
            Ecx,
            &[
                (0, "lahf-lm"),
                (1, "cmp-legacy"),
                (2, "svm"),
                (3, "extapic"),
                (4, "cr8legacy"),
                (5, "abm"),
                (6, "sse4a"),
                (7, "misalignsse"),
                (8, "3dnowprefetch"),
                (9, "osvw"),
                (10, "ibs"),
                (11, "xop"),
                (12, "skinit"),
                (13, "wdt"),
                (15, "lwp"),
                (16, "fma4"),
                (17, "tce"),
                (19, "nodeid-msr"),
                (21, "tbm"),
                (22, "topoext"),
                (23, "perfctr-core"),
                (24, "perfctr-nb"),
            ],
        ),
        Word::new(0x8000_0007, 0, Edx, &[(8, "invtsc")]),
        Word::new(
            0x8000_0008,
            0,
            Ebx,
            &[
                (0, "clzero"),
                (2, "xsaveerptr"),
                (9, "wbnoinvd"),
                (12, "ibpb"),
                (14, "ibrs"),
                (15, "amd-stibp"),
                (17, "stibp-always-on"),
                (24, "amd-ssbd"),
                (25, "virt-ssbd"),
                (26, "amd-no-ssb"),
                (28, "amd-psfd"),
            ],
        ),
        Word::new(
            0x8000_0021,
            0,
            Eax,
            &[
                (0, "no-nested-data-bp"),
                (1, "fs-gs-base-ns"),
                (2, "lfence-always-serializing"),
                (6, "null-sel-clr-base"),
                (8, "auto-ibrs"),
            ],
        ),
    ]
};

/// KVM's paravirtual features (KVM cpuid.rst).
pub(super) const KVM_FEATURES: u32 = 0x4000_0001;

/// Other names of the same features.
pub(super) const ALIASES: [(&str, &str); 9] = [
    ("sse3", "pni"),
    ("sse4-1", "sse4.1"),
    ("sse4-2", "sse4.2"),
    ("pclmuldq", "pclmulqdq"),
    ("i64", "lm"),
    ("xd", "nx"),
    ("ffxsr", "fxsr-opt"),
    ("lzcnt", "abm"),
    ("sha", "sha-ni"),
];

/// Bits of the MSR IA32_ARCH_CAPABILITIES, which QEMU names like features.
pub(super) const OF_ARCH_CAPABILITIES: [&str; 24] = [
    "rdctl-no",
    "ibrs-all",
    "rsba",
    "skip-l1dfl-vmentry",
    "ssb-no",
    "mds-no",
    "pschange-mc-no",
    "tsx-ctrl",
    "taa-no",
    "sbdr-ssdp-no",
    "fbsdp-no",
    "psdp-no",
    "fb-clear",
    "bhi-no",
    "pbrsb-no",
    "gds-no",
    "rfds-no",
    "rfds-clear",
    "its-no",
    "split-lock-detect",
    "overclocking",
    "energy-filtering",
    "doitm",
    "xapic-disable",
];
