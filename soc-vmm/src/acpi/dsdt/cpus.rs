//! The processors (ACPI 6.5 §8.4), those that can be put in too, and how the guest hears of changes (§6.3); the registers are
//! [`crate::devices::CpuHotplug`]'s.

use acpi_tables::aml::{
    Acquire, And, Arg, BufferData, Equal, FieldAccessType, IO, Local, MethodCall, Mutex, Notify, ONE, OpRegionSpace,
    Release, ZERO,
};

use crate::acpi::aml::{Term, again, device, eisa, fields, give, method, name, path, region, resources, store, when};
use crate::acpi::{AcpiConfig, NumaNode, madt};
use crate::devices::{CPU_HOTPLUG_GPE, CPU_HOTPLUG_LEN, CPU_HOTPLUG_PORT};

/// Device notifications (§5.6.6): look whether it is there; let it go.
const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;
/// Present, enabled, shown, working (§6.3.7).
const WORKING: u8 = 0xf;
const FOREVER: u16 = 0xffff;

// Bits of CFLG.
const PRESENT: u8 = 1 << 0;
const INSERTED: u8 = 1 << 1;
const LEAVING: u8 = 1 << 2;
const EJECT: u8 = 1 << 3;

// Commands for CCMD.
const NEXT: u8 = 0;
const OST_SOURCE: u8 = 1;
const OST_STATUS: u8 = 2;

/// The event's handler.
pub(super) fn event() -> Term {
    let scan = MethodCall::new(path("\\_SB_.CPUS.CSCN"), vec![]);
    method(&format!("_E{CPU_HOTPLUG_GPE:02X}"), 0, &[Term::of(&scan)])
}

/// The container of the processors, with registers and methods; and what keeps the registers' ports from other drivers.
pub(super) fn container(config: &AcpiConfig) -> [Term; 2] {
    let ports = IO::new(CPU_HOTPLUG_PORT, CPU_HOTPLUG_PORT, 1, CPU_HOTPLUG_LEN);
    let ports = [eisa("_HID", "PNP0C02"), name("_UID", &"CPUS"), resources("_CRS", &[Term::of(&ports)])];
    let mut terms = vec![name("_HID", &"ACPI0010"), eisa("_CID", "PNP0A05")];
    terms.extend(registers());
    terms.extend([status(), eject(), report(), notify(config.apic_ids.len()), scan()]);
    let uids = 0u32..;
    terms.extend(uids.zip(&config.apic_ids).map(|(uid, apic_id)| processor(uid, *apic_id, config)));
    [device("CPUR", &ports), device("CPUS", &terms)]
}

fn registers() -> [Term; 4] {
    [
        region("CPST", OpRegionSpace::SystemIO, CPU_HOTPLUG_PORT.into(), CPU_HOTPLUG_LEN.into()),
        fields("CPST", FieldAccessType::DWord, &[(Some(*b"CSEL"), 32), (None, 32), (Some(*b"CDAT"), 32)]),
        // Whole bytes, which are written without being read.
        fields("CPST", FieldAccessType::Byte, &[(None, 32), (Some(*b"CFLG"), 8), (Some(*b"CCMD"), 8)]),
        Term::of(&Mutex::new(path("CPLK"), 0)),
    ]
}

/// `CSTA`: the `_STA` of processor Arg0.
fn status() -> Term {
    let is_there = Term::of(&And::new(&ZERO, &Local(0), &PRESENT));
    method(
        "CSTA",
        1,
        &[
            acquire(),
            store(&path("CSEL"), &Arg(0)),
            store(&Local(0), &path("CFLG")),
            release(),
            when(&is_there, &[give(&WORKING)]),
            give(&ZERO),
        ],
    )
}

/// `CEJ0`: ejects processor Arg0.
fn eject() -> Term {
    let body = [acquire(), store(&path("CSEL"), &Arg(0)), store(&path("CFLG"), &EJECT), release()];
    method("CEJ0", 1, &body)
}

/// `COST`: reports of processor Arg0 what came (Arg2) of what (Arg1).
fn report() -> Term {
    method(
        "COST",
        3,
        &[
            acquire(),
            store(&path("CSEL"), &Arg(0)),
            store(&path("CCMD"), &OST_SOURCE),
            store(&path("CDAT"), &Arg(1)),
            store(&path("CCMD"), &OST_STATUS),
            store(&path("CDAT"), &Arg(2)),
            release(),
        ],
    )
}

/// `CTFY`: notifies processor Arg0 of Arg1.
fn notify(processors: usize) -> Term {
    let one = |uid: u32| {
        let it = path(&processor_name(uid));
        when(&Equal::new(&Arg(0), &uid), &[Term::of(&Notify::new(&it, &Arg(1)))])
    };
    method("CTFY", 2, &(0..processors as u32).map(one).collect::<Vec<_>>())
}

/// `CSCN`: tells the guest of every change.
fn scan() -> Term {
    let is_set = |bits: u8| Term::of(&And::new(&ZERO, &Local(1), &bits));
    let tell = |what: u8| Term::of(&MethodCall::new(path("CTFY"), vec![&Local(2), &what]));
    let changed = [
        store(&Local(2), &path("CDAT")),
        when(&is_set(INSERTED), &[tell(DEVICE_CHECK)]),
        when(&is_set(LEAVING), &[tell(EJECT_REQUEST)]),
        // What was told is not told again.
        Term::of(&And::new(&path("CFLG"), &Local(1), &(INSERTED | LEAVING))),
        store(&Local(0), &ONE),
    ];
    let look = [
        store(&Local(0), &ZERO),
        store(&path("CCMD"), &NEXT),
        store(&Local(1), &path("CFLG")),
        when(&is_set(INSERTED | LEAVING), &changed),
    ];
    let all = again(&Local(0), &look);
    method("CSCN", 0, &[acquire(), store(&path("CSEL"), &ZERO), store(&Local(0), &ONE), all, release()])
}

/// A processor device; its UID leads to its MADT structure.
fn processor(uid: u32, apic_id: u32, config: &AcpiConfig) -> Term {
    let call = |method, args| Term::of(&MethodCall::new(path(method), args));
    let structure = BufferData::new(madt::processor(uid, apic_id, madt::ENABLED));
    let mut terms = vec![
        name("_HID", &"ACPI0007"),
        name("_UID", &uid),
        method("_STA", 0, &[give(&call("CSTA", vec![&uid]))]),
        name("_MAT", &structure),
        method("_OST", 3, &[call("COST", vec![&uid, &Arg(0), &Arg(1)])]),
    ];
    // The boot processor stays.
    if uid != 0 {
        terms.push(method("_EJ0", 1, &[call("CEJ0", vec![&uid])]));
    }
    let of_node = |node: &NumaNode| node.processors.contains(&(uid as usize));
    terms.extend(config.numa.iter().position(of_node).map(|node| name("_PXM", &(node as u32))));
    device(&processor_name(uid), &terms)
}

fn processor_name(uid: u32) -> String {
    format!("C{uid:03X}")
}

fn acquire() -> Term {
    Term::of(&Acquire::new(path("CPLK"), FOREVER))
}

fn release() -> Term {
    Term::of(&Release::new(path("CPLK")))
}
