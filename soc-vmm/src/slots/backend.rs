//! Opening what devices stand on: images and networks.

use std::fs::Metadata;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::{NewNet, NewVhost};
use crate::block::{self, BlockBackend, BlockError, FileId, ImageSpec};
use crate::cli::{NetSpec, VhostRole, VhostSpec};
use crate::net;
use crate::virtio::RateLimits;
use crate::virtio::vhost::{VhostConfig, VhostDevice, VhostKind, VhostOpenError};

/// Why a device has nothing to stand on.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It would write what the VM was started from.
    #[error("{} is also the {role} of this VM: give a copy, or say readonly=on", path.display())]
    Reserved {
        /// The image.
        path: PathBuf,
        /// What else it is.
        role: String,
    },
    /// The image can't be opened.
    #[error(transparent)]
    Image(#[from] BlockError),
    /// The network can't be reached.
    #[error(transparent)]
    Net(#[from] net::OpenError),
    /// The other process can't be reached, or isn't what it should be.
    #[error(transparent)]
    Vhost(#[from] VhostOpenError),
}

/// The files that a VM was started from, which its disks may not write.
#[derive(Clone, Debug, Default)]
pub struct Reserved {
    /// Images, and what they are.
    pub images: Vec<(FileId, String)>,
    /// Files that may be replaced by others of the same name, and what they are.
    pub paths: Vec<(PathBuf, String)>,
    /// The guest, whose disks are opened, is elsewhere: they are another process's until it is here.
    pub elsewhere: Arc<AtomicBool>,
}

impl Reserved {
    /// What a file is if it is one of them.
    fn role_of(&self, file: &Metadata) -> Option<&str> {
        let id = FileId::of(file);
        let image = self.images.iter().find(|(image, _)| *image == id).map(|(_, role)| role);
        let is_now = |path: &PathBuf| std::fs::metadata(path).is_ok_and(|file| FileId::of(&file) == id);
        let path = || self.paths.iter().find(|(path, _)| is_now(path)).map(|(_, role)| role);
        image.or_else(path).map(String::as_str)
    }
}

/// Opens a disk's image. May take long: a file may be far away.
///
/// # Errors
/// See [`OpenError`].
pub fn open_disk(image: &ImageSpec, reserved: &Reserved) -> Result<Arc<dyn BlockBackend>, OpenError> {
    // What is wrong with a file that isn't there is told by who opens it.
    let file = std::fs::metadata(&image.path).ok().filter(|_| !image.read_only);
    if let Some(role) = file.and_then(|file| reserved.role_of(&file).map(str::to_owned)) {
        return Err(OpenError::Reserved { path: image.path.clone(), role });
    }
    let unclaimed = !image.read_only && reserved.elsewhere.load(Ordering::Acquire);
    Ok(block::open(&ImageSpec { unclaimed, ..image.clone() })?)
}

/// Connects an interface. May take long: its peer may be slow.
///
/// # Errors
/// See [`OpenError`].
pub fn open_net(net: &NetSpec) -> Result<NewNet, OpenError> {
    let backends = net::open(&net.source)?;
    Ok(NewNet { backends, mac: net.mac, mtu: net.mtu, limits: net.limits })
}

/// An interface by descriptors that are open, one a pair of queues.
///
/// # Errors
/// One is of something else.
pub fn passed_net(queues: Vec<OwnedFd>) -> Result<NewNet, OpenError> {
    Ok(NewNet { backends: net::passed(queues)?, mac: None, mtu: None, limits: RateLimits::default() })
}

/// A user's own network.
///
/// # Errors
/// It can't be started.
pub fn user_net() -> Result<NewNet, OpenError> {
    Ok(NewNet { backends: net::user()?, mac: None, mtu: None, limits: RateLimits::default() })
}

/// Connects a device of another process's. May take long: that may be slow.
///
/// # Errors
/// See [`OpenError`].
pub fn open_vhost(spec: &VhostSpec) -> Result<NewVhost, OpenError> {
    let (kind, mac) = match &spec.role {
        VhostRole::Disk => (VhostKind::Block, None),
        VhostRole::Net(mac) => (VhostKind::Net, *mac),
        VhostRole::Fs(tag) => (VhostKind::Fs { tag: tag.clone() }, None),
    };
    let device = VhostDevice::open(VhostConfig { socket: spec.socket.clone(), kind, queues: spec.queues })?;
    Ok(NewVhost { device, mac })
}
