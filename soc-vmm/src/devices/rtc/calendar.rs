//! The clock's registers as seconds since 1970 and back: BCD or binary, 12 or 24 hours, proleptic Gregorian calendar.

use super::{b, index};

const MINUTE: i128 = 60;
const HOUR: i128 = 60 * MINUTE;
pub(super) const DAY: i128 = 24 * HOUR;

const PM: u8 = 1 << 7;
/// An alarm register with both set matches every value.
const ANY: u8 = 0xc0;

/// How the registers are coded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mode {
    binary: bool,
    hours_24: bool,
}

impl Mode {
    /// The mode that register B chooses.
    pub(super) fn of(register_b: u8) -> Self {
        Self { binary: register_b & b::BINARY != 0, hours_24: register_b & b::HOURS_24 != 0 }
    }

    /// The time registers at `seconds`.
    pub(super) fn registers(self, seconds: i128) -> [(u8, u8); 8] {
        let days = seconds.div_euclid(DAY);
        let time = seconds.rem_euclid(DAY);
        let (year, month, day) = date(days);
        let number = |value: i128| self.code(value as u8);
        [
            (index::SECONDS, number(time % MINUTE)),
            (index::MINUTES, number(time / MINUTE % 60)),
            (index::HOURS, self.code_hour((time / HOUR) as u8)),
            // 1970 began on a Thursday; Sunday is 1.
            (index::WEEKDAY, number((days + 4).rem_euclid(7) + 1)),
            (index::DAY, number(day)),
            (index::MONTH, number(month)),
            (index::YEAR, number(year.rem_euclid(100))),
            (index::CENTURY, number(year.div_euclid(100).rem_euclid(100))),
        ]
    }

    /// The time that registers say. Values out of range carry over (the 32nd of a month is the next one's first days): the guest
    /// may write anything.
    pub(super) fn seconds(self, register: impl Fn(u8) -> u8) -> i128 {
        let number = |index| i128::from(self.decode(register(index)));
        let year = number(index::CENTURY) * 100 + number(index::YEAR);
        let days = days(year, number(index::MONTH), number(index::DAY));
        let hour = i128::from(self.decode_hour(register(index::HOURS)));
        days * DAY + hour * HOUR + number(index::MINUTES) * MINUTE + number(index::SECONDS)
    }

    /// The alarm that three registers say; `None` if it never comes.
    pub(super) fn alarm(self, hours: u8, minutes: u8, seconds: u8) -> Option<Alarm> {
        let field = |raw: u8, value: u8, below: u8| match raw & ANY {
            ANY => Some(None),
            _ => (value < below).then_some(Some(i128::from(value))),
        };
        Some(Alarm {
            hour: field(hours, self.decode_hour(hours), 24)?,
            minute: field(minutes, self.decode(minutes), 60)?,
            second: field(seconds, self.decode(seconds), 60)?,
        })
    }

    fn code(self, value: u8) -> u8 {
        if self.binary { value } else { ((value / 10) << 4) | (value % 10) }
    }

    fn decode(self, raw: u8) -> u8 {
        if self.binary { raw } else { (raw >> 4) * 10 + (raw & 0x0f) }
    }

    fn code_hour(self, hour: u8) -> u8 {
        if self.hours_24 {
            return self.code(hour);
        }
        let twelve = (hour + 11) % 12 + 1;
        self.code(twelve) | if hour >= 12 { PM } else { 0 }
    }

    fn decode_hour(self, raw: u8) -> u8 {
        if self.hours_24 {
            return self.decode(raw);
        }
        self.decode(raw & !PM) % 12 + if raw & PM != 0 { 12 } else { 0 }
    }
}

/// A daily alarm; `None` matches every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alarm {
    hour: Option<i128>,
    minute: Option<i128>,
    second: Option<i128>,
}

impl Alarm {
    /// The first time at or after `from` at which it goes off, in seconds since 1970.
    pub(super) fn next(self, from: i128) -> i128 {
        // Each field is raised to its next match, which resets the finer ones; a wrap carries into the coarser one. At most
        // one wrap a field: the loop runs four times at most.
        let mut at = from;
        loop {
            let start = at;
            at = advance(at, DAY, HOUR, self.hour);
            at = advance(at, HOUR, MINUTE, self.minute);
            at = advance(at, MINUTE, 1, self.second);
            if at == start {
                return at;
            }
        }
    }
}

/// The first time at or after `at` whose field (units of `unit` within `cycle`) is `wanted`.
fn advance(at: i128, cycle: i128, unit: i128, wanted: Option<i128>) -> i128 {
    let Some(wanted) = wanted else { return at };
    let start = at - at.rem_euclid(cycle) + wanted * unit;
    if at < start {
        start
    } else if at < start + unit {
        at
    } else {
        start + cycle
    }
}

/// Days since 1970-01-01 of a date; month and day may lie outside their ranges.
fn days(year: i128, month: i128, day: i128) -> i128 {
    // Years that begin in March, so that the leap day is the last one; months from 0.
    let months = year * 12 + month - 3;
    let (year, month) = (months.div_euclid(12), months.rem_euclid(12));
    days_before_year(year) + days_before_month(month) + day - 1
}

/// Year, month 1–12 and day 1–31 of a day since 1970-01-01.
fn date(days: i128) -> (i128, i128, i128) {
    // 400 years have 146 097 days, so that this estimate is at most two years too late and never too early.
    let since = days - EPOCH;
    let mut year = since.div_euclid(146_097) * 400 + since.rem_euclid(146_097) * 400 / 146_097 + 1;
    while days_before_year(year) > days {
        year -= 1;
    }
    let rest = days - days_before_year(year);
    let month = (0..12).rev().find(|&month| days_before_month(month) <= rest).unwrap_or(0);
    let months = month + 2;
    (year + months / 12, months % 12 + 1, rest - days_before_month(month) + 1)
}

/// 0000-03-01 in days since 1970-01-01.
const EPOCH: i128 = -719_468;

fn days_before_year(year: i128) -> i128 {
    EPOCH + year * 365 + year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400)
}

/// Days before a month counted from March: 31, 30, 31, 30, 31, and again.
fn days_before_month(month: i128) -> i128 {
    (month * 153 + 2) / 5
}
