//! What payloads are built from: where things lie, the tables of long mode, and the code around a payload's own.

pub(crate) mod layout;
pub(crate) mod long;
pub(crate) mod real;
mod runtime;
pub(crate) mod speech;
mod start;
mod tables;
pub(crate) mod virtio;

pub(crate) use long::LongMode;
pub(crate) use real::RealMode;
