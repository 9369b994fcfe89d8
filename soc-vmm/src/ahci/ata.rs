//! ATA commands of a packet device (ATA8-ACS), which is how packet commands reach it.

use super::cdrom::{Drive, Reply};
use super::fis::{FromHost, TaskFile};
use super::registers::status::{ERROR, READY, SEEK};

// Commands.
const DEVICE_RESET: u8 = 0x08;
const EXECUTE_DEVICE_DIAGNOSTIC: u8 = 0x90;
const PACKET: u8 = 0xa0;
const IDENTIFY_PACKET_DEVICE: u8 = 0xa1;
const STANDBY_IMMEDIATE: u8 = 0xe0;
const IDLE_IMMEDIATE: u8 = 0xe1;
const STANDBY: u8 = 0xe2;
const IDLE: u8 = 0xe3;
const CHECK_POWER_MODE: u8 = 0xe5;
const SLEEP: u8 = 0xe6;
const IDENTIFY_DEVICE: u8 = 0xec;
const SET_FEATURES: u8 = 0xef;
/// Commands that a packet device aborts with its signature, so that it is known for one.
const READ_SECTORS: u8 = 0x20;

/// Features of a PACKET command: data by DMA.
const BY_DMA: u8 = 1;
/// Error register: aborted.
const ABORTED: u8 = 1 << 2;
/// Count register of a PACKET command that is done: command/data, input/output (ATA8-ACS §6.2.6).
const REASON_DONE: u8 = 0b11;
const GOOD: u8 = READY | SEEK;

/// What is to be done for a frame of the host.
pub(super) struct Plan {
    /// Data for the host, first.
    pub(super) reply: Reply,
    /// The data is announced by a PIO setup FIS.
    pub(super) pio: bool,
    /// How the device is afterwards.
    pub(super) after: TaskFile,
    /// How that is told.
    pub(super) ending: Ending,
}

/// How the host hears that a command is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    /// Not at all: by the PIO setup FIS, or the device is in reset.
    Silent,
    /// By a register FIS.
    Quiet,
    /// By a register FIS that interrupts.
    Interrupt,
}

impl Plan {
    fn end(after: TaskFile) -> Self {
        Self { reply: Reply::Done, pio: false, after, ending: Ending::Interrupt }
    }

    fn good() -> Self {
        Self::end(TaskFile { status: GOOD, ..TaskFile::default() })
    }

    fn aborted(with: TaskFile) -> Self {
        Self::end(TaskFile { status: READY | ERROR, error: ABORTED, ..with })
    }

    /// The packet command failed, with that sense key.
    pub(super) fn check_condition(key: u8) -> TaskFile {
        TaskFile { status: READY | ERROR, error: key << 4, count: REASON_DONE, ..TaskFile::default() }
    }
}

/// Carries out what the host sent, but for moving data.
pub(super) fn execute(drive: &mut Drive, frame: FromHost, packet: &[u8; 12]) -> Plan {
    let (command, features, count) = match frame {
        FromHost::Control { reset: true } => {
            drive.reset();
            let after = TaskFile::signature();
            return Plan { ending: Ending::Silent, ..Plan::end(after) };
        }
        FromHost::Control { reset: false } => {
            return Plan { ending: Ending::Quiet, ..Plan::end(TaskFile::signature()) };
        }
        FromHost::Command { command, features, count } => (command, features, count),
    };
    match command {
        PACKET => {
            let done = TaskFile { status: GOOD, count: REASON_DONE, ..TaskFile::default() };
            match drive.packet(packet) {
                Ok(reply) => {
                    let pio = features & BY_DMA == 0 && !matches!(reply, Reply::Done);
                    Plan { reply, pio, ..Plan::end(done) }
                }
                Err(sense) => Plan::end(Plan::check_condition(sense.key())),
            }
        }
        IDENTIFY_PACKET_DEVICE => {
            let reply = Reply::Bytes(identity(&drive.serial).into());
            Plan { reply, pio: true, ending: Ending::Silent, ..Plan::good() }
        }
        DEVICE_RESET => {
            drive.reset();
            Plan::end(TaskFile::signature())
        }
        EXECUTE_DEVICE_DIAGNOSTIC => Plan::end(TaskFile { status: GOOD, ..TaskFile::signature() }),
        STANDBY_IMMEDIATE | IDLE_IMMEDIATE | STANDBY | IDLE | SLEEP => Plan::good(),
        // Active.
        CHECK_POWER_MODE => Plan::end(TaskFile { status: GOOD, count: 0xff, ..TaskFile::default() }),
        SET_FEATURES if can_set(features, count) => Plan::good(),
        IDENTIFY_DEVICE | READ_SECTORS => Plan::aborted(TaskFile::signature()),
        _ => Plan::aborted(TaskFile::default()),
    }
}

/// SET FEATURES: transfer modes, which are all as fast as memory, and how Serial ATA is used.
fn can_set(feature: u8, count: u8) -> bool {
    match feature {
        0x03 => matches!(count, 0 | 1 | 0x08..=0x0c | 0x20..=0x22 | 0x40..=0x46),
        0x10 | 0x90 => true,
        _ => false,
    }
}

/// IDENTIFY PACKET DEVICE's data (ATA8-ACS §7.18).
fn identity(serial: &str) -> [u8; 512] {
    let mut words = [0u16; 256];
    // A CD-ROM, removable, wants its packet within 50 µs, of 12 bytes.
    words[0] = 0b10 << 14 | 5 << 8 | 1 << 7 | 0b10 << 5;
    put_text(&mut words[10..20], serial);
    put_text(&mut words[23..27], "1.0");
    put_text(&mut words[27..47], "Outboard CD-ROM");
    // IORDY, LBA, DMA.
    words[49] = 1 << 11 | 1 << 9 | 1 << 8;
    words[50] = 1 << 14;
    // Words 64–70 and 88 are valid.
    words[53] = 0b110;
    // Multiword DMA 0–2; PIO 3 and 4, with their cycle times in ns.
    words[63] = 0b111;
    words[64] = 0b11;
    words[65..69].fill(120);
    // Serial ATA, first generation.
    words[76] = 1 << 1;
    // ATA/ATAPI-4 to ATA8-ACS.
    words[80] = 0b1_1111 << 4;
    // DEVICE RESET and PACKET: there, and on.
    for at in [82, 85] {
        words[at] = 1 << 9 | 1 << 4;
    }
    for at in [83, 84, 87] {
        words[at] = 1 << 14;
    }
    // Ultra DMA 0–5, of which 5 is used.
    words[88] = 0x203f;
    let mut bytes = [0; 512];
    for (to, word) in bytes.chunks_exact_mut(2).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    // Integrity word: all bytes together are 0.
    bytes[510] = 0xa5;
    bytes[511] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    bytes
}

/// Text as ATA has it: padded with spaces, the first character of each word in its upper half.
fn put_text(words: &mut [u16], text: &str) {
    let mut bytes = text.bytes().chain(std::iter::repeat(b' '));
    for word in words {
        *word = u16::from_be_bytes([bytes.next().unwrap_or(b' '), bytes.next().unwrap_or(b' ')]);
    }
}
