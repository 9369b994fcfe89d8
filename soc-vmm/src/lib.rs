//! The VMM on the SoC: machine, devices, boot, QMP, CLI.

// They panic where a stream is full or closed, and a panic ends the VM: see `say`.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod acpi;
pub mod ahci;
pub mod arena;
pub mod block;
pub mod boot;
pub mod bus;
pub mod chardev;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod cpuid;
pub mod cpus;
pub mod daemon;
pub mod devices;
mod dial;
pub mod fds;
pub mod flash;
mod function;
pub mod hyperv;
pub mod interrupt;
pub mod inventory;
pub mod iommu;
pub mod jobs;
pub mod layout;
pub mod link;
pub mod log;
pub mod memory;
pub mod migrate;
pub mod nbd;
pub mod net;
pub mod numa;
mod own;
pub mod pci;
pub mod persist;
pub mod pool;
pub mod power;
pub mod probe;
pub mod qemu;
pub mod qmp;
mod rights;
mod runtime;
pub mod sandbox;
pub mod say;
mod shim;
pub mod slots;
pub mod smbios;
pub mod tls;
pub mod vhost_user;
pub mod virtio;
pub mod vm;
