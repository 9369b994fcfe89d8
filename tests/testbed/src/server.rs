//! The emulated host server: x86-64 under TCG with real nested KVM, an IOMMU, and the card's functions in its slots.

use crate::build;
use crate::fetch::{self, Arch};
use crate::machine::{Basics, Error, Machine, Model};

/// KVM with nested paging, and VFIO behind the IOMMU.
const MODULES: [&str; 7] = ["irqbypass", "kvm", "kvm_amd", "vfio", "vfio_iommu_type1", "vfio_pci_core", "vfio_pci"];

/// A server to be started.
#[derive(Clone, Debug)]
pub struct ServerConfig {
    /// What every machine has.
    pub basics: Basics,
    /// Pages of 2 MiB that its kernel reserves at boot.
    pub hugepages: u32,
}

/// KVM lets no periodic timer of a guest be faster than this, in µs.
const SHORTEST_PERIOD: &str = "/sys/module/kvm/parameters/min_timer_period_us";

/// Lets no guest's periodic timer tick faster than once a second, so that OVMF runs.
///
/// QEMU's TCG aborts where a nested guest writes CR8 while KVM waits for it to take an interrupt (a lock is missing, up to 11.1). OVMF's
/// interrupt handler ends with such a write, and its timer ticks every 10 ms, missed ticks at once: a handler that is kept up finds the
/// next tick waiting. Slow ticks leave it time. Linux uses no periodic timer.
///
/// # Errors
/// [`Error::Call`].
pub fn slow_periodic_timers(server: &Machine) -> Result<(), Error> {
    server.write(SHORTEST_PERIOD, "1000000")
}

impl ServerConfig {
    /// 2 processors, 3 GiB of RAM of which 1 GiB is huge pages, no card.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { basics: Basics::new(name, 2, 3072), hugepages: 512 }
    }

    /// Starts it and waits until it takes calls. Its user space is its first process and what that starts, nothing else.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(&self) -> Result<Machine, Error> {
        let qemu = fetch::qemu()?;
        let kernel = fetch::kernel(Arch::Amd64)?;
        let init = build::programs(Arch::Amd64, &["testbed-init"])?.remove(0);
        let args = [
            // Split irqchip is what lets the emulated IOMMU remap interrupts.
            "-machine",
            "q35,accel=tcg,kernel-irqchip=split,memory-backend=ram",
            "-cpu",
            // Five levels of paging cost an emulated nested guest 35 loads a miss, four cost 24.
            "max,+svm,la57=off",
            // Caching mode reports every mapping, so the card sees what VFIO maps.
            "-device",
            "intel-iommu,intremap=on,caching-mode=on",
        ];
        Machine::start(
            &self.basics,
            &Model {
                qemu: &qemu,
                kernel: &kernel,
                program: "qemu-system-x86_64",
                args: args.map(str::to_owned).to_vec(),
                init,
                modules: &MODULES,
                command_line: format!(
                    // An emulated processor that gets no time loses ticks: the kernel would take its timer for broken, and die.
                    "console=ttyS0 quiet panic=-1 no_timer_check intel_iommu=on hugepages={}",
                    self.hugepages
                ),
            },
        )
    }
}
