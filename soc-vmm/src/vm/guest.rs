//! What the guest and its vCPUs report, on its way to the VM's control loop.

use std::sync::atomic::{AtomicBool, Ordering};

use ioreq_ring::Request;
use ioreq_ring::wire::exit_reason;
use tokio::sync::mpsc::UnboundedSender;

use crate::power::{PowerEvent, PowerSink};

/// A report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum GuestEvent {
    /// The guest wants its machine reset, off, or ended.
    Power(PowerEvent),
    /// A vCPU can't go on.
    Failed(String),
    /// The function no longer carries.
    Lost(String),
}

/// Passes reports on. At most a few a reset can wait: each parks the vCPU that made it.
#[derive(Debug)]
pub(super) struct Relay {
    events: UnboundedSender<GuestEvent>,
    park: AtomicBool,
}

impl Relay {
    pub(super) fn new(events: UnboundedSender<GuestEvent>) -> Self {
        Self { events, park: AtomicBool::new(false) }
    }

    pub(super) fn tell(&self, event: GuestEvent) {
        // Nobody listens once the VM has ended.
        let _ = self.events.send(event);
    }

    /// Whether the access that was served must keep its vCPU out of the guest.
    pub(super) fn take_park(&self) -> bool {
        self.park.swap(false, Ordering::Relaxed)
    }

    /// A vCPU's exit report.
    pub(super) fn report(&self, vcpu: usize, request: &Request) {
        self.park.store(true, Ordering::Relaxed);
        let [a, b, c, d] = request.words.unwrap_or_default();
        let event = match request.address {
            exit_reason::SHUTDOWN => GuestEvent::Power(PowerEvent::Reset),
            exit_reason::INTERNAL_ERROR => GuestEvent::Failed(format!(
                "vCPU {vcpu}: KVM internal error, suberror {a} ({b:#x} {c:#x} {d:#x}): the guest did what this host's KVM can't emulate"
            )),
            exit_reason::FAIL_ENTRY => {
                GuestEvent::Failed(format!("vCPU {vcpu}: the CPU refused to enter the guest, hardware reason {a:#x}"))
            }
            exit_reason::SYSTEM_EVENT => GuestEvent::Failed(format!("vCPU {vcpu}: system event {a}, flags {b:#x}")),
            exit_reason::HALT => {
                GuestEvent::Failed(format!("vCPU {vcpu}: halted with no interrupt controller to wake it"))
            }
            exit_reason::RUN_FAILED => GuestEvent::Failed(format!("vCPU {vcpu}: KVM_RUN failed, errno {a}")),
            _ => GuestEvent::Failed(format!("vCPU {vcpu}: KVM exit {a}, which host-kvm-shim doesn't know")),
        };
        self.tell(event);
    }
}

impl PowerSink for Relay {
    fn power(&self, event: PowerEvent) {
        self.park.store(true, Ordering::Relaxed);
        self.tell(GuestEvent::Power(event));
    }
}
