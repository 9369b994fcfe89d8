//! The emulated DPU SoC: aarch64 under TCG, with VFIO behind virtio-iommu and the card's SoC side in its slots.

use std::path::PathBuf;

use crate::build;
use crate::fetch::{self, Arch};
use crate::machine::{Basics, Error, Machine, Model};

/// VFIO behind the IOMMU, and drives.
const MODULES: [&str; 6] = ["virtio_iommu", "vfio", "vfio_iommu_type1", "vfio_pci_core", "vfio_pci", "virtio_blk"];

/// Turns on Access Control Services of QEMU's root ports (1b36:000c): source validation, request and completion redirect,
/// upstream forwarding. The kernel does so by itself only where it knows of an IOMMU before it looks for devices; without, a
/// function shares its IOMMU group with its port.
const ACS_OF_PORTS: &str = "pci=config_acs=xx111x1@pci:1b36:c";

/// An Arm SoC to be started.
#[derive(Clone, Debug)]
pub struct SocConfig {
    /// What every machine has.
    pub basics: Basics,
    /// Raw images of this machine that it has as drives: `/dev/vda`, `/dev/vdb`, and so on. It writes to copies, which end
    /// with it.
    pub drives: Vec<PathBuf>,
}

impl SocConfig {
    /// 2 processors, 1 GiB of RAM, no card.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self { basics: Basics::new(name, 2, 1024), drives: Vec::new() }
    }

    /// Starts it and waits until it takes calls.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(&self) -> Result<Machine, Error> {
        let qemu = fetch::qemu()?;
        let kernel = fetch::kernel(Arch::Arm64)?;
        let init = build::programs(Arch::Arm64, &["testbed-init"])?.remove(0);
        let mut args = [
            "-machine",
            "virt,accel=tcg,gic-version=3,memory-backend=ram",
            "-cpu",
            "cortex-a72",
            // Not smmuv3: QEMU lets no vfio-user device behind it.
            "-device",
            "virtio-iommu-pci",
        ]
        .map(str::to_owned)
        .to_vec();
        for (index, image) in self.drives.iter().enumerate() {
            let image = image.display();
            args.extend(["-drive".to_owned(), format!("if=none,id=drive{index},format=raw,snapshot=on,file={image}")]);
            args.extend(["-device".to_owned(), format!("virtio-blk-pci,drive=drive{index}")]);
        }
        Machine::start(
            &self.basics,
            &Model {
                qemu: &qemu,
                kernel: &kernel,
                program: "qemu-system-aarch64",
                args,
                init,
                modules: &MODULES,
                command_line: format!("console=ttyAMA0 quiet panic=-1 {ACS_OF_PORTS}"),
            },
        )
    }
}
