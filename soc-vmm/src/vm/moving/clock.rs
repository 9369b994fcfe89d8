//! A guest's clocks on the way: KVM's clock goes on by the real time that has passed (KVM api.rst §4.30), and the TSC by as much.

use api_channel::codec::Malformed;
use api_channel::state::{Clock, Msr, Record, Records, Tsc, Type, records};

/// How long a guest can be on its way, from the reading of its clock to its setting. One that was for longer was kept in a file, or the hosts'
/// clocks differ: its time goes on where it stood, as if it had slept. Well below the 21 s after which Linux takes processors that stand
/// still for stuck.
const LONGEST: u64 = 10_000_000_000;
/// The TSC.
const TSC: u32 = 0x10;
/// The real time is told (KVM_CLOCK_REALTIME), and the host's TSC (KVM_CLOCK_HOST_TSC).
const REALTIME: u64 = 1 << 2;
const HOST_TSC: u64 = 1 << 3;

/// The VM's clock, out of its records; none: it has none.
///
/// # Errors
/// They are no records.
pub(in crate::vm) fn clock(list: &[u8]) -> Result<Option<Clock>, Malformed> {
    records(list)?.iter().find(|record| record.kind == Type::CLOCK).map(Record::get).transpose()
}

/// The VM's records as they are set where the real time is `now` (nanoseconds since 1970).
///
/// # Errors
/// They are no records.
pub(in crate::vm) fn arrived(list: &[u8], now: u64) -> Result<Vec<u8>, Malformed> {
    let each = |list: Records, record: Record<'_>| -> Result<Records, Malformed> {
        if record.kind != Type::CLOCK {
            return Ok(list.bytes(record.kind, record.payload));
        }
        let clock: Clock = record.get()?;
        let is_live = now.saturating_sub(clock.realtime) <= LONGEST;
        let flags = if is_live { clock.flags } else { clock.flags & !REALTIME };
        Ok(list.put(Type::CLOCK, &Clock { flags, ..clock }))
    };
    Ok(records(list)?.into_iter().try_fold(Records::default(), each)?.done())
}

/// How many ticks of a TSC of `khz` have passed between two readings of a VM's clock.
fn ticks(before: &Clock, after: &Clock, khz: u32) -> u64 {
    let nanoseconds = after.kvmclock.saturating_sub(before.kvmclock).min(2 * LONGEST);
    (u128::from(nanoseconds) * u128::from(khz) / 1_000_000) as u64
}

/// A vCPU's records where its VM's clock, which was `before`, is `after` by now: its TSC has gone on by as much. By its offset to the
/// host's where both hosts tell that: then it agrees with the clock to the tick, whenever it is set. Else by its value, which was read a
/// little after one clock and is set a little after the other.
///
/// # Errors
/// They are no records.
pub(in crate::vm) fn gone_on(list: &[u8], before: &Clock, after: &Clock, khz: u32) -> Result<Vec<u8>, Malformed> {
    let ticks = ticks(before, after, khz);
    let all = records(list)?;
    let exact = before.flags & after.flags & HOST_TSC != 0 && all.iter().any(|record| record.kind == Type::TSC);
    let each = |list: Records, record: Record<'_>| -> Result<Records, Malformed> {
        Ok(match record.kind {
            Type::TSC if exact => {
                let Tsc { offset } = record.get()?;
                let passed = before.host_tsc.wrapping_add(ticks).wrapping_sub(after.host_tsc);
                list.put(Type::TSC, &Tsc { offset: offset.wrapping_add(passed) })
            }
            Type::TSC => list,
            Type::MSRS if !exact => {
                let mut msrs: Vec<Msr> = record.get_list()?;
                msrs.iter_mut()
                    .filter(|msr| msr.index == TSC)
                    .for_each(|msr| msr.value = msr.value.wrapping_add(ticks));
                list.list(Type::MSRS, &msrs)
            }
            _ => list.bytes(record.kind, record.payload),
        })
    };
    Ok(all.into_iter().try_fold(Records::default(), each)?.done())
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLOCK: Clock = Clock { kvmclock: 5_000_000, realtime: 1_700_000_000_000_000_000, host_tsc: 7, flags: 0b1110 };

    #[test]
    fn who_was_kept_in_a_file_has_slept() {
        let list = Records::default().bytes(Type::PIC, &[1; 32]).put(Type::CLOCK, &CLOCK).done();
        let flags = |passed: i64| {
            let arrived = arrived(&list, CLOCK.realtime.wrapping_add_signed(passed)).unwrap();
            assert_eq!(records(&arrived).unwrap()[0].payload, [1; 32]);
            clock(&arrived).unwrap().unwrap().flags
        };
        assert_eq!([-5_000_000_000, 0, 300_000_000].map(flags), [0b1110; 3]);
        assert_eq!(flags(3_600_000_000_000), 0b1010);
    }

    #[test]
    fn the_tsc_goes_on_with_the_clock() {
        let after = Clock { kvmclock: 55_000_000, ..CLOCK };
        assert_eq!(ticks(&CLOCK, &after, 2_000_000), 100_000_000);
        assert_eq!(ticks(&after, &CLOCK, 2_000_000), 0);
        let msr = |index, value| Msr { index, reserved: 0, value };
        let values = Records::default().list(Type::MSRS, &[msr(TSC, 9), msr(0x6e0, 9)]);
        let without = gone_on(&values.clone().done(), &CLOCK, &after, 2_000_000).unwrap();
        let msrs: Vec<Msr> = records(&without).unwrap()[0].get_list().unwrap();
        assert_eq!(msrs, [msr(TSC, 100_000_009), msr(0x6e0, 9)]);
        // The other host's TSC stands at 7 too: what has passed is all in the offset.
        let with = values.put(Type::TSC, &Tsc { offset: u64::MAX }).done();
        let moved = gone_on(&with, &CLOCK, &after, 2_000_000).unwrap();
        let list = records(&moved).unwrap();
        assert_eq!(list[0].get_list::<Msr>().unwrap()[0], msr(TSC, 9));
        assert_eq!(list[1].get::<Tsc>().unwrap().offset, 99_999_999);
        let elsewhere = Clock { flags: 0b0110, ..after };
        assert_eq!(records(&gone_on(&with, &CLOCK, &elsewhere, 2_000_000).unwrap()).unwrap().len(), 1);
    }
}
