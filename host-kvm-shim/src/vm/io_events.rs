//! Guest writes that KVM finishes itself, by signalling an eventfd that soc-vmm waits for.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use api_channel::call::IoEvent;
use api_channel::codec::Malformed;
use kvm_bindings::{
    kvm_ioeventfd, kvm_ioeventfd_flag_nr_datamatch, kvm_ioeventfd_flag_nr_deassign, kvm_ioeventfd_flag_nr_pio,
};
use kvm_ioctls::VmFd;
use pcie_function::HostFunction;

use crate::error::Refusal;
use crate::kvm::ioeventfd;

/// Address, data, length, flags.
type Place = (u64, u64, u32, u32);

/// Those that are there, with what they signal: KVM removes one only by that.
#[derive(Debug, Default)]
pub(crate) struct IoEvents(BTreeMap<Place, OwnedFd>);

impl IoEvents {
    /// Adds or removes one.
    pub(crate) fn change<F: HostFunction>(&mut self, vm: &VmFd, function: &F, event: &IoEvent) -> Result<(), Refusal> {
        let IoEvent { address, data, len, port, match_data, on, event, reserved } = *event;
        if reserved != 0 || (on == 0 && event != 0) {
            return Err(Malformed.into());
        }
        let legal = matches!(len, 0 | 1 | 2 | 4 | 8) && port <= 1 && match_data <= 1 && on <= 1;
        if !legal || (len == 0 && match_data == 1) || (port == 1 && address > 0xffff) {
            return Err(Refusal::argument(format!("an ioeventfd of {len} bytes at {address:#x}")));
        }
        let flags = port << kvm_ioeventfd_flag_nr_pio | match_data << kvm_ioeventfd_flag_nr_datamatch;
        let place = (address, data * u64::from(match_data), len, flags);
        if self.0.contains_key(&place) == (on == 1) {
            let which = if on == 1 { "already" } else { "not" };
            return Err(Refusal::state(format!("an ioeventfd at {address:#x} is {which} there")));
        }
        if on == 1 {
            let signalled = function.shared(event)?;
            ask(vm, place, &signalled, 0)?;
            self.0.insert(place, signalled);
        } else if let Some(signalled) = self.0.get(&place) {
            ask(vm, place, signalled, 1 << kvm_ioeventfd_flag_nr_deassign)?;
            self.0.remove(&place);
        }
        Ok(())
    }
}

fn ask(vm: &VmFd, (addr, datamatch, len, flags): Place, event: &OwnedFd, how: u32) -> Result<(), Refusal> {
    let fd = event.as_raw_fd();
    let request = kvm_ioeventfd { datamatch, addr, len, fd, flags: flags | how, ..Default::default() };
    ioeventfd(vm, &request).map_err(Refusal::nix("change an ioeventfd"))
}
