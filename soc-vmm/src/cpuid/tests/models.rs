//! Named models and switches.

use super::*;
use crate::cpuid::feature::FeatureSet;
use crate::cpuid::models::{MODELS, Model};
use crate::cpuid::words::{ALIASES, Register, WORDS};

fn spec(text: &str) -> CpuSpec {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn one_vcpu() -> CpuidConfig {
    config(Topology::flat(1).unwrap())
}

fn processor(host: &[CpuidEntry], text: &str) -> Result<Vec<CpuidEntry>, String> {
    let made = Processor::new(host, &spec(text), one_vcpu()).map_err(|e| e.to_string())?;
    Ok(made.table(0))
}

fn features(names: &str) -> FeatureSet {
    FeatureSet::of_names(names)
}

/// A host whose processor is a model's, with KVM's own features and sizes of its extended state.
fn host_like(model: &str, vendor: [u8; 12]) -> Vec<CpuidEntry> {
    let everything = host(vendor, 0x20);
    let mut table = processor(&everything, model).unwrap();
    table.retain(|entry| entry.function != 0xd);
    table.extend(extended_state());
    table
}

/// Leaf 0xd of an Ice Lake server: AVX, AVX-512, PKRU.
fn extended_state() -> [CpuidEntry; 7] {
    [
        subleaf(0xd, 0, [0x2e7, 2696, 2696, 0]),
        subleaf(0xd, 1, [0xf, 0, 0x1800, 0]),
        subleaf(0xd, 2, [256, 576, 0, 0]),
        subleaf(0xd, 5, [64, 1088, 0, 0]),
        subleaf(0xd, 6, [512, 1152, 0, 0]),
        subleaf(0xd, 7, [1024, 1664, 0, 0]),
        subleaf(0xd, 9, [8, 2688, 0, 0]),
    ]
}

/// `KVM_GET_SUPPORTED_CPUID` of a KVM without hardware virtualization, its empty leaves left out.
fn software_kvm() -> Vec<CpuidEntry> {
    vec![
        leaf(0, [0x1c, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        leaf(1, [0xc_06f2, 0x0102_0800, 0x8120_2000, 0x0f8b_fbff]),
        leaf(2, [0x00fe_ff01, 0xf0, 0, 0]),
        subleaf(4, 0, [0x0400_0121, 0x02c0_003f, 0x3f, 0]),
        subleaf(4, 1, [0x0400_0122, 0x01c0_003f, 0x3f, 0]),
        subleaf(4, 2, [0x0400_0143, 0x03c0_003f, 0x7ff, 0]),
        subleaf(4, 3, [0x0400_4163, 0x04c0_003f, 0x3_3fff, 0]),
        leaf(6, [4, 0, 0, 0]),
        subleaf(7, 0, [2, 0x0180_2852, 0x1a01_0104, 0x2001_0000]),
        subleaf(7, 1, [0x1c00, 0, 0, 0]),
        subleaf(7, 2, [0, 0, 0, 1]),
        subleaf(0xd, 0, [0xe7, 0xa80, 0xa80, 0]),
        subleaf(0xd, 2, [0x100, 0x240, 0, 0]),
        subleaf(0xd, 5, [0x40, 0x440, 0, 0]),
        subleaf(0xd, 6, [0x200, 0x480, 0, 0]),
        subleaf(0xd, 7, [0x400, 0x680, 0, 0]),
        leaf(0x8000_0000, [0x8000_0021, 0, 0, 0]),
        leaf(0x8000_0001, [0, 0, 0x101, 0x2010_0800]),
        leaf(0x8000_0006, [0, 0, 0x0800_7040, 0]),
        leaf(0x8000_0007, [0, 0, 0, 0x100]),
        leaf(0x8000_0008, [0x3930, 0, 0, 0]),
        leaf(0x8000_0021, [0x244, 0, 6, 0]),
        leaf(KVM_SIGNATURE, [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
        leaf(0x4000_0001, [0x0100_7efb, 0, 0, 0]),
    ]
}

#[test]
fn each_feature_has_one_name_and_each_name_one_place() {
    let mut names = Vec::new();
    for word in &WORDS {
        assert_eq!(word.mask().count_ones() as usize, word.bits.len(), "{word:?}");
        names.extend(word.bits.iter().map(|(_, name)| *name));
    }
    names.sort_unstable();
    let twice: Vec<_> = names.windows(2).filter(|pair| pair[0] == pair[1]).map(|pair| pair[0]).collect();
    assert_eq!(twice, ["kvmclock"], "its two interfaces are switched together");
    for (alias, name) in ALIASES {
        assert!(!names.contains(&alias) && names.contains(&name), "{alias}");
    }
    assert!(names.iter().all(|name| !name.contains('_')), "both ways of writing are read as '-'");
    assert_eq!(spec("host,-sse4_2,-lahf_lm"), spec("host,sse4.2=off,lahf-lm=off"));
}

#[test]
fn features_are_where_the_manuals_have_them() {
    for (name, leaf, subleaf, register, bit) in [
        ("sse4.2", 1, 0, Register::Ecx, 20),
        ("aes", 1, 0, Register::Ecx, 25),
        ("avx2", 7, 0, Register::Ebx, 5),
        ("vaes", 7, 0, Register::Ecx, 9),
        ("spec-ctrl", 7, 0, Register::Edx, 26),
        ("avx512-bf16", 7, 1, Register::Eax, 5),
        ("xsavec", 0xd, 1, Register::Eax, 1),
        ("lm", 0x8000_0001, 0, Register::Edx, 29),
        ("abm", 0x8000_0001, 0, Register::Ecx, 5),
        ("invtsc", 0x8000_0007, 0, Register::Edx, 8),
        ("ibpb", 0x8000_0008, 0, Register::Ebx, 12),
        ("auto-ibrs", 0x8000_0021, 0, Register::Eax, 8),
        ("kvm-steal-time", 0x4000_0001, 0, Register::Eax, 5),
    ] {
        assert_eq!(features(name).bits(leaf, subleaf, register), 1 << bit, "{name}");
    }
    assert_eq!(features("kvmclock").bits(0x4000_0001, 0, Register::Eax), 0b1001);
}

#[test]
fn models_stand_on_earlier_ones() {
    for (i, model) in MODELS.iter().enumerate() {
        assert!(MODELS[..i].iter().all(|earlier| earlier.name != model.name), "{} twice", model.name);
        assert!(model.like.is_none_or(|like| MODELS[..i].iter().any(|m| m.name == like)), "{}", model.name);
        assert!(!model.features().is_empty());
        let base = model.like.and_then(Model::named).map_or(FeatureSet::NONE, Model::features);
        assert!(base.has(features(model.less)), "{} is without what it had not", model.name);
        assert!(!base.has_any(features(model.more)), "{} has twice", model.name);
    }
}

#[test]
fn processors_have_the_levels_that_the_psabi_says() {
    // What the level adds (x86-64 psABI table 3.1), but for OSXSAVE, which is the guest's.
    let levels = [
        ("x86-64-v2", "cx16 lahf-lm popcnt pni sse4.1 sse4.2 ssse3"),
        ("x86-64-v3", "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave"),
        ("x86-64-v4", "avx512f avx512bw avx512cd avx512dq avx512vl"),
    ];
    let level = |name: &str| {
        let has = Model::named(name).unwrap().features();
        levels.iter().take_while(|(_, added)| has.has(features(added))).count()
    };
    assert_eq!(levels.map(|(name, _)| level(name)), [1, 2, 3]);
    for (name, expected) in [
        ("qemu64", 0),
        ("Penryn", 0),
        ("Nehalem", 1),
        ("IvyBridge", 1),
        ("Opteron_G4", 1),
        ("Haswell-noTSX", 2),
        ("EPYC", 2),
        ("EPYC-Milan", 2),
        ("Dhyana", 2),
        ("Skylake-Server", 3),
        ("SapphireRapids", 3),
        ("EPYC-Genoa", 3),
    ] {
        assert_eq!(level(name), expected, "{name}");
    }
}

#[test]
fn signatures_are_the_processors() {
    for (name, amd, signature) in [
        ("Nehalem", false, 0x0001_06a3),
        ("Skylake-Server", false, 0x0005_0654),
        ("SapphireRapids", false, 0x0008_06f4),
        ("qemu64", false, 0x0006_0fb1),
        ("EPYC", true, 0x0080_0f12),
        ("EPYC-Milan", true, 0x00a0_0f11),
        ("x86-64-v2", false, 0x0001_06a3),
        ("x86-64-v4", true, 0x00a1_0f10),
    ] {
        assert_eq!(Model::named(name).unwrap().signature(amd), signature, "{name}");
    }
}

#[test]
fn a_host_that_has_all_gives_every_model_as_it_is() {
    for vendor in [INTEL, AMD] {
        let host = host(vendor, 0x20);
        for model in &MODELS {
            let table = processor(&host, model.name).unwrap();
            let kvm =
                "kvmclock kvmclock-stable-bit kvm-nopiodelay kvm-asyncpf kvm-asyncpf-int kvm-steal-time kvm-pv-eoi";
            let expected = model.features() | features("x2apic hypervisor") | features(kvm);
            assert_eq!(FeatureSet::of_table(&table), expected, "{}", model.name);
            let basic = find(&table, 0, 0).unwrap();
            let host_basic = find(&host, 0, 0).unwrap();
            assert_eq!((basic.ebx, basic.ecx, basic.edx), (host_basic.ebx, host_basic.ecx, host_basic.edx));
            // Every leaf is announced.
            let xlevel = find(&table, 0x8000_0000, 0).unwrap().eax;
            for entry in &table {
                let most = [basic.eax, KVM_SIGNATURE + 1, xlevel][(entry.function >> 30) as usize];
                assert!(entry.function <= most, "{} has {:#x} beyond {most:#x}", model.name, entry.function);
            }
        }
    }
}

#[test]
fn amd_repeats_features_and_tells_its_signature_again() {
    let table = processor(&host(AMD, 0x20), "EPYC").unwrap();
    let (basic, extended) = (find(&table, 1, 0).unwrap(), find(&table, 0x8000_0001, 0).unwrap());
    assert_eq!((basic.eax, extended.eax), (0x0080_0f12, 0x0080_0f12));
    assert_eq!(extended.edx & 0x0183_f3ff, basic.edx & 0x0183_f3ff);
    assert!(find(&table, 0x8000_001e, 0).is_some());
    let table = processor(&host(INTEL, 0x20), "Skylake-Server").unwrap();
    let extended = find(&table, 0x8000_0001, 0).unwrap();
    assert_eq!((extended.eax, extended.edx & 0x0183_f3ff), (0, 0));
    assert!(find(&table, 0x8000_001e, 0).is_none() && find(&table, 4, 3).is_some());
}

#[test]
fn a_model_says_its_name() {
    let table = processor(&host(INTEL, 0x20), "Skylake-Server-noTSX-IBRS").unwrap();
    let words = [0x8000_0002, 0x8000_0003, 0x8000_0004].map(|leaf| find(&table, leaf, 0).unwrap());
    let bytes: Vec<_> = words
        .iter()
        .flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx])
        .flat_map(u32::to_le_bytes)
        .take_while(|b| *b != 0)
        .collect();
    assert_eq!(bytes, b"Virtual CPU (Skylake-Server-noTSX-IBRS)");
}

#[test]
fn a_model_that_the_host_can_t_give_is_refused_with_what_is_missing() {
    let haswell = host_like("Haswell-noTSX", INTEL);
    assert_eq!(
        processor(&haswell, "Broadwell").unwrap_err(),
        "--cpu Broadwell: this host lacks hle, rtm, rdseed, adx, smap, 3dnowprefetch; use --cpu host or one of: x86-64-v2, \
         x86-64-v3, qemu64, kvm64, Conroe, Penryn, Nehalem, Westmere, SandyBridge, IvyBridge, Haswell-noTSX, Opteron_G1, Opteron_G2"
    );
    assert_eq!(
        processor(&haswell, "host,+avx512f").unwrap_err(),
        "--cpu host: this host lacks avx512f; leave them out"
    );
    assert_eq!(
        processor(&haswell, "Nehalem,+adx,smap=on").unwrap_err(),
        "--cpu Nehalem: this host lacks adx, smap; leave them out"
    );
    // What is switched off need not be there.
    assert!(processor(&haswell, "Broadwell,-hle,-rtm,-rdseed,-adx,-smap,-3dnowprefetch").is_ok());
}

#[test]
fn a_recorded_host_gives_what_it_has() {
    let host = software_kvm();
    assert_eq!(
        processor(&host, "x86-64-v2").unwrap_err(),
        "--cpu x86-64-v2: this host lacks pni, ssse3, sse4.1, sse4.2, popcnt; use --cpu host, it can give no named model"
    );
    let table = processor(&host, "host").unwrap();
    assert_eq!(FeatureSet::of_table(&table), FeatureSet::of_table(&host).without(features("ht")) | features("x2apic"));
    let table = processor(&host, "host,-clwb,invtsc=off").unwrap();
    assert_eq!(find(&table, 7, 0).unwrap().ebx, 0x0080_2852);
    assert_eq!(find(&table, 0x8000_0007, 0).unwrap().edx, 0);
}

#[test]
fn an_invariant_tsc_is_asked_for_by_name() {
    let host = host(INTEL, 0x20);
    let invariant =
        |text| find(&processor(&host, text).unwrap(), 0x8000_0007, 0).is_some_and(|leaf| leaf.edx == 1 << 8);
    assert!(!invariant("Skylake-Server"));
    assert!(invariant("Skylake-Server,+invtsc"));
}

#[test]
fn extended_state_fits_the_features() {
    let host = host_like("Icelake-Server", INTEL);
    let state = |text: &str| {
        let table = processor(&host, text).unwrap();
        let leaf = |index| find(&table, 0xd, index).filter(|entry| entry.index == index);
        let parts: Vec<_> = (2..64).filter(|index| leaf(*index).is_some()).collect();
        let first = leaf(0);
        (first.map(|e| (e.eax, e.ecx)), leaf(1).map(|e| (e.eax, e.ecx)), parts)
    };
    assert_eq!(state("Nehalem"), (None, None, vec![]));
    assert_eq!(state("SandyBridge"), (Some((7, 832)), Some((1, 0)), vec![2]));
    assert_eq!(state("Skylake-Server"), (Some((0x2e7, 2696)), Some((7, 0)), vec![2, 5, 6, 7, 9]));
    assert_eq!(state("Skylake-Server,-pku"), (Some((0xe7, 2688)), Some((7, 0)), vec![2, 5, 6, 7]));
    assert_eq!(state("Skylake-Server,-avx512f"), (Some((0x207, 2696)), Some((7, 0)), vec![2, 9]));
    assert_eq!(state("host"), (Some((0x2e7, 2696)), Some((0xf, 0x1800)), vec![2, 5, 6, 7, 9]));
    assert_eq!(state("host,-avx"), (Some((0x203, 2696)), Some((0xf, 0)), vec![9]));
    assert_eq!(state("host,-xsave"), (None, None, vec![]));
}

#[test]
fn what_needs_a_feature_goes_with_it() {
    let host = host_like("Icelake-Server", INTEL);
    let table = processor(&host, "Skylake-Server,-avx").unwrap();
    let left = FeatureSet::of_table(&table);
    assert!(!left.has_any(features("avx avx2 fma f16c avx512f avx512bw")) && left.has(features("xsave pku aes bmi2")));
    assert_eq!(spec("host,-avx,+avx"), spec("host,+avx"), "the last holds");
}

#[test]
fn words_that_mean_nothing_are_refused() {
    for (text, said) in [
        ("", "no CPU model ''"),
        ("haswell", "no CPU model 'haswell'"),
        ("Haswell-v3", "no CPU model"),
        ("host,", "write MODEL"),
        ("host,avx", "write MODEL"),
        ("host,avx=yes", "write MODEL"),
        ("host,+frob", "no CPU feature 'frob'"),
        ("host,+", "no CPU feature ''"),
        ("host,+vmx", "'vmx' is not given"),
        ("EPYC,svm=on", "'svm' is not given"),
        ("host,rdctl-no=on", "with arch-capabilities"),
        ("host,+avx2,-avx", "'avx2' is on"),
    ] {
        let error = text.parse::<CpuSpec>().expect_err(text).to_string();
        assert!(error.contains(said), "{text:?}: {error}");
    }
    assert!("host,-vmx,-svm".parse::<CpuSpec>().is_ok());
}

#[test]
fn many_vcpus_need_x2apic() {
    let host = host(INTEL, 0x20);
    let made = |cpus, text: &str| Processor::new(&host, &spec(text), config(Topology::flat(cpus).unwrap()));
    assert!(made(255, "Nehalem,-x2apic").is_ok());
    assert!(made(1024, "Nehalem").is_ok());
    assert_eq!(made(256, "Nehalem,-x2apic").unwrap_err(), CpuidError::NeedsX2apic);
}

/// Any model with any switches.
fn any_spec() -> impl Strategy<Value = CpuSpec> {
    let names: Vec<_> = WORDS.iter().flat_map(|word| word.bits.iter().map(|(_, name)| *name)).collect();
    let switches = prop::collection::vec((prop::sample::select(names), any::<bool>()), 0..8);
    let models: Vec<_> = std::iter::once("host").chain(MODELS.iter().map(|model| model.name)).collect();
    (prop::sample::select(models), switches).prop_filter_map("a contradiction, or not carried", |(model, switches)| {
        let text =
            switches.iter().fold(model.to_owned(), |text, (name, on)| text + if *on { ",+" } else { ",-" } + name);
        text.parse().ok()
    })
}

/// A host with any features at all, and any extended state.
fn any_features() -> impl Strategy<Value = Vec<CpuidEntry>> {
    (any::<[u32; 24]>(), prop::array::uniform4(any::<[u32; 4]>()), any::<bool>()).prop_map(|(random, state, dense)| {
        let mut random =
            random.into_iter().map(move |bits| if dense { !(bits & bits >> 7 & bits >> 13) } else { bits }).cycle();
        let mut host = host(INTEL, 0x20);
        host.retain(|entry| entry.function != 0xd);
        host.extend((0..4).zip(state).map(|(index, words)| subleaf(0xd, index, words)));
        for entry in host.iter_mut().filter(|entry| WORDS.iter().any(|word| word.leaf == entry.function)) {
            let function = entry.function;
            for word in WORDS.iter().filter(|word| word.leaf == function) {
                *word.register.of_mut(entry) &= random.next().unwrap_or_default();
            }
        }
        host
    })
}

proptest! {
    /// Whatever the host and whatever is asked: no panic, and nothing that the host lacks but what KVM has by itself.
    #[test]
    fn no_guest_has_what_its_host_lacks(host in prop_oneof![any_features(), any_host()], spec in any_spec(), index in 0u32..12) {
        let config = config(Topology::new(2, 3, 2).unwrap());
        let Ok(processor) = Processor::new(&host, &spec, config) else { return Ok(()) };
        let table = processor.table(index);
        prop_assert!(table.len() <= host.len() + 32, "{}", table.len());
        let had = FeatureSet::of_table(&host) | features("x2apic hypervisor tsc-deadline ht cmp-legacy");
        let extra = FeatureSet::of_table(&table).without(had);
        prop_assert!(extra.is_empty(), "{extra:?}");
        prop_assert!(!FeatureSet::of_table(&table).has_any(features("vmx svm sgx intel-pt")));
        // No part of the extended state that the host lacks.
        let parts = |table: &[CpuidEntry]| find(table, 0xd, 0).map_or(0, |entry| entry.eax);
        prop_assert_eq!(parts(&table) & !parts(&host), 0);
        let repeated = FeatureSet::of_table(&table).without(FeatureSet::of_table(&processor.table((index + 1) % 12)));
        prop_assert!(repeated.is_empty(), "vCPUs differ: {repeated:?}");
    }
}
