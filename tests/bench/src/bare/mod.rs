//! The least that runs a payload: KVM_RUN in a loop, exits served in the same thread. It shows that a payload works on
//! this machine's KVM, and it is the floor that benchmarks stand on.

mod devices;
mod ioapic;
mod machine;
mod vcpu;

pub use devices::{Access, Driver, Event, Silent, TestDevice};
pub use machine::{Machine, Options, Outcome};
pub use vcpu::End;

/// Which interrupt controllers KVM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Irqchip {
    /// None: no local APIC either.
    None,
    /// All of them.
    Full,
    /// The local APICs; the IOAPIC is this program's, and told of each end of a level interrupt.
    Split,
}

/// Why a machine could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A call to KVM failed.
    #[error("KVM: {call}")]
    Kvm {
        /// Which.
        call: &'static str,
        /// Why.
        source: kvm_ioctls::Error,
    },
    /// Guest memory could not be had.
    #[error("guest memory: {0}")]
    Memory(String),
    /// A thread or a signal.
    #[error("vCPU thread")]
    Thread(#[from] std::io::Error),
}

fn kvm(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Error {
    move |source| Error::Kvm { call, source }
}
