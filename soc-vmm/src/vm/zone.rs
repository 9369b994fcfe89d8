//! The time of day here, and what a guest's clock is set to.
//!
//! How far the local time is from UTC only the C library knows, whose call is `unsafe`.
#![allow(unsafe_code)]

use std::time::{SystemTime, UNIX_EPOCH};

use nix::libc::{localtime_r, time_t, tm};

use crate::qemu::small::RtcBase;

/// How many seconds a clock is ahead of UTC that is set to `base` now.
pub(super) fn ahead(base: RtcBase) -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs() as i64);
    match base {
        RtcBase::Utc => 0,
        RtcBase::LocalTime => local(now),
        RtcBase::Date(date) => date.as_secs() as i64 - now,
    }
}

/// How many seconds the local time is ahead of UTC at that time; 0 where the system doesn't know.
fn local(now: i64) -> i64 {
    // SAFETY: all of its fields are numbers, or a pointer that may be null.
    let mut fields: tm = unsafe { std::mem::zeroed() };
    let now = now as time_t;
    // SAFETY: it reads one number and fills one structure, which are this call's own.
    let done = unsafe { localtime_r(&raw const now, &raw mut fields) };
    if done.is_null() { 0 } else { fields.tm_gmtoff }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_clock_is_set_to_the_time_here_or_to_a_date() {
        assert_eq!(ahead(RtcBase::Utc), 0);
        assert!(ahead(RtcBase::LocalTime).abs() <= 14 * 3600);
        assert!(ahead(RtcBase::Date(Duration::ZERO)) < -1_700_000_000);
    }
}
