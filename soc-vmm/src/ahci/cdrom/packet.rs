//! Packet commands (MMC-6 §6, SPC-4 §6): what each does to the drive, and what it answers.

use super::disc::Format;
use super::{Drive, MediaEvent, Medium, Sense, configuration, disc, inquiry, mode};

// Operation codes.
const TEST_UNIT_READY: u8 = 0x00;
const REQUEST_SENSE: u8 = 0x03;
const INQUIRY: u8 = 0x12;
const START_STOP_UNIT: u8 = 0x1b;
const PREVENT_ALLOW_MEDIUM_REMOVAL: u8 = 0x1e;
const READ_CAPACITY: u8 = 0x25;
const READ_10: u8 = 0x28;
const SEEK: u8 = 0x2b;
const READ_TOC: u8 = 0x43;
const GET_CONFIGURATION: u8 = 0x46;
const GET_EVENT_STATUS: u8 = 0x4a;
const READ_DISC_INFORMATION: u8 = 0x51;
const MODE_SENSE_10: u8 = 0x5a;
const READ_12: u8 = 0xa8;
const READ_DISC_STRUCTURE: u8 = 0xad;
const SET_CD_SPEED: u8 = 0xbb;
const MECHANISM_STATUS: u8 = 0xbd;
const READ_CD: u8 = 0xbe;

/// Class of events: media, as number and as bit.
const CLASS_MEDIA: u8 = 4;
const CLASSES: u8 = 1 << CLASS_MEDIA;

/// What a command answers with.
#[derive(Clone)]
pub(in super::super) enum Reply {
    /// Nothing but that it is done.
    Done,
    /// Some bytes.
    Bytes(Vec<u8>),
    /// Sectors, which are still to be read.
    Sectors {
        /// Where they are.
        medium: Medium,
        /// The first one.
        first: u32,
        /// How many.
        count: u32,
    },
}

impl Drive {
    /// Carries out a command, but for the reading. What it says when it fails is kept for REQUEST SENSE.
    pub(in super::super) fn packet(&mut self, packet: &[u8; 12]) -> Result<Reply, Sense> {
        let done = self.command(packet);
        match &done {
            Err(sense) => self.fail(*sense),
            Ok(_) if packet[0] != REQUEST_SENSE => self.state.sense = None,
            Ok(_) => {}
        }
        done
    }

    fn command(&mut self, packet: &[u8; 12]) -> Result<Reply, Sense> {
        let half = |at: usize| u16::from_be_bytes([packet[at], packet[at + 1]]);
        let word = |at: usize| u32::from_be_bytes([packet[at], packet[at + 1], packet[at + 2], packet[at + 3]]);
        let cut = |mut bytes: Vec<u8>, room: u16| {
            bytes.truncate(room.into());
            Ok(if bytes.is_empty() { Reply::Done } else { Reply::Bytes(bytes) })
        };
        // These tell of themselves, and nothing is told before them.
        let silent = matches!(packet[0], REQUEST_SENSE | INQUIRY | GET_CONFIGURATION | GET_EVENT_STATUS);
        if !silent && let Some(attention) = self.state.attention.take() {
            return Err(attention);
        }
        match packet[0] {
            TEST_UNIT_READY => self.medium_to_read().map(|_| Reply::Done),
            REQUEST_SENSE => {
                let sense = self.state.sense.take().or_else(|| self.state.attention.take());
                cut(sense.unwrap_or(Sense::NONE).data().into(), packet[4].into())
            }
            INQUIRY => cut(inquiry::inquiry(packet[1], packet[2], &self.serial)?, half(3)),
            START_STOP_UNIT => self.start_stop(packet[4]),
            PREVENT_ALLOW_MEDIUM_REMOVAL => {
                self.state.locked = packet[4] & 1 != 0;
                Ok(Reply::Done)
            }
            READ_CAPACITY => {
                let last = self.disc()? - 1;
                cut([last.to_be_bytes(), (super::SECTOR as u32).to_be_bytes()].concat(), u16::MAX)
            }
            READ_10 => self.read(word(2), half(7).into()),
            READ_12 => self.read(word(2), word(6)),
            READ_CD => match (packet[9] & 0xf8, packet[10] & 7) {
                (0, 0) => self.medium_to_read().map(|_| Reply::Done),
                // User data alone, of a sector of any type or of mode 1.
                (0x10, 0) if matches!(packet[1] >> 2 & 7, 0 | 2) => {
                    self.read(word(2), u32::from(packet[6]) << 16 | u32::from(half(7)))
                }
                _ => Err(Sense::BAD_FIELD),
            },
            SEEK => self.read(word(2), 1).map(|_| Reply::Done),
            READ_TOC => {
                let sectors = self.disc()?;
                // ATAPI's first edition had the format in the control byte.
                let kind = if packet[2] & 0xf != 0 { packet[2] & 0xf } else { packet[9] >> 6 };
                let format = if packet[1] & 2 != 0 { Format::Msf } else { Format::Lba };
                cut(disc::contents(kind, format, packet[6], sectors)?, half(7))
            }
            READ_DISC_INFORMATION if packet[1] & 7 == 0 => {
                self.disc()?;
                cut(disc::information(), half(7))
            }
            READ_DISC_STRUCTURE => {
                let sectors = self.disc()?;
                cut(disc::structure(packet[1] & 0xf, packet[6], packet[7], sectors)?, half(8))
            }
            GET_CONFIGURATION => {
                let sectors = self.readable().map(|medium| Self::sectors(&**medium));
                cut(configuration::configuration(packet[1] & 3, half(2), sectors)?, half(7))
            }
            GET_EVENT_STATUS if packet[1] & 1 != 0 => cut(self.event_status(packet[4]), half(7)),
            MODE_SENSE_10 if packet[2] >> 6 == 3 => Err(Sense::NO_SAVED_PAGES),
            MODE_SENSE_10 => {
                let changeable = packet[2] >> 6 == 1;
                cut(mode::sense(packet[2] & 0x3f, changeable, self.state.locked)?, half(7))
            }
            MECHANISM_STATUS => {
                // A door, and no slots of a changer.
                cut(vec![0, if self.state.open { 0x10 } else { 0 }, 0, 0, 0, 0, 0, 0], half(8))
            }
            SET_CD_SPEED => Ok(Reply::Done),
            READ_DISC_INFORMATION | GET_EVENT_STATUS => Err(Sense::BAD_FIELD),
            _ => Err(Sense::UNKNOWN_COMMAND),
        }
    }

    fn medium_to_read(&self) -> Result<&Medium, Sense> {
        let missing = if self.state.open { Sense::NO_MEDIUM_TRAY_OPEN } else { Sense::NO_MEDIUM_TRAY_CLOSED };
        self.readable().ok_or(missing)
    }

    /// Sectors of the medium: at least one, since no image is empty.
    fn disc(&self) -> Result<u32, Sense> {
        self.medium_to_read().map(|medium| Self::sectors(&**medium).max(1))
    }

    fn read(&self, first: u32, count: u32) -> Result<Reply, Sense> {
        let medium = self.medium_to_read()?;
        match first.checked_add(count) {
            Some(end) if end <= Self::sectors(&**medium) => {}
            _ => return Err(Sense::BEHIND_THE_END),
        }
        Ok(if count == 0 { Reply::Done } else { Reply::Sectors { medium: medium.clone(), first, count } })
    }

    /// START STOP UNIT: only the tray is of interest, not whether the motor runs.
    fn start_stop(&mut self, how: u8) -> Result<Reply, Sense> {
        let (load_eject, start, power) = (how & 2 != 0, how & 1 != 0, how >> 4);
        if power == 0 && load_eject {
            if !start && self.state.locked && !self.state.open {
                return Err(Sense::REMOVAL_PREVENTED);
            }
            self.move_tray(!start);
        }
        Ok(Reply::Done)
    }

    /// GET EVENT STATUS NOTIFICATION, polled (MMC-6 §6.6).
    fn event_status(&mut self, classes: u8) -> Vec<u8> {
        if classes & CLASSES == 0 {
            // None that is supported: bit 7.
            return vec![0, 2, 0x80, CLASSES];
        }
        let event = std::mem::replace(&mut self.state.event, MediaEvent::None);
        let media = u8::from(self.state.open) | u8::from(self.readable().is_some()) << 1;
        vec![0, 6, CLASS_MEDIA, CLASSES, event as u8, media, 0, 0]
    }
}
