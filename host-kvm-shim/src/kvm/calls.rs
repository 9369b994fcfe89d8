//! KVM's ioctls that kvm-ioctls lacks, or gives only in a form that hides or allocates what is needed here.
//!
//! `unsafe`: ioctls take addresses of structures. Each wrapper passes a structure of the type that the request's number names.
#![allow(unsafe_code)]

use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use kvm_bindings::{
    CpuId, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log,
    kvm_enable_cap, kvm_ioeventfd, kvm_irqfd, kvm_sregs2, kvm_userspace_memory_region,
};
use nix::errno::Errno;

/// KVM api.rst §4.37: enables a capability of a VM or a vCPU.
pub(crate) fn enable_cap(fd: &impl AsRawFd, cap: u32, args: [u64; 4]) -> Result<(), Errno> {
    let request = kvm_enable_cap { cap, args, ..Default::default() };
    // SAFETY: the request names a kvm_enable_cap, which outlives the call.
    unsafe { raw::enable_cap(fd.as_raw_fd(), &raw const request) }.map(drop)
}

/// KVM api.rst §4.118: the Hyper-V leaves that KVM supports. `table` has room for them, and says how much.
pub(crate) fn get_supported_hv_cpuid(kvm: &impl AsRawFd, table: &mut CpuId) -> Result<(), Errno> {
    // SAFETY: KVM writes no more entries than the table's header says it has room for, then their number in its place.
    unsafe { raw::get_supported_hv_cpuid(kvm.as_raw_fd(), table.as_mut_fam_struct_ptr()) }.map(drop)
}

/// KVM api.rst §4.35: adds, changes or (with no size) deletes a memslot.
///
/// # Safety
/// The memory named by `region` stays mapped until the slot is deleted.
pub(crate) unsafe fn set_memory_region(vm: &impl AsRawFd, region: &kvm_userspace_memory_region) -> Result<(), Errno> {
    // SAFETY: the request names a kvm_userspace_memory_region, which outlives the call; the caller keeps the memory.
    unsafe { raw::set_user_memory_region(vm.as_raw_fd(), region) }.map(drop)
}

/// KVM api.rst §4.8: the dirty bitmap of a slot of at most `bitmap.len()` × 64 pages.
pub(crate) fn get_dirty_log(vm: &impl AsRawFd, slot: u32, bitmap: &mut [u64]) -> Result<(), Errno> {
    let mut request = kvm_dirty_log { slot, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: KVM writes a bit a page of the slot, rounded up to 64: the caller's bitmap is that long.
    unsafe { raw::get_dirty_log(vm.as_raw_fd(), &raw const request) }.map(drop)
}

/// KVM api.rst §4.117: clears, in the log of a slot, the pages whose bits are set.
pub(crate) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    bitmap: &[u64],
) -> Result<(), Errno> {
    assert!(bitmap.len() * 64 >= num_pages as usize, "a bitmap shorter than its pages");
    let mut request = kvm_clear_dirty_log { slot, num_pages, first_page, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = bitmap.as_ptr().cast_mut().cast();
    // SAFETY: KVM reads one bit a page; the assertion holds the bitmap to that.
    unsafe { raw::clear_dirty_log(vm.as_raw_fd(), &raw mut request) }.map(drop)
}

/// KVM api.rst §8.29: takes back the entries of all dirty rings that were read. A signal may cut it short.
pub(crate) fn reset_dirty_rings(vm: &impl AsRawFd) -> Result<(), Errno> {
    // SAFETY: no argument.
    unsafe { raw::reset_dirty_rings(vm.as_raw_fd(), 0) }.map(drop)
}

/// KVM api.rst §4.75: wires an eventfd to a GSI, level-triggered with `resample`.
pub(crate) fn irqfd(
    vm: &impl AsRawFd,
    event: BorrowedFd<'_>,
    gsi: u32,
    resample: Option<BorrowedFd<'_>>,
    on: bool,
) -> Result<(), Errno> {
    let mut flags = if on { 0 } else { KVM_IRQFD_FLAG_DEASSIGN };
    let mut resamplefd = 0;
    if let Some(fd) = resample {
        flags |= KVM_IRQFD_FLAG_RESAMPLE;
        resamplefd = fd.as_raw_fd() as u32;
    }
    let request = kvm_irqfd { fd: event.as_raw_fd() as u32, gsi, flags, resamplefd, ..Default::default() };
    // SAFETY: the request names a kvm_irqfd, which outlives the call.
    unsafe { raw::irqfd(vm.as_raw_fd(), &raw const request) }.map(drop)
}

/// KVM api.rst §4.59: turns guest writes into an eventfd's signals.
pub(crate) fn ioeventfd(vm: &impl AsRawFd, request: &kvm_ioeventfd) -> Result<(), Errno> {
    // SAFETY: the request names a kvm_ioeventfd, which outlives the call.
    unsafe { raw::ioeventfd(vm.as_raw_fd(), request) }.map(drop)
}

/// KVM api.rst §4.10: runs a vCPU until it exits or a signal comes.
pub(crate) fn run(vcpu: &impl AsRawFd) -> Result<(), Errno> {
    // SAFETY: no argument; what KVM writes is the vCPU's run page.
    unsafe { raw::run(vcpu.as_raw_fd(), 0) }.map(drop)
}

/// KVM api.rst §4.133: segments, control registers, PDPTRs.
pub(crate) fn get_sregs2(vcpu: &impl AsRawFd) -> Result<kvm_sregs2, Errno> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the request names a kvm_sregs2, which outlives the call.
    unsafe { raw::get_sregs2(vcpu.as_raw_fd(), &raw mut sregs) }.map(|_| sregs)
}

/// KVM api.rst §4.134.
pub(crate) fn set_sregs2(vcpu: &impl AsRawFd, sregs: &kvm_sregs2) -> Result<(), Errno> {
    // SAFETY: as above; KVM only reads it.
    unsafe { raw::set_sregs2(vcpu.as_raw_fd(), sregs) }.map(drop)
}

/// KVM api.rst §4.135: the XSAVE area. `area` has as many words as KVM_CAP_XSAVE2 says of the VM.
pub(crate) fn get_xsave2(vcpu: &impl AsRawFd, area: &mut [u64]) -> Result<(), Errno> {
    // SAFETY: KVM writes as many bytes as the capability says; the caller's area is that long.
    unsafe { raw::get_xsave2(vcpu.as_raw_fd(), area.as_mut_ptr().cast()) }.map(drop)
}

/// KVM api.rst §4.43. `area` has as many words as KVM_CAP_XSAVE2 says of the VM.
pub(crate) fn set_xsave(vcpu: &impl AsRawFd, area: &[u64]) -> Result<(), Errno> {
    // SAFETY: KVM reads as many bytes as the capability says; the caller's area is that long.
    unsafe { raw::set_xsave(vcpu.as_raw_fd(), area.as_ptr().cast()) }.map(drop)
}

/// KVM api.rst §4.56: the TSC's frequency in kHz, of a vCPU, or the default of a VM.
pub(crate) fn tsc_khz(fd: &impl AsRawFd) -> Result<u32, Errno> {
    // SAFETY: no argument.
    unsafe { raw::get_tsc_khz(fd.as_raw_fd(), 0) }.map(|khz| khz as u32)
}

/// KVM api.rst §4.133 (KVM_GET_STATS_FD): a descriptor that reads as statistics of a VM or a vCPU.
pub(crate) fn stats_fd(fd: &impl AsRawFd) -> Result<OwnedFd, Errno> {
    // SAFETY: no argument.
    let fd = unsafe { raw::get_stats_fd(fd.as_raw_fd(), 0) }?;
    // SAFETY: KVM has just made this descriptor, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The host's time stamp counter.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux leaves it to user space.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Makes the kick signal interrupt system calls instead of ending the process.
pub(crate) fn install_kick() -> Result<(), Errno> {
    use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, sigaction};
    extern "C" fn nothing(_: i32) {}
    let action = SigAction::new(SigHandler::Handler(nothing), SaFlags::empty(), SigSet::empty());
    // SAFETY: the handler does nothing, which is safe at any moment.
    unsafe { sigaction(KICK, &action) }.map(drop)
}

/// The signal that takes a vCPU thread out of the guest.
pub(crate) const KICK: nix::sys::signal::Signal = nix::sys::signal::Signal::SIGUSR1;

/// What is added to the host's TSC for a vCPU's (KVM devices/vcpu.rst §4.1); none: this KVM doesn't tell.
pub(crate) fn get_tsc_offset(vcpu: &impl AsRawFd) -> Option<u64> {
    let mut offset = 0u64;
    let attr = kvm_device_attr { addr: (&raw mut offset).addr() as u64, ..TSC_OFFSET };
    // SAFETY: KVM writes a u64 at the attribute's address, which outlives the call.
    unsafe { raw::get_device_attr(vcpu.as_raw_fd(), &raw const attr) }.is_ok().then_some(offset)
}

/// Sets it.
pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, offset: u64) -> Result<(), Errno> {
    let attr = kvm_device_attr { addr: (&raw const offset).addr() as u64, ..TSC_OFFSET };
    // SAFETY: KVM reads a u64 at the attribute's address, which outlives the call.
    unsafe { raw::set_device_attr(vcpu.as_raw_fd(), &raw const attr) }.map(drop)
}

/// KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.
const TSC_OFFSET: kvm_device_attr = kvm_device_attr { flags: 0, group: 0, attr: 0, addr: 0 };

/// The bare requests, by number: KVM api.rst and include/uapi/linux/kvm.h.
mod raw {
    use kvm_bindings::{
        kvm_clear_dirty_log, kvm_cpuid2, kvm_device_attr, kvm_dirty_log, kvm_enable_cap, kvm_ioeventfd, kvm_irqfd,
        kvm_sregs2, kvm_userspace_memory_region, kvm_xsave,
    };
    const KVMIO: u8 = 0xae;
    // KVM refuses requests without an argument unless the argument is 0.
    nix::ioctl_write_ptr!(dirty_log, KVMIO, 0x42, kvm_dirty_log);
    nix::ioctl_write_ptr!(set_user_memory_region, KVMIO, 0x46, kvm_userspace_memory_region);
    nix::ioctl_write_ptr!(irqfd, KVMIO, 0x76, kvm_irqfd);
    nix::ioctl_write_ptr!(ioeventfd, KVMIO, 0x79, kvm_ioeventfd);
    nix::ioctl_write_int_bad!(run, nix::request_code_none!(KVMIO, 0x80));
    nix::ioctl_write_int_bad!(get_tsc_khz, nix::request_code_none!(KVMIO, 0xa3));
    nix::ioctl_write_ptr!(enable_cap, KVMIO, 0xa3, kvm_enable_cap);
    nix::ioctl_write_ptr!(set_xsave, KVMIO, 0xa5, kvm_xsave);
    nix::ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
    nix::ioctl_readwrite!(get_supported_hv_cpuid, KVMIO, 0xc1, kvm_cpuid2);
    nix::ioctl_write_int_bad!(reset_dirty_rings, nix::request_code_none!(KVMIO, 0xc7));
    nix::ioctl_read!(get_sregs2, KVMIO, 0xcc, kvm_sregs2);
    nix::ioctl_write_ptr!(set_sregs2, KVMIO, 0xcd, kvm_sregs2);
    nix::ioctl_write_ptr!(set_device_attr, KVMIO, 0xe1, kvm_device_attr);
    nix::ioctl_write_ptr!(get_device_attr, KVMIO, 0xe2, kvm_device_attr);
    nix::ioctl_write_int_bad!(get_stats_fd, nix::request_code_none!(KVMIO, 0xce));
    nix::ioctl_read!(get_xsave2, KVMIO, 0xcf, kvm_xsave);
    pub(super) use dirty_log as get_dirty_log;
}
