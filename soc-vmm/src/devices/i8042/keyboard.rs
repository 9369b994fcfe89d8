//! A keyboard that nobody types at (IBM PS/2 Technical Reference, "Keyboards (101- and 102-key)": its commands).
//!
//! It is there because firmware looks for one and waits for it: UEFI's driver polls the controller for a second, port by port, for every command
//! that isn't acknowledged.

use serde::{Deserialize, Serialize};

mod command {
    pub(super) const LEDS: u8 = 0xed;
    pub(super) const ECHO: u8 = 0xee;
    pub(super) const SCAN_SET: u8 = 0xf0;
    pub(super) const IDENTIFY: u8 = 0xf2;
    pub(super) const RATE: u8 = 0xf3;
    pub(super) const ENABLE: u8 = 0xf4;
    pub(super) const DISABLE: u8 = 0xf5;
    pub(super) const DEFAULTS: u8 = 0xf6;
    pub(super) const RESET: u8 = 0xff;
}

const ACKNOWLEDGE: u8 = 0xfa;
const SELF_TEST_PASSED: u8 = 0xaa;
const RESEND: u8 = 0xfe;
/// An MF2 keyboard.
const IDENTITY: [u8; 2] = [0xab, 0x83];
const DEFAULT_SCAN_SET: u8 = 2;

/// What the keyboard remembers: state that is saved, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Keyboard {
    /// The command whose argument is awaited.
    pub awaited: Option<u8>,
    /// The scan code set, 1–3.
    pub scan_set: u8,
}

impl Keyboard {
    pub(super) fn power_on() -> Self {
        Self { awaited: None, scan_set: DEFAULT_SCAN_SET }
    }

    /// Whether this can be a keyboard's state.
    pub(super) fn is_lawful(&self) -> bool {
        let awaited = [None, Some(command::LEDS), Some(command::SCAN_SET), Some(command::RATE)];
        awaited.contains(&self.awaited) && (1..=3).contains(&self.scan_set)
    }

    /// Takes a byte, and hands each byte of the answer to `answer`.
    pub(super) fn take(&mut self, byte: u8, mut answer: impl FnMut(u8)) {
        match (self.awaited.take(), byte) {
            (Some(command::SCAN_SET), 0) => {
                answer(ACKNOWLEDGE);
                answer(self.scan_set);
            }
            (Some(command::SCAN_SET), 1..=3) => {
                self.scan_set = byte;
                answer(ACKNOWLEDGE);
            }
            (Some(command::LEDS), 0..=7) | (Some(command::RATE), 0..=0x7f) => answer(ACKNOWLEDGE),
            // No argument can be this: it is the next command.
            (_, command::LEDS | command::SCAN_SET | command::RATE) => {
                self.awaited = Some(byte);
                answer(ACKNOWLEDGE);
            }
            (_, command::ECHO) => answer(command::ECHO),
            (_, command::IDENTIFY) => {
                answer(ACKNOWLEDGE);
                IDENTITY.into_iter().for_each(answer);
            }
            (_, command::ENABLE | command::DISABLE) => answer(ACKNOWLEDGE),
            (_, command::DEFAULTS) => {
                *self = Self::power_on();
                answer(ACKNOWLEDGE);
            }
            (_, command::RESET) => {
                *self = Self::power_on();
                answer(ACKNOWLEDGE);
                answer(SELF_TEST_PASSED);
            }
            _ => answer(RESEND),
        }
    }
}

/// What the controller makes of a keyboard's byte where it translates scan codes of set 2 to set 1: of those that can come here, only what
/// looks like a key changes.
pub(super) fn translated(byte: u8) -> u8 {
    match byte {
        0x01 => 0x43,
        0x02 => 0x41,
        0x03 => 0x3f,
        0x83 => 0x41,
        _ => byte,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn says(keyboard: &mut Keyboard, byte: u8) -> Vec<u8> {
        let mut answer = Vec::new();
        keyboard.take(byte, |byte| answer.push(byte));
        answer
    }

    #[test]
    fn commands_are_answered() {
        let mut keyboard = Keyboard::power_on();
        let dialogue: [(u8, &[u8]); 14] = [
            (0xff, &[0xfa, 0xaa]),
            (0xf2, &[0xfa, 0xab, 0x83]),
            (0xf5, &[0xfa]),
            (0xed, &[0xfa]),
            (0x07, &[0xfa]),
            (0xf0, &[0xfa]),
            (0x01, &[0xfa]),
            (0xf0, &[0xfa]),
            (0x00, &[0xfa, 0x01]),
            (0xf3, &[0xfa]),
            (0x20, &[0xfa]),
            (0xf4, &[0xfa]),
            (0xee, &[0xee]),
            (0x12, &[0xfe]),
        ];
        for (byte, answer) in dialogue {
            assert_eq!(says(&mut keyboard, byte), answer, "{byte:#x}");
        }
    }

    #[test]
    fn a_command_ends_the_wait_for_an_argument() {
        let mut keyboard = Keyboard::power_on();
        assert_eq!(says(&mut keyboard, 0xed), [0xfa]);
        assert_eq!(says(&mut keyboard, 0xff), [0xfa, 0xaa]);
        assert_eq!(says(&mut keyboard, 0x02), [0xfe]);
    }

    #[test]
    fn every_state_that_is_reached_is_lawful() {
        for first in 0..=255 {
            let mut keyboard = Keyboard::power_on();
            for second in 0..=255 {
                says(&mut keyboard, first);
                assert!(keyboard.is_lawful(), "{keyboard:?}");
                assert!(says(&mut keyboard, second).len() <= 3);
                assert!(keyboard.is_lawful(), "{keyboard:?}");
            }
        }
        assert!(!Keyboard { awaited: Some(0xf2), scan_set: 2 }.is_lawful());
        assert!(!Keyboard { awaited: None, scan_set: 0 }.is_lawful());
    }
}
