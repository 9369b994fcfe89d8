//! The state in which vCPUs start, as the host takes it.

use api_channel::codec::Malformed;
use api_channel::state::{MpState, Msr, Record, Records, Regs, Segment, Sregs, Table, Type, records};

use crate::boot::entry::{self, Entry, Start};

/// The records that start a vCPU: what it had when it was made, which is KVM's reset state (FPU, MSRs, debug registers, local APIC,
/// pending events), with the registers of `entry`.
///
/// # Errors
/// `pristine` is no list of records, or lacks the segment record, of which the APIC base is kept.
pub(super) fn start(pristine: &[u8], entry: &Entry) -> Result<Vec<u8>, Malformed> {
    let mut list = Records::default();
    let mut found = false;
    for record in records(pristine)? {
        list = match record.kind {
            Type::SREGS => {
                found = true;
                list.put(Type::SREGS, &sregs(entry, &record.get()?))
            }
            Type::REGS => list.put(Type::REGS, &regs(entry)),
            Type::MSRS => list.list(Type::MSRS, &msrs(&record)?),
            Type::MP_STATE => list.put(Type::MP_STATE, &mp_state(entry)),
            // The MSR says where the TSC begins anew.
            Type::TSC => list,
            _ => list.bytes(record.kind, record.payload),
        };
    }
    if found { Ok(list.done()) } else { Err(Malformed) }
}

/// The same for a vCPU that joins others which run: its time stamp counter agrees with theirs. KVM takes a zero for "as the others'"
/// (its `kvm_synchronize_tsc`).
///
/// # Errors
/// As [`start`]'s.
pub(super) fn join(pristine: &[u8], entry: &Entry) -> Result<Vec<u8>, Malformed> {
    const TSC: u32 = 0x10;
    let mut list = Records::default();
    for record in records(&start(pristine, entry)?)? {
        list = match record.kind {
            Type::MSRS => {
                let mut msrs: Vec<Msr> = record.get_list()?;
                msrs.iter_mut().filter(|msr| msr.index == TSC).for_each(|msr| msr.value = 0);
                list.list(Type::MSRS, &msrs)
            }
            _ => list.bytes(record.kind, record.payload),
        };
    }
    Ok(list.done())
}

/// The VM's records without its clock, which a reset does not turn back.
///
/// # Errors
/// `pristine` is no list of records.
pub(super) fn chips(pristine: &[u8]) -> Result<Vec<u8>, Malformed> {
    let keep = |record: &Record<'_>| record.kind != Type::CLOCK;
    let kept = records(pristine)?.into_iter().filter(keep);
    Ok(kept.fold(Records::default(), |list, record| list.bytes(record.kind, record.payload)).done())
}

/// Where a vCPU stands, in one line. After a triple fault AMD's processors have no state left to show: KVM gives their vCPU that of a
/// reset, with RIP 0xfff0 (KVM's `shutdown_interception`).
///
/// # Errors
/// `list` is no list of records, or holds no registers.
pub(super) fn standing(list: &[u8]) -> Result<String, Malformed> {
    let all = records(list)?;
    let of = |kind| all.iter().find(|record| record.kind == kind).ok_or(Malformed);
    let (regs, sregs) = (of(Type::REGS)?.get::<Regs>()?, of(Type::SREGS)?.get::<Sregs>()?);
    let Sregs { cr0, cr2, cr3, cr4, efer, cs, idt, .. } = sregs;
    Ok(format!(
        "rip {:#x} rsp {:#x} cs {:#x} cr0 {cr0:#x} cr2 {cr2:#x} cr3 {cr3:#x} cr4 {cr4:#x} efer {efer:#x} idt {:#x}+{:#x}",
        regs.rip, regs.rsp, cs.selector, idt.base, idt.limit
    ))
}

fn regs(entry: &Entry) -> Regs {
    let entry::Regs { rax, rbx, rdx, rsi, rip, rflags } = entry.regs;
    Regs { rax, rbx, rdx, rsi, rip, rflags, ..Regs::default() }
}

/// KVM makes a SynIC that is on; after a reset it is off (TLFS "SCONTROL Register").
fn msrs(pristine: &Record<'_>) -> Result<Vec<Msr>, Malformed> {
    const SCONTROL: u32 = 0x4000_0080;
    let mut msrs: Vec<Msr> = pristine.get_list()?;
    msrs.iter_mut().filter(|msr| msr.index == SCONTROL).for_each(|msr| msr.value = 0);
    Ok(msrs)
}

fn sregs(entry: &Entry, pristine: &Sregs) -> Sregs {
    let data = segment(&entry.segments.data);
    let table = |t: &entry::DescriptorTable| Table { base: t.base, limit: t.limit.into() };
    Sregs {
        cs: segment(&entry.segments.cs),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: segment(&entry.segments.tr),
        ldt: segment(&entry.segments.ldt),
        gdt: table(&entry.gdt),
        idt: table(&entry.idt),
        cr0: entry.cr0,
        cr3: entry.cr3,
        cr4: entry.cr4,
        efer: entry.efer,
        apic_base: pristine.apic_base,
        ..Sregs::default()
    }
}

fn segment(s: &entry::Segment) -> Segment {
    let bit = |on: bool, at: u16| u16::from(on) << at;
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attributes: u16::from(s.kind)
            | bit(s.code_or_data, 4)
            | bit(s.present, 7)
            | bit(s.long, 9)
            | bit(s.default_big, 10)
            | bit(s.granularity, 11)
            | bit(!s.present, 12),
    }
}

fn mp_state(entry: &Entry) -> MpState {
    match entry.start {
        Start::Running => MpState::RUNNABLE,
        Start::WaitForSipi => MpState::UNINITIALIZED,
    }
}
