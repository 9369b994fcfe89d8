//! pvpanic (QEMU docs/specs/pvpanic.rst): a port by which a guest tells that its kernel panicked.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::{Persist, Ranges, RestoreError, bytes, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::power::{CrashEvent, CrashSink};

/// The port, for ACPI.
pub const PVPANIC_PORT: u16 = 0x505;

/// The kernel panicked.
const PANICKED: u8 = 1 << 0;
/// The kernel panicked, and another one that was loaded for that case takes over.
const CRASH_LOADED: u8 = 1 << 1;

/// Port 0x505: a read tells which events there are, a write reports them, each once until the next reset.
pub struct Pvpanic {
    sink: Arc<dyn CrashSink>,
    reported: u8,
}

impl Pvpanic {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(PVPANIC_PORT as u64, 1)]);

    /// A device that reports to `sink`.
    pub fn new(sink: Arc<dyn CrashSink>) -> Self {
        Self { sink, reported: 0 }
    }
}

impl Device for Pvpanic {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, 1, |_| PANICKED | CRASH_LOADED))
    }

    fn write(&mut self, _: &Access, _: u64, data: u64, _: Deferred<'_>) -> Answer {
        let new = data as u8 & !self.reported;
        self.reported |= new;
        for (bit, event) in [(PANICKED, CrashEvent::Panicked), (CRASH_LOADED, CrashEvent::CrashLoaded)] {
            if new & bit != 0 {
                self.sink.crashed(event);
            }
        }
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.reported = 0;
    }
}

/// Saved state of [`Pvpanic`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PvpanicState {
    /// Events that were reported since the last reset.
    pub reported: u8,
}

impl Persist for Pvpanic {
    const NAME: &'static str = "pvpanic";
    type State = PvpanicState;

    fn save(&self) -> PvpanicState {
        PvpanicState { reported: self.reported }
    }

    fn restore(&mut self, state: &PvpanicState) -> Result<(), RestoreError> {
        self.reported = state.reported;
        Ok(())
    }
}

impl std::fmt::Debug for Pvpanic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pvpanic").field("reported", &self.reported).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use super::*;
    use crate::bus::{RequestId, Wake};

    #[derive(Debug, Default)]
    struct Heard(Mutex<Vec<CrashEvent>>);

    impl CrashSink for Heard {
        fn crashed(&self, event: CrashEvent) {
            self.0.lock().unwrap().push(event);
        }
    }

    #[derive(Debug)]
    struct Asleep;

    impl Wake for Asleep {
        fn wake(&self) {}
    }

    #[test]
    fn each_event_is_reported_once_until_a_reset() {
        let heard = Arc::new(Heard::default());
        let mut device = Pvpanic::new(heard.clone());
        let (late, _answers) = mpsc::channel();
        let wake: Arc<dyn Wake> = Arc::new(Asleep);
        let access = Access { vcpu: 0, host_tsc: 0, len: 1 };
        let reply = || Deferred::new(RequestId { vcpu: 0, sequence: 1 }, &late, &wake);
        assert!(matches!(device.read(&access, 0, reply()), Answer::Done(value) if value as u8 == 3));
        for data in [0, 0xfc, 2, 2, 1, 3] {
            assert!(matches!(device.write(&access, 0, data, reply()), Answer::Done(_)));
        }
        device.reset();
        assert!(matches!(device.write(&access, 0, 1, reply()), Answer::Done(_)));
        assert_eq!(*heard.0.lock().unwrap(), [CrashEvent::CrashLoaded, CrashEvent::Panicked, CrashEvent::Panicked]);
    }
}
