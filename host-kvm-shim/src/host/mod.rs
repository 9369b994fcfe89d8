//! The host: what its KVM and its hardware give, asked once while the shim may still open files.

mod faults;
mod inventory;
mod memory;

use std::fs;
use std::sync::Arc;

use api_channel::call::CpuidEntry;
use kvm_bindings::{
    CpuId, KVM_CAP_HYPERV_SYNIC, KVM_CAP_SYS_HYPERV_CPUID, KVM_CAP_VM_TSC_CONTROL, KVM_CAP_XSAVE2,
    KVM_MAX_CPUID_ENTRIES,
};
use kvm_ioctls::{Cap, Kvm};
use nix::errno::Errno;

pub(crate) use memory::MemoryInfo;

use crate::error::{Refusal, ServeError};
use crate::frugal::Program;
use crate::kvm::{Userfault, get_supported_hv_cpuid, install_kick, tsc_khz};
use crate::sandbox::VcpuFilter;
use crate::vcpu::{Abilities, from_cpuid};

/// The host as a VM needs to know it.
pub(crate) struct Host {
    kvm: Kvm,
    abilities: Abilities,
    tsc_khz: u32,
    tsc_is_synchronised: bool,
    one_cpu: bool,
    memory: MemoryInfo,
    inventory: Vec<u8>,
    vcpu_filter: Option<VcpuFilter>,
    program: Program,
    /// What tells of faults in guest memory; else why nothing does.
    userfault: Result<Arc<Userfault>, String>,
}

/// What this KVM must have, by api.rst's names; Linux 5.17 has all of it.
const NEEDED: [(Cap, &str); 9] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
];
/// The same, of those that kvm-ioctls has no name for.
const NEEDED_RAW: [(u32, &str); 2] = [
    (kvm_bindings::KVM_CAP_SREGS2, "KVM_CAP_SREGS2"),
    (kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2"),
];

impl Host {
    /// Opens KVM and looks at the host.
    ///
    /// # Errors
    /// KVM can't be used, and what to do about it.
    pub(crate) fn open() -> Result<Self, ServeError> {
        let kvm = Kvm::new().map_err(|e| ServeError::Kvm(kvm_is_closed(Errno::from_raw(e.errno()))))?;
        if kvm.get_api_version() != 12 {
            let why =
                format!("/dev/kvm speaks API version {}, not 12: use a stock Linux kernel", kvm.get_api_version());
            return Err(ServeError::Kvm(why));
        }
        let named = NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name);
        let raw = NEEDED_RAW.iter().find(|(cap, _)| kvm.check_extension_raw((*cap).into()) <= 0).map(|(_, name)| *name);
        if let Some(name) = named.or(raw) {
            return Err(ServeError::Kvm(format!("/dev/kvm lacks {name}: use Linux 5.17 or newer")));
        }
        let failed = |what: &str, e: kvm_ioctls::Error| {
            ServeError::Kvm(format!(
                "/dev/kvm can't {what}: {}; look at the kernel's log",
                Errno::from_raw(e.errno()).desc()
            ))
        };
        // A VM that never runs: it proves that VMs can be created, and tells what a capability of the device can't.
        let vm = kvm.create_vm().map_err(|e| failed("create a VM", e))?;
        let khz = match vm.check_extension_raw(KVM_CAP_VM_TSC_CONTROL.into()) {
            1.. => tsc_khz(&vm).unwrap_or(0),
            _ => {
                // A vCPU without an in-kernel APIC would have the kernel patch KVM's code under all VMs of this host, twice.
                vm.create_irq_chip().map_err(|e| failed("create interrupt controllers", e))?;
                vm.create_vcpu(0).map_err(|e| failed("create a vCPU", e))?.get_tsc_khz().unwrap_or(0)
            }
        };
        let msrs = kvm.get_msr_index_list().map_err(|e| failed("list its MSRs", e))?;
        let abilities = Abilities::new(vm.check_extension_raw(KVM_CAP_XSAVE2.into()), msrs.as_slice().to_vec());
        install_kick().map_err(|errno| ServeError::Os("install a signal handler", errno))?;
        let one_cpu = std::thread::available_parallelism().is_ok_and(|n| n.get() == 1);
        Ok(Self {
            kvm,
            abilities,
            tsc_khz: khz,
            tsc_is_synchronised: one_cpu || clocksource_is_tsc(),
            one_cpu,
            memory: MemoryInfo::open().map_err(|errno| ServeError::Os("open /proc/meminfo", errno))?,
            inventory: inventory::read().encode(),
            vcpu_filter: None,
            program: Program::new(),
            userfault: faults::open().map(Arc::new),
        })
    }

    /// Confines this process: see [`crate::sandbox`].
    pub(crate) fn confine(&mut self) -> Result<(), ServeError> {
        self.vcpu_filter = Some(crate::sandbox::confine()?);
        Ok(())
    }

    /// What vCPU threads are confined by.
    pub(crate) fn vcpu_filter(&self) -> Option<VcpuFilter> {
        self.vcpu_filter.clone()
    }

    /// What tells of faults in guest memory.
    pub(crate) fn userfault(&self) -> Result<&Arc<Userfault>, Refusal> {
        self.userfault.as_ref().map_err(|why| Refusal::unavailable(why.clone()))
    }

    /// This program, whose code need not all stay mapped.
    pub(crate) fn program(&self) -> &Program {
        &self.program
    }

    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    pub(crate) fn abilities(&self) -> &Abilities {
        &self.abilities
    }

    pub(crate) fn memory(&self) -> &MemoryInfo {
        &self.memory
    }

    /// The encoded [`api_channel::call::HostInfo`], as of the shim's start.
    pub(crate) fn inventory(&self) -> &[u8] {
        &self.inventory
    }

    /// Frequency of the host's TSC.
    pub(crate) fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// Whether time stamps of different CPUs compare, so that posted writes can be put in order.
    pub(crate) fn tsc_is_synchronised(&self) -> bool {
        self.tsc_is_synchronised
    }

    /// Whether spinning can only keep the other side from running.
    pub(crate) fn has_one_cpu(&self) -> bool {
        self.one_cpu
    }

    /// Whether KVM can tell of the guest's EOI of an irqfd.
    pub(crate) fn has_resample(&self) -> bool {
        self.kvm.check_extension(Cap::IrqfdResample)
    }

    pub(crate) fn most_vcpus(&self) -> u32 {
        self.kvm.get_max_vcpus() as u32
    }

    /// vCPU ids, which are APIC ids, are below this.
    pub(crate) fn most_vcpu_ids(&self) -> u32 {
        self.kvm.get_max_vcpu_id() as u32
    }

    pub(crate) fn most_memslots(&self) -> usize {
        self.kvm.get_nr_memslots()
    }

    /// Whether vCPUs can have Hyper-V's SynIC.
    pub(crate) fn has_synic(&self) -> bool {
        self.kvm.check_extension_raw(KVM_CAP_HYPERV_SYNIC.into()) > 0
    }

    /// The Hyper-V leaves that KVM supports: none where it has no such interfaces, or can't tell before there is a vCPU.
    pub(crate) fn supported_hv_cpuid(&self) -> Result<Vec<CpuidEntry>, Refusal> {
        if self.kvm.check_extension_raw(KVM_CAP_SYS_HYPERV_CPUID.into()) <= 0 {
            return Ok(Vec::new());
        }
        let mut table =
            CpuId::new(KVM_MAX_CPUID_ENTRIES).map_err(|_| Refusal::unavailable("no memory for a CPUID table"))?;
        get_supported_hv_cpuid(&self.kvm, &mut table).map_err(Refusal::nix("read the Hyper-V CPUID"))?;
        Ok(table.as_slice().iter().map(from_cpuid).collect())
    }

    /// The CPUID that KVM supports.
    pub(crate) fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, Refusal> {
        let table =
            self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(Refusal::kvm("read the supported CPUID"))?;
        Ok(table.as_slice().iter().map(from_cpuid).collect())
    }
}

/// The kernel uses the TSC as its clock only while it finds the CPUs' TSCs synchronised, and gives it up for good when they drift.
/// A virtual machine whose kernel prefers a paravirtual clock tells nothing: posting is off there.
fn clocksource_is_tsc() -> bool {
    let current = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource");
    current.is_ok_and(|name| name.trim() == "tsc")
}

fn kvm_is_closed(errno: Errno) -> String {
    let todo = match errno {
        Errno::ENOENT => "load kvm_intel or kvm_amd, and enable virtualization in the firmware",
        Errno::EACCES | Errno::EPERM => "run as root, or as a user of the device's group (kvm)",
        Errno::ENODEV | Errno::ENXIO => "load kvm_intel or kvm_amd",
        _ => "look at the kernel's log",
    };
    format!("can't open /dev/kvm: {}; {todo}", errno.desc())
}
