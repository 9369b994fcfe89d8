//! Interrupts into the guest: lines, MSIs, routing, and vectors wired to GSIs.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use api_channel::call::{Irqchip, Irqfd, Msi, Route, RouteKind};
use api_channel::codec::Malformed;
use ioreq_ring::LineChange;
use kvm_bindings::{
    KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_hv_sint, kvm_msi,
};
use kvm_ioctls::VmFd;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::error::Refusal;
use crate::kvm::irqfd;

/// The interrupt lines of a VM. A GSI has one path only: an irqfd, or changes of its level.
#[derive(Debug)]
pub(crate) struct Lines {
    vm: Arc<VmFd>,
    paths: Mutex<BTreeMap<u32, Path>>,
}

/// How a GSI is driven.
#[derive(Debug)]
enum Path {
    /// By level changes; the sequence of the last one applied.
    Level(u32),
    /// By a vector of the function; with `resample`, the guest's EOI comes back.
    Vector {
        vector: u32,
        #[expect(dead_code, reason = "kept open while KVM signals it")]
        resample: Option<Arc<EventFd>>,
    },
}

/// GSIs of a VM: KVM's KVM_MAX_IRQ_ROUTES.
const MOST_GSIS: u32 = 4096;

impl Lines {
    pub(crate) fn new(vm: Arc<VmFd>) -> Self {
        Self { vm, paths: Mutex::default() }
    }

    fn paths(&self) -> MutexGuard<'_, BTreeMap<u32, Path>> {
        self.paths.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Applies a change of level unless a newer one of its GSI was applied; says whether it did. The lock is held over the ioctl:
    /// else two changes of one GSI could reach KVM in the wrong order.
    pub(crate) fn apply(&self, change: LineChange) -> bool {
        let gsi = u32::from(change.gsi);
        let mut paths = self.paths();
        match paths.get(&gsi) {
            Some(Path::Vector { .. }) => return false,
            Some(Path::Level(last)) if (change.sequence.wrapping_sub(*last) as i32) <= 0 => return false,
            _ => {}
        }
        if self.vm.set_irq_line(gsi, change.high).is_err() {
            return false;
        }
        paths.insert(gsi, Path::Level(change.sequence));
        true
    }

    /// Wires a vector to a GSI or unwires it; gives the eventfd that tells of the guest's EOI, to be polled.
    pub(crate) fn wire(&self, call: &Irqfd, vector: BorrowedFd<'_>) -> Result<Option<Arc<EventFd>>, Refusal> {
        let mut paths = self.paths();
        if call.gsi >= MOST_GSIS || call.on > 1 || call.resample > 1 {
            return Err(Refusal::argument(format!("GSI {} or its flags are out of range", call.gsi)));
        }
        if call.on == 0 {
            match paths.get(&call.gsi) {
                Some(Path::Vector { vector: wired, .. }) if *wired == call.vector => {}
                _ => return Err(Refusal::state(format!("vector {} is not wired to GSI {}", call.vector, call.gsi))),
            }
            irqfd(&*self.vm, vector, call.gsi, None, false).map_err(Refusal::nix("unwire a vector"))?;
            paths.remove(&call.gsi);
            return Ok(None);
        }
        let taken = paths.iter().any(|(gsi, path)| {
            *gsi == call.gsi || matches!(path, Path::Vector { vector, .. } if *vector == call.vector)
        });
        if taken {
            let why = format!("GSI {} or vector {} has another path already", call.gsi, call.vector);
            return Err(Refusal::state(why));
        }
        let resample = (call.resample == 1)
            .then(|| EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK))
            .transpose()
            .map_err(Refusal::nix("create an eventfd"))?
            .map(Arc::new);
        irqfd(&*self.vm, vector, call.gsi, resample.as_deref().map(AsFd::as_fd), true)
            .map_err(Refusal::nix("wire a vector to a GSI"))?;
        paths.insert(call.gsi, Path::Vector { vector: call.vector, resample: resample.clone() });
        Ok(resample)
    }
}

/// Replaces the routing; `synics` vCPUs have a SynIC.
pub(crate) fn set_routing(vm: &VmFd, irqchip: Irqchip, synics: u32, routes: &[Route]) -> Result<(), Refusal> {
    let entries = routes.iter().map(|route| to_entry(irqchip, synics, route)).collect::<Result<Vec<_>, _>>()?;
    let table = KvmIrqRouting::from_entries(&entries)
        .map_err(|_| Refusal::argument(format!("a routing table of {} entries", routes.len())))?;
    vm.set_gsi_routing(&table).map_err(Refusal::kvm("set the interrupt routing"))
}

fn to_entry(irqchip: Irqchip, synics: u32, route: &Route) -> Result<kvm_irq_routing_entry, Refusal> {
    if route.reserved != 0 {
        return Err(Malformed.into());
    }
    if route.gsi >= MOST_GSIS {
        return Err(Refusal::argument(format!("GSI {} is out of range", route.gsi)));
    }
    let mut entry = kvm_irq_routing_entry { gsi: route.gsi, ..Default::default() };
    match route.kind {
        kind if kind == RouteKind::Pin as u32 => {
            let pins = match route.address {
                0 | 1 => 8,
                2 => 24,
                _ => 0,
            };
            if irqchip != Irqchip::Full || route.data >= pins {
                return Err(Refusal::argument(format!("no chip in KVM has pin {} of {}", route.data, route.address)));
            }
            entry.type_ = KVM_IRQ_ROUTING_IRQCHIP;
            entry.u.irqchip.irqchip = route.address as u32;
            entry.u.irqchip.pin = route.data;
        }
        kind if kind == RouteKind::Msi as u32 => {
            entry.type_ = KVM_IRQ_ROUTING_MSI;
            entry.u.msi.address_lo = route.address as u32;
            entry.u.msi.address_hi = (route.address >> 32) as u32;
            entry.u.msi.data = route.data;
        }
        kind if kind == RouteKind::Sint as u32 => {
            let vcpu = u32::try_from(route.address).ok().filter(|vcpu| *vcpu < synics && route.data < 16);
            let Some(vcpu) = vcpu else {
                return Err(Refusal::argument(format!("no SINT {} of a vCPU {}", route.data, route.address)));
            };
            entry.type_ = KVM_IRQ_ROUTING_HV_SINT;
            // A vCPU's index is its number: nobody gives it another one.
            entry.u.hv_sint = kvm_irq_routing_hv_sint { vcpu, sint: route.data };
        }
        kind => return Err(Refusal::argument(format!("no route is of kind {kind}"))),
    }
    Ok(entry)
}

/// Raises an MSI.
pub(crate) fn signal_msi(vm: &VmFd, msi: &Msi) -> Result<(), Refusal> {
    if msi.reserved != 0 {
        return Err(Malformed.into());
    }
    let message = kvm_msi {
        address_lo: msi.address as u32,
        address_hi: (msi.address >> 32) as u32,
        data: msi.data,
        ..Default::default()
    };
    // 0: the guest's APIC blocks it, which is the guest's business.
    vm.signal_msi(message).map(drop).map_err(Refusal::kvm("raise an MSI"))
}
