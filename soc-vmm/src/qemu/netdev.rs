//! Networks: `-netdev` and QMP `netdev_add`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Properties, Switch, Wrong, inert};
use crate::net::MAX_QUEUES;

/// A network (QMP `Netdev`, of the types that there are).
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Netdev {
    /// What it is.
    #[serde(rename = "type")]
    pub kind: NetdevKind,
    /// Its name.
    pub id: String,
    /// Of a stream: where its peer listens.
    pub addr: Option<SocketAddress>,
    /// Of a stream: whether it listens itself, which it doesn't.
    #[serde(default)]
    pub server: bool,
    /// Of a stream: seconds between attempts to find a peer that left.
    pub reconnect: Option<u32>,
    /// Of a TAP interface: its name.
    pub ifname: Option<String>,
    /// Of a TAP interface: a descriptor of it, by number or name.
    pub fd: Option<String>,
    /// Likewise several, one a queue, between colons.
    pub fds: Option<String>,
    /// Of a TAP interface by name, and of vhost-user: how many pairs of queues.
    pub queues: Option<u16>,
    /// Of a TAP interface: whether Linux' vhost-net is to carry its frames. It can't reach a guest whose memory is the host's, so frames
    /// are carried here.
    pub vhost: Option<Switch>,
    /// A descriptor for that, which is closed.
    pub vhostfd: Option<String>,
    /// Likewise several.
    pub vhostfds: Option<String>,
    /// Of vhost-user: the socket's character device.
    pub chardev: Option<String>,
}

#[derive(Deserialize, JsonSchema)]
struct Type {
    #[serde(rename = "type")]
    _kind: NetdevKind,
}

/// QMP `NetClientDriver`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum NetdevKind {
    /// A TAP interface.
    Tap,
    /// This user's own network, by a passt of the VM's.
    User,
    /// A stream of frames.
    Stream,
    /// Another process's device.
    VhostUser,
}

impl NetdevKind {
    fn name(self) -> &'static str {
        match self {
            Self::Tap => "tap",
            Self::User => "user",
            Self::Stream => "stream",
            Self::VhostUser => "vhost-user",
        }
    }
}

/// QMP `SocketAddress`, of UNIX sockets.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SocketAddress {
    /// `unix`.
    #[serde(rename = "type")]
    pub kind: SocketKind,
    /// Its path.
    pub path: PathBuf,
}

/// QMP `SocketAddressType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SocketKind {
    /// A UNIX socket.
    Unix,
}

impl Netdev {
    /// Reads the value of `-netdev`.
    ///
    /// # Errors
    /// See [`Netdev::checked`].
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        Self::of(Properties::parse(text, Some("type"))?)
    }

    /// Reads one from its properties.
    ///
    /// # Errors
    /// See [`Netdev::checked`].
    pub fn of(mut properties: Properties) -> Result<Self, Wrong> {
        // Its other properties would be unknown too.
        properties.only::<Type>()?;
        inert::strip("-netdev", &mut properties)?;
        properties.read::<Self>()?.checked()
    }

    /// The network, if it can be.
    ///
    /// # Errors
    /// It says something that its type has not, or not all that it needs.
    pub fn checked(self) -> Result<Self, Wrong> {
        let own: &[&str] = match self.kind {
            NetdevKind::Tap => &["ifname", "fd", "fds", "queues", "vhost", "vhostfd", "vhostfds"],
            NetdevKind::User => &[],
            NetdevKind::Stream => &["addr", "reconnect"],
            NetdevKind::VhostUser => &["chardev", "queues"],
        };
        let given = [
            ("addr", self.addr.is_some()),
            ("reconnect", self.reconnect.is_some()),
            ("ifname", self.ifname.is_some()),
            ("fd", self.fd.is_some()),
            ("fds", self.fds.is_some()),
            ("queues", self.queues.is_some()),
            ("vhost", self.vhost.is_some()),
            ("vhostfd", self.vhostfd.is_some()),
            ("vhostfds", self.vhostfds.is_some()),
            ("chardev", self.chardev.is_some()),
        ];
        if let Some((key, _)) = given.iter().find(|(key, there)| *there && !own.contains(key)) {
            let has = if own.is_empty() { "id alone".to_owned() } else { own.join(", ") };
            return Err(Wrong::new(format!("a network of type '{}' has {has}", self.kind.name())).at(*key));
        }
        if self.server {
            return Err(Wrong::new("a stream connects: its peer is the server").at("server"));
        }
        if self.queues.is_some_and(|queues| queues == 0 || queues > MAX_QUEUES) {
            return Err(Wrong::new(format!("an interface has 1 to {MAX_QUEUES} pairs of queues")).at("queues"));
        }
        let ways =
            [self.ifname.is_some(), self.fd.is_some(), self.fds.is_some()].into_iter().filter(|way| *way).count();
        match self.kind {
            NetdevKind::Tap if ways != 1 => Err(Wrong::new("a tap needs one of 'fd', 'fds' and 'ifname'")),
            NetdevKind::Tap if self.ifname.is_none() && self.queues.is_some() => {
                Err(Wrong::new("descriptors are one queue each: leave it out").at("queues"))
            }
            NetdevKind::Stream if self.addr.is_none() => {
                Err(Wrong::new("a stream needs 'addr' of type unix, with 'path'"))
            }
            NetdevKind::VhostUser if self.chardev.is_none() => Err(Wrong::new("vhost-user needs 'chardev'")),
            _ => Ok(self),
        }
    }

    /// The descriptors of its queues, by number or name.
    pub fn descriptors(&self) -> Vec<String> {
        let several = self.fds.iter().flat_map(|fds| fds.split(':').map(str::to_owned));
        self.fd.iter().cloned().chain(several).collect()
    }

    /// Those that are only to be closed.
    pub fn unused_descriptors(&self) -> Vec<String> {
        let several = self.vhostfds.iter().flat_map(|fds| fds.split(':').map(str::to_owned));
        self.vhostfd.iter().cloned().chain(several).collect()
    }
}
