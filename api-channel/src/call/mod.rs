//! What the SoC can ask of the host.
//!
//! One [`Call`] a request; its answer's shape stands beside it. Numbers are little-endian; "page" is 4096 bytes.

mod interrupt;
mod memory;
mod vcpu;
mod vm;

pub use interrupt::{IoEvent, Irqfd, Msi, NotifyPage, Route, RouteKind};
pub use memory::{DirtyFetch, DirtyLimit, DirtyRun, Discard, Extent, LateRun, Memslot, PAGE, RamRequest, SlotFlags};
pub use vcpu::{CpuidEntry, Groups, PostedRange, StateRequest, VCPU_ALL, VM};
pub use vm::{CreateVm, HostInfo, Irqchip, Name, NumaNode, PciDevice, Statistic, VmCreated};

use crate::codec::{Malformed, Reader, Writer};

/// A request or an order.
#[derive(Clone, Debug, PartialEq)]
pub enum Call {
    /// Nothing; answered at once.
    Ping,
    /// The server's inventory: [`HostInfo`] in bulk. Both roles.
    HostInfo,
    /// The CPUID that KVM supports, as a list of [`CpuidEntry`] in bulk, and what else a VM may have.
    SupportedCpuid,
    /// The Hyper-V CPUID leaves that KVM supports, as a list of [`CpuidEntry`] in bulk; none where it has no such interfaces.
    SupportedHvCpuid,
    /// Creates the VM and its vCPUs, all paused: [`VmCreated`].
    CreateVm(CreateVm),
    /// Gives the vCPUs their APIC ids, one each, vCPU 0 first; before the first memslots. Without it vCPU n has n.
    SetApicIds(Vec<u32>),
    /// Ends the VM: vCPUs stopped, RAM unmapped from the device, everything freed.
    DestroyVm,
    /// Allocates guest RAM or ROM and maps it for the device: a list of [`Extent`].
    AddRam(RamRequest),
    /// Replaces the whole set of memslots at once: vCPUs out of the guest, dirty bits of dying slots harvested, swap, resume.
    SetMemslots(Vec<Memslot>),
    /// Gives memory back to the host, where [`VmCreated::DISCARD`] says that it takes some.
    Discard(Vec<Discard>),
    /// Sets a vCPU's CPUID, before it first runs.
    SetCpuid {
        /// The vCPU.
        vcpu: u32,
        /// The table.
        entries: Vec<CpuidEntry>,
    },
    /// Keeps a vCPU's thread on these CPUs of the host, by their numbers.
    SetAffinity {
        /// The vCPU.
        vcpu: u32,
        /// The CPUs: one or more.
        cpus: Vec<u32>,
    },
    /// Reads state records, in bulk. The VM is paused.
    GetState(StateRequest),
    /// Sets state records, in their order. The VM is paused.
    SetState {
        /// Whose: a vCPU, or [`VM`].
        target: u32,
        /// Records: see [`crate::state`].
        records: Vec<u8>,
    },
    /// Lets vCPUs run: [`VCPU_ALL`] or one.
    Run(u32),
    /// Takes vCPUs out of the guest; answered when they are out and their pending exits are finished.
    Pause(u32),
    /// Makes a vCPU leave and re-enter the guest.
    Kick(u32),
    /// Replaces the interrupt routing.
    SetRouting(Vec<Route>),
    /// Raises an MSI.
    Msi(Msi),
    /// Sets interrupt lines: words of [`ioreq_ring::LineChange`]. Usually an order.
    Lines(Vec<u64>),
    /// Wires a vector to a GSI, or unwires it.
    Irqfd(Irqfd),
    /// Adds or removes an ioeventfd, or a range of posted writes.
    IoEvent(IoEvent),
    /// Replaces the set of address ranges whose writes are posted.
    PostedRanges(Vec<PostedRange>),
    /// Replaces the set of the function's notify pages that the guest sees, where [`VmCreated::NOTIFY`] says that it can see any.
    NotifyPages(Vec<NotifyPage>),
    /// Starts or stops the dirty log of every writable slot.
    DirtyLog(bool),
    /// Fetches runs of dirty pages, in bulk, and clears them.
    DirtyFetch(DirtyFetch),
    /// Limits how fast vCPUs write clean pages.
    DirtyLimit(DirtyLimit),
    /// Whether the guest can run before all of its pages are there; a refusal says why not.
    CanPostCopy,
    /// These pages come later. All vCPUs are paused, and no post-copy is under way yet.
    Lacks(Vec<LateRun>),
    /// From here on who touches a page that was said to come later waits for it, and is told of by an event; or (false) no more: all have come.
    PostCopy(bool),
    /// The bytes of these pages, which were said to come later, are there: who waits for them goes on.
    Placed(Vec<LateRun>),
    /// Counters of the shim and of KVM: a list of [`Statistic`] in bulk.
    Statistics,
    /// Ends the shim once the VM is gone.
    Shutdown,
}

/// Most entries of any list in a call.
const MOST: usize = 4096;

impl Call {
    /// The call's number on the wire.
    #[must_use]
    pub fn opcode(&self) -> u16 {
        match self {
            Self::Ping => 0x001,
            Self::HostInfo => 0x010,
            Self::SupportedCpuid => 0x011,
            Self::SupportedHvCpuid => 0x012,
            Self::CreateVm(_) => 0x100,
            Self::DestroyVm => 0x101,
            Self::SetApicIds(_) => 0x102,
            Self::AddRam(_) => 0x110,
            Self::SetMemslots(_) => 0x111,
            Self::Discard(_) => 0x112,
            Self::SetCpuid { .. } => 0x200,
            Self::SetAffinity { .. } => 0x201,
            Self::GetState(_) => 0x210,
            Self::SetState { .. } => 0x211,
            Self::Run(_) => 0x300,
            Self::Pause(_) => 0x301,
            Self::Kick(_) => 0x302,
            Self::SetRouting(_) => 0x400,
            Self::Msi(_) => 0x401,
            Self::Lines(_) => 0x402,
            Self::Irqfd(_) => 0x403,
            Self::IoEvent(_) => 0x500,
            Self::PostedRanges(_) => 0x501,
            Self::NotifyPages(_) => 0x502,
            Self::DirtyLog(_) => 0x600,
            Self::DirtyFetch(_) => 0x601,
            Self::DirtyLimit(_) => 0x602,
            Self::CanPostCopy => 0x610,
            Self::Lacks(_) => 0x611,
            Self::PostCopy(_) => 0x612,
            Self::Placed(_) => 0x613,
            Self::Statistics => 0x700,
            Self::Shutdown => 0xf00,
        }
    }

    /// The call's payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let w = Writer::default();
        match self {
            Self::Ping
            | Self::HostInfo
            | Self::SupportedCpuid
            | Self::SupportedHvCpuid
            | Self::DestroyVm
            | Self::CanPostCopy
            | Self::Statistics
            | Self::Shutdown => w,
            Self::CreateVm(create) => w.put(create),
            Self::SetApicIds(ids) => w.list(ids),
            Self::AddRam(ram) => w.put(ram),
            Self::SetMemslots(slots) => w.list(slots),
            Self::Discard(runs) => w.list(runs),
            Self::SetCpuid { vcpu, entries } => w.put(&u64::from(*vcpu)).list(entries),
            Self::SetAffinity { vcpu, cpus } => w.put(&u64::from(*vcpu)).list(cpus),
            Self::GetState(state) => w.put(state),
            Self::SetState { target, records } => w.put(&u64::from(*target)).bytes(records),
            Self::Run(vcpu) | Self::Pause(vcpu) | Self::Kick(vcpu) => w.put(&u64::from(*vcpu)),
            Self::SetRouting(routes) => w.list(routes),
            Self::Msi(msi) => w.put(msi),
            Self::Lines(words) => w.list(words),
            Self::Irqfd(irqfd) => w.put(irqfd),
            Self::IoEvent(event) => w.put(event),
            Self::PostedRanges(ranges) => w.list(ranges),
            Self::NotifyPages(pages) => w.list(pages),
            Self::DirtyLog(on) | Self::PostCopy(on) => w.put(&u64::from(*on)),
            Self::DirtyFetch(fetch) => w.put(fetch),
            Self::DirtyLimit(limit) => w.put(limit),
            Self::Lacks(runs) | Self::Placed(runs) => w.list(runs),
        }
        .done()
    }

    /// Reads a call; `Ok(None)` for an opcode that this build doesn't know.
    ///
    /// # Errors
    /// The payload is not that call's.
    pub fn decode(opcode: u16, payload: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut r = Reader::new(payload);
        let call = match opcode {
            0x001 => Self::Ping,
            0x010 => Self::HostInfo,
            0x011 => Self::SupportedCpuid,
            0x012 => Self::SupportedHvCpuid,
            0x100 => Self::CreateVm(r.take()?),
            0x101 => Self::DestroyVm,
            0x102 => Self::SetApicIds(r.list(MOST)?),
            0x110 => Self::AddRam(r.take()?),
            0x111 => Self::SetMemslots(r.list(MOST)?),
            0x112 => Self::Discard(r.list(MOST)?),
            0x200 => Self::SetCpuid { vcpu: narrow(r.take()?)?, entries: r.list(MOST)? },
            0x201 => Self::SetAffinity { vcpu: narrow(r.take()?)?, cpus: r.list(MOST)? },
            0x210 => Self::GetState(r.take()?),
            0x211 => {
                let target = narrow(r.take()?)?;
                return Ok(Some(Self::SetState { target, records: r.rest().to_vec() }));
            }
            0x300 => Self::Run(narrow(r.take()?)?),
            0x301 => Self::Pause(narrow(r.take()?)?),
            0x302 => Self::Kick(narrow(r.take()?)?),
            0x400 => Self::SetRouting(r.list(MOST)?),
            0x401 => Self::Msi(r.take()?),
            0x402 => Self::Lines(r.list(MOST)?),
            0x403 => Self::Irqfd(r.take()?),
            0x500 => Self::IoEvent(r.take()?),
            0x501 => Self::PostedRanges(r.list(MOST)?),
            0x502 => Self::NotifyPages(r.list(MOST)?),
            0x600 => Self::DirtyLog(is_on(r.take()?)?),
            0x601 => Self::DirtyFetch(r.take()?),
            0x602 => Self::DirtyLimit(r.take()?),
            0x610 => Self::CanPostCopy,
            0x611 => Self::Lacks(r.list(MOST)?),
            0x612 => Self::PostCopy(is_on(r.take()?)?),
            0x613 => Self::Placed(r.list(MOST)?),
            0x700 => Self::Statistics,
            0xf00 => Self::Shutdown,
            _ => return Ok(None),
        };
        r.end()?;
        Ok(Some(call))
    }
}

fn is_on(word: u64) -> Result<bool, Malformed> {
    match word {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(Malformed),
    }
}

fn narrow(word: u64) -> Result<u32, Malformed> {
    u32::try_from(word).map_err(|_| Malformed)
}
