//! What processors a host can give its guests, as control planes ask for it before they choose one.

use api_channel::call::CpuidEntry;

use super::feature::FeatureSet;
use super::models::MODELS;
use super::processor::able;
use super::spec::CpuSpec;
use super::words::WORDS;
use super::{CpuidError, find};

/// A host's processor, by what its KVM supports.
#[derive(Clone, Debug)]
pub struct HostCpu {
    able: FeatureSet,
    vendor: String,
    signature: u32,
}

/// A model, and what this host lacks of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelDefinition {
    /// Its name; `host` for whatever the host's own is.
    pub name: &'static str,
    /// The features that it has and the host hasn't.
    pub unavailable: Vec<&'static str>,
}

/// A processor, told in full.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelExpansion {
    /// Every feature that has a name, and whether it is there.
    pub features: Vec<(&'static str, bool)>,
    /// The vendor's twelve characters.
    pub vendor: String,
    /// Family, model, stepping (Intel SDM volume 2A figure 3-6).
    pub identity: (u32, u32, u32),
}

impl HostCpu {
    /// The host whose KVM supports `table` (`KVM_GET_SUPPORTED_CPUID`).
    ///
    /// # Errors
    /// It is no table of an x86 processor.
    pub fn new(table: &[CpuidEntry], tsc_deadline: bool) -> Result<Self, CpuidError> {
        let basic = find(table, 0, 0).ok_or(CpuidError::Incomplete { leaf: 0 })?;
        let signature = find(table, 1, 0).ok_or(CpuidError::Incomplete { leaf: 1 })?.eax;
        let vendor = [basic.ebx, basic.edx, basic.ecx].map(u32::to_le_bytes).concat();
        let vendor = String::from_utf8_lossy(&vendor).into_owned();
        Ok(Self { able: able(table, tsc_deadline), vendor, signature })
    }

    /// Every model, and what is missing of each.
    pub fn definitions(&self) -> Vec<ModelDefinition> {
        let models = MODELS.iter().map(|model| {
            let wanted = CpuSpec { model: Some(model), ..CpuSpec::HOST }.wanted(self.able);
            ModelDefinition { name: model.name, unavailable: wanted.without(self.able).names() }
        });
        let host = ["host", "max"].map(|name| ModelDefinition { name, unavailable: Vec::new() });
        host.into_iter().chain(models).collect()
    }

    /// What a guest gets that is given the processor of `spec`.
    pub fn expand(&self, spec: &CpuSpec) -> ModelExpansion {
        let has = spec.wanted(self.able) & self.able;
        let mut features: Vec<(&str, bool)> = Vec::new();
        for (_, name) in WORDS.iter().flat_map(|word| word.bits) {
            if !features.iter().any(|(known, _)| known == name) {
                features.push((name, has.has_any(FeatureSet::of_names(name))));
            }
        }
        let amd = matches!(&*self.vendor, "AuthenticAMD" | "HygonGenuine");
        let signature = spec.model.map_or(self.signature, |model| model.signature(amd));
        ModelExpansion { features, vendor: self.vendor.clone(), identity: identity(signature) }
    }
}

/// Family, model and stepping of a processor signature.
fn identity(signature: u32) -> (u32, u32, u32) {
    let (base_family, base_model) = (signature >> 8 & 0xf, signature >> 4 & 0xf);
    let family = if base_family == 0xf { base_family + (signature >> 20 & 0xff) } else { base_family };
    let extended = if matches!(base_family, 6 | 0xf) { signature >> 16 & 0xf } else { 0 };
    (family, extended << 4 | base_model, signature & 0xf)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_as_manufacturers_write_them() {
        // Skylake server, EPYC, and a Pentium of before the extended fields.
        assert_eq!(identity(0x0005_0654), (6, 85, 4));
        assert_eq!(identity(0x0080_0f12), (23, 1, 2));
        assert_eq!(identity(0x0000_052c), (5, 2, 12));
    }

    #[test]
    fn a_poor_host_says_what_it_lacks() {
        let leaf =
            |function, eax, ebx, ecx, edx| CpuidEntry { function, index: 0, flags: 0, eax, ebx, ecx, edx, reserved: 0 };
        let vendor = |text: &[u8; 4]| u32::from_le_bytes(*text);
        // FPU, TSC, MSR, PAE, CX8, APIC, SSE2's family and no more.
        let table = [
            leaf(0, 1, vendor(b"Genu"), vendor(b"ntel"), vendor(b"ineI")),
            leaf(1, 0x0005_0654, 0, 0, 0x0783_fbff),
            leaf(0x8000_0001, 0, 0, 0, 1 << 29 | 1 << 20 | 1 << 11),
        ];
        let host = HostCpu::new(&table, false).unwrap();
        let definitions = host.definitions();
        let lacks = |name: &str| definitions.iter().find(|d| d.name == name).unwrap().unavailable.clone();
        assert!(lacks("host").is_empty());
        assert!(lacks("Skylake-Server").contains(&"avx512f"), "{:?}", lacks("Skylake-Server"));
        let expanded = host.expand(&CpuSpec::HOST);
        assert_eq!((&*expanded.vendor, expanded.identity), ("GenuineIntel", (6, 85, 4)));
        let has = |name: &str| expanded.features.iter().find(|(known, _)| *known == name).unwrap().1;
        assert!(has("sse2") && !has("avx") && !has("vmx"));
        assert!(HostCpu::new(&[], false).is_err());
    }
}
