//! What the shim asks of KVM beyond kvm-ioctls, and the memory that KVM shares with it.

mod calls;
mod dirty_ring;
mod memory;
mod run_page;
mod stats;
mod userfault;

pub(crate) use calls::{
    KICK, clear_dirty_log, enable_cap, get_dirty_log, get_sregs2, get_supported_hv_cpuid, get_tsc_offset, get_xsave2,
    host_tsc, install_kick, ioeventfd, irqfd, reset_dirty_rings, run, set_memory_region, set_sregs2, set_tsc_offset,
    set_xsave, stats_fd, tsc_khz,
};
pub(crate) use dirty_ring::DirtyRing;
#[cfg(test)]
pub(crate) use dirty_ring::model;
pub(crate) use memory::GuestMemory;
pub(crate) use run_page::{RawExit, RunPage};
pub(crate) use stats::StatsFd;
pub(crate) use userfault::{Userfault, Watched};
