//! The i8042 keyboard controller (IBM PS/2 Technical Reference, "Keyboard and Auxiliary Device Controller") with a keyboard that
//! nobody types at, and no mouse.
//!
//! A byte sent to the mouse is answered as real controllers do where nobody is: a timeout with 0xfe in the output buffer, at
//! once, so that no guest waits for a device that will not come.

mod keyboard;

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::wire::Wire;
use super::{Persist, Ranges, RestoreError, bytes, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::interrupt::InterruptLine;
use crate::power::{PowerEvent, PowerSink};

pub use keyboard::Keyboard;

mod status {
    pub(super) const OUTPUT_FULL: u8 = 1 << 0;
    pub(super) const SELF_TEST: u8 = 1 << 2;
    pub(super) const COMMAND: u8 = 1 << 3;
    pub(super) const UNLOCKED: u8 = 1 << 4;
    pub(super) const AUX_FULL: u8 = 1 << 5;
    pub(super) const TIMEOUT: u8 = 1 << 6;
    /// The bits that are state; the others follow from the output buffer.
    pub(super) const KEPT: u8 = SELF_TEST | COMMAND | UNLOCKED;
}

mod mode {
    pub(super) const KEYBOARD_INT: u8 = 1 << 0;
    pub(super) const AUX_INT: u8 = 1 << 1;
    pub(super) const KEYBOARD_OFF: u8 = 1 << 4;
    pub(super) const AUX_OFF: u8 = 1 << 5;
    /// Scan codes of set 2 reach the guest as set 1.
    pub(super) const TRANSLATE: u8 = 1 << 6;
}

mod port {
    /// Low resets the machine.
    pub(super) const RESET: u8 = 1 << 0;
    pub(super) const A20: u8 = 1 << 1;
    pub(super) const OUTPUT_FULL: u8 = 1 << 4;
    pub(super) const AUX_FULL: u8 = 1 << 5;
    pub(super) const ONES: u8 = 0xcc;
}

mod command {
    pub(super) const READ_MODE: u8 = 0x20;
    pub(super) const WRITE_MODE: u8 = 0x60;
    pub(super) const AUX_DISABLE: u8 = 0xa7;
    pub(super) const AUX_ENABLE: u8 = 0xa8;
    pub(super) const AUX_TEST: u8 = 0xa9;
    pub(super) const SELF_TEST: u8 = 0xaa;
    pub(super) const KEYBOARD_TEST: u8 = 0xab;
    pub(super) const KEYBOARD_DISABLE: u8 = 0xad;
    pub(super) const KEYBOARD_ENABLE: u8 = 0xae;
    pub(super) const READ_INPUT_PORT: u8 = 0xc0;
    pub(super) const READ_OUTPUT_PORT: u8 = 0xd0;
    pub(super) const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub(super) const WRITE_OUTPUT: u8 = 0xd2;
    pub(super) const WRITE_AUX_OUTPUT: u8 = 0xd3;
    pub(super) const WRITE_AUX: u8 = 0xd4;
    pub(super) const A20_OFF: u8 = 0xdd;
    pub(super) const A20_ON: u8 = 0xdf;
    /// 0xf0–0xff pulse the output port's bits that are 0 in the low half of the command.
    pub(super) const PULSE: u8 = 0xf0;
}

const SELF_TEST_PASSED: u8 = 0x55;
const INTERFACE_PASSED: u8 = 0x00;
/// Bit 7: the keyboard is not locked.
const INPUT_PORT: u8 = 0x80;
const RESEND: u8 = 0xfe;
/// Replies that wait to be read; more of them are lost, as in the real controller.
const QUEUE: usize = 16;

/// Ports 0x60 (data) and 0x64 (status, command).
pub struct I8042 {
    state: I8042State,
    keyboard_irq: Wire,
    aux_irq: Wire,
    power: Arc<dyn PowerSink>,
}

/// Saved state of an [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042State {
    /// Status register, without what follows from `output`.
    pub status: u8,
    /// Controller command byte ("mode").
    pub mode: u8,
    /// Output port, without what follows from `output`.
    pub outport: u8,
    /// The command whose data byte is awaited.
    pub awaited: Option<u8>,
    /// Bytes to be read, the first one in the output buffer.
    pub output: VecDeque<I8042Byte>,
    /// The keyboard.
    pub keyboard: Keyboard,
}

/// A byte for port 0x60.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct I8042Byte {
    /// Its value.
    pub value: u8,
    /// It is the auxiliary device's (the mouse's).
    pub aux: bool,
    /// Nobody answered.
    pub timeout: bool,
}

impl I8042State {
    fn power_on() -> Self {
        Self {
            status: status::COMMAND | status::UNLOCKED,
            mode: mode::KEYBOARD_INT | mode::AUX_INT,
            outport: port::RESET | port::A20 | port::ONES,
            awaited: None,
            output: VecDeque::new(),
            keyboard: Keyboard::power_on(),
        }
    }

    fn status(&self) -> u8 {
        self.status
            | self.output.front().map_or(0, |byte| {
                status::OUTPUT_FULL
                    | if byte.aux { status::AUX_FULL } else { 0 }
                    | if byte.timeout { status::TIMEOUT } else { 0 }
            })
    }

    fn outport(&self) -> u8 {
        let full = self.output.front().map_or(0, |byte| if byte.aux { port::AUX_FULL } else { port::OUTPUT_FULL });
        self.outport & !(port::OUTPUT_FULL | port::AUX_FULL) | full
    }

    fn push(&mut self, value: u8, aux: bool, timeout: bool) {
        if self.output.len() < QUEUE {
            self.output.push_back(I8042Byte { value, aux, timeout });
        }
    }

    fn reply(&mut self, value: u8) {
        self.push(value, false, false);
    }

    /// A byte for the keyboard, whose line is opened by it.
    fn send(&mut self, byte: u8) {
        self.mode &= !mode::KEYBOARD_OFF;
        let translate = self.mode & mode::TRANSLATE != 0;
        let mut keyboard = self.keyboard;
        keyboard.take(byte, |said| self.reply(if translate { keyboard::translated(said) } else { said }));
        self.keyboard = keyboard;
    }

    /// Levels of the keyboard's and the mouse's line.
    fn levels(&self) -> (bool, bool) {
        match self.output.front() {
            Some(byte) if byte.aux => (false, self.mode & mode::AUX_INT != 0),
            Some(_) => (self.mode & mode::KEYBOARD_INT != 0 && self.mode & mode::KEYBOARD_OFF == 0, false),
            None => (false, false),
        }
    }
}

impl I8042 {
    /// What it claims.
    pub const RANGES: Ranges = Ranges::ports(&[claim(0x60, 1), claim(0x64, 1)]);
    /// The keyboard's GSI.
    pub const KEYBOARD_GSI: u32 = 1;
    /// The mouse's GSI.
    pub const AUX_GSI: u32 = 12;

    /// A controller after power on; resets go to `power`.
    pub fn new(keyboard_irq: InterruptLine, aux_irq: InterruptLine, power: Arc<dyn PowerSink>) -> Self {
        Self {
            state: I8042State::power_on(),
            keyboard_irq: Wire::new(keyboard_irq),
            aux_irq: Wire::new(aux_irq),
            power,
        }
    }

    fn command(&mut self, byte: u8) {
        let state = &mut self.state;
        state.status |= status::COMMAND;
        state.awaited = None;
        match byte {
            command::READ_MODE => state.reply(state.mode),
            command::WRITE_MODE
            | command::WRITE_OUTPUT_PORT
            | command::WRITE_OUTPUT
            | command::WRITE_AUX_OUTPUT
            | command::WRITE_AUX => state.awaited = Some(byte),
            command::AUX_DISABLE => state.mode |= mode::AUX_OFF,
            command::AUX_ENABLE => state.mode &= !mode::AUX_OFF,
            command::AUX_TEST | command::KEYBOARD_TEST => state.reply(INTERFACE_PASSED),
            command::SELF_TEST => {
                state.status |= status::SELF_TEST;
                state.reply(SELF_TEST_PASSED);
            }
            command::KEYBOARD_DISABLE => state.mode |= mode::KEYBOARD_OFF,
            command::KEYBOARD_ENABLE => state.mode &= !mode::KEYBOARD_OFF,
            command::READ_INPUT_PORT => state.reply(INPUT_PORT),
            command::READ_OUTPUT_PORT => state.reply(state.outport()),
            command::A20_OFF => state.outport &= !port::A20,
            command::A20_ON => state.outport |= port::A20,
            command::PULSE..=0xff if byte & port::RESET == 0 => self.power.power(PowerEvent::Reset),
            _ => {}
        }
    }

    fn data(&mut self, byte: u8) {
        let state = &mut self.state;
        state.status &= !status::COMMAND;
        match state.awaited.take() {
            Some(command::WRITE_MODE) => state.mode = byte,
            Some(command::WRITE_OUTPUT) => state.push(byte, false, false),
            Some(command::WRITE_AUX_OUTPUT) => state.push(byte, true, false),
            Some(command::WRITE_OUTPUT_PORT) => {
                state.outport = byte;
                if byte & port::RESET == 0 {
                    self.power.power(PowerEvent::Reset);
                }
            }
            Some(command::WRITE_AUX) => state.push(RESEND, true, true),
            _ => state.send(byte),
        }
    }

    fn update_irq(&mut self) {
        let (keyboard, aux) = self.state.levels();
        self.keyboard_irq.set(keyboard);
        self.aux_irq.set(aux);
    }
}

impl Device for I8042 {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let value = match offset {
            0 => {
                let value = self.state.output.pop_front().map_or(0, |byte| byte.value);
                // The next byte is a new interrupt: on an edge-triggered pin the line must fall between the two.
                self.keyboard_irq.set(false);
                self.aux_irq.set(false);
                value
            }
            _ => self.state.status(),
        };
        self.update_irq();
        // The next port is no neighbour: a wide read ends here.
        Answer::Done(bytes::read(access, offset, offset + 1, |_| value))
    }

    fn write(&mut self, _: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        match offset {
            0 => self.data(data as u8),
            _ => self.command(data as u8),
        }
        self.update_irq();
        Answer::Done(0)
    }

    fn reset(&mut self) {
        self.state = I8042State::power_on();
        self.update_irq();
    }
}

impl Persist for I8042 {
    const NAME: &'static str = "i8042";
    type State = I8042State;

    fn save(&self) -> I8042State {
        self.state.clone()
    }

    fn restore(&mut self, state: &I8042State) -> Result<(), RestoreError> {
        check(state.status & !status::KEPT == 0, "i8042", "status has bits that are no state")?;
        check(state.output.len() <= QUEUE, "i8042", "too many bytes wait to be read")?;
        check(state.keyboard.is_lawful(), "i8042", "the keyboard is in no state of its own")?;
        self.state = state.clone();
        let (keyboard, aux) = self.state.levels();
        self.keyboard_irq.force(keyboard);
        self.aux_irq.force(aux);
        Ok(())
    }
}
