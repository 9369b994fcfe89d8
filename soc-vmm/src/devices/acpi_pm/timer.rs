//! The ACPI PM timer as a function of the host's TSC.

use std::time::{Duration, Instant};

/// Hz (ACPI 6.5 §4.8.2.1).
const FREQUENCY: u64 = 3_579_545;

/// Bits of the PM timer; the FADT's TMR_VAL_EXT must say the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PmTimerWidth {
    /// As QEMU's: wraps every 4.7 s.
    Bits24,
    /// Wraps every 20 min.
    Bits32,
}

/// PM timer ticks in `host_tsc` TSC ticks at `tsc_khz` kHz, modulo 2⁶⁴.
pub(super) fn ticks(host_tsc: u64, tsc_khz: u64) -> u64 {
    (u128::from(host_tsc) * u128::from(FREQUENCY) / (u128::from(tsc_khz.max(1)) * 1000)) as u64
}

/// What a host's TSC was.
#[derive(Clone, Copy, Debug)]
pub(super) struct Reading {
    pub(super) tsc: u64,
    pub(super) when: Instant,
}

impl Reading {
    /// What it is `now`, at `tsc_khz` kHz.
    pub(super) fn at(&self, now: Instant, tsc_khz: u64) -> u64 {
        let passed = now.saturating_duration_since(self.when).as_nanos() as u64;
        // Modulo 2⁶⁴; the product of two such numbers fits.
        self.tsc.wrapping_add((u128::from(passed) * u128::from(tsc_khz) / 1_000_000) as u64)
    }
}

/// The count is kept with 64 bits; the guest sees the low ones. Whenever the top bit that it sees toggles, a carry is due.
#[derive(Debug)]
pub(super) struct PmTimer {
    tsc_khz: u64,
    /// Half the range the guest sees: a power of two.
    half: u64,
    /// The count at host TSC 0.
    offset: u64,
    /// The count of the next carry; known from the first access on.
    next_carry: Option<u64>,
}

impl PmTimer {
    pub(super) fn new(tsc_khz: u64, width: PmTimerWidth) -> Self {
        let half = match width {
            PmTimerWidth::Bits24 => 1 << 23,
            PmTimerWidth::Bits32 => 1 << 31,
        };
        Self { tsc_khz, half, offset: 0, next_carry: None }
    }

    /// What the guest reads.
    pub(super) fn read(&self, host_tsc: u64) -> u32 {
        (self.count(host_tsc) & (2 * self.half - 1)) as u32
    }

    /// Whether a carry has come by `host_tsc`; told once.
    pub(super) fn carried(&mut self, host_tsc: u64) -> bool {
        let count = self.count(host_tsc);
        let carried = self.next_carry.is_some_and(|carry| count.wrapping_sub(carry) < 1 << 63);
        if carried || self.next_carry.is_none() {
            self.next_carry = Some(self.after(count));
        }
        carried
    }

    /// A carry has come by another clock than the TSC.
    pub(super) fn carry(&mut self) {
        self.next_carry = self.next_carry.map(|carry| carry.wrapping_add(self.half));
    }

    /// Time from `host_tsc` to the next carry, rounded up.
    pub(super) fn until_carry(&self, host_tsc: u64) -> Duration {
        let count = self.count(host_tsc);
        let ticks = self.next_carry.unwrap_or(self.after(count)).wrapping_sub(count);
        duration(ticks.min(2 * self.half))
    }

    /// No wait for a carry is longer.
    pub(super) fn longest_wait(&self) -> Duration {
        duration(2 * self.half)
    }

    /// Makes the count `count` at `host_tsc`. The next carry stays where it is.
    pub(super) fn set(&mut self, count: u64, host_tsc: u64) {
        self.offset = count.wrapping_sub(ticks(host_tsc, self.tsc_khz));
    }

    pub(super) fn restore(&mut self, offset: u64, next_carry: Option<u64>) {
        self.offset = offset;
        self.next_carry = next_carry;
    }

    pub(super) fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    pub(super) fn offset(&self) -> u64 {
        self.offset
    }

    pub(super) fn next_carry(&self) -> Option<u64> {
        self.next_carry
    }

    fn count(&self, host_tsc: u64) -> u64 {
        ticks(host_tsc, self.tsc_khz).wrapping_add(self.offset)
    }

    /// The first carry after `count`.
    fn after(&self, count: u64) -> u64 {
        (count & !(self.half - 1)).wrapping_add(self.half)
    }
}

fn duration(ticks: u64) -> Duration {
    // At most 2³² ticks, twenty minutes in ns: far from overflow.
    Duration::from_nanos((ticks * 1_000_000_000).div_ceil(FREQUENCY))
}
