//! Reads a list of state records on standard input, each into its type, and writes them anew: what a SoC of another architecture
//! does with a guest's state between two hosts.

use std::io::{Read, Write};
use std::process::ExitCode;

use api_channel::codec::Malformed;
use api_channel::state::{
    Clock, DebugRegs, Events, IoApic, Lapic, MpState, Msr, Pic, Pit, Record, Records, Regs, Sregs, Tsc, Type, Xcr,
    records,
};

fn main() -> ExitCode {
    let mut list = Vec::new();
    if let Err(e) = std::io::stdin().read_to_end(&mut list) {
        eprintln!("pass-records: standard input: {e}");
        return ExitCode::FAILURE;
    }
    let Ok(passed) = pass(&list) else {
        eprintln!("pass-records: standard input is no list of records that this build knows");
        return ExitCode::FAILURE;
    };
    match std::io::stdout().write_all(&passed) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("pass-records: standard output: {e}");
            ExitCode::FAILURE
        }
    }
}

fn pass(list: &[u8]) -> Result<Vec<u8>, Malformed> {
    Ok(records(list)?.iter().try_fold(Records::default(), one)?.done())
}

fn one(list: Records, record: &Record<'_>) -> Result<Records, Malformed> {
    let kind = record.kind;
    Ok(match kind {
        Type::REGS => list.put(kind, &record.get::<Regs>()?),
        Type::SREGS => list.put(kind, &record.get::<Sregs>()?),
        Type::XCRS => list.list(kind, &record.get_list::<Xcr>()?),
        Type::XSAVE => list.list(kind, &record.get_list::<u64>()?),
        Type::DEBUG => list.put(kind, &record.get::<DebugRegs>()?),
        Type::LAPIC => list.put(kind, &record.get::<Lapic>()?),
        Type::MSRS => list.list(kind, &record.get_list::<Msr>()?),
        Type::TSC => list.put(kind, &record.get::<Tsc>()?),
        Type::MP_STATE => list.put(kind, &record.get::<MpState>()?),
        Type::EVENTS => list.put(kind, &record.get::<Events>()?),
        Type::PIC => list.put(kind, &record.get::<Pic>()?),
        Type::IOAPIC => list.put(kind, &record.get::<IoApic>()?),
        Type::PIT => list.put(kind, &record.get::<Pit>()?),
        Type::CLOCK => list.put(kind, &record.get::<Clock>()?),
        _ => return Err(Malformed),
    })
}
