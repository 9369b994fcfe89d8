//! Commands that name back ends: block nodes and networks.

use std::path::PathBuf;
use std::time::Duration;

use schemars::JsonSchema;
use serde::Deserialize;

use super::QmpError;
use super::aside::aside;
use super::command::Command;
use super::devices::{open, slots_of};
use super::types::Empty;
use crate::block::{ImageFormat, ImageSpec};
use crate::cli::{NetSpec, with_causes};
use crate::control::VmHandle;
use crate::net::{NetSource, TapSource};
use crate::slots::{self, DiskNode, SlotsHandle};
use crate::virtio::RateLimits;

/// QMP `blockdev-add`: a file, or an image in one.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevAdd {
    /// `file`, `raw` or `qcow2`.
    driver: String,
    /// Its name.
    node_name: String,
    /// Of `file`: its path.
    filename: Option<PathBuf>,
    /// Of an image: the file that it is in.
    file: Option<FileRef>,
    /// It is not written.
    #[serde(default)]
    read_only: bool,
    /// It may be opened without being written: whether it is decides who uses it.
    #[serde(default, rename = "auto-read-only")]
    _auto_read_only: bool,
    /// How it is cached.
    #[serde(default)]
    cache: Cache,
    /// What becomes of discards: a disk always passes them on.
    #[serde(default)]
    discard: Option<Discard>,
}

/// QMP `BlockdevRef`, to a file.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "'file' is a node's name, or {\"driver\":\"file\",\"filename\":PATH}")]
enum FileRef {
    /// A node that is there.
    Node(String),
    /// The file itself.
    Inline(InlineFile),
}

#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct InlineFile {
    driver: FileDriver,
    filename: PathBuf,
}

#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum FileDriver {
    File,
    HostDevice,
}

/// QMP `BlockdevCacheOptions`.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct Cache {
    /// Past the page cache.
    direct: bool,
    /// Flushes do nothing: not here.
    no_flush: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Discard {
    Ignore,
    Unmap,
}

impl Command for BlockdevAdd {
    const NAME: &'static str = "blockdev-add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        aside(move || self.add(&slots)).await?;
        Ok(Empty {})
    }
}

impl BlockdevAdd {
    fn add(self, slots: &SlotsHandle) -> Result<(), QmpError> {
        if self.discard == Some(Discard::Ignore) {
            return Err(QmpError::generic("discard=ignore is not there: disks pass discards on"));
        }
        if self.cache.no_flush {
            return Err(QmpError::generic("cache.no-flush is not there: a flush makes durable what was written"));
        }
        let format = match &*self.driver {
            "file" | "host_device" => return self.add_file(slots),
            "raw" => ImageFormat::Raw,
            "qcow2" => ImageFormat::Qcow2,
            other => return Err(QmpError::generic(format!("Block nodes are file, raw or qcow2, not '{other}'"))),
        };
        if self.filename.is_some() {
            return Err(QmpError::generic(format!("'filename' is of a file; '{}' needs 'file'", self.driver)));
        }
        let (path, read_only, direct, over) = match self.file {
            None => return Err(QmpError::generic(format!("'{}' needs 'file'", self.driver))),
            Some(FileRef::Inline(InlineFile { driver: FileDriver::File | FileDriver::HostDevice, filename })) => {
                (filename, false, false, None)
            }
            Some(FileRef::Node(name)) => match slots.disk_node(&name)? {
                DiskNode::File(file) => (file.path, file.read_only, file.direct, Some(name)),
                DiskNode::Image(..) => return Err(QmpError::generic(format!("'{name}' is an image, not a file"))),
            },
        };
        let image = ImageSpec {
            path,
            format: Some(format),
            read_only: self.read_only || read_only,
            direct: self.cache.direct || direct,
        };
        let image = open(slots, &image)?;
        Ok(slots.name_disk(&self.node_name, DiskNode::Image(image, over))?)
    }

    /// Names a file. It is opened by who reads it: only then its locks are known.
    fn add_file(self, slots: &SlotsHandle) -> Result<(), QmpError> {
        let (Some(path), None) = (self.filename, self.file) else {
            return Err(QmpError::generic("A file needs 'filename', and no 'file'"));
        };
        if let Err(e) = std::fs::metadata(&path) {
            return Err(QmpError::generic(format!("Could not open '{}': {e}", path.display())));
        }
        // Used as it is, it is raw. Its name is not asked.
        let file =
            ImageSpec { path, format: Some(ImageFormat::Raw), read_only: self.read_only, direct: self.cache.direct };
        Ok(slots.name_disk(&self.node_name, DiskNode::File(file))?)
    }
}

/// QMP `blockdev-del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct BlockdevDel {
    /// Its name.
    node_name: String,
}

impl Command for BlockdevDel {
    const NAME: &'static str = "blockdev-del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        aside(move || Ok(slots.delete_disk(&self.node_name)?)).await?;
        Ok(Empty {})
    }
}

/// QMP `netdev_add`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NetdevAdd {
    /// `stream` or `tap`.
    #[serde(rename = "type")]
    kind: String,
    /// Its name.
    id: String,
    /// Of a stream: where its peer listens.
    addr: Option<SocketAddress>,
    /// Of a stream: whether it listens itself.
    #[serde(default)]
    server: bool,
    /// Of a stream: seconds between attempts to find a peer that left.
    reconnect: Option<u32>,
    /// Of a TAP interface: its name.
    ifname: Option<String>,
    /// Of a TAP interface: how many of its queues.
    queues: Option<u16>,
    /// Of a TAP interface: what is run to set it up, which is nothing.
    script: Option<String>,
    /// Likewise when it is no longer used.
    downscript: Option<String>,
}

/// QMP `SocketAddress`, of UNIX sockets.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct SocketAddress {
    #[serde(rename = "type")]
    kind: String,
    path: Option<PathBuf>,
}

impl Command for NetdevAdd {
    const NAME: &'static str = "netdev_add";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        let (id, source) = self.source()?;
        aside(move || {
            let net = NetSpec { source, mtu: None, limits: RateLimits::default(), mac: None, id: None };
            let net = slots::open_net(&net).map_err(|e| QmpError::generic(with_causes(&e)))?;
            Ok(slots.name_net(&id, net)?)
        })
        .await?;
        Ok(Empty {})
    }
}

impl NetdevAdd {
    fn source(self) -> Result<(String, NetSource), QmpError> {
        let Self { kind, id, addr, server, reconnect, ifname, queues, script, downscript } = self;
        let source = match &*kind {
            "stream" if server => return Err(QmpError::generic("A stream connects: its peer is the server")),
            "stream" => match addr {
                Some(SocketAddress { kind, path: Some(path) }) if kind == "unix" => {
                    let seconds = reconnect.filter(|seconds| *seconds > 0);
                    NetSource::Stream { path, reconnect: seconds.map(|s| Duration::from_secs(s.into())) }
                }
                _ => return Err(QmpError::generic("A stream needs 'addr' of type unix, with 'path'")),
            },
            "tap" if [script, downscript].iter().flatten().any(|script| script != "no") => {
                return Err(QmpError::generic("No script is run for a tap: say no, or leave it out"));
            }
            // The notation of --net knows what a name is.
            "tap" => {
                let Some(name) = ifname else { return Err(QmpError::generic("A tap needs 'ifname'")) };
                let queues = queues.map_or(String::new(), |queues| format!(",queues={queues}"));
                let net = format!("tap={}{queues}", name.replace(',', ",,")).parse::<NetSpec>();
                match net.map_err(|e| QmpError::generic(e.to_string()))?.source {
                    NetSource::Tap(TapSource::Inherited(_)) => {
                        return Err(QmpError::generic("A tap needs the name of an interface as 'ifname'"));
                    }
                    source => source,
                }
            }
            other => return Err(QmpError::generic(format!("Networks are of type stream or tap, not '{other}'"))),
        };
        Ok((id, source))
    }
}

/// QMP `netdev_del`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NetdevDel {
    /// Its name.
    id: String,
}

impl Command for NetdevDel {
    const NAME: &'static str = "netdev_del";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        let slots = slots_of(&vm)?;
        aside(move || Ok(slots.delete_net(&self.id)?)).await?;
        Ok(Empty {})
    }
}
