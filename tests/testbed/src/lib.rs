//! The emulated DPU server: QEMU machines that stand for a host server and for a DPU's Arm SoC.
//!
//! What they are made of is fetched by [`fetch`], all from Debian's archive, without root.

pub mod fetch;
pub mod paths;
pub mod process;
