//! The header of every message, and what can be wrong with one.

/// Bytes of a ring's slot.
pub const SLOT: usize = 64;
/// Bytes of a message header.
pub const HEADER: usize = 32;
/// Most bytes of payload in one message.
pub const MOST_PAYLOAD: usize = 48 << 10;

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// SoC to host; answered by a reply of the same opcode and sequence.
    Request = 1,
    /// SoC to host; never answered.
    Order = 2,
    /// Host to SoC: the answer to a request.
    Reply = 3,
    /// Host to SoC: something happened.
    Event = 4,
}

/// How a request ended. Errors of the transport, of the VM and of a device are apart, by range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Status(pub u32);

impl Status {
    /// Done.
    pub const OK: Self = Self(0);
    /// Transport: the opcode is not known here.
    pub const UNKNOWN: Self = Self(0x100);
    /// Transport: the payload can't be read.
    pub const MALFORMED: Self = Self(0x101);
    /// Transport: the deadline passed before the work was done; what was begun of it is taken back.
    pub const LATE: Self = Self(0x102);
    /// VM: not in this state of the VM.
    pub const STATE: Self = Self(0x200);
    /// VM: an argument is out of range; the text says which.
    pub const ARGUMENT: Self = Self(0x201);
    /// VM: the host has not what was asked for (memory, vectors, lanes, a CPU feature); the text says what.
    pub const UNAVAILABLE: Self = Self(0x202);
    /// VM: a system call failed; the low 16 bits hold errno, the text says what was tried.
    pub const OS: Self = Self(0x3_0000);

    /// [`Status::OS`] with an errno.
    #[must_use]
    pub fn os(errno: i32) -> Self {
        Self(Self::OS.0 | errno as u32 & 0xffff)
    }
}

/// A message's header, 32 bytes.
///
/// Opcode (bits 0–15), class (16–23), 0 (24–31), payload length in bytes (32–63) · sequence (0–31), status (32–63) · epoch ·
/// deadline in ms (requests) or bytes of bulk (replies), 0–31; 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which call or event.
    pub opcode: u16,
    /// What the message is.
    pub class: Class,
    /// Bytes of payload.
    pub length: u32,
    /// Pairs a reply with its request; counts events.
    pub sequence: u32,
    /// How the request ended; replies only, 0 in others.
    pub status: Status,
    /// The connection that this belongs to.
    pub epoch: u64,
    /// Milliseconds within which the host should begin (requests; 0: no limit), or bytes of bulk that wait (replies); 0 in others.
    pub extra: u32,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; HEADER] {
        let words = [
            u64::from(self.opcode) | (self.class as u64) << 16 | u64::from(self.length) << 32,
            u64::from(self.sequence) | u64::from(self.status.0) << 32,
            self.epoch,
            u64::from(self.extra),
        ];
        let mut bytes = [0; HEADER];
        for (chunk, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
            *chunk = word.to_le_bytes();
        }
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// A reserved bit is set, or the class is none.
    pub fn parse(bytes: &[u8; HEADER]) -> Result<Self, ChannelError> {
        let word = |i: usize| u64::from_le_bytes(bytes.as_chunks::<8>().0[i]);
        let class = match word(0) >> 16 & 0xffff {
            1 => Class::Request,
            2 => Class::Order,
            3 => Class::Reply,
            4 => Class::Event,
            _ => return Err(ChannelError::Header(word(0))),
        };
        if word(3) >> 32 != 0 || matches!(class, Class::Order | Class::Event) && word(3) != 0 {
            return Err(ChannelError::Header(word(3)));
        }
        if class != Class::Reply && word(1) >> 32 != 0 {
            return Err(ChannelError::Header(word(1)));
        }
        Ok(Self {
            opcode: word(0) as u16,
            class,
            length: (word(0) >> 32) as u32,
            sequence: word(1) as u32,
            status: Status((word(1) >> 32) as u32),
            epoch: word(2),
            extra: word(3) as u32,
        })
    }
}

/// What ends a connection, or keeps a message from being sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelError {
    /// No room in the ring, or the last bulk still there: the peer doesn't read.
    Full,
    /// The peer takes requests and answers none: so many wait.
    Unanswered(usize),
    /// A payload longer than [`MOST_PAYLOAD`].
    TooLong(usize),
    /// The peer's head is past what was written.
    Head {
        /// What it says.
        head: u64,
        /// What was written.
        tail: u64,
    },
    /// The peer's tail moved back, or past the ring.
    Tail {
        /// What was read.
        head: u64,
        /// What it says.
        tail: u64,
    },
    /// A header with reserved bits or no class: the word.
    Header(u64),
    /// A length that the ring doesn't hold.
    Length(u32),
    /// A message of another connection.
    Epoch(u64),
    /// A message that this side doesn't take, or a reply that nobody asked for.
    Class(u16),
    /// The bulk of a reply can't be where it is said to be.
    Bulk(u32),
}

impl std::fmt::Display for ChannelError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Full => f.write_str("the peer doesn't read its ring"),
            Self::Unanswered(n) => write!(f, "the peer left {n} requests without an answer"),
            Self::TooLong(n) => write!(f, "a message of {n} bytes is longer than {MOST_PAYLOAD}"),
            Self::Head { head, tail } => write!(f, "the peer's head {head} is past the tail {tail}"),
            Self::Tail { head, tail } => write!(f, "the peer's tail {tail} does not follow the head {head}"),
            Self::Header(word) => write!(f, "the peer's message header is malformed: {word:#018x}"),
            Self::Length(n) => write!(f, "the peer's message has {n} bytes, more than its ring holds"),
            Self::Epoch(epoch) => write!(f, "the peer's message belongs to another connection, {epoch:#018x}"),
            Self::Class(opcode) => write!(f, "the peer's message {opcode:#06x} answers nothing that was asked"),
            Self::Bulk(n) => write!(f, "the peer announces {n} bytes of bulk, more than there can be"),
        }
    }
}

impl std::error::Error for ChannelError {}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_a_class_does_not_use_is_reserved() {
        let header = |class, status, extra| {
            let header = Header { opcode: 1, class, length: 0, sequence: 1, status, epoch: 0, extra };
            Header::parse(&header.to_bytes()).is_ok()
        };
        for class in [Class::Request, Class::Order, Class::Reply, Class::Event] {
            assert!(header(class, Status::OK, 0));
            assert_eq!(header(class, Status::LATE, 0), class == Class::Reply, "{class:?}");
            assert_eq!(header(class, Status::OK, 1), matches!(class, Class::Reply | Class::Request), "{class:?}");
        }
    }

    proptest! {
        #[test]
        fn a_parsed_header_says_the_same_again(bytes: [u8; HEADER]) {
            let mut bytes = bytes;
            bytes[2] %= 6;
            bytes[3] = 0;
            bytes[28..].fill(0);
            if let Ok(header) = Header::parse(&bytes) {
                prop_assert_eq!(header.to_bytes(), bytes);
            }
        }
    }
}
