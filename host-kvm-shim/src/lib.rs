//! The vCPU runner on the host: KVM for one VM, and nothing else.
//!
//! [`Shim::serve`] takes a function's host end and runs one VM at a time for the SoC on its other end. The main thread is the API
//! server; every vCPU has one thread of its own, which alone issues that vCPU's ioctls. While some of the guest's pages are still to come,
//! one more hears of faults. There is no other thread.
//!
//! ```text
//! vCPU thread: KVM_RUN ─ exit ─▶ exit.rs: Request ─▶ lane.rs ─▶ SoC     API thread: channel ─▶ api/: one call ─▶ vm.rs …
//!                 ▲─────── completion, line changes ◀┘                               │ asks vCPU threads through vcpu/handle.rs
//! ```

#![deny(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "they panic where nobody reads, and a VM would end with that"
)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("host-kvm-shim runs on x86-64 Linux hosts; soc-vmm is what runs on the SoC");

mod api;
pub mod args;
mod bootstrap;
mod error;
mod frugal;
mod host;
mod kvm;
mod poller;
mod sandbox;
pub mod say;
mod serve;
pub mod signals;
pub mod socket;
mod vcpu;
mod vm;

pub use error::ServeError;
pub use frugal::frugal;
pub use sandbox::close_inherited;
pub use serve::{Ended, Level, Options, Shim};
