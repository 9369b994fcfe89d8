//! Interrupts of every kind on this machine's /dev/kvm.

mod run;

use bench::bare::{Driver, Irqchip, Options};
use kvm_bindings::{
    KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use payloads::{interrupts, smp};
use run::{drive, run};
use vmm_sys_util::eventfd::EventFd;

fn with(irqchip: Irqchip) -> Options {
    Options { irqchip, ..Options::default() }
}

/// Sends a message after each count.
struct Messages(u32);

impl Driver for Messages {
    fn answer(&mut self, _vcpu: u8, count: u32, vm: &VmFd) {
        assert_eq!(count, self.0);
        self.0 += 1;
        let message =
            kvm_msi { address_lo: interrupts::MSI_ADDRESS as u32, data: interrupts::MSI_DATA, ..Default::default() };
        vm.signal_msi(message).unwrap();
    }
}

/// Signals an irqfd after each count.
struct Irqfd(Option<EventFd>);

impl Driver for Irqfd {
    fn answer(&mut self, _vcpu: u8, _count: u32, vm: &VmFd) {
        let irqfd = self.0.get_or_insert_with(|| route(vm));
        irqfd.write(1).unwrap();
    }
}

fn route(vm: &VmFd) -> EventFd {
    const GSI: u32 = 30;
    let route = kvm_irq_routing_entry {
        gsi: GSI,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 {
            msi: kvm_irq_routing_msi {
                address_lo: interrupts::MSI_ADDRESS as u32,
                data: interrupts::MSI_DATA,
                ..Default::default()
            },
        },
        ..Default::default()
    };
    vm.set_gsi_routing(&KvmIrqRouting::from_entries(&[route]).unwrap()).unwrap();
    let irqfd = EventFd::new(libc::EFD_NONBLOCK).unwrap();
    vm.register_irqfd(&irqfd, GSI).unwrap();
    irqfd
}

#[test]
fn messages() {
    if !run::kvm_or_skip() {
        return;
    }
    drive(&interrupts::msi().unwrap(), with(Irqchip::Full), Messages(0));
    drive(&interrupts::msi().unwrap(), with(Irqchip::Split), Messages(0));
}

#[test]
fn irqfd() {
    if !run::kvm_or_skip() {
        return;
    }
    drive(&interrupts::msi().unwrap(), with(Irqchip::Full), Irqfd(None));
    drive(&interrupts::msi().unwrap(), with(Irqchip::Split), Irqfd(None));
}

#[test]
fn level_line_with_notice_of_each_end_of_interrupt() {
    if !run::kvm_or_skip() {
        return;
    }
    // 0 on hardware; the software backend gives one in some runs.
    const TOLERATED: u32 = interrupts::LEVEL_ROUNDS / 8;
    let outcome = run(&interrupts::level().unwrap(), with(Irqchip::Split));
    let surplus = interrupts::parse_surplus(&outcome.console).unwrap();
    assert!(surplus <= TOLERATED, "{surplus} of {}", interrupts::LEVEL_ROUNDS);
}

#[test]
fn interrupts_between_vcpus() {
    if !run::kvm_or_skip() {
        return;
    }
    run(&smp::ipi(2).unwrap(), with(Irqchip::Full));
    run(&smp::ipi(5).unwrap(), with(Irqchip::Split));
}
