//! State records of any bytes, read as everything that a record can be.
#![no_main]

use api_channel::state::{
    Clock, DebugRegs, Events, IoApic, Lapic, MpState, Msr, Pic, Pit, Records, Regs, Sregs, Xcr, records,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(list) = records(data) else { return };
    let mut again = Records::default();
    let mut current = true;
    for record in &list {
        let _ = (record.get::<Regs>(), record.get::<Sregs>(), record.get::<DebugRegs>(), record.get::<Lapic>());
        let _ = (record.get::<MpState>(), record.get::<Events>(), record.get::<Clock>());
        let _ = (record.get::<Pic>(), record.get::<IoApic>(), record.get::<Pit>());
        let _ = (record.get_list::<Xcr>(), record.get_list::<Msr>(), record.get_list::<u64>());
        again = match record.get::<Sregs>() {
            Ok(sregs) => again.put(record.kind, &sregs),
            Err(_) => again.bytes(record.kind, record.payload),
        };
        current &= record.version == 1;
    }
    // What was read and can be written says the same.
    assert!(!current || again.done() == data, "{list:?}");
});
