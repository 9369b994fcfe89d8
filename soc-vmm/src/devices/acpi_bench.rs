//! What the registers of hotplug are tried with: ACPI's power management beside them, and the line of its interrupt.

use std::sync::{Arc, Mutex, mpsc};

use super::{AcpiHandle, AcpiPm, PmTimerWidth, SystemClock};
use crate::bus::{Access, Answer, Deferred, Device, RequestId, Wake};
use crate::interrupt::{InterruptLine, LineSink};
use crate::power::{PowerEvent, PowerSink};

/// Where the interrupt's line ends.
#[derive(Debug, Default)]
pub(crate) struct Sci(Mutex<bool>);

impl Sci {
    pub(crate) fn is_high(&self) -> bool {
        *self.0.lock().unwrap()
    }
}

impl LineSink for Sci {
    fn set_level(&self, _: u32, high: bool) {
        *self.0.lock().unwrap() = high;
    }
}

/// Who should hear nothing of power, and needs not be woken.
#[derive(Debug)]
struct Nobody;

impl PowerSink for Nobody {
    fn power(&self, event: PowerEvent) {
        panic!("{event:?}");
    }
}

impl Wake for Nobody {
    fn wake(&self) {}
}

pub(crate) fn acpi() -> (Arc<Sci>, AcpiPm, AcpiHandle) {
    let sci = Arc::new(Sci::default());
    let (line, clock, nobody) = (InterruptLine::new(9, sci.clone()), Arc::new(SystemClock), Arc::new(Nobody));
    let (pm, acpi) = AcpiPm::new(1000, PmTimerWidth::Bits32, clock, line, nobody.clone(), nobody);
    (sci, pm, acpi)
}

/// An access that a device answers at once: what it answers.
pub(crate) fn access(device: &mut dyn Device, offset: u64, len: u8, data: Option<u64>) -> u64 {
    let (late, _answers) = mpsc::channel();
    let wake: Arc<dyn Wake> = Arc::new(Nobody);
    let reply = Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
    let access = Access { vcpu: 0, host_tsc: 0, len };
    let answer = match data {
        Some(data) => device.write(&access, offset, data, reply),
        None => device.read(&access, offset, reply),
    };
    let Answer::Done(value) = answer else { panic!("{answer:?}") };
    value
}
