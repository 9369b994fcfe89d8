//! QMP, the QEMU Machine Protocol, as a server and as a client.
//!
//! Bytes become commands without I/O ([`Session`], which a fuzzer can drive), commands become futures over a
//! [`crate::control::VmHandle`] ([`command`]), and [`Server`] moves both over UNIX sockets. What a peer can make this process
//! hold or wait for is bounded everywhere: see the constants.

pub mod about;
mod aside;
mod backends;
mod block;
mod cdrom;
mod chardevs;
mod client;
pub mod command;
mod commands;
mod cpus;
mod devices;
mod error;
mod exports;
mod framing;
mod jobs;
pub(crate) mod json;
pub mod life;
mod machines;
mod migration;
mod objects;
mod options;
pub mod ours;
mod passed;
pub mod schema;
mod server;
mod session;
mod tree;
mod tune;
pub mod types;

pub use client::{Client, ClientError};
pub use devices::Add;
pub use error::{ErrorClass, QmpError};
pub use framing::{FrameError, Framer, MAX_COMMAND};
pub use passed::Passed;
pub use server::{Greet, MAX_MONITORS, Server};
pub use session::{Call, Session, Step};
pub use tree::{PERIPHERAL, ROOT_PORT};
