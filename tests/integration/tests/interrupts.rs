//! Every way into the guest's interrupt controllers.

use api_channel::call::{Call, Irqchip, Irqfd, Msi, Route, RouteKind, VmCreated};
use iced_x86::code_asm::*;
use integration::soc::{Answer, Board, FLAT_CODE, Ioapic, Seen, Shape, Soc, resampled};
use integration::{kvm, test_name};
use ioreq_ring::{Completion, Kind, LineChange};
use payloads::{EXIT_FAIL, EXIT_PASS, Payload, interrupts, ports, smp};

const MESSAGE: Msi = Msi { address: interrupts::MSI_ADDRESS, data: interrupts::MSI_DATA, reserved: 0 };

fn started(payload: &Payload, irqchip: Irqchip) -> (Soc, VmCreated) {
    let mut soc = Soc::start(&[]);
    let created = soc.create(&Shape { irqchip, ..Shape::of(payload) });
    soc.load(payload);
    (soc, created)
}

/// Runs [`interrupts::msi`] to its end; `send` sends one interrupt after each count but the last.
fn count_interrupts(soc: &mut Soc, mut send: impl FnMut(&mut Soc)) {
    soc.run();
    let mut board = Board::default();
    let mut counts = 0;
    while board.exit.is_none() {
        let seen = soc.take();
        let answer = board.serve(&seen);
        soc.answer(&seen, answer);
        if seen.writes(ports::COMMAND) {
            assert_eq!(seen.request.data, counts, "one interrupt a message");
            counts += 1;
            if counts <= u64::from(interrupts::MSI_COUNT) {
                send(soc);
            }
        }
    }
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    assert_eq!(counts, u64::from(interrupts::MSI_COUNT) + 1);
}

#[test]
fn messages() {
    if !kvm(&test_name()) {
        return;
    }
    for irqchip in [Irqchip::Full, Irqchip::Split] {
        let (mut soc, _) = started(&interrupts::msi().unwrap(), irqchip);
        count_interrupts(&mut soc, |soc| soc.order(&Call::Msi(MESSAGE)));
        assert!(soc.shut_down().unwrap().success());
    }
}

#[test]
fn a_vector_of_the_function_is_the_guests_interrupt() {
    if !kvm(&test_name()) {
        return;
    }
    const GSI: u32 = 30;
    for irqchip in [Irqchip::Full, Irqchip::Split] {
        let (mut soc, created) = started(&interrupts::msi().unwrap(), irqchip);
        assert!(created.free_vectors > 0);
        let vector = created.free_vector;
        let route =
            Route { gsi: GSI, kind: RouteKind::Msi as u32, address: MESSAGE.address, data: MESSAGE.data, reserved: 0 };
        soc.ok(&Call::SetRouting(vec![route]));
        let wire = |on| Call::Irqfd(Irqfd { vector, gsi: GSI, on, resample: 0 });
        soc.ok(&wire(1));
        count_interrupts(&mut soc, |soc| pcie_function::SocFunction::raise(&soc.function, vector));
        soc.ok(&wire(0));
        assert!(soc.shut_down().unwrap().success());
    }
}

/// The line that a write of [`ports::IRQ_LINES`] sets, and its level.
fn line(seen: &Seen) -> Option<(u16, bool)> {
    let port = u16::try_from(seen.request.address).ok()?;
    let line = port.checked_sub(ports::IRQ_LINES).filter(|&line| line < 24 && seen.writes(port))?;
    Some((line, seen.request.data != 0))
}

/// Interrupts that came though the line was low. A software KVM backend gives some: `payloads::interrupts::level` says when.
fn surplus(board: &Board) -> u32 {
    assert_eq!(board.exit, Some(EXIT_PASS), "{}", board.console);
    interrupts::parse_surplus(&board.console).unwrap()
}

#[test]
fn a_level_line_is_raised_again_at_the_notice_of_its_end() {
    if !kvm(&test_name()) {
        return;
    }
    let (mut soc, _) = started(&interrupts::level().unwrap(), Irqchip::Split);
    soc.run();
    let (mut board, mut ioapic, mut calls) = (Board::default(), Ioapic::default(), Vec::new());
    while board.exit.is_none() {
        let seen = soc.take();
        let answer = match (ioapic.serve(&seen, &mut calls), line(&seen)) {
            (Some(answer), _) => answer,
            (None, Some((pin, high))) => {
                ioapic.set_line(pin.into(), high, &mut calls);
                Answer::Plain(Completion::ok(0))
            }
            (None, None) => board.serve(&seen),
        };
        for call in calls.drain(..) {
            soc.ok(&call);
        }
        soc.answer(&seen, answer);
    }
    let surplus = surplus(&board);
    // 0 on hardware. A software backend tells of some ends early, the more the busier its host is; a line that fell after the end
    // would give one a round.
    assert!(surplus < interrupts::LEVEL_ROUNDS / 2, "{surplus} interrupts too many");
    // Each entry of the handler ended by a notice; the very last one's may have come too late.
    let entries = interrupts::LEVEL_ROUNDS * interrupts::LEVEL_ENTRIES + surplus;
    assert!((entries - 1..=entries).contains(&ioapic.ends), "{} notices of {entries} ends", ioapic.ends);
    assert!(soc.shut_down().unwrap().success());
}

#[test]
fn a_level_line_on_a_vector_is_resampled() {
    if !kvm(&test_name()) {
        return;
    }
    let (mut soc, created) = started(&interrupts::level().unwrap(), Irqchip::Full);
    if created.features & VmCreated::RESAMPLE == 0 {
        testbed::skip(&test_name(), "this KVM has no irqfd with resample");
        return;
    }
    let (vector, gsi) = (created.free_vector, u32::from(interrupts::LEVEL_LINE));
    soc.ok(&Call::Irqfd(Irqfd { vector, gsi, on: 1, resample: 1 }));
    soc.run();
    let (board, notices) = resampled(&mut soc, vector);
    let surplus = surplus(&board);
    assert!(notices >= interrupts::LEVEL_ROUNDS * (interrupts::LEVEL_ENTRIES - 1), "{notices} notices");
    if surplus > 0 {
        // Told of the end when the interrupt is delivered, the device raises its line once too often.
        testbed::skip(&test_name(), "this KVM tells of the end of an interrupt when it delivers it");
        assert!(surplus <= interrupts::LEVEL_ROUNDS, "{surplus}");
    }
    assert!(soc.shut_down().unwrap().success());
}

#[test]
fn vcpus_interrupt_each_other() {
    if !kvm(&test_name()) {
        return;
    }
    for (vcpus, irqchip) in [(2, Irqchip::Full), (5, Irqchip::Split)] {
        let (mut soc, _) = started(&smp::ipi(vcpus).unwrap(), irqchip);
        soc.run();
        let mut board = Board::default();
        assert_eq!(soc.run_to_exit(&mut board), EXIT_PASS, "{}", board.console);
        assert!(soc.shut_down().unwrap().success());
    }
}

const ROUNDS: u32 = 300;
const GSI: u16 = 5;

/// Real mode, 8259 as after a PC's firmware: raises GSI 5 by port 0x2005 [`ROUNDS`] times. The interrupt must come before the
/// instruction that follows; its handler, which stands first, lowers the line.
fn raise_and_look() -> Vec<u8> {
    let assemble = || -> Result<Vec<u8>, iced_x86::IcedError> {
        const COUNT: u32 = 0x600;
        const GATE: u32 = (0x20 + GSI as u32) * 4;
        let line = u32::from(ports::IRQ_LINES + GSI);
        let mut a = CodeAssembler::new(16)?;
        let [mut start, mut next, mut late, mut end] = [0; 4].map(|_| a.create_label());
        a.call(start)?; // leaves the handler's address on the stack

        a.push(ax)?;
        a.inc(word_ptr(di))?;
        a.xor(al, al)?;
        a.out(dx, al)?;
        a.mov(al, 0x20)?;
        a.out(0x20, al)?;
        a.pop(ax)?;
        a.iret()?;

        a.set_label(&mut start)?;
        a.mov(si, GATE)?;
        a.pop(word_ptr(si))?;
        a.mov(word_ptr(si + 2), 0)?;
        a.mov(di, COUNT)?;
        a.mov(word_ptr(di), 0)?;
        // ICW1 to ICW4: vectors from 0x20; then all masked but one.
        for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, !(1 << GSI) & 0xff)] {
            a.mov(al, value)?;
            a.out(port, al)?;
        }
        a.sti()?;
        a.mov(cx, ROUNDS)?;
        a.xor(bx, bx)?;
        a.mov(dx, line)?;
        a.set_label(&mut next)?;
        a.inc(bx)?;
        a.mov(al, 1)?;
        a.out(dx, al)?;
        a.cmp(word_ptr(di), bx)?;
        a.jne(late)?;
        a.loop_(next)?;
        a.mov(al, u32::from(EXIT_PASS))?;
        a.jmp(end)?;
        a.set_label(&mut late)?;
        a.mov(al, u32::from(EXIT_FAIL))?;
        a.set_label(&mut end)?;
        a.mov(dx, u32::from(ports::DEBUG_EXIT))?;
        a.out(dx, al)?;
        a.hlt()?;
        a.assemble(FLAT_CODE)
    };
    assemble().unwrap()
}

#[test]
fn a_line_change_of_a_completion_is_there_before_the_guest_goes_on() {
    if !kvm(&test_name()) {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.create(&Shape { vcpus: 1, memory: 1 << 20, irqchip: Irqchip::Full, spin_ns: 0, dirty_ring: 0 });
    soc.load_real_mode(&raise_and_look());
    soc.run();
    let mut board = Board::default();
    let mut sequence = 0;
    while board.exit.is_none() {
        let seen = soc.take();
        assert_eq!(seen.request.kind, Kind::PIO);
        let answer = match line(&seen) {
            Some((gsi, high)) => {
                sequence += 1;
                let change = LineChange { gsi, high, sequence };
                Answer::Plain(Completion { lines: [Some(change), None], ..Completion::ok(0) })
            }
            None => board.serve(&seen),
        };
        soc.answer(&seen, answer);
    }
    assert_eq!(board.exit, Some(EXIT_PASS), "round {}", sequence / 2);
    assert_eq!(sequence, 2 * ROUNDS);
    assert_eq!(soc.counter("shim.line_stale"), 0);
    assert!(soc.shut_down().unwrap().success());
}
