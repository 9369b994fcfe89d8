//! The MC146818 real-time clock with its 128 bytes of CMOS RAM (Motorola MC146818A datasheet; Intel ICH9 datasheet §13.6).
//!
//! There is one timeline: guest time = real time + an offset that the guest sets by setting the clock. Registers, update-in-
//! progress and all three interrupt sources derive from it, so that nothing ticks while nobody looks: flags are brought up to date
//! at each access, and a deadline is kept only for a source that is enabled and not pending. Ticks that pass while a flag is
//! pending are one tick, as on hardware.

mod calendar;
mod cmos;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::wire::Wire;
use super::{Clock, CpuHotplugHandle, Persist, Ranges, RestoreError, bytes, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::interrupt::InterruptLine;
use calendar::Alarm;

pub use cmos::{BootDevice, Cmos};

/// Indices of registers.
mod index {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const ALARM_SECONDS: u8 = 0x01;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const ALARM_MINUTES: u8 = 0x03;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const ALARM_HOURS: u8 = 0x05;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const A: u8 = 0x0a;
    pub(super) const B: u8 = 0x0b;
    pub(super) const C: u8 = 0x0c;
    pub(super) const D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = 0x32;
    /// Where a PS/2 has its century: the same register here.
    pub(super) const CENTURY_PS2: u8 = 0x37;
}

/// Register A: update in progress, divider, periodic rate.
mod a {
    pub(super) const UPDATING: u8 = 1 << 7;
    pub(super) const DIVIDER: u8 = 0x70;
    /// Dividers above this one hold the clock in reset.
    pub(super) const DIVIDER_RUNS: u8 = 0x20;
    pub(super) const RATE: u8 = 0x0f;
}

/// Register B.
mod b {
    pub(super) const SET: u8 = 1 << 7;
    pub(super) const UPDATE_INT: u8 = 1 << 4;
    pub(super) const SQUARE_WAVE: u8 = 1 << 3;
    pub(super) const BINARY: u8 = 1 << 2;
    pub(super) const HOURS_24: u8 = 1 << 1;
}

/// Register C; the same bits of B enable them.
mod c {
    pub(super) const PENDING: u8 = 1 << 7;
    pub(super) const PERIODIC: u8 = 1 << 6;
    pub(super) const ALARM: u8 = 1 << 5;
    pub(super) const UPDATED: u8 = 1 << 4;
    pub(super) const SOURCES: u8 = PERIODIC | ALARM | UPDATED;
}

/// Register D: the battery is good.
const VALID: u8 = 1 << 7;

const SECOND: i128 = 1_000_000_000;
/// "Update in progress" comes 244 µs before the update.
const UPDATE_NOTICE: i128 = 244_141;
/// After a divider reset the first update comes half a second later.
const AFTER_DIVIDER_RESET: i128 = SECOND / 2;
/// Ticks of the crystal in a second.
const CRYSTAL: i128 = 32_768;
/// Real time may be stepped under a deadline: none is further away, so that an alarm is late by no more.
const FARTHEST: Duration = Duration::from_secs(60);
/// Bound of a saved offset: more than the clock's registers can express, less than what overflows.
const OFFSET_LIMIT: i64 = 1_000_000_000_000;

/// Ports 0x70 (index) and 0x71 (data).
#[derive(Debug)]
pub struct Rtc {
    cmos: [u8; cmos::LEN],
    index: u8,
    /// Guest time minus real time, in ns.
    offset: i128,
    /// Guest time up to which register C's flags are right, in ns since 1970.
    seen: i128,
    deadline: Option<Instant>,
    clock: Arc<dyn Clock>,
    irq: Wire,
    /// Of these CMOS RAM tells how many there are.
    cpus: Option<CpuHotplugHandle>,
}

/// Saved state of an [`Rtc`]. Real time is taken to be the same where it is restored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// All 128 bytes; of the time registers those that count while the clock is stopped.
    pub cmos: Vec<u8>,
    /// The register that port 0x71 reaches.
    pub index: u8,
    /// Guest time minus real time, whole seconds (rounded down).
    pub offset_seconds: i64,
    /// The rest, in ns, below 10⁹.
    pub offset_nanos: u32,
    /// Guest time up to which register C's flags are right: seconds since 1970 (rounded down).
    pub seen_seconds: i64,
    /// The rest, in ns, below 10⁹.
    pub seen_nanos: u32,
}

impl Rtc {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0x70, 2)]);
    /// Its GSI.
    pub const GSI: u32 = 8;

    /// A clock that shows UTC by `clock`, and what `cmos` says about the machine.
    pub fn new(cmos: &Cmos, clock: Arc<dyn Clock>, irq: InterruptLine) -> Self {
        let mut bytes = cmos.bytes();
        bytes[usize::from(index::A)] = a::DIVIDER_RUNS | 0x06;
        bytes[usize::from(index::B)] = b::HOURS_24;
        bytes[usize::from(index::D)] = VALID;
        let mut rtc =
            Self { cmos: bytes, index: 0, offset: 0, seen: 0, deadline: None, clock, irq: Wire::new(irq), cpus: None };
        rtc.seen = rtc.now();
        rtc
    }

    /// The same, where there are other processors after a reset.
    #[must_use]
    pub fn counting(self, cpus: CpuHotplugHandle) -> Self {
        Self { cpus: Some(cpus), ..self }
    }

    /// The same, where guest time is so many seconds ahead of UTC, or behind.
    #[must_use]
    pub fn ahead(mut self, seconds: i64) -> Self {
        self.offset = i128::from(seconds.clamp(-OFFSET_LIMIT, OFFSET_LIMIT)) * SECOND;
        self.seen = self.now();
        self
    }

    /// Guest time in ns since 1970.
    fn now(&self) -> i128 {
        // It fits: a Duration is below 2⁹⁵ ns.
        self.clock.realtime().as_nanos() as i128 + self.offset
    }

    fn register(&self, index: u8) -> u8 {
        self.cmos[usize::from(index)]
    }

    fn divider_runs(&self) -> bool {
        self.register(index::A) & a::DIVIDER <= a::DIVIDER_RUNS
    }

    /// The time registers follow the timeline; otherwise they stand still and the guest may set them.
    fn runs(&self) -> bool {
        self.divider_runs() && self.register(index::B) & b::SET == 0
    }

    /// ns of guest time between periodic interrupts, as ticks of the crystal; none: off.
    fn period(&self) -> Option<i128> {
        match self.register(index::A) & a::RATE {
            0 => None,
            _ if !self.divider_runs() => None,
            rate @ 1..=2 => Some(1 << (rate + 6)),
            rate => Some(1 << (rate - 1)),
        }
    }

    fn alarm(&self) -> Option<Alarm> {
        let mode = calendar::Mode::of(self.register(index::B));
        mode.alarm(
            self.register(index::ALARM_HOURS),
            self.register(index::ALARM_MINUTES),
            self.register(index::ALARM_SECONDS),
        )
    }

    /// Brings register C up to `now`.
    fn account(&mut self, now: i128) {
        let seen = std::mem::replace(&mut self.seen, now);
        if now <= seen {
            // Real time was stepped back: what was told stays told.
            return;
        }
        let mut flags = 0;
        if let Some(period) = self.period()
            && ticks(now).div_euclid(period) != ticks(seen).div_euclid(period)
        {
            flags |= c::PERIODIC;
        }
        let (from, to) = (seen.div_euclid(SECOND), now.div_euclid(SECOND));
        if self.runs() && to > from {
            flags |= c::UPDATED;
            if self.alarm().is_some_and(|alarm| alarm.next(from + 1) <= to) {
                flags |= c::ALARM;
            }
        }
        self.cmos[usize::from(index::C)] |= flags;
    }

    /// The interrupt line and the next deadline, after any change.
    fn update(&mut self) {
        let enabled = self.register(index::B) & c::SOURCES;
        let pending = self.register(index::C) & enabled;
        self.irq.set(pending != 0);
        self.deadline = self.next_event(enabled & !pending).map(|at| {
            let wait = u64::try_from(at - self.now()).unwrap_or(0);
            self.clock.monotonic() + Duration::from_nanos(wait).min(FARTHEST)
        });
    }

    /// Guest time at which the first of `sources` raises its flag, after what was accounted for.
    fn next_event(&self, sources: u8) -> Option<i128> {
        let wants = |source| sources & source != 0;
        let second = self.seen.div_euclid(SECOND) + 1;
        let periodic = self.period().filter(|_| wants(c::PERIODIC)).map(|period| {
            let tick = (ticks(self.seen).div_euclid(period) + 1) * period;
            // Rounded up: at that instant the tick has come.
            -(-tick * SECOND).div_euclid(CRYSTAL)
        });
        let updated = (self.runs() && wants(c::UPDATED)).then_some(second * SECOND);
        let alarm = (self.runs() && wants(c::ALARM)).then(|| self.alarm()).flatten();
        let alarm = alarm.map(|alarm| alarm.next(second) * SECOND);
        [periodic, updated, alarm].into_iter().flatten().min()
    }

    /// Writes the time of `now` into the registers.
    fn latch(&mut self, now: i128) {
        let mode = calendar::Mode::of(self.register(index::B));
        for (index, value) in mode.registers(now.div_euclid(SECOND)) {
            self.cmos[usize::from(index)] = value;
        }
    }

    /// Makes the timeline show what the registers say; the fraction of a second stays.
    fn start(&mut self, now: i128) {
        let mode = calendar::Mode::of(self.register(index::B));
        let shown = mode.seconds(|index| self.register(index));
        self.shift((shown - now.div_euclid(SECOND)) * SECOND);
    }

    /// Moves the timeline; nothing happens in the gap.
    fn shift(&mut self, by: i128) {
        self.offset += by;
        self.seen += by;
    }

    fn read_data(&mut self) -> u8 {
        let now = self.now();
        match self.index {
            index::A => {
                let updating = self.runs() && now.rem_euclid(SECOND) >= SECOND - UPDATE_NOTICE;
                self.register(index::A) | if updating { a::UPDATING } else { 0 }
            }
            index::C => {
                self.account(now);
                let flags = std::mem::take(&mut self.cmos[usize::from(index::C)]);
                let pending = flags & self.register(index::B) & c::SOURCES != 0;
                self.update();
                flags | if pending { c::PENDING } else { 0 }
            }
            index::SECONDS | index::MINUTES | index::HOURS | index::WEEKDAY..=index::YEAR | index::CENTURY
                if self.runs() =>
            {
                self.latch(now);
                self.register(self.index)
            }
            index => self.register(index),
        }
    }

    fn write_data(&mut self, value: u8) {
        let now = self.now();
        self.account(now);
        let at = usize::from(self.index);
        match self.index {
            index::SECONDS | index::MINUTES | index::HOURS | index::WEEKDAY..=index::YEAR | index::CENTURY
                if self.runs() =>
            {
                self.latch(now);
                self.cmos[at] = value;
                self.start(now);
            }
            index::A => self.reconfigure(now, |rtc| rtc.cmos[at] = value & !a::UPDATING),
            // Stopping the clock by SET disables its update interrupt.
            index::B if value & b::SET != 0 => self.reconfigure(now, |rtc| rtc.cmos[at] = value & !b::UPDATE_INT),
            index::B => self.reconfigure(now, |rtc| rtc.cmos[at] = value),
            index::C | index::D => {}
            _ => self.cmos[at] = value,
        }
        self.update();
    }

    /// Changes register A or B, and stops or starts the clock where that follows.
    fn reconfigure(&mut self, now: i128, change: impl FnOnce(&mut Self)) {
        let (ran, divider_ran) = (self.runs(), self.divider_runs());
        if ran {
            self.latch(now);
        }
        change(self);
        let mut now = now;
        if !divider_ran && self.divider_runs() {
            let by = AFTER_DIVIDER_RESET - now.rem_euclid(SECOND);
            self.shift(by);
            now += by;
        }
        if !ran && self.runs() {
            self.start(now);
        }
    }
}

/// Whole ticks of the crystal in `time`.
fn ticks(time: i128) -> i128 {
    (time * CRYSTAL).div_euclid(SECOND)
}

impl Device for Rtc {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        Answer::Done(bytes::read(access, offset, 2, |at| if at == 0 { 0xff } else { self.read_data() }))
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        bytes::write(access, offset, 2, data, |at, byte| match at {
            // Bit 7 masks NMIs, which nothing here raises.
            0 if byte & 0x7f == index::CENTURY_PS2 => self.index = index::CENTURY,
            0 => self.index = byte & 0x7f,
            _ => self.write_data(byte),
        });
        Answer::Done(0)
    }

    fn poll(&mut self) {
        self.account(self.now());
        self.update();
    }

    fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Disables the interrupts; time and CMOS RAM are the battery's.
    fn reset(&mut self) {
        self.cmos[usize::from(index::B)] &= !(c::PERIODIC | c::ALARM | c::UPDATED | b::SQUARE_WAVE);
        self.cmos[usize::from(index::C)] = 0;
        self.index = 0;
        if let Some(cpus) = &self.cpus {
            cmos::count_cpus(&mut self.cmos, cpus.present().len());
        }
        self.update();
    }
}

impl Persist for Rtc {
    const NAME: &'static str = "rtc";
    type State = RtcState;

    fn save(&self) -> RtcState {
        let (offset_seconds, offset_nanos) = split(self.offset);
        let (seen_seconds, seen_nanos) = split(self.seen);
        RtcState { cmos: self.cmos.to_vec(), index: self.index, offset_seconds, offset_nanos, seen_seconds, seen_nanos }
    }

    fn restore(&mut self, state: &RtcState) -> Result<(), RestoreError> {
        let ok = |condition, what| check(condition, "rtc", what);
        let bytes: [u8; cmos::LEN] =
            state.cmos.as_slice().try_into().map_err(|_| RestoreError::new("rtc", "not 128 bytes of CMOS RAM"))?;
        ok(bytes[usize::from(index::A)] & a::UPDATING == 0, "register A has update in progress")?;
        ok(bytes[usize::from(index::C)] & !c::SOURCES == 0, "register C has reserved bits")?;
        ok(bytes[usize::from(index::D)] == VALID, "register D is not what it always is")?;
        ok(usize::from(state.index) < cmos::LEN, "the index is past the CMOS RAM")?;
        let seconds = -OFFSET_LIMIT..=OFFSET_LIMIT;
        ok(seconds.contains(&state.offset_seconds), "the offset is out of range")?;
        ok(seconds.contains(&state.seen_seconds), "the time is out of range")?;
        ok(i128::from(state.offset_nanos.max(state.seen_nanos)) < SECOND, "a second has no more than 10⁹ ns")?;
        self.cmos = bytes;
        self.index = state.index;
        self.offset = join(state.offset_seconds, state.offset_nanos);
        self.seen = join(state.seen_seconds, state.seen_nanos);
        self.update();
        self.irq.force(self.irq.is_high());
        Ok(())
    }
}

fn split(time: i128) -> (i64, u32) {
    // Both within OFFSET_LIMIT: set by the guest through registers that reach year 16 665, or restored and checked.
    (time.div_euclid(SECOND) as i64, time.rem_euclid(SECOND) as u32)
}

fn join(seconds: i64, nanos: u32) -> i128 {
    i128::from(seconds) * SECOND + i128::from(nanos)
}
