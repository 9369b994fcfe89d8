//! The emulated DPU server.
