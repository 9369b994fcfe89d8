//! A VM's processors, as its monitors reach them: once the machine is built, from any thread.

use std::sync::{Arc, OnceLock};

use tokio::sync::broadcast::WeakSender;

use super::event::{AcpiOstInfo, Event, EventKind};
use crate::cpus::{CpuListener, CpusHandle, Occupant};
use crate::devices::CpuReport;

/// Where the processors are found once there are any.
#[derive(Clone, Debug, Default)]
pub(super) struct CpusPlace(Arc<OnceLock<CpusHandle>>);

impl CpusPlace {
    pub(super) fn get(&self) -> Option<&CpusHandle> {
        self.0.get()
    }

    pub(super) fn fill(&self, cpus: CpusHandle) {
        // A machine is built once.
        let _ = self.0.set(cpus);
    }
}

/// Tells monitors of processors.
pub(super) struct Teller(pub(super) WeakSender<Event>);

impl Teller {
    fn tell(&self, kind: EventKind) {
        if let Some(events) = self.0.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(Event::now(kind));
        }
    }
}

impl CpuListener for Teller {
    fn deleted(&self, Occupant { id, path }: Occupant) {
        self.tell(EventKind::DeviceDeleted { device: Some(id), path });
    }

    fn reported(&self, id: Option<String>, report: CpuReport) {
        let CpuReport { cpu, source, status } = report;
        let info = AcpiOstInfo { device: id, slot: cpu.to_string(), slot_type: "CPU", source, status };
        self.tell(EventKind::AcpiDeviceOst { info });
    }
}
