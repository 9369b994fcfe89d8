//! The values of `--disk`, `--net` and `--fs` whose device is another process's: `vhost-user=SOCKET`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::{DiskSpec, parse_id, split};
use super::net::{Mac, NetSpec};
use super::values::{ValueError, wrong};
use crate::virtio::vhost::{MAX_QUEUES, MAX_TAG};

/// A device whose back end listens on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostSpec {
    /// The socket.
    pub socket: PathBuf,
    /// What it is.
    pub role: VhostRole,
    /// Queues (disk), pairs of queues (net) or queues of requests (fs).
    pub queues: u16,
    /// The name that it is known by afterwards.
    pub id: Option<String>,
}

/// What such a device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VhostRole {
    /// A disk.
    Disk,
    /// A network interface, and its address; none: one made from the VM's name.
    Net(Option<Mac>),
    /// A file system, and its tag.
    Fs(String),
}

/// The value of `--disk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnyDisk {
    /// An image of ours.
    Image(DiskSpec),
    /// Another process's.
    Vhost(VhostSpec),
}

/// The value of `--net`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AnyNet {
    /// A network of ours.
    Own(NetSpec),
    /// Another process's.
    Vhost(VhostSpec),
}

/// The value of `--fs`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsSpec(pub VhostSpec);

impl AnyDisk {
    /// Its id, or the one that it has as the disk of that place on the command line.
    pub(crate) fn id_at(&self, index: usize) -> String {
        match self {
            Self::Image(disk) => disk.id_at(index),
            Self::Vhost(disk) => disk.id_at("disk", index),
        }
    }
}

impl AnyNet {
    /// Its id, or the one that it has as the interface of that place on the command line.
    pub(crate) fn id_at(&self, index: usize) -> String {
        match self {
            Self::Own(net) => net.id_at(index),
            Self::Vhost(net) => net.id_at("net", index),
        }
    }
}

impl FsSpec {
    /// Its id, or the one that it has as the file system of that place on the command line.
    pub(crate) fn id_at(&self, index: usize) -> String {
        self.0.id_at("fs", index)
    }
}

impl FromStr for AnyDisk {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        if is_vhost(s) { parse(s, VhostRole::Disk).map(Self::Vhost) } else { s.parse().map(Self::Image) }
    }
}

impl FromStr for AnyNet {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        if is_vhost(s) { parse(s, VhostRole::Net(None)).map(Self::Vhost) } else { s.parse().map(Self::Own) }
    }
}

impl FromStr for FsSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let spec = parse(s, VhostRole::Fs(String::new()))?;
        match &spec.role {
            VhostRole::Fs(tag) if tag.is_empty() => wrong("a file system needs tag=TAG, by which the guest mounts it"),
            _ => Ok(Self(spec)),
        }
    }
}

impl VhostSpec {
    fn id_at(&self, prefix: &str, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("{prefix}{index}"))
    }
}

fn is_vhost(s: &str) -> bool {
    split(s).iter().any(|option| option.starts_with("vhost-user="))
}

fn parse(s: &str, mut role: VhostRole) -> Result<VhostSpec, ValueError> {
    let (mut socket, mut queues, mut id) = (None, None, None);
    for option in split(s) {
        let (name, value) = option.split_once('=').unwrap_or((&option, ""));
        match (name, &mut role) {
            ("vhost-user", _) if value.is_empty() => return wrong("vhost-user= needs the path of a socket"),
            ("vhost-user", _) if socket.is_none() => socket = Some(PathBuf::from(value)),
            ("queues", _) if queues.is_none() => queues = Some(parse_queues(value)?),
            ("id", _) if id.is_none() => id = Some(parse_id(value)?),
            ("mac", VhostRole::Net(mac @ None)) => *mac = Some(value.parse()?),
            ("tag", VhostRole::Fs(tag)) if tag.is_empty() => *tag = parse_tag(value)?,
            (_, role) => {
                let more = match role {
                    VhostRole::Disk => "",
                    VhostRole::Net(_) => "[,mac=MAC]",
                    VhostRole::Fs(_) => ",tag=TAG",
                };
                return wrong(format!("'{option}': write vhost-user=SOCKET{more}[,queues=N][,id=ID], each once"));
            }
        }
    }
    let Some(socket) = socket else { return wrong("vhost-user=SOCKET is missing: where its back end listens") };
    Ok(VhostSpec { socket, role, queues: queues.unwrap_or(1), id })
}

fn parse_queues(s: &str) -> Result<u16, ValueError> {
    match s.parse() {
        Ok(n) if (1..=MAX_QUEUES).contains(&n) && s.bytes().all(|b| b.is_ascii_digit()) => Ok(n),
        _ => wrong(format!("queues={s}: it is a number from 1 to {MAX_QUEUES}")),
    }
}

fn parse_tag(s: &str) -> Result<String, ValueError> {
    if (1..=MAX_TAG).contains(&s.len()) && !s.contains('\0') {
        Ok(s.into())
    } else {
        wrong(format!("tag={s:.40}: a tag has 1 to {MAX_TAG} bytes"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_of_others_in_every_notation() {
        let spec = |role, queues, id: Option<&str>| VhostSpec {
            socket: "/run/a,b".into(),
            role,
            queues,
            id: id.map(str::to_owned),
        };
        let disk: AnyDisk = "id=d0,queues=4,vhost-user=/run/a,,b".parse().unwrap();
        assert_eq!(disk, AnyDisk::Vhost(spec(VhostRole::Disk, 4, Some("d0"))));
        let net: AnyNet = "vhost-user=/run/a,,b,mac=52:54:00:00:00:01".parse().unwrap();
        let mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
        assert_eq!(net, AnyNet::Vhost(spec(VhostRole::Net(Some(mac)), 1, None)));
        let fs: FsSpec = "vhost-user=/run/a,,b,tag=home".parse().unwrap();
        assert_eq!((fs.id_at(3), fs), ("fs3".into(), FsSpec(spec(VhostRole::Fs("home".into()), 1, None))));
        assert!(matches!("file=vhost-user".parse(), Ok(AnyDisk::Image(_))));
        assert!(matches!("stream=s".parse(), Ok(AnyNet::Own(_))));
    }

    #[test]
    fn what_is_no_such_device_is_refused() {
        for bad in ["vhost-user=", "vhost-user=s,file=a", "vhost-user=s,queues=17", "vhost-user=s,queues=+1"] {
            assert!(bad.parse::<AnyDisk>().is_err(), "{bad}");
        }
        for bad in ["vhost-user=s,vhost-user=t", "vhost-user=s,mtu=1500", "vhost-user=s,tap=t", "vhost-user=s,mac=1"] {
            assert!(bad.parse::<AnyNet>().is_err(), "{bad}");
        }
        let long = format!("vhost-user=s,tag={}", "x".repeat(37));
        for bad in ["", "tag=t", "vhost-user=s", "vhost-user=s,tag=", "vhost-user=s,tag=a,tag=b", &long] {
            assert!(bad.parse::<FsSpec>().is_err(), "{bad}");
        }
    }
}
