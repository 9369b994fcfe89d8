#![allow(unsafe_code)] // KVM lays an I/O exit's data out behind kvm_run

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use kvm_ioctls::{VcpuExit, VcpuFd};
use payloads::ports;

use super::devices::Devices;

/// Why a vCPU stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The payload wrote to the debug-exit port.
    Exited,
    /// It was told to: time is over or another vCPU ended.
    Stopped,
    /// HLT without an interrupt controller.
    Halted,
    /// KVM could not go on.
    Failed(String),
}

/// Runs one vCPU to its end.
pub(super) fn run(vcpu: &mut VcpuFd, id: u8, devices: &Mutex<Devices>, stop: &AtomicBool) -> End {
    loop {
        // An exit is complete only when KVM is entered again, and may bring another (the rest of a page-split access,
        // of a string). `immediate_exit` completes it and goes no further.
        let stopping = stop.load(Ordering::Acquire);
        vcpu.set_kvm_immediate_exit(stopping.into());
        match step(vcpu, id, devices) {
            Step::Served => {}
            Step::Interrupted if stopping => {
                vcpu.set_kvm_immediate_exit(0);
                return End::Stopped;
            }
            Step::Interrupted => {}
            Step::Ended(end) => return end,
        }
    }
}

/// Runs one vCPU with a debug console only.
pub(super) fn run_floor(vcpu: &mut VcpuFd, console: &mut Vec<u8>, stop: &AtomicBool) -> End {
    while !stop.load(Ordering::Relaxed) {
        match vcpu.run() {
            Ok(VcpuExit::IoIn(ports::DEBUG_CONSOLE, data)) => data.fill(ports::DEBUG_CONSOLE_READS),
            Ok(VcpuExit::IoOut(ports::DEBUG_CONSOLE, data)) => console.extend(data),
            Ok(VcpuExit::IoOut(ports::DEBUG_EXIT, _)) => return End::Exited,
            Err(error) if error.errno() == libc::EINTR => {}
            other => return End::Failed(format!("{other:?}")),
        }
    }
    End::Stopped
}

enum Step {
    Served,
    Interrupted,
    Ended(End),
}

/// Enters the guest once, and serves the exit.
fn step(vcpu: &mut VcpuFd, id: u8, devices: &Mutex<Devices>) -> Step {
    let lock = || devices.lock().unwrap_or_else(PoisonError::into_inner);
    match vcpu.run() {
        Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
            let (port, width, write, data) = io(vcpu);
            let mut devices = lock();
            devices.port(id, port, width, write, data);
            if devices.exit_code.is_some() {
                return Step::Ended(End::Exited);
            }
        }
        Ok(VcpuExit::MmioRead(address, data)) => lock().memory(id, address, false, data),
        Ok(VcpuExit::MmioWrite(address, data)) => lock().memory(id, address, true, &mut data.to_vec()),
        Ok(VcpuExit::IoapicEoi(vector)) => lock().end_of_interrupt(vector),
        Ok(VcpuExit::Hlt) => return Step::Ended(End::Halted),
        Ok(VcpuExit::Intr) => return Step::Interrupted,
        // EAGAIN: it waited for its start-up IPI, and something came.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => return Step::Interrupted,
        Ok(exit) => {
            let what = format!("{exit:?}");
            let at = vcpu.get_regs().map_or(0, |regs| regs.rip);
            return Step::Ended(End::Failed(format!("{what} at {at:#x}")));
        }
        Err(error) => return Step::Ended(End::Failed(error.to_string())),
    }
    Step::Served
}

/// The I/O exit that stands in `kvm_run`: port, width of an element, whether it is a write, and all elements.
fn io(vcpu: &mut VcpuFd) -> (u16, u8, bool, &mut [u8]) {
    let run = vcpu.get_kvm_run();
    // SAFETY: called for an exit of the kind whose member this is.
    let io = unsafe { run.__bindgen_anon_1.io };
    let length = usize::from(io.size) * io.count as usize;
    // SAFETY: KVM put `length` bytes at `data_offset` of the mapping that `run` is the beginning of; it touches them
    // in KVM_RUN only, which needs the vCPU's borrow that the slice holds.
    let data = unsafe {
        std::slice::from_raw_parts_mut(std::ptr::from_mut(run).cast::<u8>().add(io.data_offset as usize), length)
    };
    (io.port, io.size, u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_OUT, data)
}
