//! What a lane refuses.

use core::fmt;

/// A peer broke the lane's rules. The connection ends; the VM is suspended or lost, nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LaneError {
    /// A line's sequence number is neither the last one nor the next one.
    Sequence {
        /// The next sequence number that would be legal.
        expected: u32,
        /// What the line says.
        found: u32,
    },
    /// Reserved bits are set, or a field holds no legal value.
    Malformed {
        /// The line's last word.
        header: u64,
    },
    /// A ring's tail moved back, or past what the consumer gave credit for.
    Tail {
        /// The consumer's head.
        head: u32,
        /// The tail it read.
        tail: u32,
    },
    /// A credit gave back more than was posted.
    Credit {
        /// The producer's tail.
        tail: u32,
        /// The credit it read.
        credit: u32,
    },
    /// This end broke the rules itself: a request while one waits, a completion without a request.
    Order,
}

impl fmt::Display for LaneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sequence { expected, found } => {
                write!(f, "the peer's line has sequence {found}, legal is {expected} or the one before")
            }
            Self::Malformed { header } => write!(f, "the peer's line is malformed: header {header:#018x}"),
            Self::Tail { head, tail } => write!(f, "the peer's ring tail {tail} does not follow head {head}"),
            Self::Credit { tail, credit } => write!(f, "the peer's credit {credit} is past what was posted, {tail}"),
            Self::Order => f.write_str("a lane was used out of order"),
        }
    }
}

impl core::error::Error for LaneError {}
