//! virtio devices as a guest's driver meets them.

mod balloon;
mod block;
mod console;
mod control;
mod cost;
mod direct;
mod disk;
mod dpdk;
mod entropy;
mod hurt;
mod moves;
mod net;
mod notify;
mod pci;
mod program;
mod properties;
mod rig;
mod ring;
mod small;
mod streams;
mod tap;
mod vhost;
mod vsock;
