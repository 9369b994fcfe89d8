//! What each vCPU writes: of VMs whose host tells them apart.

use std::time::Duration;

use migration::VmError;

use super::{MigrateError, Migration};
use crate::cli::with_causes;

/// A VM as who counts or limits its vCPUs' writes has it.
pub trait WritingVcpus: Send + Sync {
    /// Whether its host tells which vCPU writes what.
    fn tells_vcpus_apart(&self) -> bool;

    /// Counts what vCPUs write, or no longer.
    ///
    /// # Errors
    /// Its host doesn't.
    fn count_writes(&self, on: bool) -> Result<(), VmError>;

    /// What its vCPUs have written so far, while that is counted or limited.
    ///
    /// # Errors
    /// Its host doesn't tell.
    fn written(&self) -> Result<AllWritten, VmError>;

    /// Limits a vCPU, or all, to so many bytes a second; 0: no longer.
    ///
    /// # Errors
    /// Its host doesn't.
    fn limit_vcpu(&self, vcpu: Option<u32>, bytes: u64) -> Result<(), VmError>;

    /// The vCPUs that have limits, and how they fare.
    ///
    /// # Errors
    /// Its host doesn't tell.
    fn limited_vcpus(&self) -> Result<Vec<VcpuWrites>, VmError>;
}

/// What a vCPU has written, in all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Bytes of its pages, each as often as it was logged.
    pub bytes: u64,
    /// For how long it stood still because of its limit.
    pub stood: Duration,
}

/// What all vCPUs have written, in all.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AllWritten {
    /// Each, by its number.
    pub vcpus: Vec<Written>,
    /// How often KVM has overrun a ring: what vCPUs have written is unknown from then on.
    pub overruns: u64,
}

/// A vCPU's writing just now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VcpuWrites {
    /// The vCPU.
    pub vcpu: u32,
    /// Bytes a second that it may write.
    pub limit: u64,
    /// Bytes a second that it writes.
    pub rate: u64,
    /// What it takes it to fill its ring.
    pub fills_ring: Duration,
    /// For how long of that it stands still.
    pub stands: Duration,
}

impl Written {
    /// How fast that was since `before`, for a vCPU with a ring for so many bytes.
    pub(crate) fn since(&self, before: &Self, passed: Duration, ring: u64) -> VcpuWrites {
        let bytes = self.bytes.saturating_sub(before.bytes);
        let rate = bytes as f64 / passed.as_secs_f64();
        if bytes == 0 || !rate.is_finite() {
            return VcpuWrites::default();
        }
        let rings = bytes as f64 / ring.max(1) as f64;
        VcpuWrites {
            rate: rate as u64,
            fills_ring: passed.div_f64(rings),
            stands: self.stood.saturating_sub(before.stood).min(passed).div_f64(rings),
            ..VcpuWrites::default()
        }
    }
}

impl Migration {
    /// Whether the VM's host tells its vCPUs apart. Waits for the VM.
    ///
    /// # Errors
    /// It doesn't, and what to do.
    pub fn check_rings(&self) -> Result<(), MigrateError> {
        self.of_rings(|_| Ok(()))
    }

    /// Limits a vCPU, or all, to so many bytes a second; 0: no longer. Waits for the VM.
    ///
    /// # Errors
    /// It can't be done now, or not with this VM, and why.
    pub fn limit_vcpu(&self, vcpu: Option<u32>, bytes: u64) -> Result<(), MigrateError> {
        let is_limited = self.progress().is_some_and(|progress| !progress.phase.is_last() && progress.write_limit != 0);
        if is_limited {
            let why = "a migration limits the guest's vCPUs (dirty-limit): change its vcpu-dirty-limit, or wait until it is over";
            return Err(MigrateError::Refused(why.into()));
        }
        self.of_rings(|vm| vm.limit_vcpu(vcpu, bytes))
    }

    /// The vCPUs that have limits, and how they fare. Waits for the VM.
    ///
    /// # Errors
    /// The VM's host doesn't tell.
    pub fn limited_vcpus(&self) -> Result<Vec<VcpuWrites>, MigrateError> {
        self.of_rings(|vm| vm.limited_vcpus())
    }

    fn of_rings<T>(&self, work: impl FnOnce(&dyn WritingVcpus) -> Result<T, VmError>) -> Result<T, MigrateError> {
        let vm = self.state().vm.clone().ok_or(MigrateError::NotBuilt)?;
        if !vm.tells_vcpus_apart() {
            let why = "this VM's host logs dirty pages by bitmap, which doesn't tell vCPUs apart: start it with --dirty-ring 4096 \
                       (-accel kvm,dirty-ring-size=4096)";
            return Err(MigrateError::Refused(why.into()));
        }
        work(&*vm).map_err(|e| MigrateError::Refused(with_causes(&*e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_of_the_time_between() {
        let second = Duration::from_secs(1);
        let before = Written { bytes: 1 << 20, stood: second };
        let now = Written { bytes: 5 << 20, stood: second * 2 };
        let writes = now.since(&before, second * 2, 1 << 20);
        let quarter = second / 4;
        assert_eq!(writes, VcpuWrites { vcpu: 0, limit: 0, rate: 2 << 20, fills_ring: quarter * 2, stands: quarter });
        assert_eq!(now.since(&now, second, 1 << 20), VcpuWrites::default());
        assert_eq!(now.since(&before, Duration::ZERO, 1 << 20), VcpuWrites::default());
    }
}
