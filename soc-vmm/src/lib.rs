//! The VMM on the SoC: machine, devices, boot, QMP, CLI.

pub mod bus;
pub mod control;
pub mod devices;
pub mod interrupt;
pub mod memory;
pub mod power;
pub mod qmp;
