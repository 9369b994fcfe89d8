//! What the host reports by itself.

use crate::call::LateRun;
use crate::codec::{Malformed, Reader, Writer};

/// An event.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest ended a level-triggered interrupt: set the line again if the device still wants it.
    Eoi {
        /// The GSI.
        gsi: u32,
    },
    /// A log record of the shim.
    Log {
        /// 1 error, 2 warning, 3 information, 4 detail.
        level: u8,
        /// One line.
        text: String,
    },
    /// A vCPU, or KVM for it, waits for these pages, which were said to come later.
    Wanted(LateRun),
}

/// Most bytes of a text.
const TEXT: usize = 1024;

impl Event {
    /// The event's number on the wire.
    #[must_use]
    pub fn opcode(&self) -> u16 {
        match self {
            Self::Eoi { .. } => 0x8001,
            Self::Log { .. } => 0x8002,
            Self::Wanted(_) => 0x8003,
        }
    }

    /// The event's payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let w = Writer::default();
        match self {
            Self::Eoi { gsi } => w.put(&u64::from(*gsi)),
            Self::Log { level, text } => {
                w.put(&u64::from(*level)).list(&text.as_bytes()[..text.floor_char_boundary(TEXT)])
            }
            Self::Wanted(run) => w.put(run),
        }
        .done()
    }

    /// Reads an event; `Ok(None)` for one that this build doesn't know. Text that is no UTF-8 is mended, not refused.
    ///
    /// # Errors
    /// The payload is not that event's.
    pub fn decode(opcode: u16, payload: &[u8]) -> Result<Option<Self>, Malformed> {
        let mut r = Reader::new(payload);
        let number = |r: &mut Reader<'_>| r.take::<u64>().and_then(|n| u32::try_from(n).map_err(|_| Malformed));
        let text = |r: &mut Reader<'_>| r.list::<u8>(TEXT).map(|b| String::from_utf8_lossy(&b).into_owned());
        let event = match opcode {
            0x8001 => Self::Eoi { gsi: number(&mut r)? },
            0x8002 => Self::Log { level: u8::try_from(number(&mut r)?).map_err(|_| Malformed)?, text: text(&mut r)? },
            0x8003 => Self::Wanted(r.take()?),
            _ => return Ok(None),
        };
        r.end()?;
        Ok(Some(event))
    }
}
