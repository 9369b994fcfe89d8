//! The page that KVM shares with a vCPU's thread (KVM api.rst §5, `struct kvm_run`).
//!
//! kvm-ioctls' own view of an exit lacks the size of a port access, so the page is mapped here once more and read as it is.
//!
//! `unsafe`: KVM writes the page while the vCPU runs, and other threads write `immediate_exit`; so no reference into it is ever
//! made, and everything goes through raw pointers.
#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use ioreq_ring::Direction;
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// An exit as KVM wrote it down, copied out once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RawExit {
    /// Port access: `count` elements of `size` bytes; `first` is the first element, where it is written.
    Io { direction: Direction, port: u16, size: u8, count: u32, first: u32 },
    /// Memory access of up to 8 bytes.
    Mmio { direction: Direction, address: u64, len: u32, data: u64 },
    /// MSR access that KVM leaves to user space.
    Msr { direction: Direction, index: u32, data: u64 },
    /// Hypercall that KVM leaves to user space.
    Hypercall { number: u64, args: [u64; 4] },
    /// Hyper-V hypercall that KVM leaves to user space.
    HvHypercall { input: u64, params: [u64; 2] },
    /// The guest wrote an MSR of its Hyper-V SynIC: what its registers are now.
    HvSynic { msr: u32, control: u64, event_page: u64, message_page: u64 },
    /// HLT without an in-kernel LAPIC.
    Halt,
    /// Triple fault.
    Shutdown,
    /// KVM could not go on.
    InternalError { suberror: u32, data: [u64; 3] },
    /// The hardware refused to enter the guest.
    FailEntry { reason: u64, cpu: u32 },
    /// Reset or shutdown by a hypercall.
    SystemEvent { kind: u32, flags: u64 },
    /// The guest ended a level-triggered interrupt of a split irqchip.
    IoapicEoi { vector: u8 },
    /// The vCPU's dirty ring is full.
    RingFull,
    /// A signal, or a window that nobody asked for: enter again.
    Interrupted,
    /// Anything else.
    Other { reason: u32 },
}

/// A mapping of a vCPU's run page and port data, unmapped with the last owner.
#[derive(Debug)]
pub(crate) struct RunPage {
    base: NonNull<kvm_run>,
    len: usize,
}

// SAFETY: the mapping belongs to no thread; all but `immediate_exit` is used by the vCPU's thread alone (the methods say so).
unsafe impl Send for RunPage {}
// SAFETY: what other threads may call, `set_immediate_exit`, is an atomic store.
unsafe impl Sync for RunPage {}

impl RunPage {
    /// Maps the `len` bytes (KVM_GET_VCPU_MMAP_SIZE) of a vCPU.
    pub(crate) fn map(vcpu: &VcpuFd, len: usize) -> Result<Self, Errno> {
        let size = NonZeroUsize::new(len).filter(|n| n.get() >= size_of::<kvm_run>()).ok_or(Errno::EINVAL)?;
        let prot = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: the descriptor is open as long as `vcpu` is borrowed; a new mapping at an address that the kernel chooses
        // replaces nothing.
        let base =
            unsafe { mmap(None, size, prot, MapFlags::MAP_SHARED, BorrowedFd::borrow_raw(vcpu.as_raw_fd()), 0) }?;
        Ok(Self { base: base.cast(), len })
    }

    /// Makes the next, or the current, KVM_RUN return at once. Any thread may call it.
    pub(crate) fn leave(&self) {
        self.immediate_exit().store(1, Ordering::SeqCst);
    }

    /// Lets KVM_RUN run again. What was stored before a [`RunPage::leave`] that this takes back is seen afterwards.
    pub(crate) fn stay(&self) {
        self.immediate_exit().swap(0, Ordering::SeqCst);
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte lies within the mapping, which lives as long as `self`; KVM and all threads access it as a byte.
        unsafe { AtomicU8::from_ptr(&raw mut (*self.base.as_ptr()).immediate_exit) }
    }

    /// The exit that the last KVM_RUN returned with. For the vCPU's thread.
    pub(crate) fn exit(&self) -> RawExit {
        let run = self.base.as_ptr();
        // SAFETY: KVM_RUN has returned, so KVM writes nothing now; the union's arm is the one that the exit reason names (KVM
        // api.rst §5); all arms are plain numbers, of which every bit pattern is valid.
        unsafe {
            let reason = (&raw const (*run).exit_reason).read();
            let arm = &raw const (*run).__bindgen_anon_1;
            match reason {
                KVM_EXIT_IO => {
                    let io = (&raw const (*arm).io).read();
                    let direction =
                        if u32::from(io.direction) == KVM_EXIT_IO_OUT { Direction::Write } else { Direction::Read };
                    let mut first = [0; 4];
                    if direction == Direction::Write {
                        self.copy_io(io.data_offset, &mut first[..usize::from(io.size.min(4))]);
                    }
                    let first = u32::from_le_bytes(first);
                    RawExit::Io { direction, port: io.port, size: io.size, count: io.count, first }
                }
                KVM_EXIT_MMIO => {
                    let mmio = (&raw const (*arm).mmio).read();
                    let direction = if mmio.is_write != 0 { Direction::Write } else { Direction::Read };
                    let data = if mmio.is_write != 0 { u64::from_le_bytes(mmio.data) } else { 0 };
                    RawExit::Mmio { direction, address: mmio.phys_addr, len: mmio.len, data }
                }
                KVM_EXIT_X86_RDMSR => {
                    let msr = (&raw const (*arm).msr).read();
                    RawExit::Msr { direction: Direction::Read, index: msr.index, data: 0 }
                }
                KVM_EXIT_X86_WRMSR => {
                    let msr = (&raw const (*arm).msr).read();
                    RawExit::Msr { direction: Direction::Write, index: msr.index, data: msr.data }
                }
                KVM_EXIT_HYPERCALL => {
                    let call = (&raw const (*arm).hypercall).read();
                    let [a, b, c, d, ..] = call.args;
                    RawExit::Hypercall { number: call.nr, args: [a, b, c, d] }
                }
                KVM_EXIT_HYPERV => {
                    let hv = (&raw const (*arm).hyperv).read();
                    match hv.type_ {
                        KVM_EXIT_HYPERV_HCALL => {
                            let call = hv.u.hcall;
                            RawExit::HvHypercall { input: call.input, params: call.params }
                        }
                        KVM_EXIT_HYPERV_SYNIC => {
                            let synic = hv.u.synic;
                            RawExit::HvSynic {
                                msr: synic.msr,
                                control: synic.control,
                                event_page: synic.evt_page,
                                message_page: synic.msg_page,
                            }
                        }
                        _ => RawExit::Other { reason },
                    }
                }
                KVM_EXIT_HLT => RawExit::Halt,
                KVM_EXIT_SHUTDOWN => RawExit::Shutdown,
                KVM_EXIT_INTERNAL_ERROR => {
                    let error = (&raw const (*arm).internal).read();
                    let known = |i: usize| if i < error.ndata as usize { error.data[i] } else { 0 };
                    RawExit::InternalError { suberror: error.suberror, data: [known(0), known(1), known(2)] }
                }
                KVM_EXIT_FAIL_ENTRY => {
                    let fail = (&raw const (*arm).fail_entry).read();
                    RawExit::FailEntry { reason: fail.hardware_entry_failure_reason, cpu: fail.cpu }
                }
                KVM_EXIT_SYSTEM_EVENT => {
                    let event = (&raw const (*arm).system_event).read();
                    // The first of the data words is what was once the only one, the flags.
                    let flags = if event.ndata == 0 { 0 } else { event.__bindgen_anon_1.data[0] };
                    RawExit::SystemEvent { kind: event.type_, flags }
                }
                KVM_EXIT_IOAPIC_EOI => RawExit::IoapicEoi { vector: (&raw const (*arm).eoi).read().vector },
                KVM_EXIT_DIRTY_RING_FULL => RawExit::RingFull,
                KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => RawExit::Interrupted,
                reason => RawExit::Other { reason },
            }
        }
    }

    /// Where the data of the pending port access lies, and how long it is; `None` if that is not within the mapping.
    fn io_data(&self) -> Option<(u64, usize)> {
        let run = self.base.as_ptr();
        // SAFETY: within the mapping; the caller is the vCPU's thread with a port exit pending, so the arm is `io`.
        let io = unsafe { (&raw const (*run).__bindgen_anon_1.io).read() };
        let bytes = usize::from(io.size).checked_mul(io.count as usize)?;
        let end = usize::try_from(io.data_offset).ok()?.checked_add(bytes)?;
        (end <= self.len).then_some((io.data_offset, bytes))
    }

    /// The data of a pending port write, from byte `at` on.
    pub(crate) fn read_io(&self, at: usize, data: &mut [u8]) {
        if let Some((offset, bytes)) = self.io_data() {
            let len = data.len().min(bytes.saturating_sub(at));
            self.copy_io(offset + at as u64, &mut data[..len]);
        }
    }

    /// The answer to a pending port read, from byte `at` on; what is past the access is dropped.
    pub(crate) fn write_io(&self, at: usize, data: &[u8]) {
        let Some((offset, bytes)) = self.io_data() else { return };
        let len = data.len().min(bytes.saturating_sub(at));
        // SAFETY: `io_data` checked that the access lies within the mapping, and `at + len` within the access; KVM does not run.
        unsafe {
            let to = self.base.as_ptr().cast::<u8>().add(offset as usize + at);
            std::ptr::copy_nonoverlapping(data.as_ptr(), to, len);
        }
    }

    fn copy_io(&self, offset: u64, data: &mut [u8]) {
        let Some(end) = usize::try_from(offset).ok().and_then(|o| o.checked_add(data.len())) else { return };
        if end > self.len {
            return;
        }
        // SAFETY: the range lies within the mapping, just checked; KVM does not run.
        unsafe {
            let from = self.base.as_ptr().cast::<u8>().add(offset as usize);
            std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len());
        }
    }

    /// The answer to a pending memory read.
    pub(crate) fn write_mmio(&self, data: u64) {
        // SAFETY: within the mapping; the caller is the vCPU's thread with a memory exit pending.
        unsafe { (&raw mut (*self.base.as_ptr()).__bindgen_anon_1.mmio.data).write(data.to_le_bytes()) }
    }

    /// The answer to a pending MSR access; an error makes KVM inject #GP.
    pub(crate) fn write_msr(&self, data: u64, error: bool) {
        // SAFETY: within the mapping; the caller is the vCPU's thread with an MSR exit pending.
        unsafe {
            let msr = &raw mut (*self.base.as_ptr()).__bindgen_anon_1.msr;
            (&raw mut (*msr).data).write(data);
            (&raw mut (*msr).error).write(error.into());
        }
    }

    /// The result value of a pending Hyper-V hypercall.
    pub(crate) fn write_hv_hypercall(&self, result: u64) {
        // SAFETY: within the mapping; the caller is the vCPU's thread with such a hypercall pending.
        unsafe { (&raw mut (*self.base.as_ptr()).__bindgen_anon_1.hyperv.u.hcall.result).write(result) }
    }

    /// The answer to a pending hypercall.
    pub(crate) fn write_hypercall(&self, answer: u64) {
        // SAFETY: within the mapping; the caller is the vCPU's thread with a hypercall pending.
        unsafe { (&raw mut (*self.base.as_ptr()).__bindgen_anon_1.hypercall.ret).write(answer) }
    }
}

impl Drop for RunPage {
    fn drop(&mut self) {
        // SAFETY: base and len are those that mmap gave; nobody owns the page any more.
        let _ = unsafe { munmap(self.base.cast(), self.len) };
    }
}
