//! A VM that never runs, for as long as the machine is up.
//!
//! Linux patches its code when a host's first VM comes and when its last one goes (the scheduler's static key of preempt
//! notifiers), and KVM's when there is a first, or no more, vCPU with a local APIC that its guest has not switched on: with every
//! Linux guest that boots. Another processor may run the breakpoint that stands there meanwhile, and under TCG now and then does so
//! after the patch is done and nobody expects it any more: the kernel dies of it. With such a VM and vCPU that stay, there is one
//! such moment, at the start, before anything else runs.
//!
//! `unsafe`: KVM's calls are ioctls.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

const KVMIO: u8 = 0xae;
nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(KVMIO, 0x01));
nix::ioctl_write_int_bad!(create_vcpu, nix::request_code_none!(KVMIO, 0x41));
nix::ioctl_write_int_bad!(create_irqchip, nix::request_code_none!(KVMIO, 0x60));

/// What keeps the kernel's code as it is, until it is dropped.
pub(crate) struct KeptVm {
    _vm: OwnedFd,
    _vcpu: OwnedFd,
}

impl KeptVm {
    /// Makes the VM; `None` where there is no KVM.
    pub(crate) fn new() -> Option<Self> {
        let kvm = File::open("/dev/kvm").ok()?;
        // SAFETY: KVM_CREATE_VM (KVM api.rst §4.2) takes a number, 0 for the usual kind of VM.
        let vm = owned(unsafe { create_vm(kvm.as_raw_fd(), 0) })?;
        // SAFETY: KVM_CREATE_IRQCHIP (§4.24) has no argument.
        unsafe { create_irqchip(vm.as_raw_fd(), 0) }.ok()?;
        // SAFETY: KVM_CREATE_VCPU (§4.7) takes the vCPU's number.
        let vcpu = owned(unsafe { create_vcpu(vm.as_raw_fd(), 0) })?;
        Some(Self { _vm: vm, _vcpu: vcpu })
    }
}

/// The descriptor that a call has made.
fn owned(made: Result<RawFd, Errno>) -> Option<OwnedFd> {
    // SAFETY: a new descriptor that nobody else has.
    Some(unsafe { OwnedFd::from_raw_fd(made.ok()?) })
}
