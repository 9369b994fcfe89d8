//! A VM without vCPUs for as long as the machine is up.
//!
//! Linux patches its scheduler when a host's first VM comes and when its last one goes (the static key of preempt notifiers).
//! Another processor may run the breakpoint that stands there meanwhile, and under TCG now and then does so after the patch is
//! done and nobody expects it any more: the kernel dies of it. With a VM that stays, there is one such moment, at the start.
//!
//! `unsafe`: KVM_CREATE_VM is an ioctl.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

nix::ioctl_write_int_bad!(create_vm, nix::request_code_none!(0xae, 0x01));

/// Makes the VM; `None` where there is no KVM.
pub(crate) fn keep_vm() -> Option<OwnedFd> {
    let kvm = File::open("/dev/kvm").ok()?;
    // SAFETY: KVM_CREATE_VM (KVM api.rst §4.2) takes a number, 0 for the usual kind of VM.
    let vm = unsafe { create_vm(kvm.as_raw_fd(), 0) }.ok()?;
    // SAFETY: a new descriptor that nobody else has.
    Some(unsafe { OwnedFd::from_raw_fd(vm) })
}
