//! Several vCPUs: coming up, interrupting each other, and doing nothing.

use iced_x86::code_asm::*;

use crate::kit::{LongMode, layout};
use crate::{Ends, IcedError, Payload};

/// Brings up all vCPUs by INIT and start-up IPI; each says so on the debug console, under a lock: `vcpu ` and its
/// APIC id in 16 hexadecimal digits. The first says it last, and passes.
pub fn bring_up(vcpus: u8) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.start_other_vcpus(vcpus)?;
    say_vcpu(&mut p)?;
    p.pass()?;

    p.other_vcpus()?;
    say_vcpu(&mut p)?;
    p.online()?;
    p.halt()?;
    Ok(Payload::kernel("smp", vcpus, p.finish()?))
}

/// Brings up all vCPUs, whatever their APIC ids; each finds its id in CPUID, in leaf 1 and as the topology leaf's x2APIC id, and says
/// it as in [`bring_up`]. Ids are below [`crate::MAX_VCPUS`].
pub fn identify(vcpus: u8) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    p.start_all_other_vcpus(u32::from(vcpus) - 1)?;
    say_identity(&mut p)?;
    p.pass()?;

    p.other_vcpus()?;
    say_identity(&mut p)?;
    p.online()?;
    p.halt()?;
    Ok(Payload::kernel("identify", vcpus, p.finish()?))
}

/// Intel SDM volume 2A, "CPUID", leaves 1 and 0xb.
fn say_identity(p: &mut LongMode) -> Result<(), IcedError> {
    p.lock(layout::CONSOLE_LOCK)?;
    p.asm.mov(eax, 1)?;
    p.asm.xor(ecx, ecx)?;
    p.asm.cpuid()?;
    p.asm.shr(ebx, 24)?;
    p.expect(rbx, r15, "the initial APIC id")?;
    p.asm.mov(eax, 0xb)?;
    p.asm.xor(ecx, ecx)?;
    p.asm.cpuid()?;
    p.asm.mov(edx, edx)?;
    p.expect(rdx, r15, "the x2APIC id")?;
    p.unlock(layout::CONSOLE_LOCK)?;
    say_vcpu(p)
}

fn say_vcpu(p: &mut LongMode) -> Result<(), IcedError> {
    p.lock(layout::CONSOLE_LOCK)?;
    p.print("vcpu ")?;
    p.print_hex(r15)?;
    p.print("\n")?;
    p.unlock(layout::CONSOLE_LOCK)
}

/// Sends an interrupt round the vCPUs, [`IPI_ROUNDS`] times: each sends it on from its handler, and is halted
/// otherwise. Then one from the first to all others at once.
pub fn ipi(vcpus: u8) -> Result<Payload, IcedError> {
    const ROUND_VECTOR: u8 = 0x61;
    const ALL_VECTOR: u8 = 0x62;
    const ALL_BUT_SELF: u32 = 3 << 18;
    let rounds = |vcpu: u8| layout::word(1 + u32::from(vcpu));
    let reached = layout::word(0);
    let last_word = rounds(vcpus);
    assert!(last_word < layout::CODE);

    let mut p = LongMode::new()?;
    p.enable_apic()?;
    p.start_other_vcpus(vcpus)?;
    p.asm.mov(ecx, 1)?;
    p.send_ipi(ecx, ROUND_VECTOR.into())?;
    p.asm.mov(ebx, IPI_ROUNDS)?;
    p.sleep_until(rounds(0), ebx)?;
    p.asm.xor(ecx, ecx)?;
    p.send_ipi(ecx, ALL_BUT_SELF | u32::from(ALL_VECTOR))?;
    p.spin_until(reached, u32::from(vcpus) - 1)?;
    for vcpu in 0..vcpus {
        p.asm.mov(ecx, dword_ptr(rounds(vcpu)))?;
        p.expect(rcx, rbx, &format!("interrupts of vCPU {vcpu}"))?;
    }
    p.pass()?;

    p.other_vcpus()?;
    p.enable_apic()?;
    p.asm.sti()?;
    p.online()?;
    p.halt()?;

    p.handler(ROUND_VECTOR, |p| {
        let mut send = p.asm.create_label();
        let mut done = p.asm.create_label();
        p.asm.push(rcx)?;
        p.asm.mov(ecx, r15d)?;
        p.asm.shl(ecx, 6)?;
        p.asm.inc(dword_ptr(rcx + rounds(0)))?;
        p.asm.lea(ecx, ptr(r15 + 1))?;
        p.asm.cmp(ecx, u32::from(vcpus))?;
        p.asm.jne(send)?;
        p.asm.xor(ecx, ecx)?;
        p.asm.set_label(&mut send)?;
        // The first vCPU does not begin another round after the last: it sends ones 1 to IPI_ROUNDS.
        p.asm.cmp(ecx, 1)?;
        let mut on = p.asm.create_label();
        p.asm.jne(on)?;
        p.asm.cmp(dword_ptr(rounds(0)), IPI_ROUNDS)?;
        p.asm.jae(done)?;
        p.asm.set_label(&mut on)?;
        p.send_ipi(ecx, ROUND_VECTOR.into())?;
        p.asm.set_label(&mut done)?;
        p.asm.pop(rcx)
    })?;
    p.handler(ALL_VECTOR, |p| p.asm.lock().inc(dword_ptr(reached)))?;
    Ok(Payload::kernel("ipi", vcpus, p.finish()?))
}

/// How often [`ipi`]'s interrupt goes round.
pub const IPI_ROUNDS: u32 = 20;

/// Halts all vCPUs with interrupts off, after the line `halted`. Runs until it is stopped.
pub fn halted(vcpus: u8) -> Result<Payload, IcedError> {
    let mut p = LongMode::new()?;
    if vcpus > 1 {
        p.start_other_vcpus(vcpus)?;
    }
    p.print("halted\n")?;
    p.halt()?;

    p.other_vcpus()?;
    p.online()?;
    p.halt()?;
    Ok(Payload::kernel("halted", vcpus, p.finish()?).that_ends(Ends::Never))
}
