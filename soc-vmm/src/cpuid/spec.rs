//! `--cpu`: a model, and what is changed in it.

use std::str::FromStr;

use super::feature::{FeatureSet, NameError};
use super::hyperv::HypervSpec;
use super::models::Model;

/// Which processor the guest is to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// `None` for the host's own.
    pub(super) model: Option<&'static Model>,
    /// What the guest must have.
    pub(super) on: FeatureSet,
    /// What it must not have, and what needs that.
    pub(super) off: FeatureSet,
    pub(super) hyperv: HypervSpec,
}

impl CpuSpec {
    /// The host's own processor.
    pub const HOST: Self = Self { model: None, on: FeatureSet::NONE, off: FeatureSet::NONE, hyperv: HypervSpec::NONE };

    /// The model's name.
    pub fn name(&self) -> &'static str {
        self.model.map_or("host", |model| model.name)
    }

    /// Whether it is the host's own processor, nothing changed in it.
    pub(super) fn is_host(&self) -> bool {
        Self { hyperv: HypervSpec::NONE, ..self.clone() } == Self::HOST
    }

    /// What is said of Hyper-V's enlightenments, if any is asked for.
    pub fn hyperv(&self) -> Option<&HypervSpec> {
        Some(&self.hyperv).filter(|hyperv| hyperv.is_asked())
    }

    /// What the guest is to have, on a host whose KVM gives `able`.
    pub(super) fn wanted(&self, able: FeatureSet) -> FeatureSet {
        let base = match self.model {
            None => able,
            Some(model) => model.features() | FeatureSet::of_names(OF_EVERY_MODEL) | able & paravirtual(),
        };
        (base | self.on).without(self.off)
    }
}

/// What every guest of KVM has, whatever its model.
const OF_EVERY_MODEL: &str = "x2apic hypervisor";

/// KVM's own features of every named model, where the host's KVM has them: those that cost a host nothing to keep.
fn paravirtual() -> FeatureSet {
    FeatureSet::of_names(
        "kvmclock kvmclock-stable-bit kvm-nopiodelay kvm-asyncpf kvm-asyncpf-int kvm-steal-time kvm-pv-eoi",
    )
}

/// What can't be without what (Intel SDM volume 1 §13.1 to §18.3): the first of each pair, and all that needs it.
const NEEDED: [(&str, &str); 5] = [
    ("xsave", "xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx-tile"),
    (
        "avx",
        "avx2 fma f16c fma4 xop vaes vpclmulqdq avx-vnni avx-ifma avx-vnni-int8 avx-vnni-int16 avx-ne-convert avx512f",
    ),
    ("avx2", "avx512f"),
    (
        "avx512f",
        "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512vbmi2 avx512vnni avx512bitalg \
         avx512-vpopcntdq avx512-4vnniw avx512-4fmaps avx512-vp2intersect avx512-bf16 avx512-fp16",
    ),
    ("amx-tile", "amx-bf16 amx-int8 amx-fp16 amx-complex"),
];

/// `off`, and all that needs any of it. A feature stands above what needs it, so that one pass is enough.
fn with_what_needs_it(off: FeatureSet) -> FeatureSet {
    NEEDED.into_iter().fold(off, |off, (feature, needing)| {
        if off.has(FeatureSet::of_names(feature)) { off | FeatureSet::of_names(needing) } else { off }
    })
}

impl FromStr for CpuSpec {
    type Err = CpuSpecError;

    /// `MODEL[,+FEATURE][,-FEATURE][,FEATURE=on|off][,hv-SWITCH]…`; of several about one feature the last holds.
    fn from_str(s: &str) -> Result<Self, CpuSpecError> {
        let (name, switches) = s.split_once(',').map_or((s, None), |(name, switches)| (name, Some(switches)));
        let model = match name {
            // All that KVM gives is what the host's own is.
            "host" | "max" => None,
            name => Some(Model::named(name).ok_or_else(|| CpuSpecError::Model(name.to_owned()))?),
        };
        let (mut on, mut off, mut hyperv) = (FeatureSet::NONE, FeatureSet::NONE, HypervSpec::NONE);
        for switch in switches.into_iter().flat_map(|switches| switches.split(',')) {
            if hyperv.take(switch)? {
                continue;
            }
            let (name, is_on) = match (switch.strip_prefix('+'), switch.strip_prefix('-'), switch.split_once('=')) {
                (Some(name), ..) => (name, true),
                (_, Some(name), _) => (name, false),
                (.., Some((name, "on"))) => (name, true),
                (.., Some((name, "off"))) => (name, false),
                _ => return Err(CpuSpecError::Switch(switch.to_owned())),
            };
            let feature = FeatureSet::named(name)?;
            if is_on && feature.has_any(not_carried()) {
                return Err(CpuSpecError::NotCarried(name.to_owned()));
            }
            (on, off) = if is_on { (on | feature, off.without(feature)) } else { (on.without(feature), off | feature) };
        }
        let off = with_what_needs_it(off);
        match (on & off).names().first() {
            Some(name) => Err(CpuSpecError::Contradiction(name)),
            None => Ok(Self { model, on, off, hyperv }),
        }
    }
}

/// What no guest gets: its state is not carried from host to host, or it opens what belongs to the host.
pub(super) fn not_carried() -> FeatureSet {
    FeatureSet::of_names("vmx smx svm skinit sgx sgxlc intel-pt arch-lbr core-capability")
}

/// Why a text is no [`CpuSpec`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuSpecError {
    /// No model of that name.
    #[error("there is no CPU model '{0}'; use host, x86-64-v2, or a name of QEMU's such as Skylake-Server")]
    Model(String),
    /// Not the form of a switch.
    #[error("'{0}': write MODEL[,+FEATURE][,-FEATURE][,FEATURE=on|off]…")]
    Switch(String),
    /// Not a feature.
    #[error(transparent)]
    Feature(#[from] NameError),
    /// A feature that is never there.
    #[error("'{0}' is not given to guests: what it needs is not carried")]
    NotCarried(String),
    /// No switch of Hyper-V's.
    #[error("there is no Hyper-V enlightenment '{0}'")]
    Hyperv(String),
    /// Not a count of spinlocks.
    #[error("hv-spinlocks: write a number from 0xfff on, or 0xffffffff for never")]
    Spinlocks,
    /// Not a vendor.
    #[error("hv-vendor-id: write 1 to 12 printable characters")]
    HypervVendor,
    /// On, but what it needs is off.
    #[error("'{0}' is on, and what it needs is off")]
    Contradiction(&'static str),
}
