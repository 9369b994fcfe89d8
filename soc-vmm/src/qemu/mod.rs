//! QEMU's command line, as libvirt 9.0.0 and people write it (docs/qemu-command-line.md).
//!
//! Words become [`Properties`] ([`keyval`](Properties), or JSON), those become the options' types, which QMP's commands share
//! ([`Device`], [`Blockdev`], [`Netdev`], [`Object`]); all of them are a [`Line`], and [`parse`] makes of that what `soc-vmm run` makes of
//! its own arguments. What is not there is refused by its name; what changes nothing is accepted only from [`inert`]'s lists.

mod blockdev;
pub mod catalog;
mod chardev;
mod config;
mod device;
mod hardware;
pub mod inert;
mod keyval;
mod line;
mod machine;
mod netdev;
mod object;
mod options;
mod plan;
mod read;
mod scalar;
pub mod small;
#[cfg(test)]
mod tests;
mod wrong;

pub use blockdev::{BlockAio, BlockDriver, Blockdev, Cache, FileDriver, FileRef, InlineFile, NbdAddress};
pub use chardev::{Chardev, ChardevKind, LogFile, Socket};
pub use config::parse;
pub use device::{
    Balloon, Cd, Cpu, DebugConsole, Device, DeviceKind, Disk, Entropy, FileSystem, Net, Policy, Port, RootPort, Serial,
    VhostDisk,
};
pub(crate) use hardware::ahci_port;
pub use hardware::{BootPlace, Hardware, PortPlace, Probe};
pub use keyval::Properties;
pub use line::Line;
pub use machine::{MachineKind, MachineOption, NumaOption};
pub use netdev::{Netdev, NetdevKind, SocketAddress, SocketKind};
pub use object::{Limits, MemoryBackend, Object, ObjectKind};
pub use plan::{Names, PlanError, World, image};
pub use scalar::{PciAddress, Size, Switch, Uuid};
pub use wrong::Wrong;

use crate::slots::{ID_MAX, is_name};

/// QMP `blockdev-add`'s arguments.
#[derive(Clone, Debug)]
pub struct BlockdevAdd(pub Blockdev);

/// QMP `netdev_add`'s arguments.
#[derive(Clone, Debug)]
pub struct NetdevAdd(pub Netdev);

/// `Ok` if it is a name as QEMU and libvirt know them.
pub(crate) fn check_id(id: &str) -> Result<(), Wrong> {
    if is_name(id) {
        return Ok(());
    }
    let why = format!(
        "'{:.60}': an id is a letter, then letters, digits and any of '-', '.', '_', at most {ID_MAX} characters",
        id.escape_default().to_string()
    );
    Err(Wrong::new(why).at("id"))
}
