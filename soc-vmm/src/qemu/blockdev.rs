//! Block nodes: `-blockdev` and QMP `blockdev-add`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Properties, Wrong, inert};
use crate::nbd::Address;

/// A block node (QMP `BlockdevOptions`, of the drivers that there are).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Blockdev {
    /// `file`, `host_device`, `raw`, `qcow2`, `throttle` or `nbd`.
    pub driver: BlockDriver,
    /// Its name.
    pub node_name: String,
    /// Of `file` and `host_device`: its path.
    pub filename: Option<PathBuf>,
    /// Of an image, or of `throttle`: what it is over.
    pub file: Option<FileRef>,
    /// It is not written.
    #[serde(default)]
    pub read_only: bool,
    /// How it is cached.
    #[serde(default)]
    pub cache: Cache,
    /// What becomes of discards: a disk always passes them on.
    pub discard: Option<Discard>,
    /// What becomes of zeros that are written.
    pub detect_zeroes: Option<DetectZeroes>,
    /// How a file is read and written.
    pub aio: Option<BlockAio>,
    /// Of `throttle`: the object that says how much may pass.
    pub throttle_group: Option<String>,
    /// Of `nbd`: where its server is.
    pub server: Option<NbdAddress>,
    /// Of `nbd`: its name there; none: the one without a name.
    pub export: Option<String>,
    /// Of `nbd`: how the connection is kept secret: not here.
    pub tls_creds: Option<String>,
    /// Of `nbd`: whose certificate is expected; nobody's, where there is no TLS.
    pub tls_hostname: Option<String>,
    /// Of an image: the node of its backing file, which is the one that the image names; within, `null`: it shall name none.
    #[serde(default, deserialize_with = "given")]
    pub backing: Option<Option<String>>,
}

#[derive(Deserialize, JsonSchema)]
struct Driver {
    #[serde(rename = "driver")]
    _driver: BlockDriver,
}

/// What is there, be it `null`.
fn given<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Option<String>>, D::Error> {
    Option::deserialize(deserializer).map(Some)
}

/// QMP `BlockdevDriver`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BlockDriver {
    /// A file.
    File,
    /// A block device.
    HostDevice,
    /// An image that is the disk's bytes.
    Raw,
    /// An image in QEMU's format.
    Qcow2,
    /// A limit before another node.
    Throttle,
    /// Another process's disk.
    Nbd,
}

impl BlockDriver {
    /// Its QAPI name.
    pub fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::HostDevice => "host_device",
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Throttle => "throttle",
            Self::Nbd => "nbd",
        }
    }
}

/// QMP `BlockdevRef`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(untagged, expecting = "'file' is a node's name, or {\"driver\":\"file\",\"filename\":PATH}")]
pub enum FileRef {
    /// A node that is there.
    Node(String),
    /// The file itself.
    Inline(InlineFile),
}

/// A file that is no node.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct InlineFile {
    /// `file` or `host_device`.
    pub driver: FileDriver,
    /// Its path.
    pub filename: PathBuf,
}

/// What a file can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum FileDriver {
    /// A file.
    File,
    /// A block device.
    HostDevice,
}

/// QMP `BlockdevCacheOptions`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Cache {
    /// Past the page cache.
    pub direct: bool,
    /// Flushes do nothing: not here.
    pub no_flush: bool,
}

/// QMP `BlockdevDiscardOptions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Discard {
    /// They are forgotten: not here.
    Ignore,
    /// They are passed on.
    Unmap,
}

/// QMP `BlockdevDetectZeroesOptions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum DetectZeroes {
    /// They are written.
    Off,
    /// They are looked for: not here.
    On,
    /// They are looked for, and given back: not here.
    Unmap,
}

/// QMP `BlockdevAioOptions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum BlockAio {
    /// Threads.
    Threads,
    /// Linux' old interface: io_uring is what does its work here.
    Native,
    /// io_uring.
    IoUring,
}

impl Blockdev {
    /// Reads the value of `-blockdev`.
    ///
    /// # Errors
    /// See [`Blockdev::checked`].
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        Self::of(Properties::parse(text, Some("driver"))?)
    }

    /// Reads one from its properties.
    ///
    /// # Errors
    /// See [`Blockdev::checked`].
    pub fn of(mut properties: Properties) -> Result<Self, Wrong> {
        // Its other properties would be unknown too.
        properties.only::<Driver>()?;
        inert::strip("-blockdev", &mut properties)?;
        properties.read::<Self>()?.checked()
    }

    /// The node, if it can be.
    ///
    /// # Errors
    /// It says something that its driver has not, or that is not there.
    pub fn checked(self) -> Result<Self, Wrong> {
        let wrong = |key: &str, why: &str| Err(Wrong::new(why).at(key));
        if self.discard == Some(Discard::Ignore) {
            return wrong("discard", "'ignore' is not there, disks pass discards on: write unmap");
        }
        if self.cache.no_flush {
            return wrong("cache.no-flush", "it is not there, a flush makes durable what was written: leave it out");
        }
        if matches!(self.detect_zeroes, Some(DetectZeroes::On | DetectZeroes::Unmap)) {
            return wrong("detect-zeroes", "zeros are written as they come: write off");
        }
        if self.backing.is_some() && self.driver != BlockDriver::Qcow2 {
            return wrong("backing", "that is of driver=qcow2");
        }
        for (key, given) in [("tls-creds", &self.tls_creds), ("tls-hostname", &self.tls_hostname)] {
            if given.as_ref().is_some_and(|given| !given.is_empty()) {
                return wrong(key, "NBD is not spoken over TLS: leave it out, and give it a network of its own");
            }
        }
        let is_file = matches!(self.driver, BlockDriver::File | BlockDriver::HostDevice);
        let driver = self.driver.name();
        let is_nbd = self.driver == BlockDriver::Nbd;
        let of_nbd = [("server", self.server.is_some()), ("export", self.export.is_some())];
        if let Some((key, _)) = of_nbd.into_iter().find(|(_, given)| *given && !is_nbd) {
            return wrong(key, "that is of driver=nbd");
        }
        if is_nbd {
            return match (&self.server, &self.filename, &self.file) {
                (Some(_), None, None) => Ok(self),
                _ => Err(Wrong::new("'nbd' needs 'server', and neither 'file' nor 'filename'")),
            };
        }
        match (is_file, &self.filename, &self.file) {
            (true, Some(_), None) | (false, None, Some(_)) => {}
            (true, ..) => return Err(Wrong::new(format!("'{driver}' needs 'filename', and no 'file'"))),
            (false, ..) => return Err(Wrong::new(format!("'{driver}' needs 'file', and no 'filename'"))),
        }
        match (self.driver, &self.throttle_group) {
            (BlockDriver::Throttle, None) => Err(Wrong::new("'throttle' needs 'throttle-group'")),
            (BlockDriver::Throttle, Some(_)) if !matches!(self.file, Some(FileRef::Node(_))) => {
                Err(Wrong::new("'throttle' needs the name of a node as 'file'"))
            }
            (BlockDriver::Throttle, Some(_)) | (_, None) => Ok(self),
            (_, Some(_)) => wrong("throttle-group", "that is of driver=throttle"),
        }
    }
}

/// QMP `SocketAddress`, of the kinds that there are.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "lowercase", deny_unknown_fields)]
pub enum NbdAddress {
    /// TCP.
    Inet {
        /// A host's name or address; none: every address.
        host: String,
        /// A port.
        port: String,
    },
    /// A socket in the file system.
    Unix {
        /// Its path.
        path: PathBuf,
    },
}

impl NbdAddress {
    /// What it means.
    ///
    /// # Errors
    /// That is no port.
    pub fn address(&self) -> Result<Address, Wrong> {
        match self {
            Self::Inet { host, port } => {
                let number = port.parse().map_err(|_| Wrong::new(format!("'{port}' is no port: write its number")))?;
                Ok(Address::Tcp(host.clone(), number))
            }
            Self::Unix { path } => Ok(Address::Unix(path.clone())),
        }
    }
}
