//! RTC and CMOS RAM: what SeaBIOS and Linux do with them.

use std::time::Duration;

use soc_vmm::devices::{Cmos, Persist, Rtc};
use soc_vmm::interrupt::InterruptLine;

use crate::rig::{CMOS, Rig, START};

const GSI: u32 = 8;
const A: u8 = 0x0a;
const B: u8 = 0x0b;
const C: u8 = 0x0c;
const D: u8 = 0x0d;

const SECOND: Duration = Duration::from_secs(1);

fn get(rig: &mut Rig, index: u8) -> u8 {
    rig.outb(0x70, index | 0x80);
    rig.inb(0x71)
}

fn set(rig: &mut Rig, index: u8, value: u8) {
    rig.outb(0x70, index);
    rig.outb(0x71, value);
}

/// Year (with century), month, day, hour, minute, second as the registers show them.
fn shown(rig: &mut Rig) -> [u8; 7] {
    [0x32, 9, 8, 7, 4, 2, 0].map(|index| get(rig, index))
}

/// As SeaBIOS computes RAM below 4 GiB and above.
fn seabios_ram(rig: &mut Rig) -> (u64, u64) {
    let pair = |rig: &mut Rig, low| u64::from(get(rig, low)) | u64::from(get(rig, low + 1)) << 8;
    let above_16m = pair(rig, 0x34) << 16;
    let below = if above_16m != 0 { above_16m + (16 << 20) } else { (pair(rig, 0x30) << 10) + (1 << 20) };
    let above = pair(rig, 0x5b) << 16 | u64::from(get(rig, 0x5d)) << 32;
    (below, above)
}

#[test]
fn seabios_reads_the_machine() {
    let mut rig = Rig::new();
    assert_eq!(seabios_ram(&mut rig), (512 << 20, 0));
    assert_eq!((get(&mut rig, 0x15), get(&mut rig, 0x16)), (0x80, 0x02), "640 KiB");
    assert_eq!((get(&mut rig, 0x17), get(&mut rig, 0x18)), (0xff, 0xff));
    assert_eq!(get(&mut rig, 0x5f), 1, "two vCPUs");
    assert_eq!((get(&mut rig, 0x3d), get(&mut rig, 0x38)), (0x23, 0x00), "CD-ROM, then disk");
    assert_eq!(get(&mut rig, D), 0x80);
    for (below, above, cpus) in [(8u64 << 20, 0, 1), (3 << 30, 1u64 << 30, 256), (2 << 30, 254 << 30, 300)] {
        let cmos = Cmos { ram_below_4g: below, ram_above_4g: above, cpus, ..CMOS };
        let rtc = Rtc::new(&cmos, rig.clock.clone(), InterruptLine::new(GSI, rig.lines.clone()));
        *rig.rtc.lock().unwrap() = rtc;
        assert_eq!(seabios_ram(&mut rig), (below, above));
        assert_eq!(get(&mut rig, 0x5f), if cpus > 256 { 0 } else { (cpus - 1) as u8 });
    }
}

#[test]
fn cmos_ram_keeps_bytes_through_a_reset() {
    let mut rig = Rig::new();
    set(&mut rig, 0x0f, 0x0a);
    for index in 0x40..0x50 {
        set(&mut rig, index, index ^ 0x55);
    }
    rig.ports.reset();
    assert_eq!(get(&mut rig, 0x0f), 0x0a, "SeaBIOS' resume reads the shutdown byte");
    for index in 0x40..0x50 {
        assert_eq!(get(&mut rig, index), index ^ 0x55);
    }
    // A word at 0x70 is index and data.
    rig.out(0x70, 2, 0xab41);
    assert_eq!(get(&mut rig, 0x41), 0xab);
    assert_eq!(rig.inp(0x70, 2), 0xabff, "the index can't be read");
}

#[test]
fn the_date_is_real_time() {
    let mut rig = Rig::new();
    assert_eq!(shown(&mut rig), [0x20, 0x24, 0x02, 0x28, 0x23, 0x59, 0x50]);
    assert_eq!(get(&mut rig, 6), 4, "Wednesday");
    rig.pass(10 * SECOND);
    assert_eq!(shown(&mut rig), [0x20, 0x24, 0x02, 0x29, 0x00, 0x00, 0x00]);
    // Binary, 12 hours.
    set(&mut rig, B, 0x04);
    assert_eq!(shown(&mut rig), [20, 24, 2, 29, 12, 0, 0]);
    rig.pass(13 * 3600 * SECOND);
    assert_eq!(get(&mut rig, 4), 0x81, "1 pm");
    set(&mut rig, B, 0x00);
    rig.pass(10 * 3600 * SECOND);
    assert_eq!(get(&mut rig, 4), 0x91, "11 pm in BCD");
    assert_eq!(get(&mut rig, 0x37), 0x20, "a PS/2's century");
}

#[test]
fn the_update_is_announced() {
    let mut rig = Rig::new();
    assert_eq!(get(&mut rig, A) & 0x80, 0);
    rig.pass(SECOND - Duration::from_micros(300));
    assert_eq!(get(&mut rig, A) & 0x80, 0);
    rig.pass(Duration::from_micros(100));
    assert_eq!(get(&mut rig, A) & 0x80, 0x80);
    assert_eq!(get(&mut rig, 0), 0x50);
    rig.pass(Duration::from_micros(200));
    assert_eq!(get(&mut rig, A) & 0x80, 0);
    assert_eq!(get(&mut rig, 0), 0x51);
    set(&mut rig, B, 0x92);
    assert_eq!(get(&mut rig, B), 0x82, "and their interrupt is off");
    rig.pass(SECOND - Duration::from_micros(200));
    assert_eq!(get(&mut rig, A) & 0x80, 0, "no updates while the clock is set");
}

/// Linux' `mc146818_set_time`.
#[test]
fn linux_sets_the_clock() {
    let mut rig = Rig::new();
    rig.pass(Duration::from_millis(300));
    let (control, frequency) = (get(&mut rig, B), get(&mut rig, A));
    set(&mut rig, B, control | 0x80);
    set(&mut rig, A, frequency | 0x70);
    rig.pass(3 * SECOND);
    for (index, value) in [(9, 0x31), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59), (0x32, 0x19)] {
        set(&mut rig, index, value);
        assert_eq!(get(&mut rig, index), value);
    }
    rig.pass(3 * SECOND);
    assert_eq!(get(&mut rig, 0), 0x59, "it stands still");
    set(&mut rig, B, control);
    assert_eq!(get(&mut rig, 0), 0x59, "the divider is still held");
    set(&mut rig, A, frequency);
    rig.pass(Duration::from_millis(499));
    assert_eq!(shown(&mut rig), [0x19, 0x31, 0x12, 0x31, 0x23, 0x59, 0x59]);
    rig.pass(Duration::from_millis(1));
    assert_eq!(
        shown(&mut rig),
        [0x19, 0x32, 0x01, 0x01, 0x00, 0x00, 0x00],
        "the first update comes after half a second"
    );
    // Real time goes on below: an hour later it is an hour later.
    rig.pass(3600 * SECOND);
    assert_eq!(shown(&mut rig), [0x19, 0x32, 0x01, 0x01, 0x01, 0x00, 0x00]);
}

#[test]
fn a_register_set_while_the_clock_runs_takes_effect() {
    let mut rig = Rig::new();
    set(&mut rig, B, 0x12);
    rig.pass(Duration::from_millis(250));
    set(&mut rig, 4, 0x05);
    rig.ports.poll();
    set(&mut rig, 9, 0x25);
    set(&mut rig, 9, 0x24);
    set(&mut rig, 4, 0x06);
    set(&mut rig, 4, 0x05);
    set(&mut rig, 2, 0x58);
    set(&mut rig, 2, 0x59);
    rig.ports.poll();
    assert!(!rig.lines.high(GSI), "setting is no update, neither back nor on");
    assert_eq!(shown(&mut rig), [0x20, 0x24, 0x02, 0x28, 0x05, 0x59, 0x50]);
    rig.pass(Duration::from_millis(749));
    assert_eq!(get(&mut rig, 0), 0x50);
    rig.pass(Duration::from_millis(1));
    assert_eq!(get(&mut rig, 0), 0x51, "the fraction of the second stayed");
}

#[test]
fn update_interrupts_come_each_second() {
    let mut rig = Rig::new();
    assert_eq!(rig.ports.deadline(), None, "an RTC that nobody waits for sleeps");
    set(&mut rig, B, 0x12);
    for _ in 0..5 {
        rig.pass(Duration::from_millis(999));
        assert!(!rig.lines.high(GSI));
        rig.pass(Duration::from_millis(1));
        assert!(rig.lines.high(GSI));
        assert_eq!(rig.ports.deadline(), None, "pending: nothing more to wait for");
        assert_eq!(get(&mut rig, C) & !0x40, 0x90);
        assert!(!rig.lines.high(GSI));
        assert_eq!(get(&mut rig, C) & 0x90, 0);
    }
    rig.pass(10 * SECOND);
    assert_eq!(get(&mut rig, C) & 0x90, 0x90, "missed ones are one");
    rig.ports.reset();
    rig.pass(2 * SECOND);
    assert!(!rig.lines.high(GSI));
    assert_eq!(get(&mut rig, B), 0x02);
}

#[test]
fn periodic_interrupts_keep_their_rate() {
    for (rate, hz) in [(6, 1024), (3, 8192), (15, 2), (1, 256), (2, 128)] {
        let mut rig = Rig::new();
        set(&mut rig, A, 0x20 | rate);
        set(&mut rig, B, 0x42);
        let end = soc_vmm::devices::Clock::realtime(&*rig.clock) + SECOND;
        let mut count = 0;
        while let Some(at) = rig.ports.deadline() {
            let now = soc_vmm::devices::Clock::monotonic(&*rig.clock);
            rig.pass(at - now);
            if soc_vmm::devices::Clock::realtime(&*rig.clock) > end {
                break;
            }
            assert!(rig.lines.high(GSI));
            assert_eq!(get(&mut rig, C) & 0xc0, 0xc0);
            count += 1;
        }
        assert_eq!(count, hz, "rate {rate}");
    }
    let mut rig = Rig::new();
    set(&mut rig, A, 0x20);
    set(&mut rig, B, 0x42);
    assert_eq!(rig.ports.deadline(), None, "rate 0 is off");
    set(&mut rig, A, 0x76);
    assert_eq!(rig.ports.deadline(), None, "the divider is held");
}

#[test]
fn the_alarm_rings_once_a_day() {
    let mut rig = Rig::new();
    // 00:00:05, fifteen seconds from now.
    for (index, value) in [(5, 0x00), (3, 0x00), (1, 0x05)] {
        set(&mut rig, index, value);
    }
    set(&mut rig, B, 0x22);
    rig.pass(Duration::from_millis(14_999));
    assert!(!rig.lines.high(GSI));
    rig.pass(Duration::from_millis(1));
    assert!(rig.lines.high(GSI));
    assert_eq!(get(&mut rig, C) & 0xa0, 0xa0);
    rig.pass(Duration::from_secs(86_399));
    assert!(!rig.lines.high(GSI));
    rig.pass(SECOND);
    assert!(rig.lines.high(GSI));
    // Any minute, second 30; the flag is set also where no interrupt is enabled.
    set(&mut rig, B, 0x02);
    get(&mut rig, C);
    for (index, value) in [(5, 0xff), (3, 0xff), (1, 0x30)] {
        set(&mut rig, index, value);
    }
    rig.pass(24 * SECOND);
    assert_eq!(get(&mut rig, C) & 0xa0, 0);
    rig.pass(SECOND);
    assert_eq!(get(&mut rig, C) & 0xa0, 0x20);
}

#[test]
fn an_alarm_that_never_comes_costs_nothing() {
    let mut rig = Rig::new();
    set(&mut rig, 1, 0x61);
    set(&mut rig, B, 0x22);
    assert_eq!(rig.ports.deadline(), None);
    rig.pass(Duration::from_secs(200_000));
    assert!(!rig.lines.high(GSI));
}

#[test]
fn stepped_real_time_makes_no_storm() {
    let mut rig = Rig::new();
    set(&mut rig, B, 0x12);
    rig.pass(SECOND);
    get(&mut rig, C);
    rig.clock.step_real(START - Duration::from_secs(86_400));
    rig.ports.poll();
    assert!(!rig.lines.high(GSI), "back in time, nothing is due");
    assert_eq!(shown(&mut rig)[3], 0x27, "the date follows");
    rig.pass(SECOND);
    assert!(rig.lines.high(GSI));
    get(&mut rig, C);
    rig.clock.step_real(START + Duration::from_secs(86_400));
    rig.ports.poll();
    assert!(rig.lines.high(GSI));
    get(&mut rig, C);
    assert!(!rig.lines.high(GSI), "a day's updates are one");
}

#[test]
fn a_step_back_is_no_periodic_tick() {
    let mut rig = Rig::new();
    set(&mut rig, A, 0x2f);
    set(&mut rig, B, 0x42);
    rig.pass(SECOND);
    get(&mut rig, C);
    rig.clock.step_real(START);
    rig.ports.poll();
    assert!(!rig.lines.high(GSI));
}

#[test]
fn an_alarm_under_a_deadline_that_real_time_jumps_over_is_a_minute_late_at_most() {
    let mut rig = Rig::new();
    // 04:00:00.
    for (index, value) in [(5, 0x04), (3, 0x00), (1, 0x00)] {
        set(&mut rig, index, value);
    }
    set(&mut rig, B, 0x22);
    rig.clock.step_real(START + Duration::from_secs(5 * 3600));
    rig.pass(60 * SECOND);
    assert!(rig.lines.high(GSI));
}

#[test]
fn garbage_in_the_time_registers_is_normalised() {
    let mut rig = Rig::new();
    set(&mut rig, B, 0x82);
    for index in [0, 2, 4, 6, 7, 8, 9, 0x32] {
        set(&mut rig, index, 0xff);
    }
    set(&mut rig, B, 0x02);
    let [century, year, month, day, hour, minute, second] = shown(&mut rig);
    assert!(century <= 0x99 && year <= 0x99 && (1..=0x12).contains(&month) && (1..=0x31).contains(&day));
    assert!(hour <= 0x23 && minute <= 0x59 && second <= 0x59);
}

#[test]
fn refused_states_change_nothing() {
    let rig = Rig::new();
    let mut rtc = rig.rtc.lock().unwrap();
    let good = rtc.save();
    let mut bad = [good.clone(), good.clone(), good.clone(), good.clone(), good.clone()];
    bad[0].cmos.pop();
    bad[1].index = 128;
    bad[2].offset_nanos = 1_000_000_000;
    bad[3].seen_seconds = i64::MIN;
    bad[4].cmos[0x0c] = 0x80;
    for bad in bad {
        rtc.restore(&bad).unwrap_err();
        assert_eq!(rtc.save(), good);
    }
}
