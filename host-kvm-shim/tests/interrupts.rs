//! Interrupts into the guest: lines with their order, MSIs, vectors wired to GSIs, and how the guest's EOI comes back.

mod soc;

use std::time::Instant;

use api_channel::Status;
use api_channel::call::{Call, Irqchip, Irqfd, Msi, Route, RouteKind};
use api_channel::event::Event;
use ioreq_ring::{Completion, Kind, LineChange};
use pcie_function::SocFunction;
use soc::Soc;

/// Where guests have their handler, behind all else.
const HANDLER: u64 = 0x2000;

/// Real-mode guest: both PICs at vectors 0x20 and 0x28, IRQ 4 alone unmasked and level-triggered, a handler at 0x2000 that writes 0x44 to
/// port 0x90 and ends the interrupt; then `sti`, out 0x91, and `hlt` for ever.
fn pic_guest(soc: &mut Soc) {
    let init = [
        &[0xfa, 0xb0, 0x11, 0xe6, 0x20, 0xb0, 0x20, 0xe6, 0x21, 0xb0, 0x04, 0xe6, 0x21, 0xb0, 0x01, 0xe6, 0x21][..],
        &[0xb0, 0xef, 0xe6, 0x21],             // mov al, 0xef; out 0x21, al   IRQ 4 alone
        &[0xb0, 0x10, 0xba, 0xd0, 0x04, 0xee], // mov al, 0x10; mov dx, 0x4d0; out dx, al   ELCR: level
        &[0xc7, 0x06, 0x90, 0x00, 0x00, 0x20], // mov word [0x24 * 4], 0x2000
        &[0xc7, 0x06, 0x92, 0x00, 0x00, 0x00], // mov word [0x24 * 4 + 2], 0
        &[0xfb, 0xe6, 0x91, 0xf4, 0xeb, 0xfd], // sti; out 0x91, al; hlt; jmp back
    ]
    .concat();
    // mov al, 0x44; out 0x90, al; mov al, 0x20; out 0x20, al; iret
    let handler = [0xb0, 0x44, 0xe6, 0x90, 0xb0, 0x20, 0xe6, 0x20, 0xcf];
    soc.real_mode(1, Irqchip::Full, &init);
    soc.function.write(HANDLER, &handler).unwrap();
    soc.run();
    soc.until("ready", |soc| soc.seen.len() == 1);
    assert_eq!(soc.seen[0].request.address, 0x91);
}

/// Looks again and again where the guest is, until that isn't its handler.
fn leaves_handler(soc: &mut Soc) {
    let deadline = Instant::now() + soc::PATIENCE;
    loop {
        soc.pause();
        let rip = soc.regs(0).rip;
        soc.run();
        if rip < HANDLER {
            return;
        }
        assert!(Instant::now() < deadline, "it stays in its handler");
    }
}

fn line(high: bool, sequence: u32) -> LineChange {
    LineChange { gsi: 4, high, sequence }
}

fn interrupts(soc: &Soc) -> usize {
    soc.seen.iter().filter(|s| s.request.address == 0x90).count()
}

#[test]
fn a_line_is_high_until_the_completion_that_lowers_it_and_old_changes_are_dropped() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let mut sequence = 10;
    soc.handler = Box::new(move |seen, _| {
        let mut completion = Completion::ok(0);
        if seen.request.address == 0x90 {
            // The device lowers its line when its handler has spoken to it; an older change of the same GSI comes too late.
            sequence += 10;
            completion.lines = [Some(line(false, sequence)), Some(line(true, sequence - 9))];
        }
        Some(completion)
    });
    pic_guest(&mut soc);
    for n in 1..=5 {
        soc.client.order(&Call::Lines(vec![line(true, n * 10 + 1).to_word()])).unwrap();
        soc.function.raise(0);
        soc.until("interrupted", |soc| interrupts(soc) == n as usize);
        // The guest is out of its handler before the next rise: one while the last is in service may be one more.
        leaves_handler(&mut soc);
    }
    soc.ok(&Call::Lines(vec![line(true, 7).to_word(), 0]));
    soc.ok(&Call::Ping);
    std::thread::sleep(std::time::Duration::from_millis(20));
    soc.ok(&Call::Ping);
    assert_eq!(interrupts(&soc), 5, "exactly one interrupt a rise, none by a stale change");
    assert_eq!(soc.counter("shim.line_stale"), 5);
    let (status, _) = soc.refused(&Call::Lines(vec![1]));
    assert_eq!(status, Status::ARGUMENT);
    assert!(soc.shut_down().success());
}

#[test]
fn a_vector_of_the_function_is_the_guest_s_interrupt_and_its_eoi_comes_back() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    pic_guest(&mut soc);
    let created = soc.created.unwrap();
    let wire = |vector, on, resample| Call::Irqfd(Irqfd { vector, gsi: 4, on, resample });
    for vector in [0, created.lane_vector, created.free_vector + created.free_vectors] {
        let (status, why) = soc.refused(&wire(vector, 1, 0));
        assert_eq!(status, Status::ARGUMENT, "{why}");
    }
    let (status, _) = soc.refused(&wire(created.free_vector, 0, 0));
    assert_eq!(status, Status::STATE, "it is not wired");
    assert_ne!(created.features & api_channel::call::VmCreated::RESAMPLE, 0);
    soc.ok(&wire(created.free_vector, 1, 1));
    let (status, _) = soc.refused(&wire(created.free_vector + 1, 1, 0));
    assert_eq!(status, Status::STATE, "a GSI has one path");
    for n in 1..=3 {
        soc.function.raise(created.free_vector);
        soc.until("interrupted", |soc| interrupts(soc) == n);
        soc.until("ended", |soc| soc.events.iter().filter(|e| **e == Event::Eoi { gsi: 4 }).count() >= n);
    }
    soc.ok(&wire(created.free_vector, 0, 0));
    soc.function.raise(created.free_vector);
    soc.ok(&Call::Ping);
    assert_eq!(interrupts(&soc), 3);
    // Unwired, the GSI may be driven by level again.
    soc.ok(&Call::Lines(vec![line(true, 1).to_word()]));
    soc.until("interrupted", |soc| interrupts(soc) > 3);
    assert!(soc.shut_down().success());
}

#[test]
fn routes_and_msis_reach_the_lapic_and_a_split_irqchip_reports_the_eoi() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    // Enables the LAPIC (spurious vector 0xff), in big real mode by a DS whose base is the LAPIC's: set below. Handler of vectors 0x30 and 0x31 at
    // 0x2000: out 0x90, al; mov dword [0xb0], 0 (EOI); iret
    let init = [
        &[0xfa, 0x2e, 0xc7, 0x06, 0xc0, 0x00, 0x00, 0x20, 0x2e, 0xc7, 0x06, 0xc2, 0x00, 0x00, 0x00][..], // vector 0x30
        &[0x2e, 0xc7, 0x06, 0xc4, 0x00, 0x00, 0x20, 0x2e, 0xc7, 0x06, 0xc6, 0x00, 0x00, 0x00],           // vector 0x31
        &[0x66, 0xc7, 0x06, 0xf0, 0x00, 0xff, 0x01, 0x00, 0x00], // mov dword [0xf0], 0x1ff
        &[0xfb, 0xe6, 0x91, 0xf4, 0xeb, 0xfd],                   // sti; out 0x91, al; hlt; jmp back
    ]
    .concat();
    let handler = [0xe6, 0x90, 0x66, 0xc7, 0x06, 0xb0, 0x00, 0, 0, 0, 0, 0xcf];
    soc.real_mode(1, Irqchip::Split, &init);
    soc.function.write(HANDLER, &handler).unwrap();
    let list = soc.state(0, api_channel::state::Type::SREGS.group());
    let mut sregs: api_channel::state::Sregs = api_channel::state::records(&list).unwrap()[0].get().unwrap();
    sregs.ds.base = 0xfee0_0000;
    let records = api_channel::state::Records::default().put(api_channel::state::Type::SREGS, &sregs).done();
    soc.ok(&Call::SetState { target: 0, records });
    soc.run();
    soc.until("ready", |soc| soc.seen.len() == 1);
    let msi = |data| Msi { address: 0xfee0_0000, data, reserved: 0 };
    soc.ok(&Call::Msi(msi(0x30)));
    soc.until("interrupted", |soc| interrupts(soc) == 1);

    let route = |gsi, kind: RouteKind, address, data| Route { gsi, kind: kind as u32, address, data, reserved: 0 };
    let (status, _) = soc.refused(&Call::SetRouting(vec![route(4, RouteKind::Pin, 2, 4)]));
    assert_eq!(status, Status::ARGUMENT, "the IOAPIC is on the SoC");
    // A GSI below 24 whose MSI is level-triggered (data bit 15): an IOAPIC's pin, whose EOI is an exit.
    soc.ok(&Call::SetRouting(vec![
        route(9, RouteKind::Msi, 0xfee0_0000, 0x8031),
        route(40, RouteKind::Msi, 0xfee0_0000, 0x30),
    ]));
    let created = soc.created.unwrap();
    assert_eq!(created.features & api_channel::call::VmCreated::RESAMPLE, 0);
    let (status, _) = soc.refused(&Call::Irqfd(Irqfd { vector: created.free_vector, gsi: 9, on: 1, resample: 1 }));
    assert_eq!(status, Status::UNAVAILABLE);
    soc.ok(&Call::Irqfd(Irqfd { vector: created.free_vector, gsi: 40, on: 1, resample: 0 }));
    soc.function.raise(created.free_vector);
    soc.until("interrupted", |soc| interrupts(soc) == 2);
    soc.ok(&Call::Lines(vec![LineChange { gsi: 9, high: true, sequence: 1 }.to_word()]));
    soc.until("ended", |soc| soc.seen.iter().any(|s| s.request.kind == Kind::EOI));
    assert_eq!(interrupts(&soc), 3);
    let eoi = soc.seen.iter().find(|s| s.request.kind == Kind::EOI).unwrap().request;
    assert_eq!((eoi.address, eoi.length), (0x31, 1));
    assert!(soc.shut_down().success());
}
