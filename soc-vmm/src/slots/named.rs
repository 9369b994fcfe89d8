//! Back ends that monitors name before they make devices of them: QMP's block nodes and network devices.

use std::collections::HashMap;
use std::sync::Arc;

use super::{NewDevice, NewKind, NewNet, SlotError, SlotsHandle, is_name, lock};
use crate::block::{BlockBackend, ImageSpec};
use crate::cli::Mac;

/// Back ends by name.
#[derive(Default)]
pub(super) struct Named {
    disks: HashMap<String, DiskNode>,
    /// None: a device has it.
    nets: HashMap<String, Option<NewNet>>,
}

/// A block node.
#[derive(Clone)]
pub enum DiskNode {
    /// A file, as another node or a disk will read it.
    File(ImageSpec),
    /// An open image, and the file's node that it is over.
    Image(Arc<dyn BlockBackend>, Option<String>),
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
    /// There is no machine any more.
    #[error(transparent)]
    Slot(#[from] SlotError),
}

impl SlotsHandle {
    /// Gives a block node its name.
    ///
    /// # Errors
    /// The name is taken, or the VM has ended.
    pub fn name_disk(&self, name: &str, node: DiskNode) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        if !is_name(name) {
            return Err(SlotError::Malformed(name.into()).into());
        }
        if named.disks.contains_key(name) {
            return Err(NodeError::Taken(name.into()));
        }
        named.disks.insert(name.into(), node);
        Ok(())
    }

    /// The block node of that name.
    ///
    /// # Errors
    /// There is none, or the VM has ended.
    pub fn disk_node(&self, name: &str) -> Result<DiskNode, NodeError> {
        let shared = self.shared()?;
        let named = lock(&shared.named);
        named.disks.get(name).cloned().ok_or_else(|| NodeError::NotFound(name.into()))
    }

    /// Deletes a block node: its image is closed, unless it is a device's that is on its way out.
    ///
    /// # Errors
    /// There is none, or a device or another node needs it, or the VM has ended.
    pub fn delete_disk(&self, name: &str) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let node = {
            let mut named = lock(&shared.named);
            let is_over = |node: &DiskNode| matches!(node, DiskNode::Image(_, Some(file)) if file == name);
            let over = named.disks.iter().find(|(_, node)| is_over(node)).map(|(over, _)| over.clone());
            if let Some(user) = over.or_else(|| shared.user_of(name, false)) {
                return Err(NodeError::InUse(name.into(), user));
            }
            named.disks.remove(name)
        };
        // Closing a file may take its time: not under the lock.
        node.map(drop).ok_or_else(|| NodeError::NotFound(name.into()))
    }

    /// Gives a network its name.
    ///
    /// # Errors
    /// The name is taken, or the VM has ended.
    pub fn name_net(&self, name: &str, net: NewNet) -> Result<(), NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        if !is_name(name) {
            return Err(SlotError::Malformed(name.into()).into());
        }
        if named.nets.contains_key(name) {
            return Err(NodeError::Taken(name.into()));
        }
        named.nets.insert(name.into(), Some(net));
        Ok(())
    }

    /// Makes an interface of a network, with the address `mac` if one is given, as [`SlotsHandle::add`] does; its name.
    ///
    /// # Errors
    /// There is none of that name, it was taken before, or the device is refused: then the network is still there.
    pub fn add_named_net(
        &self,
        name: &str,
        mac: Option<Mac>,
        id: Option<String>,
        bus: Option<&str>,
    ) -> Result<String, NodeError> {
        let shared = self.shared()?;
        let mut named = lock(&shared.named);
        let place = named.nets.get_mut(name).ok_or_else(|| NodeError::NotFound(name.into()))?;
        let net = place.take().ok_or_else(|| NodeError::Spent(name.into()))?;
        let new = NewDevice { id, kind: NewKind::Net(NewNet { mac, ..net }), node: Some(name.into()) };
        shared.add_or_return(new, bus).map_err(|(why, refused)| {
            if let Some(NewKind::Net(net)) = refused.map(|refused| refused.kind) {
                *place = Some(net);
            }
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
        named.nets.remove(name).map(drop).ok_or_else(|| NodeError::NotFound(name.into()))
    }
}
