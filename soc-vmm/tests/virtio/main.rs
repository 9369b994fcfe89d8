//! virtio devices as a guest's driver meets them.

mod block;
mod net;
mod pci;
mod properties;
mod rig;
mod ring;
