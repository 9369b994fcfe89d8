//! A function through VFIO: a real PCIe card, or one that an emulator plugs in.
//!
//! A function is opened by its address (`0000:01:00.0`), which must be bound to vfio-pci and alone in its IOMMU group: functions of one
//! group share a domain, and each could reach the other's memory.

mod domain;
mod host;
mod iova;
mod open;
mod soc;
mod sys;
mod sysfs;

pub use host::{VfioBell, VfioHost};
pub use open::VfioDescriptors;
pub use soc::{MappedBars, VfioSoc};
