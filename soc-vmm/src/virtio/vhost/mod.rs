//! Devices of which the back end is another process: disks, network interfaces and file systems over vhost-user.
//!
//! Where guest memory is in files of this machine, a back end that keeps a record of what it has in flight, or that carries frames, gets the
//! guest's own queues: see [`direct`]. All others get memory of soc-vmm's own ([`region`]), and of the guest's nothing: what passes between
//! them is copied, through the same [`crate::virtio::Lease`] as every other device's data. So it makes no difference to a back end whether the guest's memory is on this
//! machine or behind a PCIe function, and none to the guest whether its back end is sound: what that may write is a ring and buffers, all
//! of which are judged before anything of them reaches the guest ([`shadow`]).
//!
//! What a back end has and has not done of shadow queues is known here, exactly: a chain is under way from the moment in which it is shown until its used
//! entry was taken. That is what the protocol's in-flight record is for, where a back end works on the guest's rings itself. With shadows it is
//! a second record of the same, written by the one who is less trusted: a back end that keeps one has it, and nobody looks at it.
//!
//! A back end that goes (its connection ends, it breaks the protocol or a ring's rules, or takes too long) is looked for again, after
//! 100 ms, then more rarely, up to 3 s. What it was at work on is settled as its kind needs:
//!
//! - a disk's requests go to the next one: from shadow queues in the order in which they came, else by its predecessor's record. Each names its sectors, so one that was done and not
//!   acknowledged is done twice with the same outcome. Until then the guest waits;
//! - a network interface's link is down, and its buffers for frames go to the next one. Frames from the guest are dropped; those in queues of
//!   the guest's own wait there, and one that was sent but not yet used may be sent twice;
//! - a file system's are answered with ENOTCONN: see [`fuse`].

mod control;
mod direct;
mod engine;
mod events;
mod fuse;
mod kind;
mod pool;
mod region;
mod ring;
mod running;
mod shadow;
mod state;
mod terms;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use kind::{MAX_QUEUES, MAX_TAG, VhostKind};
pub use region::{BASES, Layout, Region, Share};
pub use ring::Manners;
pub use shadow::{Conduct, Filled, Loss, Shadow, Trouble};

use self::direct::Way;
use self::engine::{PATIENCE, VhostEngine};
use self::terms::Terms;
use super::Plumbing;
use super::net::NetLink;
use super::pci::{Model, VirtioPci};
use crate::memory::Borrower;
use crate::pci::PciFunction;
use crate::vhost_user::{Frontend, VhostUserError};

/// Which device, and where its back end is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VhostConfig {
    /// The socket on which the back end listens.
    pub socket: PathBuf,
    /// What it is.
    pub kind: VhostKind,
    /// Queues (block), pairs of queues (net) or queues of requests (fs): 1 to [`MAX_QUEUES`].
    pub queues: u16,
}

/// A device whose back end is connected.
pub struct VhostDevice {
    config: VhostConfig,
    frontend: Frontend,
    /// What the back end says of the device's configuration.
    said: Vec<u8>,
    /// A network interface's cable.
    link: Option<Arc<NetLink>>,
}

/// Why a device can't be, in one line.
#[derive(Debug, thiserror::Error)]
#[error("can't use the vhost-user back end at {}: {why}", path.display())]
pub struct VhostOpenError {
    /// The socket.
    path: PathBuf,
    why: VhostUserError,
}

impl VhostDevice {
    /// Connects to the back end and asks what it can do. May take long: it may be slow.
    ///
    /// # Errors
    /// It isn't there, or has too little for the device.
    pub fn open(config: VhostConfig) -> Result<Self, VhostOpenError> {
        let path = config.socket.clone();
        Self::try_open(config).map_err(|why| VhostOpenError { path, why })
    }

    fn try_open(config: VhostConfig) -> Result<Self, VhostUserError> {
        let mut frontend = Frontend::connect(&config.socket, PATIENCE, config.kind.needs_record())?;
        config.kind.check(config.queues, frontend.features(), frontend.queues())?;
        let asked = config.kind.asked();
        let said = if asked > 0 { frontend.config(asked)? } else { Vec::new() };
        let link = matches!(config.kind, VhostKind::Net).then(NetLink::new).transpose();
        Ok(Self { config, frontend, said, link: link.map_err(VhostUserError::waiting)? })
    }

    /// What it is.
    pub fn kind(&self) -> &VhostKind {
        &self.config.kind
    }

    /// A network interface's cable.
    pub fn link(&self) -> Option<Arc<NetLink>> {
        self.link.clone()
    }

    /// The device as a PCI function: the log calls it `name`, and a network interface has the address `mac`.
    ///
    /// # Errors
    /// This process can have no more threads or descriptors.
    pub fn plug(self, name: &str, mac: [u8; 6], plumbing: Plumbing<'_>) -> io::Result<Box<dyn PciFunction>> {
        let Self { config, frontend, said, link } = self;
        let VhostConfig { socket, kind, queues } = config;
        let (number, class) = kind.identity();
        let name = format!("{} {name}", kind.word());
        let borrower = Arc::new(Borrower::new(&name)?);
        let way = Way::choose(&kind, &name, &borrower, &frontend, &*plumbing.memory);
        let past = if way == Way::Direct { kind.sizes(queues).len() } else { 0 };
        let terms = Terms::new(&kind, queues, &frontend, way);
        let model = Model {
            name: name.clone(),
            kind: number,
            class,
            features: terms.features | kind.own(queues, way),
            queues: [&kind.sizes(queues), kind.own_queues(queues)].concat(),
            config: kind.config(said, mac, queues, way),
            state: (kind.state_name(), state::VERSION),
        };
        let blocker = kind.blocker(&name).or_else(|| {
            let why = "its back end works on the guest's memory and keeps no log of what it writes";
            let remedy = "use one that knows VHOST_USER_PROTOCOL_F_LOG_SHMFD and VHOST_F_LOG_ALL, or unplug it";
            (!terms.logs(&frontend)).then(|| format!("{name} can't move: {why}; {remedy}"))
        });
        let engine = VhostEngine::new(borrower, name, socket, kind, terms, frontend, link)?;
        let function = VirtioPci::new(model, Box::new(engine), plumbing)?.without(terms.withheld());
        Ok(Box::new(function.with_bypass(past)?.kept_by(blocker)))
    }
}

impl std::fmt::Debug for VhostDevice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VhostDevice").field("config", &self.config).finish_non_exhaustive()
    }
}
