//! Wire layout of a lane. Little-endian; reserved bits are 0 and checked. docs/wire.md is this page for people.
//!
//! | line | bytes | where | written by |
//! | --- | --- | --- | --- |
//! | request | 64: words 4–7 always, words 0–3 where there are details | BAR, region *requests* | host |
//! | control | 64: word 0 posted tail, word 1 idle flag | BAR, region *controls* | host |
//! | posted ring | [`POSTED_SLOTS`] × 32: as words 4–7 of a request | BAR, region *posted* | host |
//! | completion | 64: words 4–7 | inbox, region *completions* | SoC |
//! | credit | 64: word 0 posted head | inbox, region *credits* | SoC |
//! | outs data | 4096 | outbox, region *outs* | host |
//! | ins data | 4096 | inbox, region *ins* | SoC |
//!
//! The header, a line's last word, carries the sequence number and is stored last. A request waits while its sequence is the
//! completion's plus one; the lane is free while they are equal; every other pair is an error.

use crate::LaneError;

/// Bytes of a request, control, completion or credit line.
pub const LINE: usize = 64;
/// Slots of a lane's posted ring. loom's models run a ring of 4, so that they can fill it.
pub const POSTED_SLOTS: u32 = if cfg!(loom) { 4 } else { 64 };
/// Bytes of a posted slot.
pub const POSTED_SLOT: usize = 32;
/// Bytes of a lane's posted ring.
pub const POSTED_RING: usize = POSTED_SLOTS as usize * POSTED_SLOT;
/// Bytes of a lane's string data, each way.
pub const STRING_PAGE: usize = 4096;
/// Offset of the four words that every request and completion has.
pub const CORE: usize = 32;
/// Offset of the header within a line.
pub const HEADER: usize = 56;
/// Offset of the posted ring's tail within a control line.
pub const TAIL: usize = 0;
/// Offset of the host's idle flag within a control line: 0 = ring me, 1 = I poll.
pub const IDLE: usize = 8;

const _: () = assert!(HEADER + 8 == LINE && CORE + 32 == LINE);
const _: () = assert!(POSTED_SLOTS.is_power_of_two() && (POSTED_RING == 2048 || cfg!(loom)));

/// What an exit is about. Kinds are open: one that the SoC doesn't know completes with [`Status::UNKNOWN_KIND`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Kind(pub u8);

impl Kind {
    /// Port access; string accesses have an element size of 1, 2 or 4 in the data word and their bytes in the string page.
    pub const PIO: Self = Self(1);
    /// Memory access, 1–8 bytes, every length.
    pub const MMIO: Self = Self(2);
    /// MSR access: address = MSR index, 8 bytes.
    pub const MSR: Self = Self(3);
    /// Hypercall: address = number, words 0–3 = arguments; the answer goes to RAX.
    pub const HYPERCALL: Self = Self(4);
    /// End of interrupt at the IOAPIC (split irqchip): address = vector.
    pub const EOI: Self = Self(5);
    /// The vCPU can't go on by itself: address = [`exit_reason`], words 0–3 = details.
    pub const EXIT_REPORT: Self = Self(6);
    /// Reserved for confidential guests.
    pub const CONFIDENTIAL: Self = Self(7);
    /// Hyper-V hypercall (TLFS "Hypercall Interface"): address = input value, words 0–1 = GPAs of its parameters, or of a fast call
    /// its parameters; the answer is the result value.
    pub const HV_HYPERCALL: Self = Self(8);
    /// The guest changed its vCPU's synthetic interrupt controller (TLFS "Synthetic Interrupt Controller"): address = MSR, words
    /// 0–2 = SCONTROL, SIEFP and SIMP as they are now.
    pub const HV_SYNIC: Self = Self(9);
}

/// Reasons of [`Kind::EXIT_REPORT`], in the address word.
pub mod exit_reason {
    /// Triple fault.
    pub const SHUTDOWN: u64 = 1;
    /// KVM internal error: word 0 = suberror, words 1–3 = KVM's data.
    pub const INTERNAL_ERROR: u64 = 2;
    /// The CPU refused to enter the guest: word 0 = hardware reason, word 1 = CPU.
    pub const FAIL_ENTRY: u64 = 3;
    /// System event: word 0 = type, word 1 = flags.
    pub const SYSTEM_EVENT: u64 = 4;
    /// HLT without an in-kernel interrupt controller.
    pub const HALT: u64 = 5;
    /// KVM_RUN failed: word 0 = errno.
    pub const RUN_FAILED: u64 = 6;
    /// An exit that the shim doesn't know: word 0 = KVM's exit reason.
    pub const UNKNOWN: u64 = 7;
}

/// Which way the data goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// The guest reads: the completion carries data.
    Read,
    /// The guest writes.
    Write,
}

/// One exit on its way to the SoC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What it is about.
    pub kind: Kind,
    /// Which way the data goes.
    pub direction: Direction,
    /// Port, guest-physical address, MSR index, …: see [`Kind`].
    pub address: u64,
    /// Written data, little-endian; for strings the element size in bytes.
    pub data: u64,
    /// Host TSC at the exit.
    pub host_tsc: u64,
    /// Bytes of data: 1–8, or of a string 1–4096.
    pub length: u16,
    /// Whether the data is a string in the lane's string page.
    pub string: bool,
    /// Details of an exit report, a hypercall or a SynIC's change; `None` keeps the request at four stores.
    pub words: Option<[u64; 4]>,
}

impl Request {
    /// An access of 1–8 bytes.
    #[must_use]
    pub fn access(kind: Kind, direction: Direction, address: u64, data: u64, length: u8, host_tsc: u64) -> Self {
        Self { kind, direction, address, data, host_tsc, length: u16::from(length), string: false, words: None }
    }

    /// The header that says this under `sequence`.
    #[must_use]
    pub(crate) fn header(&self, sequence: u32) -> u64 {
        u64::from(sequence)
            | u64::from(self.kind.0) << 32
            | u64::from(self.direction == Direction::Write) << 40
            | u64::from(self.string) << 41
            | u64::from(self.words.is_some()) << 42
            | u64::from(self.length) << 48
    }

    /// Reads a request back from the line's last four words, already private; `words` are words 0–3 where the header says so.
    pub(crate) fn parse(core: [u64; 4], words: impl FnOnce() -> [u64; 4]) -> Result<Self, LaneError> {
        let [address, data, host_tsc, header] = core;
        let malformed = LaneError::Malformed { header };
        let kind = Kind((header >> 32) as u8);
        let string = header & 1 << 41 != 0;
        let has_words = header & 1 << 42 != 0;
        let length = (header >> 48) as u16;
        let request = Self {
            kind,
            direction: if header & 1 << 40 != 0 { Direction::Write } else { Direction::Read },
            address,
            data,
            host_tsc,
            length,
            string,
            words: has_words.then(words),
        };
        let reserved = header >> 43 & 0x1f != 0;
        (!reserved && request.legal()).then_some(request).ok_or(malformed)
    }

    /// Whether the fields fit each other, for the kinds that are known.
    fn legal(&self) -> bool {
        let scalar = |lengths: core::ops::RangeInclusive<u16>| !self.string && lengths.contains(&self.length);
        let plain = self.words.is_none();
        match self.kind {
            Kind::PIO if self.string => {
                plain
                    && matches!(self.data, 1 | 2 | 4)
                    && self.length != 0
                    && usize::from(self.length) <= STRING_PAGE
                    && u64::from(self.length) % self.data == 0
                    && self.address <= 0xffff
            }
            Kind::PIO => plain && !self.string && matches!(self.length, 1 | 2 | 4) && self.address <= 0xffff,
            Kind::MMIO => plain && scalar(1..=8),
            Kind::MSR => plain && scalar(8..=8) && self.address <= 0xffff_ffff,
            Kind::HYPERCALL => scalar(8..=8),
            Kind::EOI => plain && scalar(1..=1) && self.address <= 0xff,
            Kind::EXIT_REPORT => scalar(0..=0),
            Kind::HV_HYPERCALL => !plain && scalar(8..=8),
            Kind::HV_SYNIC => !plain && scalar(0..=0) && self.address <= 0xffff_ffff,
            Kind(0) => false,
            _ => usize::from(self.length) <= STRING_PAGE,
        }
    }

    /// Whether this may travel as a posted write: it must be a plain write.
    #[must_use]
    pub fn postable(&self) -> bool {
        matches!(self.kind, Kind::PIO | Kind::MMIO)
            && self.direction == Direction::Write
            && !self.string
            && self.words.is_none()
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u8);

impl Status {
    /// A device answered.
    pub const OK: Self = Self(0);
    /// Nothing is there: reads give all ones, writes vanish.
    pub const UNCLAIMED: Self = Self(1);
    /// The device failed; the data is all ones.
    pub const DEVICE_FAILED: Self = Self(2);
    /// The SoC doesn't know this kind.
    pub const UNKNOWN_KIND: Self = Self(3);
}

/// A level change of an interrupt line, applied by the vCPU's thread before it re-enters the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LineChange {
    /// The GSI, at most 0xffff.
    pub gsi: u16,
    /// The new level.
    pub high: bool,
    /// Sequence number within the GSI: a change older than one already applied is dropped.
    pub sequence: u32,
}

impl LineChange {
    /// The change as the one word that completions and channel messages carry.
    #[must_use]
    pub fn to_word(self) -> u64 {
        u64::from(self.sequence) | u64::from(self.gsi) << 32 | u64::from(self.high) << 48 | 1 << 63
    }

    /// Reads the word back: `Ok(None)` for 0, no change.
    ///
    /// # Errors
    /// Reserved bits are set: the word itself.
    pub fn from_word(word: u64) -> Result<Option<Self>, u64> {
        if word == 0 {
            return Ok(None);
        }
        if word >> 63 == 0 || word >> 49 & 0x3fff != 0 {
            return Err(word);
        }
        Ok(Some(Self { sequence: word as u32, gsi: (word >> 32) as u16, high: word >> 48 & 1 != 0 }))
    }
}

/// A request's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Read data, little-endian.
    pub data: u64,
    /// How the request ended.
    pub status: Status,
    /// Up to two line changes.
    pub lines: [Option<LineChange>; 2],
    /// The vCPU finishes the exit, then stays out of the guest until it is told to run.
    pub park: bool,
}

impl Completion {
    /// Success with `data`.
    #[must_use]
    pub fn ok(data: u64) -> Self {
        Self { data, status: Status::OK, lines: [None; 2], park: false }
    }

    /// The last four words of the completion line.
    #[must_use]
    pub(crate) fn to_words(self, sequence: u32) -> [u64; 4] {
        let line = |i: usize| self.lines[i].map_or(0, LineChange::to_word);
        let header = u64::from(sequence) | u64::from(self.status.0) << 32 | u64::from(self.park) << 40;
        [self.data, line(0), line(1), header]
    }

    /// Reads a completion back from private words.
    pub(crate) fn parse([data, a, b, header]: [u64; 4]) -> Result<Self, LaneError> {
        let malformed = LaneError::Malformed { header };
        if header >> 41 != 0 {
            return Err(malformed);
        }
        let line = |word| LineChange::from_word(word).map_err(|_| malformed);
        Ok(Self {
            data,
            status: Status((header >> 32) as u8),
            lines: [line(a)?, line(b)?],
            park: header >> 40 & 1 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_parsed_request_says_the_same_again(core: [u64; 4], words: [u64; 4]) {
            if let Ok(request) = Request::parse(core, || words) {
                prop_assert_eq!(request.header(core[3] as u32), core[3]);
            }
        }

        #[test]
        fn a_parsed_completion_says_the_same_again(words: [u64; 4]) {
            if let Ok(completion) = Completion::parse(words) {
                prop_assert_eq!(completion.to_words(words[3] as u32), words);
            }
        }
    }
}
