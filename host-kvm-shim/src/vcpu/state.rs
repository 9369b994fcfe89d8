//! A vCPU's state: KVM's structures ⇄ the wire's records, in the order that api_channel::state fixes.

use api_channel::call::CpuidEntry;
use api_channel::codec::Malformed;
use api_channel::state::{
    DebugRegs, Events, Lapic, MpState, Msr, OPTIONAL, Record, Records, Regs, Segment, Sregs, Table, Tsc, Type, Xcr,
    records,
};
use kvm_bindings::*;
use kvm_ioctls::VcpuFd;

use crate::error::Refusal;
use crate::kvm::{get_sregs2, get_tsc_offset, get_xsave2, set_sregs2, set_tsc_offset, set_xsave};

/// What of a vCPU's state this KVM has, asked once before the VM is created.
#[derive(Clone, Debug)]
pub(crate) struct Abilities {
    /// Words of the XSAVE area (KVM_CAP_XSAVE2 of the VM).
    pub(crate) xsave_words: usize,
    /// MSRs that KVM saves, in the order of setting.
    pub(crate) msrs: Vec<u32>,
}

/// TSC deadline: set after the LAPIC and the TSC.
const TSC_DEADLINE: u32 = 0x6e0;
/// MSRs a call of KVM_GET_MSRS or KVM_SET_MSRS.
const BATCH: usize = 64;

impl Abilities {
    /// Sorts the MSRs that KVM lists.
    pub(crate) fn new(xsave_bytes: i32, msrs: Vec<u32>) -> Self {
        let xsave_words = usize::try_from(xsave_bytes).unwrap_or(0).max(4096) / 8;
        Self { xsave_words, msrs: in_order(msrs) }
    }

    /// The same, of vCPUs with a Hyper-V SynIC, of whose MSRs KVM lists the first ones alone: SCONTROL, SIEFP, SIMP, SINT0–15, and
    /// CONFIG and COUNT of STIMER0–3. The others nobody can change.
    pub(crate) fn with_synic(self) -> Self {
        let synic = [0x4000_0080, 0x4000_0082, 0x4000_0083].into_iter();
        let synic = synic.chain(0x4000_0090..=0x4000_009f).chain(0x4000_00b0..=0x4000_00b7);
        Self { msrs: in_order(self.msrs.into_iter().chain(synic).collect()), ..self }
    }
}

fn in_order(mut msrs: Vec<u32>) -> Vec<u32> {
    msrs.sort_by_key(|&index| (index == TSC_DEADLINE, index));
    msrs.dedup();
    msrs
}

/// Reads the records of `groups`. The vCPU is out of the guest, no exit pending.
pub(crate) fn read(vcpu: &VcpuFd, abilities: &Abilities, groups: u64) -> Result<Vec<u8>, Refusal> {
    let wanted = |kind: Type| groups & kind.group() != 0;
    // Both change what is read after them. The MP state takes an INIT and a start-up IPI that wait: that moves CS and RIP, and the INIT is
    // no longer a pending event. Pending events bring CR2 and DR6 up to date where KVM holds an exception's payload back.
    let mp = vcpu.get_mp_state().map_err(Refusal::kvm("read the MP state"))?;
    let events = vcpu.get_vcpu_events().map_err(Refusal::kvm("read pending events"))?;
    let mut list = Records::default();
    if wanted(Type::SREGS) {
        let sregs = get_sregs2(vcpu).map_err(Refusal::nix("read SREGS2"))?;
        list = list.put(Type::SREGS, &from_sregs(&sregs));
    }
    if wanted(Type::XCRS) {
        let xcrs = vcpu.get_xcrs().map_err(Refusal::kvm("read XCRS"))?;
        let list_of: Vec<_> = xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())]
            .iter()
            .map(|x| Xcr { number: x.xcr.into(), value: x.value })
            .collect();
        list = list.list(Type::XCRS, &list_of);
    }
    if wanted(Type::XSAVE) {
        let mut area = vec![0; abilities.xsave_words];
        get_xsave2(vcpu, &mut area).map_err(Refusal::nix("read XSAVE"))?;
        list = list.list(Type::XSAVE, &area);
    }
    if wanted(Type::REGS) {
        let regs = vcpu.get_regs().map_err(Refusal::kvm("read REGS"))?;
        list = list.put(Type::REGS, &from_regs(&regs));
    }
    if wanted(Type::DEBUG) {
        let d = vcpu.get_debug_regs().map_err(Refusal::kvm("read debug registers"))?;
        list = list.put(Type::DEBUG, &DebugRegs { addresses: d.db, dr6: d.dr6, dr7: d.dr7 });
    }
    if wanted(Type::LAPIC) {
        let lapic = vcpu.get_lapic().map_err(Refusal::kvm("read the LAPIC"))?;
        list = list.put(Type::LAPIC, &Lapic { registers: lapic.regs.map(|b| b as u8) });
    }
    if wanted(Type::MSRS) {
        list = list.list(Type::MSRS, &read_msrs(vcpu, &abilities.msrs)?);
    }
    if wanted(Type::TSC)
        && let Some(offset) = get_tsc_offset(vcpu)
    {
        list = list.put(Type::TSC, &Tsc { offset });
    }
    if wanted(Type::MP_STATE) {
        list = list.put(Type::MP_STATE, &MpState { state: mp.mp_state.into() });
    }
    if wanted(Type::EVENTS) {
        list = list.put(Type::EVENTS, &from_events(&events));
    }
    Ok(list.done())
}

/// Sets records, in their order. The vCPU is out of the guest, no exit pending.
pub(crate) fn write(vcpu: &VcpuFd, abilities: &Abilities, list: &[u8]) -> Result<(), Refusal> {
    for record in records(list)? {
        match record.kind {
            Type::SREGS => {
                let sregs = to_sregs(&record.get()?)?;
                set_sregs2(vcpu, &sregs).map_err(Refusal::nix("set SREGS2"))?;
            }
            Type::XCRS => set_xcrs(vcpu, &record.get_list()?)?,
            Type::XSAVE => {
                let mut area: Vec<u64> = record.get_list()?;
                // Of a host with a smaller area; a larger one holds features that this host lacks.
                if area.len() < 72 || area.len() > abilities.xsave_words {
                    return Err(Refusal::argument(format!("an XSAVE area of {} bytes", area.len() * 8)));
                }
                area.resize(abilities.xsave_words, 0);
                set_xsave(vcpu, &area).map_err(Refusal::nix("set XSAVE"))?;
            }
            Type::REGS => vcpu.set_regs(&to_regs(&record.get()?)).map_err(Refusal::kvm("set REGS"))?,
            Type::DEBUG => {
                let d: DebugRegs = record.get()?;
                let regs = kvm_debugregs { db: d.addresses, dr6: d.dr6, dr7: d.dr7, ..Default::default() };
                vcpu.set_debug_regs(&regs).map_err(Refusal::kvm("set debug registers"))?;
            }
            Type::LAPIC => {
                let lapic: Lapic = record.get()?;
                let lapic = kvm_lapic_state { regs: lapic.registers.map(|b| b as i8) };
                vcpu.set_lapic(&lapic).map_err(Refusal::kvm("set the LAPIC"))?;
            }
            Type::MSRS => set_msrs(vcpu, &record.get_list()?)?,
            Type::TSC => {
                let Tsc { offset } = record.get()?;
                set_tsc_offset(vcpu, offset).map_err(Refusal::nix("set the TSC's offset"))?;
            }
            Type::MP_STATE => {
                let mp: MpState = record.get()?;
                let mp_state = u32::try_from(mp.state).map_err(|_| Malformed)?;
                vcpu.set_mp_state(kvm_mp_state { mp_state }).map_err(Refusal::kvm("set the MP state"))?;
            }
            Type::EVENTS => {
                vcpu.set_vcpu_events(&to_events(&record.get()?)).map_err(Refusal::kvm("set pending events"))?;
            }
            kind => skip_or_refuse(&record, kind)?,
        }
    }
    Ok(())
}

/// A record that this build doesn't know, or that belongs elsewhere: skipped where its writer allows it.
pub(crate) fn skip_or_refuse(record: &Record<'_>, kind: Type) -> Result<(), Refusal> {
    if kind.0 & OPTIONAL != 0 {
        return Ok(());
    }
    Err(Refusal::argument(format!(
        "a state record of type {} (version {}) is not one of this target",
        kind.0, record.version
    )))
}

/// Sets the CPUID table.
pub(crate) fn set_cpuid(vcpu: &VcpuFd, entries: &[CpuidEntry]) -> Result<(), Refusal> {
    if entries.iter().any(|e| e.reserved != 0 || e.flags > 1) {
        return Err(Malformed.into());
    }
    let entries: Vec<_> = entries.iter().map(to_cpuid).collect();
    let table = CpuId::from_entries(&entries)
        .map_err(|_| Refusal::argument(format!("a CPUID table of {} entries", entries.len())))?;
    vcpu.set_cpuid2(&table).map_err(Refusal::kvm("set the CPUID table"))
}

fn to_cpuid(e: &CpuidEntry) -> kvm_cpuid_entry2 {
    let CpuidEntry { function, index, flags, eax, ebx, ecx, edx, .. } = *e;
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// KVM's entry as the wire's.
pub(crate) fn from_cpuid(e: &kvm_cpuid_entry2) -> CpuidEntry {
    let kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, .. } = *e;
    CpuidEntry { function, index, flags: flags & 1, eax, ebx, ecx, edx, reserved: 0 }
}

/// The MSRs that this vCPU has, of those that KVM knows.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, Refusal> {
    let mut found = Vec::with_capacity(indices.len());
    let mut rest = indices;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> = batch.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Refusal::argument("too many MSRs".into()))?;
        let done = vcpu.get_msrs(&mut msrs).map_err(Refusal::kvm("read MSRs"))?;
        let read = msrs.as_slice().iter().take(done);
        found.extend(read.map(|m| Msr { index: m.index, reserved: 0, value: m.data }));
        // KVM stops at the first that this vCPU's CPUID doesn't have.
        let skip = usize::from(done < batch.len());
        rest = &rest[done + skip..];
    }
    Ok(found)
}

fn set_msrs(vcpu: &VcpuFd, list: &[Msr]) -> Result<(), Refusal> {
    if list.iter().any(|m| m.reserved != 0) {
        return Err(Malformed.into());
    }
    let mut rest = list;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH)];
        let entries: Vec<_> =
            batch.iter().map(|m| kvm_msr_entry { index: m.index, data: m.value, ..Default::default() }).collect();
        let msrs = Msrs::from_entries(&entries).map_err(|_| Refusal::argument("too many MSRs".into()))?;
        let done = vcpu.set_msrs(&msrs).map_err(Refusal::kvm("set MSRs"))?;
        rest = &rest[done..];
        if done < batch.len() {
            let Msr { index, value, .. } = rest[0];
            // What a vCPU doesn't have and what nobody used are alike.
            if value != 0 {
                return Err(Refusal::argument(format!("KVM refuses MSR {index:#x} = {value:#x}")));
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}

fn set_xcrs(vcpu: &VcpuFd, list: &[Xcr]) -> Result<(), Refusal> {
    let mut xcrs = kvm_xcrs { nr_xcrs: list.len() as u32, ..Default::default() };
    if list.len() > xcrs.xcrs.len() {
        return Err(Refusal::argument(format!("{} XCRs", list.len())));
    }
    for (to, from) in xcrs.xcrs.iter_mut().zip(list) {
        to.xcr = u32::try_from(from.number).map_err(|_| Malformed)?;
        to.value = from.value;
    }
    vcpu.set_xcrs(&xcrs).map_err(Refusal::kvm("set XCRS"))
}

fn from_regs(r: &kvm_regs) -> Regs {
    Regs {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8_r15: [r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15],
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn to_regs(r: &Regs) -> kvm_regs {
    let [r8, r9, r10, r11, r12, r13, r14, r15] = r.r8_r15;
    kvm_regs {
        rax: r.rax,
        rbx: r.rbx,
        rcx: r.rcx,
        rdx: r.rdx,
        rsi: r.rsi,
        rdi: r.rdi,
        rsp: r.rsp,
        rbp: r.rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip: r.rip,
        rflags: r.rflags,
    }
}

fn from_segment(s: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u32| u16::from(value & 1) << at;
    let attributes = u16::from(s.type_ & 0xf)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 8)
        | bit(s.l, 9)
        | bit(s.db, 10)
        | bit(s.g, 11)
        | bit(s.unusable, 12);
    Segment { base: s.base, limit: s.limit, selector: s.selector, attributes }
}

fn to_segment(s: &Segment) -> Result<kvm_segment, Malformed> {
    let bit = |at: u32| (s.attributes >> at & 1) as u8;
    if s.attributes >> 13 != 0 {
        return Err(Malformed);
    }
    Ok(kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xf) as u8,
        s: bit(4),
        dpl: (s.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(8),
        l: bit(9),
        db: bit(10),
        g: bit(11),
        unusable: bit(12),
        padding: 0,
    })
}

fn from_sregs(s: &kvm_sregs2) -> Sregs {
    let table = |t: &kvm_dtable| Table { base: t.base, limit: t.limit.into() };
    Sregs {
        cs: from_segment(&s.cs),
        ds: from_segment(&s.ds),
        es: from_segment(&s.es),
        fs: from_segment(&s.fs),
        gs: from_segment(&s.gs),
        ss: from_segment(&s.ss),
        tr: from_segment(&s.tr),
        ldt: from_segment(&s.ldt),
        gdt: table(&s.gdt),
        idt: table(&s.idt),
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: s.flags,
        pdptrs: s.pdptrs,
    }
}

fn to_sregs(s: &Sregs) -> Result<kvm_sregs2, Malformed> {
    let table = |t: &Table| {
        let limit = u16::try_from(t.limit).map_err(|_| Malformed)?;
        Ok(kvm_dtable { base: t.base, limit, padding: [0; 3] })
    };
    if s.flags & !u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0 {
        return Err(Malformed);
    }
    Ok(kvm_sregs2 {
        cs: to_segment(&s.cs)?,
        ds: to_segment(&s.ds)?,
        es: to_segment(&s.es)?,
        fs: to_segment(&s.fs)?,
        gs: to_segment(&s.gs)?,
        ss: to_segment(&s.ss)?,
        tr: to_segment(&s.tr)?,
        ldt: to_segment(&s.ldt)?,
        gdt: table(&s.gdt)?,
        idt: table(&s.idt)?,
        cr0: s.cr0,
        cr2: s.cr2,
        cr3: s.cr3,
        cr4: s.cr4,
        cr8: s.cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        flags: s.flags,
        pdptrs: s.pdptrs,
    })
}

fn from_events(e: &kvm_vcpu_events) -> Events {
    Events {
        exception: [e.exception.injected, e.exception.nr, e.exception.has_error_code, e.exception.pending],
        error_code: e.exception.error_code,
        interrupt: [e.interrupt.injected, e.interrupt.nr, e.interrupt.soft, e.interrupt.shadow],
        nmi: [e.nmi.injected, e.nmi.pending, e.nmi.masked, 0],
        sipi_vector: e.sipi_vector,
        flags: e.flags,
        smi: [e.smi.smm, e.smi.pending, e.smi.smm_inside_nmi, e.smi.latched_init],
        more: [e.triple_fault.pending, e.exception_has_payload, 0, 0],
        payload: e.exception_payload,
    }
}

fn to_events(e: &Events) -> kvm_vcpu_events {
    let mut events = kvm_vcpu_events { sipi_vector: e.sipi_vector, flags: e.flags, ..Default::default() };
    let [injected, nr, has_error_code, pending] = e.exception;
    events.exception.injected = injected;
    events.exception.nr = nr;
    events.exception.has_error_code = has_error_code;
    events.exception.pending = pending;
    events.exception.error_code = e.error_code;
    let [injected, nr, soft, shadow] = e.interrupt;
    events.interrupt.injected = injected;
    events.interrupt.nr = nr;
    events.interrupt.soft = soft;
    events.interrupt.shadow = shadow;
    let [injected, pending, masked, _] = e.nmi;
    events.nmi.injected = injected;
    events.nmi.pending = pending;
    events.nmi.masked = masked;
    let [smm, pending, smm_inside_nmi, latched_init] = e.smi;
    events.smi.smm = smm;
    events.smi.pending = pending;
    events.smi.smm_inside_nmi = smm_inside_nmi;
    events.smi.latched_init = latched_init;
    events.triple_fault.pending = e.more[0];
    events.exception_has_payload = e.more[1];
    events.exception_payload = e.payload;
    events
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sregs() -> Sregs {
        let segment = Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attributes: 0x9b };
        let table = Table { base: 5, limit: 0xffff };
        Sregs {
            cs: segment,
            ds: Segment { attributes: 0x1fff, ..segment },
            tr: Segment { attributes: 0x8b, ..segment },
            ldt: Segment { attributes: 0x1000, ..segment },
            gdt: table,
            idt: table,
            cr0: 0x6000_0010,
            apic_base: 0xfee0_0900,
            flags: 1,
            pdptrs: [1, 2, 3, 4],
            ..Sregs::default()
        }
    }

    #[test]
    fn state_goes_to_kvm_s_form_and_comes_back_the_same() {
        assert_eq!(from_sregs(&to_sregs(&sregs()).unwrap()), sregs());
        let regs = Regs { rax: 1, rsp: 2, r8_r15: [3, 4, 5, 6, 7, 8, 9, 10], rip: 11, rflags: 2, ..Regs::default() };
        assert_eq!(from_regs(&to_regs(&regs)), regs);
        let events = Events {
            exception: [1, 14, 1, 0],
            error_code: 2,
            interrupt: [1, 32, 0, 1],
            nmi: [0, 1, 1, 0],
            sipi_vector: 9,
            flags: 0x3d,
            smi: [0, 0, 1, 1],
            more: [1, 1, 0, 0],
            payload: 0xfeed,
        };
        assert_eq!(from_events(&to_events(&events)), events);
    }

    #[test]
    fn reserved_bits_are_refused() {
        let bad = |spoil: fn(&mut Sregs)| {
            let mut sregs = sregs();
            spoil(&mut sregs);
            to_sregs(&sregs).is_err()
        };
        assert!(bad(|s| s.cs.attributes |= 1 << 13));
        assert!(bad(|s| s.gdt.limit = 0x1_0000));
        assert!(bad(|s| s.flags = 2));
    }

    #[test]
    fn the_tsc_deadline_is_set_last() {
        let abilities = Abilities::new(0, vec![TSC_DEADLINE, 0xc000_0080, 0x10, 0x10]);
        assert_eq!(abilities.msrs, [0x10, 0xc000_0080, TSC_DEADLINE]);
        assert_eq!(abilities.xsave_words, 512);
    }

    #[test]
    fn a_synic_s_msrs_stand_among_the_others_in_their_order() {
        let listed = vec![TSC_DEADLINE, 0xc000_0080, 0x4000_0080, 0x4000_00b0, 0x4000_0073, 0x10];
        let msrs = Abilities::new(0, listed).with_synic().msrs;
        assert_eq!(msrs.len(), 4 + 27);
        assert_eq!((msrs[..3].to_vec(), msrs.last()), (vec![0x10, 0x4000_0073, 0x4000_0080], Some(&TSC_DEADLINE)));
        assert!(msrs[..msrs.len() - 1].is_sorted());
        assert!(msrs.contains(&0x4000_009f) && msrs.contains(&0x4000_00b7));
        let none = Abilities::new(0, vec![TSC_DEADLINE, 0x10]).with_synic().msrs;
        assert_eq!((none[0], none[1], none.last()), (0x10, 0x4000_0080, Some(&TSC_DEADLINE)));
    }
}
