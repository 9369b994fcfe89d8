//! The API channel: every message between SoC and host, and the two ends that carry them.
//!
//! The SoC asks (requests, in the inbox), the host answers and reports (replies, events and log records, in card memory). Both
//! ends are free of I/O: they move messages between private memory and a ring, and say when the other side must be woken.
//! docs/wire.md is this crate for people.
//!
//! Everything is little-endian with reserved = 0. x86 guest state travels in records of this crate's own ([`state`]): they don't
//! depend on the architecture of either build.

#![forbid(unsafe_code)]

pub mod bulk;
pub mod call;
mod client;
pub mod codec;
pub mod event;
pub mod lines;
pub mod message;
mod ring;
mod server;
pub mod state;

pub use client::{Client, ClientWindows, Incoming};
pub use message::{ChannelError, Status};
pub use server::{Asked, Server, ServerWindows};

#[cfg(not(target_endian = "little"))]
compile_error!("the wire is little-endian and its records are used in place: build for a little-endian machine");
