//! Why a VM can't be built or went no further, and what its process says of that.

use crate::boot::BootError;
use crate::cli::{ExitStatus, Failure, with_causes};
use crate::cpuid::CpuidError;
use crate::layout::LayoutError;
use crate::link::{CallError, LinkError};
use crate::memory::MemoryError;
use crate::vm::host::HostError;
use crate::vm::machine::BuildError;

/// Why a VM can't be built or went no further.
#[derive(Debug, thiserror::Error)]
pub(in crate::vm) enum LifeError {
    #[error("the host did not do what it was asked for")]
    Call(#[from] CallError),
    #[error(transparent)]
    Host(#[from] HostError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error("the machine can't be built")]
    Machine(#[from] BuildError),
    #[error("--memory")]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(
        "--cpu: hv-synic: this host's KVM can't tell of the end of its interrupts (KVM_CAP_IRQFD_RESAMPLE; none can with --iommu); leave it out"
    )]
    NoEoi,
    #[error("the host's records of vCPU state can't be read")]
    Records,
    #[error("the guest can't go on here")]
    Moved(#[source] migration::VmError),
    #[error("can't start a thread")]
    Thread(#[source] std::io::Error),
}

impl From<api_channel::codec::Malformed> for LifeError {
    fn from(_: api_channel::codec::Malformed) -> Self {
        Self::Records
    }
}

impl LifeError {
    pub(in crate::vm) fn failure(&self) -> Failure {
        let status = match self {
            // The images are what they should be; the function or the host is not.
            Self::Boot(e) if e.is_of_the_machine() => ExitStatus::Unavailable,
            Self::Boot(_) | Self::Layout(_) => ExitStatus::Usage,
            Self::Machine(e) if e.is_usage() => ExitStatus::Usage,
            _ => ExitStatus::Unavailable,
        };
        Failure::of(status, "", self).by_loss(self.is_loss()).by_wish(self.is_wish())
    }

    /// Whether the host has less than this VM was asked to have, though nothing is wrong with the host.
    fn is_wish(&self) -> bool {
        matches!(self, Self::Cpuid(CpuidError::Lacks(_) | CpuidError::NeedsX2apic) | Self::NoEoi)
    }

    /// The same of a VM that was there: whoever noticed that the host is gone, it is lost.
    pub(super) fn of_a_vm(&self) -> Failure {
        if self.is_loss() { lost(&with_causes(self)) } else { self.failure() }
    }

    pub(super) fn is_loss(&self) -> bool {
        match self {
            Self::Call(e) | Self::Host(HostError::Call(e)) => e.is_loss(),
            Self::Link(e) => e.is_loss(),
            Self::Boot(BootError::Memory(e)) => matches!(e, MemoryError::Lost { .. }),
            _ => false,
        }
    }
}

/// A VM that was there and is no more.
pub(super) fn lost(why: &str) -> Failure {
    Failure::new(ExitStatus::Failed, format!("the VM is lost: {why}")).by_loss(true)
}

#[cfg(test)]
mod tests {
    use std::io::ErrorKind;

    use super::*;
    use crate::boot::{ImageError, Role};

    #[test]
    fn an_image_that_this_machine_has_no_memory_for_is_no_wrong_image() {
        let status = |kind: ErrorKind| {
            let source = ImageError::Io { action: "hold it", source: kind.into() };
            LifeError::from(BootError::File { role: Role::Kernel, path: "vmlinuz".into(), source }).failure().status()
        };
        assert_eq!(status(ErrorKind::OutOfMemory), ExitStatus::Unavailable);
        assert_eq!(status(ErrorKind::PermissionDenied), ExitStatus::Usage);
    }
}
