//! A 16550A UART (National Semiconductor PC16550D) behind eight ports.
//!
//! The line is infinitely fast: bytes leave with the write to THR and arrive with the poll that finds them, and the character
//! timeout of the receive FIFO comes at once. What isn't infinitely fast is who reads the output: while its queue is full, bytes
//! stay in the transmit FIFO and THRE stays clear, so that a guest that looks at THRE loses nothing; one that doesn't overwrites
//! the oldest byte of a full FIFO, as QEMU's does. With no reader at all the output vanishes and the guest runs on.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::pipe::{InputQueue, OutputQueue};
use super::wire::Wire;
use super::{Persist, Ranges, RestoreError, bytes, check, claim};
use crate::bus::{Access, Answer, Deferred, Device};
use crate::interrupt::InterruptLine;

/// The four serial ports of a PC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Com {
    /// 0x3f8, GSI 4.
    Com1,
    /// 0x2f8, GSI 3.
    Com2,
    /// 0x3e8, GSI 4, shared with COM1.
    Com3,
    /// 0x2e8, GSI 3, shared with COM2.
    Com4,
}

impl Com {
    /// What the port claims. Nothing is postable: THR and LSR, IER and IIR rely on each other's order.
    pub const fn ranges(self) -> Ranges {
        match self {
            Self::Com1 => COM1,
            Self::Com2 => COM2,
            Self::Com3 => COM3,
            Self::Com4 => COM4,
        }
    }

    /// Its GSI. Two ports that share one need a [`WiredOr`](crate::interrupt::WiredOr).
    pub const fn gsi(self) -> u32 {
        match self {
            Self::Com1 | Self::Com3 => 4,
            Self::Com2 | Self::Com4 => 3,
        }
    }
}

const COM1: Ranges = Ranges::ports(&[claim(0x3f8, REGISTERS)]);
const COM2: Ranges = Ranges::ports(&[claim(0x2f8, REGISTERS)]);
const COM3: Ranges = Ranges::ports(&[claim(0x3e8, REGISTERS)]);
const COM4: Ranges = Ranges::ports(&[claim(0x2e8, REGISTERS)]);

const REGISTERS: u64 = 8;
const FIFO: usize = 16;

/// Interrupt enable register.
mod ier {
    pub(super) const RECEIVED: u8 = 1 << 0;
    pub(super) const THR_EMPTY: u8 = 1 << 1;
    pub(super) const LINE_STATUS: u8 = 1 << 2;
    pub(super) const ALL: u8 = 0x0f;
}

/// Interrupt identification register.
mod iir {
    pub(super) const NONE: u8 = 0x01;
    pub(super) const THR_EMPTY: u8 = 0x02;
    pub(super) const RECEIVED: u8 = 0x04;
    pub(super) const LINE_STATUS: u8 = 0x06;
    pub(super) const TIMEOUT: u8 = 0x0c;
    pub(super) const FIFOS: u8 = 0xc0;
}

/// FIFO control register.
mod fcr {
    pub(super) const ENABLE: u8 = 1 << 0;
    pub(super) const CLEAR_RX: u8 = 1 << 1;
    pub(super) const CLEAR_TX: u8 = 1 << 2;
    /// Enable, DMA mode and trigger level stay; the clear bits don't.
    pub(super) const STICKY: u8 = 0xc9;
}

/// Line control register.
const LCR_DLAB: u8 = 1 << 7;

/// Modem control register.
mod mcr {
    pub(super) const DTR: u8 = 1 << 0;
    pub(super) const RTS: u8 = 1 << 1;
    pub(super) const OUT1: u8 = 1 << 2;
    pub(super) const OUT2: u8 = 1 << 3;
    pub(super) const LOOP: u8 = 1 << 4;
    pub(super) const ALL: u8 = 0x1f;
}

/// Line status register.
mod lsr {
    pub(super) const DATA_READY: u8 = 1 << 0;
    pub(super) const OVERRUN: u8 = 1 << 1;
    pub(super) const THR_EMPTY: u8 = 1 << 5;
    pub(super) const IDLE: u8 = 1 << 6;
}

/// Modem status register.
mod msr {
    pub(super) const CTS: u8 = 1 << 4;
    pub(super) const DSR: u8 = 1 << 5;
    pub(super) const RI: u8 = 1 << 6;
    pub(super) const DCD: u8 = 1 << 7;
}

/// A 16550A.
#[derive(Debug)]
pub struct Serial {
    state: SerialState,
    output: OutputQueue,
    input: InputQueue,
    irq: Wire,
}

/// Saved state of a [`Serial`]: its registers, and the bytes in its FIFOs. Bytes in its queues belong to the outside: what the output's
/// queue has taken is written out by the process that took it, before it ends; input that the guest has not taken stays where it was typed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register, bits 0–3.
    pub ier: u8,
    /// FIFO control register: enable, DMA mode, trigger level.
    pub fcr: u8,
    /// Line control register.
    pub lcr: u8,
    /// Modem control register, bits 0–4.
    pub mcr: u8,
    /// Scratch register.
    pub scr: u8,
    /// A received byte was lost, and LSR was not read since.
    pub overrun: bool,
    /// "THR empty" is to be told: raised when THR empties, gone once IIR told it.
    pub thr_empty_pending: bool,
    /// Received bytes, at most 16, or 1 with the FIFOs off.
    pub rx: VecDeque<u8>,
    /// Bytes that the output's queue had no room for, likewise.
    pub tx: VecDeque<u8>,
}

impl SerialState {
    fn power_on() -> Self {
        Self {
            divisor: 12,
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: mcr::OUT2,
            scr: 0,
            overrun: false,
            thr_empty_pending: false,
            rx: VecDeque::new(),
            tx: VecDeque::new(),
        }
    }

    fn depth(&self) -> usize {
        if self.fcr & fcr::ENABLE != 0 { FIFO } else { 1 }
    }

    /// How many received bytes raise "received" rather than the timeout.
    fn trigger(&self) -> usize {
        match (self.fcr & fcr::ENABLE, self.fcr >> 6) {
            (0, _) | (_, 0) => 1,
            (_, 1) => 4,
            (_, 2) => 8,
            _ => 14,
        }
    }

    fn lsr(&self) -> u8 {
        let ready = if self.rx.is_empty() { 0 } else { lsr::DATA_READY };
        let overrun = if self.overrun { lsr::OVERRUN } else { 0 };
        let empty = if self.tx.is_empty() { lsr::THR_EMPTY | lsr::IDLE } else { 0 };
        ready | overrun | empty
    }

    fn msr(&self) -> u8 {
        if self.mcr & mcr::LOOP == 0 {
            return msr::DCD | msr::DSR | msr::CTS;
        }
        [(mcr::DTR, msr::DSR), (mcr::RTS, msr::CTS), (mcr::OUT1, msr::RI), (mcr::OUT2, msr::DCD)]
            .into_iter()
            .filter(|(out, _)| self.mcr & out != 0)
            .fold(0, |status, (_, input)| status | input)
    }

    /// The pending interrupt of the highest priority.
    fn interrupt(&self) -> u8 {
        if self.ier & ier::LINE_STATUS != 0 && self.overrun {
            iir::LINE_STATUS
        } else if self.ier & ier::RECEIVED != 0 && self.rx.len() >= self.trigger() {
            iir::RECEIVED
        } else if self.ier & ier::RECEIVED != 0 && !self.rx.is_empty() {
            iir::TIMEOUT
        } else if self.ier & ier::THR_EMPTY != 0 && self.thr_empty_pending {
            iir::THR_EMPTY
        } else {
            iir::NONE
        }
    }

    fn iir(&self) -> u8 {
        self.interrupt() | if self.fcr & fcr::ENABLE != 0 { iir::FIFOS } else { 0 }
    }

    /// A byte comes in by loopback; where there is no room it is lost.
    fn loop_back(&mut self, byte: u8) {
        if self.rx.len() == self.depth() {
            self.overrun = true;
        } else {
            self.rx.push_back(byte);
        }
    }
}

impl Serial {
    /// A UART after power on: sends to `output`, receives from `input`, interrupts by `irq`.
    pub fn new(output: OutputQueue, input: InputQueue, irq: InterruptLine) -> Self {
        Self { state: SerialState::power_on(), output, input, irq: Wire::new(irq) }
    }

    /// Sends what there is to send, as far as there is room.
    fn transmit(&mut self) {
        while let Some(&byte) = self.state.tx.front() {
            if self.state.mcr & mcr::LOOP != 0 {
                self.state.loop_back(byte);
            } else if !self.output.push(byte) {
                return;
            }
            self.state.tx.pop_front();
            self.state.thr_empty_pending = self.state.tx.is_empty();
        }
    }

    /// Fills the receive FIFO; the line is off in loopback.
    fn receive(&mut self) {
        if self.state.mcr & mcr::LOOP == 0 {
            let room = self.state.depth() - self.state.rx.len();
            self.input.take(room, &mut self.state.rx);
        }
    }

    fn update_irq(&mut self) {
        self.irq.set(self.state.interrupt() != iir::NONE);
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            0 if dlab => bytes::get(self.state.divisor.into(), 0),
            0 => {
                let byte = self.state.rx.pop_front().unwrap_or(0);
                if self.state.rx.is_empty() {
                    self.receive();
                }
                byte
            }
            1 if dlab => bytes::get(self.state.divisor.into(), 1),
            1 => self.state.ier,
            2 => {
                let told = self.state.iir();
                if self.state.interrupt() == iir::THR_EMPTY {
                    self.state.thr_empty_pending = false;
                }
                told
            }
            3 => self.state.lcr,
            4 => self.state.mcr,
            5 => {
                let told = self.state.lsr();
                self.state.overrun = false;
                told
            }
            6 => self.state.msr(),
            _ => self.state.scr,
        }
    }

    fn write_register(&mut self, offset: u64, byte: u8) {
        let dlab = self.state.lcr & LCR_DLAB != 0;
        match offset {
            0 | 1 if dlab => self.state.divisor = bytes::put(self.state.divisor.into(), offset, byte) as u16,
            0 => {
                if self.state.tx.len() == self.state.depth() {
                    self.state.tx.pop_front();
                }
                self.state.tx.push_back(byte);
                self.state.thr_empty_pending = false;
                self.transmit();
            }
            1 => {
                let newly = byte & !self.state.ier;
                self.state.ier = byte & ier::ALL;
                // Enabling tells the present state, also when IIR had told it before: Windows and Linux' THRE test rely on it.
                if newly & ier::THR_EMPTY != 0 && self.state.tx.is_empty() {
                    self.state.thr_empty_pending = true;
                }
            }
            2 => self.write_fcr(byte),
            3 => self.state.lcr = byte,
            4 => {
                self.state.mcr = byte & mcr::ALL;
                self.transmit();
                self.receive();
            }
            5 | 6 => {}
            _ => self.state.scr = byte,
        }
    }

    fn write_fcr(&mut self, byte: u8) {
        let switched = (byte ^ self.state.fcr) & fcr::ENABLE != 0;
        if switched || byte & fcr::CLEAR_RX != 0 {
            self.state.rx.clear();
        }
        if (switched || byte & fcr::CLEAR_TX != 0) && !self.state.tx.is_empty() {
            self.state.tx.clear();
            self.state.thr_empty_pending = true;
        }
        self.state.fcr = byte & fcr::STICKY;
        self.receive();
    }
}

impl Device for Serial {
    fn read(&mut self, access: &Access, offset: u64, _: Deferred<'_>) -> Answer {
        let value = bytes::read(access, offset, REGISTERS, |at| self.read_register(at));
        self.update_irq();
        Answer::Done(value)
    }

    fn write(&mut self, access: &Access, offset: u64, data: u64, _: Deferred<'_>) -> Answer {
        bytes::write(access, offset, REGISTERS, data, |at, byte| self.write_register(at, byte));
        self.update_irq();
        Answer::Done(0)
    }

    fn poll(&mut self) {
        self.transmit();
        self.receive();
        self.update_irq();
    }

    fn reset(&mut self) {
        self.state = SerialState::power_on();
        self.update_irq();
    }
}

impl Persist for Serial {
    const NAME: &'static str = "serial";
    type State = SerialState;

    fn save(&self) -> SerialState {
        self.state.clone()
    }

    fn restore(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let ok = |condition, what| check(condition, "serial", what);
        ok(state.ier & !ier::ALL == 0, "IER has reserved bits")?;
        ok(state.fcr & !fcr::STICKY == 0, "FCR has reserved bits")?;
        ok(state.mcr & !mcr::ALL == 0, "MCR has reserved bits")?;
        ok(state.rx.len() <= state.depth() && state.tx.len() <= state.depth(), "a FIFO has too many bytes")?;
        self.state = state.clone();
        self.irq.force(self.state.interrupt() != iir::NONE);
        Ok(())
    }
}
