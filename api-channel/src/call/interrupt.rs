//! Interrupts and notifications.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// An MSI message.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Msi {
    /// Address.
    pub address: u64,
    /// Data.
    pub data: u32,
    /// Reserved, 0.
    pub reserved: u32,
}

/// Where a GSI goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// A pin of an in-kernel chip: address = chip (0 PIC master, 1 PIC slave, 2 IOAPIC), data = pin.
    Pin = 1,
    /// An MSI: address and data of the message.
    Msi = 2,
    /// A source of a vCPU's Hyper-V SynIC: address = vCPU, data = SINT, 0–15. The VM was created with
    /// [`super::CreateVm::HV_SYNIC`].
    Sint = 3,
}

/// One route of a GSI.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Route {
    /// The GSI.
    pub gsi: u32,
    /// A [`RouteKind`].
    pub kind: u32,
    /// See [`RouteKind`].
    pub address: u64,
    /// See [`RouteKind`].
    pub data: u32,
    /// Reserved, 0.
    pub reserved: u32,
}

/// Wires a vector of the function to a GSI: the SoC's vector is the guest's interrupt, no thread between.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Irqfd {
    /// The vector: one of those that [`super::VmCreated`] leaves free.
    pub vector: u32,
    /// The GSI.
    pub gsi: u32,
    /// 1: wire, 0: unwire.
    pub on: u32,
    /// 1: level-triggered; the guest's EOI comes as an event.
    pub resample: u32,
}

/// A notify page of the function, where the guest is to see it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct NotifyPage {
    /// Guest-physical address: whole pages.
    pub base: u64,
    /// The page's number.
    pub page: u32,
    /// Reserved, 0.
    pub reserved: u32,
}

/// A guest write that KVM finishes itself: it signals an eventfd, where host and SoC share some.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct IoEvent {
    /// Port or guest-physical address.
    pub address: u64,
    /// The value that counts, where `match_data` is 1.
    pub data: u64,
    /// Bytes of the write: 0 (any), 1, 2, 4, 8.
    pub len: u32,
    /// 1: a port.
    pub port: u32,
    /// 1: only `data` counts.
    pub match_data: u32,
    /// 1: add, 0: remove.
    pub on: u32,
    /// To add: the eventfd, by the number under which the SoC's end of the function shares it. To remove: 0.
    pub event: u32,
    /// Reserved, 0.
    pub reserved: u32,
}
