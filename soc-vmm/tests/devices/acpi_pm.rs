//! ACPI fixed hardware: what Linux' ACPICA, acpi_pm clocksource and SeaBIOS do.

use std::time::Duration;

use soc_vmm::devices::{
    ACPI_DISABLE, ACPI_ENABLE, Clock, GPE0_BLOCK, GPE0_LEN, PM_TIMER, PM1A_CONTROL, PM1A_EVENT, Persist, PmTimerWidth,
    SCI_GSI, SLEEP_TYPE_S5, SMI_COMMAND,
};
use soc_vmm::power::PowerEvent;

use crate::rig::{HandClock, Rig, TSC_KHZ};

const STATUS: u64 = PM1A_EVENT as u64;
const ENABLE: u64 = STATUS + 2;
const CONTROL: u64 = PM1A_CONTROL as u64;
const TIMER: u64 = PM_TIMER as u64;
const GPE_STATUS: u64 = GPE0_BLOCK as u64;
const GPE_ENABLE: u64 = GPE_STATUS + GPE0_LEN as u64 / 2;

const SCI_EN: u64 = 1;
const TMR: u64 = 1 << 0;
const PWRBTN: u64 = 1 << 8;
const SLP_EN: u64 = 1 << 13;

const HALF_24: f64 = (1 << 23) as f64 / 3_579_545.0;

fn enable_acpi(rig: &mut Rig) {
    assert_eq!(rig.inp(CONTROL, 2) & SCI_EN, 0);
    rig.outb(SMI_COMMAND.into(), ACPI_ENABLE);
    assert_eq!(rig.inp(CONTROL, 2) & SCI_EN, SCI_EN);
}

#[test]
fn s5_powers_off() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    // ACPICA: the type first, then the type with SLP_EN.
    let kind = u64::from(SLEEP_TYPE_S5) << 10;
    let control = rig.inp(CONTROL, 2);
    rig.out(CONTROL, 2, control | kind);
    assert_eq!(rig.power.take(), []);
    rig.out(CONTROL, 2, control | kind | SLP_EN);
    assert_eq!(rig.power.take(), [PowerEvent::PowerOff]);
    assert_eq!(rig.inp(CONTROL, 2), control | kind, "SLP_EN reads 0");
    // Another type is no state that the machine has.
    rig.out(CONTROL, 2, control | 5 << 10 | SLP_EN);
    assert_eq!(rig.power.take(), []);
}

#[test]
fn a_guest_in_s3_is_woken_by_what_it_enabled() {
    const RTC: u64 = 1 << 10;
    const WAKE: u64 = 1 << 15;
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    // Awake, an alarm is the RTC's own interrupt alone.
    rig.out(ENABLE, 2, RTC);
    rig.acpi_handle.rtc_alarm();
    rig.settle();
    assert_eq!((rig.inp(STATUS, 2), rig.power.take()), (0, vec![]));
    rig.out(CONTROL, 2, 1 << 10 | SLP_EN);
    assert_eq!(rig.power.take(), [PowerEvent::Suspend]);
    rig.acpi_handle.press_power_button();
    rig.settle();
    assert_eq!(rig.power.take(), [], "the button is not enabled");
    rig.acpi_handle.rtc_alarm();
    rig.settle();
    assert_eq!(rig.power.take(), [PowerEvent::WakeUp]);
    rig.ports.reset();
    rig.acpi_handle.woke();
    rig.settle();
    assert_eq!(rig.inp(STATUS, 2), RTC | WAKE);
    // A reset ends sleep too.
    rig.out(CONTROL, 2, 1 << 10 | SLP_EN);
    rig.ports.reset();
    rig.out(ENABLE, 2, RTC);
    rig.acpi_handle.rtc_alarm();
    rig.settle();
    assert_eq!(rig.power.take(), [PowerEvent::Suspend]);
}

#[test]
fn power_button_is_an_sci() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    rig.out(ENABLE, 2, PWRBTN);
    rig.acpi_handle.press_power_button();
    assert!(!rig.lines.high(SCI_GSI));
    rig.settle();
    assert!(rig.lines.high(SCI_GSI));
    assert_eq!(rig.inp(STATUS, 2), PWRBTN);
    rig.out(STATUS, 2, PWRBTN);
    assert!(!rig.lines.high(SCI_GSI));
    assert_eq!(rig.inp(STATUS, 2), 0);
}

#[test]
fn a_button_pressed_before_acpi_waits_and_no_sci_comes_without_acpi() {
    let mut rig = Rig::new();
    rig.acpi_handle.press_power_button();
    rig.settle();
    rig.out(ENABLE, 2, PWRBTN);
    assert!(!rig.lines.high(SCI_GSI));
    enable_acpi(&mut rig);
    assert!(rig.lines.high(SCI_GSI));
    rig.outb(SMI_COMMAND.into(), ACPI_DISABLE);
    assert!(!rig.lines.high(SCI_GSI));
    rig.outb(SMI_COMMAND.into(), ACPI_ENABLE);
    rig.acpi_handle.raise_gpe(1);
    rig.acpi_handle.press_power_button();
    rig.ports.reset();
    rig.settle();
    assert!(!rig.lines.high(SCI_GSI));
    assert_eq!(rig.inp(STATUS, 4), 0, "what was under way is gone");
    assert_eq!(rig.inp(GPE_STATUS, 4), 0);
    assert_eq!(rig.inp(CONTROL, 2), 0);
}

#[test]
fn the_timer_counts_the_hosts_tsc() {
    let mut rig = Rig::new();
    let mut last = rig.inp(TIMER, 4);
    assert_eq!(last, 0);
    for _ in 0..100 {
        rig.pass(Duration::from_millis(100));
        let now = rig.inp(TIMER, 4);
        assert_eq!(now >> 24, 0);
        let ticks = now.wrapping_sub(last) & 0xff_ffff;
        assert!((357_954..=357_955).contains(&ticks), "{ticks}");
        last = now;
    }
    assert_eq!(last, 35_795_450 % (1 << 24), "exact over ten seconds");
    assert_eq!(rig.inp(TIMER, 2), last & 0xffff);
    rig.out(TIMER, 4, 0);
    assert_eq!(rig.inp(TIMER, 4), last, "read-only");
    // The SoC's clock has no say.
    rig.clock.step_real(Duration::from_secs(1));
    assert_eq!(rig.inp(TIMER, 4), last);
}

#[test]
fn a_timer_of_32_bits_uses_them() {
    let mut rig = Rig::with(HandClock::new(), PmTimerWidth::Bits32);
    rig.pass(Duration::from_secs(1000));
    assert_eq!(rig.inp(TIMER, 4), 3_579_545_000);
    rig.pass(Duration::from_secs(1000));
    assert_eq!(rig.inp(TIMER, 4), 7_159_090_000 % (1 << 32));
}

#[test]
fn the_timers_carry_is_a_status_bit_and_an_sci() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    assert_eq!(rig.ports.deadline(), None, "nobody waits for it");
    rig.pass(Duration::from_secs(3));
    assert_eq!(rig.inp(STATUS, 2) & TMR, TMR, "bit 23 toggled");
    rig.out(STATUS, 2, TMR);
    assert_eq!(rig.inp(STATUS, 2) & TMR, 0);
    rig.out(ENABLE, 2, TMR);
    for nth in 2..20 {
        let at = rig.ports.deadline().unwrap();
        rig.pass(at - soc_vmm::devices::Clock::monotonic(&*rig.clock));
        assert!(rig.lines.high(SCI_GSI));
        let seconds = rig.clock.host_tsc() as f64 / (TSC_KHZ as f64 * 1000.0);
        assert!((seconds - HALF_24 * f64::from(nth)).abs() < 1e-5, "carry {nth} at {seconds}");
        assert_eq!(rig.ports.deadline(), None, "none more while it is pending");
        rig.out(STATUS, 2, TMR);
        assert!(!rig.lines.high(SCI_GSI));
    }
}

#[test]
fn a_carry_seen_by_an_access_is_not_told_again_by_the_deadline() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    rig.out(ENABLE, 2, TMR);
    // The thread is late: the guest looks first.
    rig.clock.pass(Duration::from_secs_f64(HALF_24 + 0.001));
    assert_eq!(rig.inp(STATUS, 2) & TMR, TMR);
    assert!(rig.lines.high(SCI_GSI));
    rig.ports.poll();
    rig.out(STATUS, 2, TMR);
    rig.ports.poll();
    assert!(!rig.lines.high(SCI_GSI));
    rig.pass(Duration::from_secs_f64(HALF_24));
    assert!(rig.lines.high(SCI_GSI), "and the next one is not lost");
}

#[test]
fn a_deadline_before_the_tscs_carry_is_that_carry() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    rig.out(ENABLE, 2, TMR);
    let lag = Duration::from_millis(1);
    rig.pass(lag);
    rig.clock.lag_tsc(lag);
    rig.pass(Duration::from_secs_f64(HALF_24) - lag / 2);
    assert!(rig.lines.high(SCI_GSI));
    assert_eq!(rig.inp(TIMER, 4) >> 23, 0, "the TSC is not there yet");
    rig.out(STATUS, 2, TMR);
    rig.pass(lag);
    assert_eq!(rig.inp(TIMER, 4) >> 23, 1);
    assert!(!rig.lines.high(SCI_GSI), "told already");
    assert_eq!(rig.inp(STATUS, 2), 0);
}

#[test]
fn general_purpose_events() {
    let mut rig = Rig::new();
    enable_acpi(&mut rig);
    rig.out(GPE_ENABLE, 4, 1 << 3);
    rig.acpi_handle.raise_gpe(3);
    rig.acpi_handle.raise_gpe(63);
    rig.settle();
    assert!(rig.lines.high(SCI_GSI));
    assert_eq!(rig.inb(GPE_STATUS), 1 << 3);
    assert_eq!(rig.inb(GPE_STATUS + 7), 0x80);
    rig.outb(GPE_STATUS, 1 << 3);
    assert!(!rig.lines.high(SCI_GSI), "the other one is not enabled");
    rig.outb(GPE_ENABLE + 7, 0x80);
    assert!(rig.lines.high(SCI_GSI));
}

#[test]
fn the_timer_goes_on_on_another_host() {
    let mut from = Rig::new();
    enable_acpi(&mut from);
    from.out(ENABLE, 2, TMR);
    from.pass(Duration::from_millis(600));
    let shown = from.inp(TIMER, 4);
    // The guest doesn't look for a while, then it moves.
    from.pass(Duration::from_millis(100));
    let state = from.acpi.lock().unwrap().save();
    // This host's TSC has run for two days; the guest arrives 50 ms later, runs after 10 more, and looks 5 later.
    let mut to = Rig::new();
    to.clock.pass(Duration::from_secs(172_800));
    to.clock.step_real(from.clock.realtime() + Duration::from_millis(50));
    to.acpi.lock().unwrap().restore(&state).unwrap();
    to.clock.pass(Duration::from_millis(10));
    to.ports.poll();
    // It moves on before it looks: a state that says the same.
    let state = to.acpi.lock().unwrap().save();
    assert_eq!(state.moment.unwrap().host_tsc, 760 * TSC_KHZ);
    to.acpi.lock().unwrap().restore(&state).unwrap();
    to.clock.pass(Duration::from_millis(5));
    let ticks = to.inp(TIMER, 4) - shown;
    assert!((590_624..=590_626).contains(&ticks), "165 ms are {ticks} ticks");
    to.pass(Duration::from_secs_f64(HALF_24 - 0.766));
    assert!(!to.lines.high(SCI_GSI));
    to.pass(Duration::from_millis(2));
    assert!(to.lines.high(SCI_GSI), "its carry comes in time");
    assert_eq!(to.inp(STATUS, 2) & TMR, TMR);
}

#[test]
fn an_overflow_on_the_way_is_told() {
    let mut from = Rig::new();
    enable_acpi(&mut from);
    from.out(ENABLE, 2, TMR);
    let state = from.acpi.lock().unwrap().save();
    let mut to = Rig::new();
    to.clock.step_real(from.clock.realtime() + Duration::from_secs(3));
    to.acpi.lock().unwrap().restore(&state).unwrap();
    to.ports.poll();
    assert!(to.lines.high(SCI_GSI));
    assert_eq!(to.inp(TIMER, 4) >> 23, 1);
    to.out(STATUS, 2, TMR);
    assert!(!to.lines.high(SCI_GSI));
}

#[test]
fn what_waits_for_a_poll_moves_too() {
    let mut from = Rig::new();
    enable_acpi(&mut from);
    from.out(ENABLE, 2, PWRBTN);
    from.out(CONTROL, 2, 1 << 10 | SLP_EN);
    from.acpi_handle.press_power_button();
    from.acpi_handle.raise_gpe(5);
    let state = from.acpi.lock().unwrap().save();
    let mut to = Rig::new();
    to.acpi_handle.raise_gpe(7);
    to.acpi.lock().unwrap().restore(&state).unwrap();
    assert_eq!((to.lines.all_high(), to.power.take()), (vec![], vec![]), "nothing new before it goes on");
    to.ports.poll();
    assert_eq!((to.inb(GPE_STATUS), to.power.take()), (1 << 5, vec![PowerEvent::WakeUp]));
}

#[test]
fn registers_that_do_nothing() {
    let mut rig = Rig::new();
    assert_eq!(rig.inp(0x630, 4), 0x20, "SMIs are somebody else's");
    rig.out(0x630, 4, 0xffff_ffff);
    assert_eq!(rig.inp(0x630, 4), 0x20);
    rig.outb(0xb3, 0x77);
    assert_eq!(rig.inb(0xb3), 0x77);
    assert_eq!(rig.inp(0x67e, 4), 0xffff_0000, "the block's end is not the SMI port");
    rig.out(0x67e, 4, 0x0202_0202);
    assert_eq!(rig.inp(CONTROL, 2), 0);
}
