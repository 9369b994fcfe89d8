//! The calendar against plain counting.

use super::calendar::{DAY, Mode};
use super::{b, index};

const BINARY: u8 = b::BINARY | b::HOURS_24;

fn leap(year: i128) -> bool {
    year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)
}

#[test]
fn every_day_of_400_years() {
    let mode = Mode::of(BINARY);
    let (mut year, mut month, mut day) = (1970, 1, 1);
    for days in 0..146_097 + 365 {
        let registers = mode.registers(days * DAY);
        let get =
            |wanted| registers.iter().find(|(index, _)| *index == wanted).map(|(_, value)| i128::from(*value)).unwrap();
        assert_eq!(
            (get(index::CENTURY) * 100 + get(index::YEAR), get(index::MONTH), get(index::DAY)),
            (year, month, day)
        );
        assert_eq!(get(index::WEEKDAY), (days + 4) % 7 + 1);
        assert_eq!(mode.seconds(|index| get(index) as u8), days * DAY);
        let length = match month {
            2 => 28 + i128::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        day += 1;
        if day > length {
            (day, month) = (1, month + 1);
        }
        if month > 12 {
            (month, year) = (1, year + 1);
        }
    }
}

#[test]
fn every_mode_shows_what_it_was_told() {
    for register_b in [0, b::BINARY, b::HOURS_24, BINARY] {
        let mode = Mode::of(register_b);
        // Days apart by a prime number of seconds: every field takes many values.
        for step in 0..10_000 {
            let seconds = 951_782_400 + step * 86_413;
            let registers = mode.registers(seconds);
            let get = |wanted| registers.iter().find(|(index, _)| *index == wanted).map(|(_, value)| *value).unwrap();
            assert_eq!(mode.seconds(get), seconds, "mode {register_b:#x}");
        }
    }
}

#[test]
fn values_out_of_range_carry_over() {
    let mode = Mode::of(BINARY);
    let at = |month, day| {
        mode.seconds(|index| match index {
            index::CENTURY => 20,
            index::YEAR => 24,
            index::MONTH => month,
            index::DAY => day,
            _ => 0,
        })
    };
    assert_eq!(at(2, 30), at(3, 1));
    assert_eq!(at(13, 1), at(12, 32));
    assert_eq!(at(0, 31), at(1, 0));
}

#[test]
fn alarms_come_when_counting_says() {
    let mode = Mode::of(BINARY);
    for (hour, minute, second) in
        [(23, 59, 59), (0, 0, 0), (0xff, 30, 15), (0xc0, 0xff, 7), (12, 0xff, 0xc1), (0xff, 0xff, 0xff)]
    {
        let alarm = mode.alarm(hour, minute, second).unwrap();
        let matches = |at: i128| {
            let field = |raw: u8, value: i128| raw >= 0xc0 || i128::from(raw) == value;
            field(hour, at / 3600 % 24) && field(minute, at / 60 % 60) && field(second, at % 60)
        };
        let mut next = alarm.next(0);
        for at in 0..2 * DAY {
            if at > next {
                next = alarm.next(at);
            }
            assert_eq!(matches(at), at == next, "{hour}:{minute}:{second} at {at}");
        }
    }
    assert_eq!(mode.alarm(24, 0, 0), None);
    assert_eq!(mode.alarm(0, 60, 0), None);
    assert_eq!(mode.alarm(0, 0, 99), None);
}
