//! Commands that make and delete character devices.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::aside::aside;
use super::command::Command;
use super::types::Empty;
use crate::chardev::{self, ChardevError};
use crate::cli::with_causes;
use crate::control::VmHandle;
use crate::qemu::{Chardev, ChardevKind, LogFile, Socket, Wrong};

/// QMP `chardev-add`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChardevAdd {
    /// Its name.
    id: String,
    /// What it is.
    backend: ChardevBackend,
}

/// QMP `ChardevBackend`, of the kinds that there are.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, tag = "type", content = "data", rename_all = "lowercase")]
enum ChardevBackend {
    Pty(ChardevCommon),
    Null(ChardevCommon),
    File(ChardevFile),
    Socket(ChardevSocket),
}

/// QMP `ChardevCommon`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ChardevCommon {
    logfile: Option<PathBuf>,
    #[serde(default)]
    logappend: bool,
}

/// QMP `ChardevFile`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ChardevFile {
    out: PathBuf,
    #[serde(default)]
    append: bool,
    logfile: Option<PathBuf>,
    #[serde(default)]
    logappend: bool,
}

/// QMP `ChardevSocket`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct ChardevSocket {
    addr: SocketAddressLegacy,
    #[serde(default = "is_server")]
    server: bool,
    wait: Option<bool>,
    /// A peer that left is looked for again always.
    #[serde(rename = "reconnect")]
    _reconnect: Option<u32>,
    logfile: Option<PathBuf>,
    #[serde(default)]
    logappend: bool,
}

/// A socket is a server's unless it is said.
fn is_server() -> bool {
    true
}

/// QMP `SocketAddressLegacy`, of the kinds that there are.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, tag = "type", content = "data", rename_all = "lowercase")]
enum SocketAddressLegacy {
    Unix { path: PathBuf },
    Fd { str: String },
}

/// QMP `ChardevReturn`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct ChardevReturn {
    /// Where a pseudo-terminal's other side is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pty: Option<PathBuf>,
}

impl ChardevAdd {
    fn spec(self) -> Result<Chardev, Wrong> {
        let log = |path: Option<PathBuf>, append| path.map(|path| LogFile { path, append });
        let (kind, log) = match self.backend {
            ChardevBackend::Pty(common) => (ChardevKind::Pty, log(common.logfile, common.logappend)),
            ChardevBackend::Null(common) => (ChardevKind::Null, log(common.logfile, common.logappend)),
            ChardevBackend::File(file) => {
                let kind = ChardevKind::File { path: file.out, append: file.append };
                (kind, log(file.logfile, file.logappend))
            }
            ChardevBackend::Socket(socket) => {
                let kind = match (socket.addr, socket.server, socket.wait) {
                    (_, true, Some(true)) => return Err(Wrong::new("nobody is waited for: say false").at("wait")),
                    (SocketAddressLegacy::Unix { path }, true, _) => ChardevKind::Listen(Socket::Path(path)),
                    (SocketAddressLegacy::Fd { str }, true, _) => ChardevKind::Listen(Socket::Descriptor(str)),
                    (SocketAddressLegacy::Unix { path }, false, _) => ChardevKind::Connect(path),
                    (SocketAddressLegacy::Fd { .. }, false, _) => {
                        return Err(Wrong::new("a socket that is passed listens").at("server"));
                    }
                };
                (kind, log(socket.logfile, socket.logappend))
            }
        };
        Ok(Chardev { id: self.id, kind, log })
    }
}

impl Command for ChardevAdd {
    const NAME: &'static str = "chardev-add";
    type Reply = ChardevReturn;

    async fn run(self, vm: VmHandle) -> Result<ChardevReturn, QmpError> {
        let spec = self.spec().map_err(|wrong| QmpError::generic(wrong.to_string()))?;
        crate::qemu::check_id(&spec.id).map_err(|wrong| QmpError::generic(wrong.to_string()))?;
        aside(move || {
            vm.chardevs().add(&spec, vm.fds())?;
            Ok(ChardevReturn { pty: vm.chardevs().pty(&spec.id) })
        })
        .await
    }
}

/// QMP `chardev-remove`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChardevRemove {
    /// Its name.
    id: String,
}

impl Command for ChardevRemove {
    const NAME: &'static str = "chardev-remove";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        // One that connects holds up who asks.
        aside(move || Ok(vm.chardevs().remove(&self.id)?)).await?;
        Ok(Empty {})
    }
}

impl From<ChardevError> for QmpError {
    fn from(e: ChardevError) -> Self {
        Self::generic(with_causes(&e))
    }
}

/// QMP `query-chardev`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryChardev {}

/// QMP `ChardevInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct ChardevInfo {
    label: String,
    filename: String,
    frontend_open: bool,
}

impl Command for QueryChardev {
    const NAME: &'static str = "query-chardev";
    type Reply = Vec<ChardevInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<ChardevInfo>, QmpError> {
        let ports = vm.slots().map(|slots| slots.serial_ports()).unwrap_or_default();
        let info =
            |chardev::ChardevInfo { label, filename, frontend_open }| ChardevInfo { label, filename, frontend_open };
        // As above.
        aside(move || Ok(vm.chardevs().list(&ports).into_iter().map(info).collect())).await
    }
}
