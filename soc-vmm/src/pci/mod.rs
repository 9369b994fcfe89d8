//! PCI Express as a q35 of QEMU has it, so that firmware, guests and libvirt recognise the machine.
//!
//! [`Fabric`] is the whole: the host bridge and every [`PciFunction`] that is plugged in, configuration space by ECAM and by ports, and
//! the windows of BARs, which move when the guest moves them. A function brings its [`ConfigSpace`]; [`Msix`] and [`Msi`] are how it
//! interrupts, [`Pirqs`] where its INTx pin goes.

mod assign;
mod bar;
mod config;
mod fabric;
mod fabric_state;
mod function;
mod host_bridge;
mod lpc;
mod msi;
mod msix;
mod requester;
mod root_port;
mod routing;
#[cfg(test)]
pub(crate) mod test_sink;
#[cfg(test)]
mod tests;
mod window;

pub use assign::{Apertures, NoRoom};
pub use bar::{Bar, Signal, Space, Window};
pub use config::{CAP_EXPRESS, CONFIG_SIZE, ConfigSpace, ConfigState, Identity, command, header};
pub use fabric::{Fabric, FabricSide, NodeId, Platform, PlugError, SlotSink};
pub use function::{PciFunction, bar_windows};
pub use host_bridge::{HostBridge, MemoryView, PAM_SEGMENTS, Shadow};
pub use lpc::{LPC, LpcBridge, LpcState};
pub use msi::Msi;
pub use msix::{CAP_MSIX, Msix, MsixLayout, MsixState, MsixVectors};
pub use requester::Requester;
pub use root_port::{Asked, RootPort, RootPortState, slot_control, slot_status};
pub use routing::{PIRQ_GSI, PIRQS, Pirqs, pirq_of};
