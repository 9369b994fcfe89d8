//! Back ends with names, from which devices are made: QMP's block nodes, network devices and objects.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use super::{NewDevice, NewKind, NewNet, NewVhost, Place, SlotError, SlotsHandle, is_name, lock};
use crate::block::{Aio, BlockBackend, ImageSpec};
use crate::cli::Mac;
use crate::qemu::{Limits, ObjectKind};
use crate::tls::CredentialsSpec;
use crate::virtio::RateLimits;

/// Back ends by name.
#[derive(Default)]
pub struct Named {
    disks: BTreeMap<String, DiskNode>,
    /// None: a device has it.
    nets: BTreeMap<String, Option<NetNode>>,
    objects: BTreeMap<String, ObjectKind>,
    /// Devices on the board: name, driver.
    on_board: Vec<(String, String)>,
}

/// A block node.
#[derive(Clone)]
pub struct DiskNode {
    /// What it is.
    pub kind: NodeKind,
    /// Its driver's name.
    pub driver: &'static str,
    /// The file that it is, or is in.
    pub file: PathBuf,
    /// It is not written.
    pub read_only: bool,
    /// It is read and written past the page cache.
    pub direct: bool,
    /// The node of its backing file, if that is said.
    pub backing: Option<String>,
    /// How it is read and written, if that is said.
    pub aio: Option<Aio>,
    /// What may pass.
    pub limits: RateLimits,
}

/// What a block node is.
#[derive(Clone)]
pub enum NodeKind {
    /// A file, as another node or a disk will read it.
    File(ImageSpec),
    /// An open image, and the node that it is over.
    Image(Arc<dyn BlockBackend>, Option<String>),
    /// The machine's flash.
    Flash,
}

/// A block node, as monitors see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeInfo {
    /// Its name.
    pub name: String,
    /// Its driver's name.
    pub driver: &'static str,
    /// The file that it is, or is in.
    pub file: PathBuf,
    /// Bytes of what is in it.
    pub size: u64,
    /// Bytes that the file takes where it is kept; none: nobody there can be asked.
    pub held: Option<u64>,
    /// It is not written.
    pub read_only: bool,
    /// It is read and written past the page cache.
    pub direct: bool,
    /// The node that it is over.
    pub over: Option<String>,
    /// The node of its backing file, if that is said.
    pub backing: Option<String>,
    /// The device that stands on it.
    pub user: Option<String>,
}

/// A network.
pub enum NetNode {
    /// One of ours.
    Own(NewNet),
    /// Another process's device.
    Vhost(NewVhost),
}

/// Why a back end with a name can't be had.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// It is another one's name.
    #[error("'{0}' is there already: give another name")]
    Taken(String),
    /// There is none.
    #[error("there is no back end '{0}'")]
    NotFound(String),
    /// A device or a node needs it.
    #[error("'{0}' is in use by '{1}': remove that first")]
    InUse(String, String),
    /// It was a device's once.
    #[error("'{0}' belongs to a device, or did: delete it and add it again")]
    Spent(String),
    /// It is the machine's.
    #[error("'{0}' is the machine's flash: it stays")]
    Flash(String),
    /// There is no machine any more.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

impl Named {
    /// Gives a block node its name.
    ///
    /// # Errors
    /// The name is taken, or is none.
    pub fn name_disk(&mut self, name: &str, node: DiskNode) -> Result<(), NodeError> {
        check(name, self.disks.contains_key(name))?;
        self.disks.insert(name.into(), node);
        Ok(())
    }

    /// The block node of that name.
    ///
    /// # Errors
    /// There is none.
    pub fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError> {
        self.disks.get(name).cloned().ok_or_else(|| NodeError::NotFound(name.into()))
    }

    /// Gives a network its name.
    ///
    /// # Errors
    /// As [`Named::name_disk`].
    pub fn name_net(&mut self, name: &str, net: NetNode) -> Result<(), NodeError> {
        check(name, self.nets.contains_key(name))?;
        self.nets.insert(name.into(), Some(net));
        Ok(())
    }

    /// Says which devices with names have their place on the board: name, driver.
    #[must_use]
    pub fn with_board(self, on_board: Vec<(String, String)>) -> Self {
        Self { on_board, ..self }
    }

    /// Gives an object its name.
    ///
    /// # Errors
    /// As [`Named::name_disk`].
    pub fn name_object(&mut self, name: &str, object: ObjectKind) -> Result<(), NodeError> {
        check(name, self.objects.contains_key(name))?;
        self.objects.insert(name.into(), object);
        Ok(())
    }

    /// The limits of that name.
    ///
    /// # Errors
    /// There is no such object.
    pub fn limits(&self, name: &str) -> Result<Limits, NodeError> {
        match self.objects.get(name) {
            Some(ObjectKind::ThrottleGroup(limits)) => Ok(*limits),
            _ => Err(NodeError::NotFound(name.into())),
        }
    }

    /// Where the certificates of that name are.
    ///
    /// # Errors
    /// There is no such object.
    pub fn credentials(&self, name: &str) -> Result<CredentialsSpec, NodeError> {
        match self.objects.get(name) {
            Some(ObjectKind::Tls(spec)) => Ok(spec.clone()),
            _ => Err(NodeError::NotFound(name.into())),
        }
    }

    /// The images that are open.
    pub fn images(&self) -> impl Iterator<Item = &Arc<dyn BlockBackend>> {
        self.disks.values().filter_map(|node| match &node.kind {
            NodeKind::Image(image, _) => Some(image),
            NodeKind::File(_) | NodeKind::Flash => None,
        })
    }

    /// The block node that is over `name`.
    fn over(&self, name: &str) -> Option<String> {
        let is_over = |node: &DiskNode| {
            let under = matches!(&node.kind, NodeKind::Image(_, Some(under)) if under == name);
            under || node.backing.as_deref() == Some(name)
        };
        self.disks.iter().find(|(_, node)| is_over(node)).map(|(over, _)| over.clone())
    }
}

fn check(name: &str, taken: bool) -> Result<(), NodeError> {
    match (is_name(name), taken) {
        (false, _) => Err(SlotError::Malformed(name.into()).into()),
        (_, true) => Err(NodeError::Taken(name.into())),
        _ => Ok(()),
    }
}

impl SlotsHandle {
    /// [`Named::name_disk`].
    ///
    /// # Errors
    /// The name is taken, or the VM has ended.
    pub fn name_disk(&self, name: &str, node: DiskNode) -> Result<(), NodeError> {
        lock(&self.shared()?.named).name_disk(name, node)
    }

    /// [`Named::disk_node`].
    ///
    /// # Errors
    /// There is none, or the VM has ended.
    pub fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError> {
        lock(&self.shared()?.named).disk_node(name)
    }

    /// Deletes a block node: its image is closed, unless it is a device's that is on its way out.
    ///
    /// # Errors
    /// There is none, or a device or another node needs it, or the VM has ended.
    pub fn delete_disk(&self, name: &str) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let node = {
            let mut named = lock(&shared.named);
            if let Some(user) = named.over(name).or_else(|| shared.user_of(name, false)) {
                return Err(NodeError::InUse(name.into(), user));
            }
            if named.disks.get(name).is_some_and(|node| matches!(node.kind, NodeKind::Flash)) {
                return Err(NodeError::Flash(name.into()));
            }
            named.disks.remove(name)
        };
        // Closing a file may take its time: not under the lock.
        node.map(drop).ok_or_else(|| NodeError::NotFound(name.into()))
    }

    /// All block nodes.
    pub fn nodes(&self) -> Vec<NodeInfo> {
        let Ok(shared) = self.shared() else { return Vec::new() };
        let nodes: Vec<_> = lock(&shared.named).disks.iter().map(|(name, node)| (name.clone(), node.clone())).collect();
        // A file may be far away: not under the lock.
        let info = |(name, node): (String, DiskNode)| {
            let metadata = std::fs::metadata(&node.file).ok();
            let (size, over) = match &node.kind {
                NodeKind::Image(image, over) => (image.size(), over.clone()),
                NodeKind::File(_) | NodeKind::Flash => (metadata.as_ref().map_or(0, fs::Metadata::len), None),
            };
            let DiskNode { driver, file, read_only, direct, backing, .. } = node;
            let user = shared.user_of(&name, false);
            // stat(2) counts in 512 bytes, whatever the file system's blocks are.
            let held = metadata.map(|file| file.blocks() * 512);
            NodeInfo { user, name, driver, file, size, held, read_only, direct, over, backing }
        };
        nodes.into_iter().map(info).collect()
    }

    /// [`Named::name_object`].
    ///
    /// # Errors
    /// The name is taken, or the VM has ended.
    pub fn name_object(&self, name: &str, object: ObjectKind) -> Result<(), NodeError> {
        lock(&self.shared()?.named).name_object(name, object)
    }

    /// Devices that have their place on the board: name, driver.
    pub fn on_board(&self) -> Vec<(String, String)> {
        self.shared().map_or_else(|_| Vec::new(), |shared| lock(&shared.named).on_board.clone())
    }

    /// The objects.
    pub fn objects(&self) -> Vec<(String, ObjectKind)> {
        let Ok(shared) = self.shared() else { return Vec::new() };
        lock(&shared.named).objects.iter().map(|(name, object)| (name.clone(), object.clone())).collect()
    }

    /// Forgets an object. What was made by it stays as it is.
    ///
    /// # Errors
    /// There is none, or it is guest memory, or the VM has ended.
    pub fn delete_object(&self, name: &str) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        match named.objects.get(name) {
            None => Err(NodeError::NotFound(name.into())),
            Some(ObjectKind::Memory(_)) => Err(NodeError::InUse(name.into(), "the machine".into())),
            Some(_) => {
                named.objects.remove(name);
                Ok(())
            }
        }
    }

    /// [`Named::limits`].
    ///
    /// # Errors
    /// There is no such object, or the VM has ended.
    pub fn limits(&self, name: &str) -> Result<Limits, NodeError> {
        lock(&self.shared()?.named).limits(name)
    }

    /// [`Named::credentials`].
    ///
    /// # Errors
    /// There is no such object, or the VM has ended.
    pub fn credentials(&self, name: &str) -> Result<CredentialsSpec, NodeError> {
        lock(&self.shared()?.named).credentials(name)
    }

    /// [`Named::name_net`].
    ///
    /// # Errors
    /// The name is taken, or the VM has ended.
    pub fn name_net(&self, name: &str, net: NetNode) -> Result<(), NodeError> {
        lock(&self.shared()?.named).name_net(name, net)
    }

    /// Makes an interface of a network, as [`SlotsHandle::add`] does; its name. Of `mac` and `mtu` those that are given count.
    ///
    /// # Errors
    /// There is none of that name, it was taken before, or the device is refused: then the network is still there.
    pub fn add_named_net(
        &self,
        name: &str,
        mac: Option<Mac>,
        mtu: Option<u16>,
        id: Option<String>,
        place: Place,
    ) -> Result<String, NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        let node = named.nets.get_mut(name).ok_or_else(|| NodeError::NotFound(name.into()))?;
        let kind = match node.take().ok_or_else(|| NodeError::Spent(name.into()))? {
            NetNode::Own(net) => NewKind::Net(NewNet { mac, mtu: mtu.or(net.mtu), ..net }),
            NetNode::Vhost(net) => NewKind::Vhost(NewVhost { mac, ..net }),
        };
        let new = NewDevice { id, kind, node: Some(name.into()), place };
        shared.add_or_return(new).map_err(|(why, refused)| {
            *node = refused.and_then(|refused| match refused.kind {
                NewKind::Net(net) => Some(NetNode::Own(net)),
                NewKind::Vhost(net) => Some(NetNode::Vhost(net)),
                _ => None,
            });
            why.into()
        })
    }

    /// Forgets a network.
    ///
    /// # Errors
    /// There is none, or a device has it, or the VM has ended.
    pub fn delete_net(&self, name: &str) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        if let Some(user) = shared.user_of(name, true) {
            return Err(NodeError::InUse(name.into(), user));
        }
        let net = named.nets.remove(name);
        drop(named);
        // A peer may take its time to end.
        net.map(drop).ok_or_else(|| NodeError::NotFound(name.into()))
    }
}
