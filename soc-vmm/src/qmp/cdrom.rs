//! Commands to the CD-ROM drive.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::aside::{aside, drop_aside};
use super::command::Command;
use super::devices::{in_world, slots_of};
use super::types::Empty;
use super::{ErrorClass, QmpError};
use crate::ahci::TrayLocked;
use crate::block::{self, ImageFormat, ImageSpec};
use crate::control::{CdromDrive, VmHandle};
use crate::qemu::image;
use crate::slots::NodeError;

/// QMP `eject`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Eject {
    /// The drive, by its old name.
    device: Option<String>,
    /// The drive.
    id: Option<String>,
    /// Also where the guest has locked the tray.
    #[serde(default)]
    force: bool,
}

impl Command for Eject {
    const NAME: &'static str = "eject";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let drive = drive(&vm, self.id, self.device)?;
        let medium = drive.handle.eject(self.force)?;
        drive.set_node(None);
        // Closing a file may take its time.
        drop_aside(medium);
        Ok(Empty {})
    }
}

/// QMP `blockdev-change-medium`: the medium is only ever read.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevChangeMedium {
    /// The drive, by its old name.
    device: Option<String>,
    /// The drive.
    id: Option<String>,
    /// The image.
    filename: PathBuf,
    /// `raw` or `qcow2`.
    format: Option<String>,
    /// Also where the guest has locked the tray.
    #[serde(default)]
    force: bool,
    /// `retain` or `read-only`.
    read_only_mode: Option<String>,
}

impl Command for BlockdevChangeMedium {
    const NAME: &'static str = "blockdev-change-medium";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let format = match self.format.as_deref() {
            None => None,
            Some("raw") => Some(ImageFormat::Raw),
            Some("qcow2") => Some(ImageFormat::Qcow2),
            Some(other) => return Err(QmpError::generic(format!("Images are raw or qcow2, not '{other}'"))),
        };
        match self.read_only_mode.as_deref() {
            None | Some("retain" | "read-only") => {}
            Some("read-write") => return Err(QmpError::generic("A CD-ROM can't be written")),
            Some(other) => {
                let why = format!("Parameter 'read-only-mode' is retain or read-only, not '{other}'");
                return Err(QmpError::generic(why));
            }
        }
        let drive = drive(&vm, self.id, self.device)?;
        let spec = ImageSpec { format, ..ImageSpec::read_only(self.filename) };
        // A file may be far away.
        let open = move || block::open(&spec).map_err(|e| QmpError::generic(crate::cli::with_causes(&e)));
        let medium = aside(open).await?;
        let old = drive.handle.change(medium, self.force)?;
        drive.set_node(None);
        drop_aside(old);
        Ok(Empty {})
    }
}

/// QMP `blockdev-open-tray`: a guest that has locked the tray is asked to open it, which it may do later.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockdevOpenTray {
    /// The drive, by its old name.
    device: Option<String>,
    /// The drive.
    id: Option<String>,
    /// Also where the guest has locked the tray.
    #[serde(default)]
    force: bool,
}

impl Command for BlockdevOpenTray {
    const NAME: &'static str = "blockdev-open-tray";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        // A guest that was asked opens the tray when it likes: who waits for that waits for DEVICE_TRAY_MOVED.
        let (Ok(()) | Err(TrayLocked)) = drive(&vm, self.id, self.device)?.handle.open_tray(self.force);
        Ok(Empty {})
    }
}

/// QMP `blockdev-close-tray`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockdevCloseTray {
    /// The drive, by its old name.
    device: Option<String>,
    /// The drive.
    id: Option<String>,
}

impl Command for BlockdevCloseTray {
    const NAME: &'static str = "blockdev-close-tray";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        drive(&vm, self.id, self.device)?.handle.close_tray();
        Ok(Empty {})
    }
}

/// QMP `blockdev-remove-medium`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockdevRemoveMedium {
    /// The drive.
    id: String,
}

impl Command for BlockdevRemoveMedium {
    const NAME: &'static str = "blockdev-remove-medium";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let drive = drive(&vm, Some(self.id), None)?;
        let medium = drive.handle.remove_medium().map_err(|e| QmpError::generic(e.to_string()))?;
        drive.set_node(None);
        drop_aside(medium);
        Ok(Empty {})
    }
}

/// QMP `blockdev-insert-medium`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevInsertMedium {
    /// The drive.
    id: String,
    /// The medium's block node.
    node_name: String,
}

impl Command for BlockdevInsertMedium {
    const NAME: &'static str = "blockdev-insert-medium";
    const ALTERS: bool = true;
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let drive = drive(&vm, Some(self.id), None)?.clone();
        let name = self.node_name.clone();
        if let Some(disk) = slots_of(&vm)?.disks().into_iter().find(|disk| disk.node.as_ref() == Some(&name)) {
            return Err(NodeError::InUse(name, disk.id).into());
        }
        let medium = in_world(vm, move |slots, world| Ok(image(&slots.disk_node(&name)?, world)?)).await?;
        drive.handle.insert_medium(medium).map_err(|e| QmpError::generic(e.to_string()))?;
        drive.set_node(Some(self.node_name));
        Ok(Empty {})
    }
}

/// `Ok` unless a drive has this block node in it.
pub(super) fn in_no_drive(vm: &VmHandle, node: &str) -> Result<(), QmpError> {
    match vm.cdroms().iter().find(|drive| drive.node().as_deref() == Some(node)) {
        Some(drive) => Err(NodeError::InUse(node.into(), drive.id.clone()).into()),
        None => Ok(()),
    }
}

/// The drive that is named in one of two ways, or in both.
fn drive(vm: &VmHandle, id: Option<String>, device: Option<String>) -> Result<&CdromDrive, QmpError> {
    let name = match (id, device) {
        (Some(id), Some(device)) if id != device => {
            return Err(QmpError::generic("'id' and 'device' name different drives: give 'id' alone"));
        }
        (Some(name), _) | (None, Some(name)) => name,
        (None, None) => return Err(QmpError::generic("Name the drive by 'id'")),
    };
    vm.cdrom(&name).ok_or_else(|| QmpError {
        class: ErrorClass::DeviceNotFound,
        desc: format!(
            "There is no removable drive '{name}': a VM has those that it was started with (--cdrom, -device ide-cd)"
        ),
    })
}

impl From<TrayLocked> for QmpError {
    fn from(e: TrayLocked) -> Self {
        Self::generic(e.to_string())
    }
}
