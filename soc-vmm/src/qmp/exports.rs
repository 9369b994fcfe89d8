//! Commands to the VM's NBD server.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::aside::aside;
use super::command::Command;
use super::devices::{in_world, slots_of};
use super::types::Empty;
use crate::cli::with_causes;
use crate::control::VmHandle;
use crate::nbd::{Export, ExportError};
use crate::qemu::{NbdAddress, World, image};
use crate::slots::SlotsHandle;

/// QMP `nbd-server-start`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct NbdServerStart {
    /// Where clients come in.
    addr: SocketAddressLegacy,
    /// How connections are kept secret: not here.
    tls_creds: Option<String>,
    /// Who may come in: not here.
    tls_authz: Option<String>,
    /// Clients at once; 0: as many as there can be.
    max_connections: Option<u32>,
}

/// QMP `SocketAddressLegacy`, of the kinds that there are.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "lowercase")]
pub(super) enum SocketAddressLegacy {
    /// TCP.
    Inet(InetAddress),
    /// A socket in the file system.
    Unix(UnixAddress),
}

/// QMP `InetSocketAddress`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct InetAddress {
    /// A host's name or address; none: every address.
    host: String,
    /// A port.
    port: String,
}

/// QMP `UnixSocketAddress`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct UnixAddress {
    /// Its path.
    path: PathBuf,
}

impl Command for NbdServerStart {
    const NAME: &'static str = "nbd-server-start";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        if [&self.tls_creds, &self.tls_authz].into_iter().flatten().any(|given| !given.is_empty()) {
            return Err(QmpError::generic(
                "NBD is not spoken over TLS: leave 'tls-creds' out, and give it a network of its own",
            ));
        }
        let address = match self.addr {
            SocketAddressLegacy::Inet(InetAddress { host, port }) => NbdAddress::Inet { host, port },
            SocketAddressLegacy::Unix(UnixAddress { path }) => NbdAddress::Unix { path },
        };
        let address = address.address().map_err(|e| QmpError::generic(e.to_string()))?;
        // A name may have to be looked up.
        aside(move || Ok(vm.exports().open(&address, self.max_connections)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `nbd-server-stop`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NbdServerStop {}

impl Command for NbdServerStop {
    const NAME: &'static str = "nbd-server-stop";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        aside(move || Ok(vm.exports().close()?)).await?;
        Ok(Empty {})
    }
}

/// QMP `block-export-add`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockExportAdd {
    /// `nbd`.
    #[serde(rename = "type")]
    _kind: BlockExportType,
    /// By which it is known here.
    id: String,
    /// The node.
    node_name: String,
    /// Clients may write it.
    #[serde(default)]
    writable: bool,
    /// By which clients ask for it; none: the node's.
    name: Option<String>,
}

/// QMP `BlockExportType`, of those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BlockExportType {
    /// NBD.
    Nbd,
}

impl Command for BlockExportAdd {
    const NAME: &'static str = "block-export-add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        let elsewhere = slots.reserved()?.elsewhere.clone();
        let guest_is_here = move || !elsewhere.load(std::sync::atomic::Ordering::Acquire);
        let user = slots.disks().into_iter().find(|disk| disk.node.as_deref() == Some(&self.node_name));
        if let (Some(disk), true) = (&user, self.writable && guest_is_here()) {
            let why = format!("'{}' is the guest's disk '{}': leave 'writable' out", self.node_name, disk.id);
            return Err(QmpError::generic(why));
        }
        if !self.writable && !guest_is_here() {
            return Err(QmpError::generic("The guest is elsewhere, and so is what its disks hold: show them later"));
        }
        if self.writable {
            super::jobs::unused(&vm, &self.node_name, "node")?;
        }
        let exports = vm.exports().clone();
        let add = move |slots: &SlotsHandle, world: &World<'_>| {
            let node = slots.disk_node(&self.node_name)?;
            let opened = image(&node, world)?;
            if self.writable && opened.is_read_only() {
                return Err(QmpError::generic(format!("'{}' is read-only: leave 'writable' out", self.node_name)));
            }
            let name = self.name.unwrap_or_else(|| self.node_name.clone());
            exports.add(Export::new(self.id, name, self.node_name, self.writable, opened))?;
            Ok(())
        };
        in_world(vm, add).await?;
        Ok(Empty {})
    }
}

/// QMP `block-export-del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct BlockExportDel {
    /// The export.
    id: String,
    /// What becomes of its clients.
    #[serde(default)]
    mode: BlockExportRemoveMode,
}

/// QMP `BlockExportRemoveMode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum BlockExportRemoveMode {
    /// There must be none.
    #[default]
    Safe,
    /// They are ended.
    Hard,
}

impl Command for BlockExportDel {
    const NAME: &'static str = "block-export-del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        aside(move || Ok(vm.exports().remove(&self.id, self.mode == BlockExportRemoveMode::Hard)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `query-block-exports`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryBlockExports {}

/// QMP `BlockExportInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct BlockExportInfo {
    id: String,
    #[serde(rename = "type")]
    kind: BlockExportType,
    node_name: String,
    shutting_down: bool,
}

impl Command for QueryBlockExports {
    const NAME: &'static str = "query-block-exports";
    type Reply = Vec<BlockExportInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<BlockExportInfo>, QmpError> {
        let info = |export: crate::nbd::ExportInfo| BlockExportInfo {
            id: export.id,
            kind: BlockExportType::Nbd,
            node_name: export.node,
            shutting_down: false,
        };
        Ok(vm.exports().list().into_iter().map(info).collect())
    }
}

impl From<ExportError> for QmpError {
    fn from(e: ExportError) -> Self {
        Self::generic(with_causes(&e))
    }
}
