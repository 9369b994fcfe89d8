//! Objects: `-object` and QMP `object-add`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Properties, Size, Wrong, inert};
use crate::tls::{CredentialsSpec, Endpoint};

/// An object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: ObjectKind,
}

/// What an object is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ObjectKind {
    /// A secret, of which nothing makes use: there is nothing that is encrypted.
    Secret,
    /// Guest memory.
    Memory(MemoryBackend),
    /// Where a virtio-rng device has its entropy: always from the system.
    Entropy,
    /// A thread for devices, of which each has one of its own.
    IoThread,
    /// How much may pass.
    ThrottleGroup(Limits),
    /// Certificates.
    Tls(CredentialsSpec),
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryBackend {
    /// Bytes.
    pub size: u64,
    /// Huge pages: their size, if it is said.
    pub huge: Option<Option<u64>>,
    /// The host's node, if there is one.
    pub node: Option<u16>,
    /// All of it is taken at once.
    pub prealloc: bool,
}

/// QMP `ThrottleLimits`: what may pass in a second, and at most for a moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub struct Limits {
    /// Requests.
    pub iops_total: u64,
    /// For a moment.
    pub iops_total_max: u64,
    /// Bytes.
    pub bps_total: u64,
    /// For a moment.
    pub bps_total_max: u64,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SecretProperties {
    #[serde(rename = "format")]
    _format: Option<String>,
    file: Option<PathBuf>,
    data: Option<String>,
    #[serde(rename = "keyid")]
    _keyid: Option<String>,
    #[serde(rename = "iv")]
    _iv: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct MemoryProperties {
    size: Size,
    #[serde(default)]
    hugetlb: bool,
    hugetlbsize: Option<Size>,
    #[serde(default)]
    prealloc: bool,
    mem_path: Option<PathBuf>,
    #[serde(default)]
    host_nodes: Vec<u16>,
    policy: Option<Policy>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Policy {
    Default,
    Preferred,
    Bind,
    Interleave,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RandomProperties {
    filename: Option<PathBuf>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ThrottleProperties {
    #[serde(default)]
    limits: Limits,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct TlsProperties {
    dir: Option<PathBuf>,
    endpoint: Option<Endpoint>,
    verify_peer: Option<bool>,
    priority: Option<String>,
    passwordid: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct NoProperties {}

/// Sources of entropy that are the system's own.
const RANDOM: [&str; 2] = ["/dev/urandom", "/dev/random"];

impl Object {
    /// Reads the value of `-object`.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        Self::of(Properties::parse_lists(text, Some("qom-type"), &["host-nodes"])?)
    }

    /// Reads one from its properties.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn of(mut properties: Properties) -> Result<Self, Wrong> {
        let kind = properties.take("qom-type")?;
        let id = properties.take("id")?;
        inert::strip(&kind, &mut properties).map_err(|wrong| wrong.at(kind.as_str()))?;
        super::check_id(&id)?;
        let read = match &*kind {
            "secret" => properties.read::<SecretProperties>().and_then(|secret| {
                let sound = secret.file.is_some() != secret.data.is_some();
                sound.then_some(ObjectKind::Secret).ok_or_else(|| Wrong::new("a secret needs one of 'file' and 'data'"))
            }),
            "memory-backend-ram" | "memory-backend-memfd" | "memory-backend-file" => {
                properties.read().and_then(|read| memory(&kind, read)).map(ObjectKind::Memory)
            }
            "rng-builtin" => properties.read::<NoProperties>().map(|_| ObjectKind::Entropy),
            "rng-random" => properties.read::<RandomProperties>().and_then(|RandomProperties { filename }| {
                let own = |path: &PathBuf| RANDOM.iter().any(|own| path.as_os_str() == *own);
                match filename.filter(|path| !own(path)) {
                    None => Ok(ObjectKind::Entropy),
                    Some(_) => Err(Wrong::new("entropy is the system's: write /dev/urandom").at("filename")),
                }
            }),
            "iothread" => properties.read::<NoProperties>().map(|_| ObjectKind::IoThread),
            "throttle-group" => {
                properties.read().map(|ThrottleProperties { limits }| ObjectKind::ThrottleGroup(limits))
            }
            "tls-creds-x509" => properties.read().and_then(tls).map(ObjectKind::Tls),
            other => {
                return Err(Wrong::new(format!(
                    "there is no '{}': there is secret, memory-backend-ram, -memfd and -file, rng-builtin, rng-random, iothread, \
                     throttle-group, tls-creds-x509",
                    other.escape_default()
                )));
            }
        };
        Ok(Self { id, kind: read.map_err(|wrong| wrong.at(kind))? })
    }
}

fn memory(kind: &str, properties: MemoryProperties) -> Result<MemoryBackend, Wrong> {
    let MemoryProperties { size, hugetlb, hugetlbsize, prealloc, mem_path, host_nodes, policy } = properties;
    let huge = match (kind, mem_path) {
        ("memory-backend-file", Some(path)) => {
            // RAM is the host's: a path says which pages are meant, and nothing else.
            if !path.components().any(|part| part.as_os_str().to_string_lossy().contains("hugepages")) {
                let why = "guest memory is the host's, in no file of this system: name a hugetlbfs, or take memory-backend-memfd";
                return Err(Wrong::new(why).at("mem-path"));
            }
            Some(None)
        }
        ("memory-backend-file", None) => return Err(Wrong::new("it needs 'mem-path'")),
        (_, Some(_)) => return Err(Wrong::new("that is of memory-backend-file").at("mem-path")),
        (_, None) if hugetlbsize.is_some() && !hugetlb => {
            return Err(Wrong::new("it needs hugetlb=on").at("hugetlbsize"));
        }
        (_, None) => hugetlb.then_some(hugetlbsize.map(Size::bytes)),
    };
    let node = match (&host_nodes[..], policy) {
        ([], None | Some(Policy::Default)) => None,
        ([node], Some(Policy::Bind | Policy::Preferred | Policy::Interleave)) => Some(*node),
        ([_], _) => return Err(Wrong::new("it needs policy=bind or policy=preferred").at("host-nodes")),
        ([], _) => return Err(Wrong::new("it needs 'host-nodes'").at("policy")),
        _ => {
            let why = "memory is on one node of the host: name one, or give the guest a node for each by -numa";
            return Err(Wrong::new(why).at("host-nodes"));
        }
    };
    Ok(MemoryBackend { size: size.bytes(), huge, node, prealloc })
}

fn tls(properties: TlsProperties) -> Result<CredentialsSpec, Wrong> {
    let TlsProperties { dir, endpoint, verify_peer, priority, passwordid } = properties;
    let dir = dir.ok_or_else(|| Wrong::new("it needs 'dir', a directory with ca-cert.pem"))?;
    // QEMU's words for what its library does of its own accord; there is nothing to choose here.
    if priority.is_some_and(|priority| !["NORMAL", "@SYSTEM"].contains(&priority.as_str())) {
        let why = "there is TLS 1.3 with the ciphers of its standard, and nothing else: leave it out";
        return Err(Wrong::new(why).at("priority"));
    }
    if passwordid.is_some() {
        let why = "encrypted keys can't be read: decrypt the key, and let its owner alone read it";
        return Err(Wrong::new(why).at("passwordid"));
    }
    let endpoint = endpoint.unwrap_or(Endpoint::Client);
    let verify_peer = verify_peer.unwrap_or(true);
    if endpoint == Endpoint::Client && !verify_peer {
        let why = "whoever doesn't look at the server's certificate may talk to anybody: leave it on";
        return Err(Wrong::new(why).at("verify-peer"));
    }
    Ok(CredentialsSpec { dir, endpoint, verify_peer })
}
