//! What the guest and its vCPUs report, on its way to the VM's control loop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ioreq_ring::Request;
use ioreq_ring::wire::exit_reason;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use crate::power::{CrashEvent, CrashSink, PowerEvent, PowerSink};
use crate::virtio::block::{DiskError, DiskErrorListener, ErrorAction};

/// A report.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum GuestEvent {
    /// The guest wants its machine reset, off, or ended.
    Power(PowerEvent),
    /// This vCPU's triple fault resets the machine.
    TripleFault(u32),
    /// The guest's kernel panicked.
    Crashed(CrashEvent),
    /// A disk's image failed, and the VM is to wait until somebody has seen to it.
    DiskStopped,
    /// A vCPU can't go on.
    Failed(String),
    /// The function no longer carries.
    Lost(String),
}

/// Reports that may wait: each parks the vCPU that made it, so that an honest host has one for each vCPU.
const WAITING: usize = 512;

/// The guest asked KVM for a reset, as by Hyper-V's HV_X64_MSR_RESET (KVM api.rst §5, `KVM_EXIT_SYSTEM_EVENT`).
const KVM_SYSTEM_EVENT_RESET: u64 = 2;

/// Passes reports on.
#[derive(Debug)]
pub(super) struct Relay {
    events: Sender<GuestEvent>,
    park: AtomicBool,
    /// [`GuestEvent::DiskStopped`] is on its way.
    stopping: AtomicBool,
}

impl Relay {
    /// A relay, and where its reports come out.
    pub(super) fn new() -> (Self, Receiver<GuestEvent>) {
        let (events, receiver) = channel(WAITING);
        (Self { events, park: AtomicBool::new(false), stopping: AtomicBool::new(false) }, receiver)
    }

    /// Passes a report on; one too many is dropped: the VM is about to be reset or ended anyway.
    pub(super) fn tell(&self, event: GuestEvent) {
        // Nobody listens once the VM has ended.
        let _ = self.events.try_send(event);
    }

    /// Says that the VM is lost: the last report, which is not dropped. Waits for room, so not from a task of tokio's.
    pub(super) fn lost(&self, why: String) {
        // Nobody listens once the VM has ended.
        let _ = self.events.blocking_send(GuestEvent::Lost(why));
    }

    /// A disk stops the VM. Many of its requests may; one report is enough.
    fn disk_stopped(&self) {
        if !self.stopping.swap(true, Ordering::AcqRel) && self.events.try_send(GuestEvent::DiskStopped).is_err() {
            self.stopping.store(false, Ordering::Release);
        }
    }

    /// What stopped was heard: the next one is another.
    pub(super) fn heard_of_stop(&self) {
        self.stopping.store(false, Ordering::Release);
    }

    /// Whether the access that was served must keep its vCPU out of the guest.
    pub(super) fn take_park(&self) -> bool {
        self.park.load(Ordering::Relaxed) && self.park.swap(false, Ordering::Relaxed)
    }

    /// A vCPU's exit report.
    pub(super) fn report(&self, vcpu: usize, request: &Request) {
        self.park.store(true, Ordering::Relaxed);
        let [a, b, c, d] = request.words.unwrap_or_default();
        let event = match request.address {
            exit_reason::SHUTDOWN => GuestEvent::TripleFault(vcpu as u32),
            exit_reason::INTERNAL_ERROR => GuestEvent::Failed(format!("vCPU {vcpu}: {}", internal_error(a, [b, c, d]))),
            exit_reason::FAIL_ENTRY => {
                GuestEvent::Failed(format!("vCPU {vcpu}: the CPU refused to enter the guest, hardware reason {a:#x}"))
            }
            exit_reason::SYSTEM_EVENT if a == KVM_SYSTEM_EVENT_RESET => GuestEvent::Power(PowerEvent::Reset),
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
        // No vCPU asked to be woken: none is in the guest.
        if event != PowerEvent::WakeUp {
            self.park.store(true, Ordering::Relaxed);
        }
        self.tell(GuestEvent::Power(event));
    }
}

impl CrashSink for Relay {
    fn crashed(&self, event: CrashEvent) {
        self.tell(GuestEvent::Crashed(event));
    }
}

/// Disks that fail: monitors hear of all, the control loop of those that stop the VM.
pub(super) struct DiskErrors {
    pub(super) monitors: Arc<dyn DiskErrorListener>,
    pub(super) relay: Arc<Relay>,
}

impl DiskErrorListener for DiskErrors {
    fn failed(&self, error: DiskError) {
        let stops = error.action == ErrorAction::Stop;
        // In this order they hear why the VM stops.
        self.monitors.failed(error);
        if stops {
            self.relay.disk_stopped();
        }
    }
}

/// KVM's internal error in words (KVM api.rst §5, `KVM_EXIT_INTERNAL_ERROR`): of a failed emulation, which instruction it was.
fn internal_error(suberror: u64, data: [u64; 3]) -> String {
    const EMULATION: u64 = 1;
    /// The words behind the flags are the instruction: how many bytes, up to 15 of them.
    const HAS_INSTRUCTION: u64 = 1;
    let [flags, ..] = data;
    if suberror != EMULATION || flags & HAS_INSTRUCTION == 0 {
        let [a, b, c] = data;
        return format!("KVM internal error, suberror {suberror} ({a:#x} {b:#x} {c:#x})");
    }
    let bytes: Vec<u8> = data[1..].iter().flat_map(|word| word.to_le_bytes()).collect();
    let length = usize::from(bytes[0]).min(bytes.len() - 1);
    let instruction: Vec<_> = bytes[1..=length].iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "this host's KVM can't emulate what the guest does ({}…); a KVM with hardware virtualization need not",
        instruction.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instruction_that_kvm_can_t_emulate_is_shown() {
        let said = internal_error(1, [1, 0x8d49_c0f7_6942_c404, 0]);
        assert!(said.contains("(c4 42 69 f7…)"), "{said}");
        // What a host makes up is shown, not trusted.
        assert!(internal_error(1, [1, u64::MAX, u64::MAX]).contains("ff ff"));
        assert!(internal_error(1, [0, 7, 0]).contains("suberror 1 (0x0 0x7 0x0)"));
        assert!(internal_error(3, [1, 7, 0]).contains("suberror 3"));
    }
}
