//! State of the VM's in-kernel chips.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// An 8259A pair: per chip the registers in the order of KVM api.rst `struct kvm_pic_state`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Pic {
    /// Master, then slave: last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll, special_mask, init_state,
    /// auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask.
    pub chips: [[u8; 16]; 2],
}

/// An I/O APIC (Intel 82093AA).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct IoApic {
    /// Guest-physical address of its registers.
    pub base: u64,
    /// IOREGSEL.
    pub select: u32,
    /// Its id.
    pub id: u32,
    /// Pins that are high.
    pub irr: u32,
    /// Reserved, 0.
    pub reserved: u32,
    /// Redirection table.
    pub redirection: [u64; 24],
}

/// A channel of the PIT.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct PitChannel {
    /// Reload value; 0 means 65536.
    pub count: u32,
    /// Value that a latch command caught.
    pub latched_count: u16,
    /// count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate.
    pub bytes: [u8; 10],
    /// When the count was loaded, in nanoseconds of the VM's boot clock.
    pub load_time: i64,
}

/// An 8254.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Pit {
    /// Its channels.
    pub channels: [PitChannel; 3],
    /// KVM_PIT_FLAGS_*: bit 0 HPET legacy, bit 1 speaker data on.
    pub flags: u64,
}

/// The VM's clock, all three read at once.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Clock {
    /// kvmclock, nanoseconds.
    pub kvmclock: u64,
    /// CLOCK_REALTIME, nanoseconds; 0 if unknown.
    pub realtime: u64,
    /// Host TSC; 0 if unknown.
    pub host_tsc: u64,
    /// KVM_CLOCK_* flags that say which of them are valid.
    pub flags: u64,
}

const _: () = assert!(size_of::<PitChannel>() == 24 && size_of::<Pit>() == 80 && size_of::<IoApic>() == 216);
