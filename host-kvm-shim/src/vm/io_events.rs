//! Guest writes that KVM turns into a doorbell by itself, where the function's doorbell is an eventfd.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd;

use api_channel::call::IoEvent;
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use pcie_function::{Doorbell, HostFunction};

use crate::error::Refusal;
use crate::kvm::ioeventfd;

/// Those that are there: address, data, length, flags.
#[derive(Debug, Default)]
pub(crate) struct IoEvents(BTreeSet<(u64, u64, u32, u32)>);

impl IoEvents {
    /// Adds or removes one.
    pub(crate) fn change<F: HostFunction>(&mut self, vm: &VmFd, function: &F, event: &IoEvent) -> Result<(), Refusal> {
        let IoEvent { address, data, len, port, match_data, on } = *event;
        let legal = matches!(len, 0 | 1 | 2 | 4 | 8) && port <= 1 && match_data <= 1 && on <= 1;
        if !legal || (len == 0 && match_data == 1) || (port == 1 && address > 0xffff) {
            return Err(Refusal::argument(format!("an ioeventfd of {len} bytes at {address:#x}")));
        }
        let Some(bell) = function.doorbell_event(Doorbell::Lanes) else {
            return Err(Refusal::unavailable("this function's doorbells are no eventfds; use posted ranges"));
        };
        let flags = port << kvm_ioeventfd_flag_nr_pio | match_data << kvm_ioeventfd_flag_nr_datamatch;
        let key = (address, data * u64::from(match_data), len, flags);
        if self.0.contains(&key) == (on == 1) {
            let which = if on == 1 { "already" } else { "not" };
            return Err(Refusal::state(format!("an ioeventfd at {address:#x} is {which} there")));
        }
        let off = if on == 1 { 0 } else { 1 << kvm_ioeventfd_flag_nr_deassign };
        let request = kvm_ioeventfd {
            datamatch: data,
            addr: address,
            len,
            fd: bell.as_raw_fd(),
            flags: flags | off,
            ..Default::default()
        };
        ioeventfd(vm, &request).map_err(Refusal::nix("change an ioeventfd"))?;
        if on == 1 {
            self.0.insert(key);
        } else {
            self.0.remove(&key);
        }
        Ok(())
    }
}
