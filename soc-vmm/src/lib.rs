//! The VMM on the SoC: machine, devices, boot, QMP, CLI.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod cli;
pub mod console;
pub mod control;
pub mod cpuid;
pub mod devices;
mod function;
pub mod interrupt;
pub mod inventory;
pub mod layout;
pub mod link;
pub mod memory;
pub mod power;
pub mod qmp;
mod shim;
pub mod vm;
