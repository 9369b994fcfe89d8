//! A port's registers (AHCI 1.3.1 §3.3).

use serde::{Deserialize, Serialize};

use super::cdrom::Drive;
use super::fis::TaskFile;
use super::registers::{
    DET, DET_RESET, LINK_UP, SERR_EXCHANGED, SIG_ATAPI, SIG_NONE, SLOTS, TFD_NONE, cmd, interrupt, port, status,
};

/// SCTL's bits that there are.
const CONTROL: u32 = 0xfff;

/// What a guest can tell of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// Command list, in guest memory.
    pub(super) list: u64,
    /// Where received FISes go.
    pub(super) received: u64,
    /// Interrupts: those that happened, those that are on.
    pub(super) status: u32,
    pub(super) enabled: u32,
    /// Command register, but for what is derived.
    pub(super) cmd: u32,
    pub(super) task_file: u32,
    pub(super) signature: u32,
    pub(super) control: u32,
    pub(super) errors: u32,
    pub(super) active: u32,
    /// Commands that the guest issued and that are not finished.
    pub(super) issued: u32,
    /// The slot of the latest one that was begun.
    pub(super) slot: u32,
    /// After a fatal error nothing is begun until the guest has stopped the port.
    pub(super) halted: bool,
    /// The device's first FIS after its reset waits for a place to go to.
    pub(super) owes_signature: bool,
}

impl PortState {
    /// After power on.
    fn new(present: bool) -> Self {
        Self {
            list: 0,
            received: 0,
            status: 0,
            enabled: 0,
            cmd: 0,
            task_file: if present { TaskFile::signature().tfd() } else { TFD_NONE },
            signature: if present { SIG_ATAPI } else { SIG_NONE },
            control: 0,
            errors: 0,
            active: 0,
            issued: 0,
            slot: SLOTS - 1,
            halted: false,
            owes_signature: present,
        }
    }
}

impl PortState {
    /// Whether a port with or without a drive can be so.
    pub(super) fn is_sound(&self, present: bool) -> bool {
        self.list & 0x3ff == 0
            && self.received & 0xff == 0
            && self.enabled & !interrupt::ALL == 0
            && self.cmd & !cmd::WRITABLE == 0
            && self.control & !CONTROL == 0
            && self.slot < SLOTS
            && (present || !self.owes_signature)
    }
}

/// What a write to a port's register asks for besides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Commands of this port are not wanted any more: what they move must not arrive.
    pub(super) fence: bool,
    /// There may be something to do.
    pub(super) kick: bool,
}

/// A port, with or without a drive.
#[derive(Debug)]
pub(super) struct Port {
    pub(super) state: PortState,
    pub(super) drive: Option<Drive>,
}

impl Port {
    pub(super) fn new(drive: Option<Drive>) -> Self {
        Self { state: PortState::new(drive.is_some()), drive }
    }

    /// As after an HBA reset, which keeps where lists and FISes are (§10.4.3).
    pub(super) fn reset(&mut self) {
        let (list, received) = (self.state.list, self.state.received);
        self.state = PortState { list, received, ..PortState::new(self.drive.is_some()) };
        if let Some(drive) = &mut self.drive {
            drive.reset();
        }
    }

    /// As after power on; a drive keeps its medium.
    pub(super) fn power_on(&mut self) {
        self.reset();
        (self.state.list, self.state.received) = (0, 0);
    }

    /// The command in `slot` is done, or failed: then it stays issued, and the port waits for the guest (§6.2.2).
    pub(super) fn done(&mut self, slot: u32, after: &TaskFile, happened: u32) {
        self.state.task_file = after.tfd();
        self.state.status |= happened;
        if after.status & status::ERROR != 0 {
            self.state.status |= interrupt::TASK_FILE;
            self.state.halted = true;
        } else {
            self.state.issued &= !(1 << slot);
        }
    }

    /// A fatal error: nothing is begun until the guest has stopped the port (§6.2.2).
    pub(super) fn fatal(&mut self, why: u32) {
        self.state.status |= why;
        self.state.halted = true;
    }

    /// Whether an interrupt happened that is on.
    pub(super) fn is_pending(&self) -> bool {
        self.interrupts() & self.state.enabled != 0
    }

    /// The slot whose command is next, if one can be begun.
    pub(super) fn next_slot(&self) -> Option<u32> {
        let state = &self.state;
        let busy = state.task_file & u32::from(status::BUSY | status::DATA) != 0;
        if self.drive.is_none() || state.cmd & cmd::START == 0 || state.halted || busy || !self.is_linked() {
            return None;
        }
        let first = (state.slot + 1) % SLOTS;
        let ahead = state.issued.rotate_right(first);
        (ahead != 0).then(|| (first + ahead.trailing_zeros()) % SLOTS)
    }

    /// Where a received FIS goes, if anywhere.
    pub(super) fn fis_area(&self) -> Option<u64> {
        (self.state.cmd & cmd::FIS_RECEIVE != 0).then_some(self.state.received)
    }

    /// Reads the register at `offset`, a multiple of 4.
    pub(super) fn read(&self, offset: u64) -> u32 {
        let state = &self.state;
        match offset {
            port::CLB => state.list as u32,
            port::CLBU => (state.list >> 32) as u32,
            port::FB => state.received as u32,
            port::FBU => (state.received >> 32) as u32,
            port::IS => self.interrupts(),
            port::IE => state.enabled,
            port::CMD => {
                let when = |bit, then| if state.cmd & bit != 0 { then } else { 0 };
                let running = when(cmd::START, cmd::LIST_RUNNING) | when(cmd::FIS_RECEIVE, cmd::FIS_RUNNING);
                let slot = when(cmd::START, state.slot << 8);
                state.cmd | cmd::UP | running | slot
            }
            port::TFD => state.task_file,
            port::SIG => state.signature,
            port::SSTS if self.is_linked() => LINK_UP,
            port::SCTL => state.control,
            port::SERR => state.errors,
            port::SACT => state.active,
            port::CI => state.issued,
            _ => 0,
        }
    }

    /// Writes those bits of the register at `offset` that are in `mask`.
    pub(super) fn write(&mut self, offset: u64, value: u32, mask: u32) -> Effect {
        let state = &mut self.state;
        let ones = value & mask;
        let merge = |old: u32| old & !mask | ones;
        let low = |old: u64, keep: u32| old & !u64::from(u32::MAX) | u64::from(merge(old as u32) & keep);
        let high = |old: u64| u64::from(merge((old >> 32) as u32)) << 32 | old & u64::from(u32::MAX);
        match offset {
            port::CLB => state.list = low(state.list, !0x3ff),
            port::CLBU => state.list = high(state.list),
            port::FB => state.received = low(state.received, !0xff),
            port::FBU => state.received = high(state.received),
            port::IS => state.status &= !ones,
            port::IE => state.enabled = merge(state.enabled) & interrupt::ALL,
            port::CMD => return self.command(merge(self.state.cmd)),
            port::SCTL => return self.link_control(merge(self.state.control) & CONTROL),
            port::SERR => state.errors &= !ones,
            port::SACT if state.cmd & cmd::START != 0 => state.active |= ones,
            port::CI if state.cmd & cmd::START != 0 => {
                state.issued |= ones;
                return Effect { kick: ones != 0, fence: false };
            }
            _ => {}
        }
        Effect::default()
    }

    /// The interrupts that happened; one of them only repeats an error bit.
    fn interrupts(&self) -> u32 {
        let exchanged = self.state.errors & SERR_EXCHANGED != 0;
        self.state.status | if exchanged { interrupt::CONNECT } else { 0 }
    }

    fn is_linked(&self) -> bool {
        self.drive.is_some() && self.state.control & DET == 0
    }

    fn command(&mut self, value: u32) -> Effect {
        let state = &mut self.state;
        let now = value & cmd::WRITABLE;
        let gone = state.cmd & !now;
        let come = now & !state.cmd;
        state.cmd = now;
        let mut effect = Effect { fence: false, kick: come & (cmd::START | cmd::FIS_RECEIVE) != 0 };
        // Without a place for its FISes, a command is as good as stopped.
        if gone & (cmd::START | cmd::FIS_RECEIVE) != 0 {
            effect.fence = true;
            state.task_file &= !u32::from(status::BUSY | status::DATA);
        }
        if gone & cmd::START != 0 {
            (state.issued, state.active, state.halted, state.slot) = (0, 0, false, SLOTS - 1);
        }
        if value & cmd::OVERRIDE != 0 && state.cmd & cmd::START == 0 && self.drive.is_some() {
            state.task_file &= !u32::from(status::BUSY | status::DATA);
        }
        effect
    }

    /// SCTL: a COMRESET lasts as long as DET says so; the device is gone until then.
    fn link_control(&mut self, value: u32) -> Effect {
        let before = self.state.control & DET;
        self.state.control = value;
        let now = value & DET;
        if self.drive.is_none() || before == now {
            return Effect::default();
        }
        let state = &mut self.state;
        (state.issued, state.active) = (0, 0);
        if now != 0 {
            (state.task_file, state.signature, state.owes_signature) = (TFD_NONE, SIG_NONE, false);
        } else {
            state.errors |= SERR_EXCHANGED;
            (state.task_file, state.signature) = (TaskFile::signature().tfd(), SIG_ATAPI);
            state.owes_signature = true;
        }
        if now == DET_RESET
            && let Some(drive) = &mut self.drive
        {
            drive.reset();
        }
        Effect { fence: true, kick: true }
    }
}
