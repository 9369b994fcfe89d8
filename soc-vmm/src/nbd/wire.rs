//! What goes over the wire: big-endian numbers, each structure with its offsets. Kinds and flags are numbers here: a peer may say any.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `NBDMAGIC`, what a server says first.
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before each option and in the greeting.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Before each answer to an option.
pub const ANSWER_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Before each simple reply.
pub const REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags of a server, and of a client in 32 bits: fixed newstyle.
pub const FIXED_NEWSTYLE: u16 = 1;
/// The same: no zeros behind the answer to `NBD_OPT_EXPORT_NAME`.
pub const NO_ZEROES: u16 = 2;
/// Those zeros.
pub const ZEROES: usize = 124;

/// Options (`NBD_OPT_`).
pub mod option {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
}

/// Kinds of answers to options (`NBD_REP_`).
pub mod answer {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    /// Of every refusal.
    pub const ERROR: u32 = 1 << 31;
    pub const UNSUPPORTED: u32 = ERROR | 1;
    pub const POLICY: u32 = ERROR | 2;
    pub const INVALID: u32 = ERROR | 3;
    pub const UNKNOWN: u32 = ERROR | 6;
    pub const TOO_BIG: u32 = ERROR | 9;
}

/// What is told of an export (`NBD_INFO_`).
pub mod info {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do (`NBD_FLAG_`).
pub mod flag {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
}

/// Kinds of requests (`NBD_CMD_`).
pub mod command {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const WRITE_ZEROES: u16 = 6;
    /// Flag: durable when it is answered.
    pub const FUA: u16 = 1 << 0;
    /// Flag: zeros that have their room.
    pub const NO_HOLE: u16 = 1 << 1;
}

/// Errors of requests (`NBD_E`), which are Linux' numbers.
pub mod error {
    #![allow(missing_docs, reason = "the specification's names")]
    pub const PERM: u32 = 1;
    pub const IO: u32 = 5;
    pub const INVAL: u32 = 22;
    pub const NOSPC: u32 = 28;
    pub const OVERFLOW: u32 = 75;
    pub const NOTSUP: u32 = 95;
    pub const SHUTDOWN: u32 = 108;
}

/// What a server says first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Greeting {
    /// 0: [`MAGIC`].
    pub magic: U64,
    /// 8: [`OPTION_MAGIC`].
    pub option_magic: U64,
    /// 16: [`FIXED_NEWSTYLE`], [`NO_ZEROES`].
    pub flags: U16,
}

/// The head of an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct OptionHead {
    /// 0: [`OPTION_MAGIC`].
    pub magic: U64,
    /// 8: one of [`option`].
    pub option: U32,
    /// 12: bytes that follow.
    pub len: U32,
}

/// The head of an answer to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AnswerHead {
    /// 0: [`ANSWER_MAGIC`].
    pub magic: U64,
    /// 8: the option's.
    pub option: U32,
    /// 12: one of [`answer`].
    pub kind: U32,
    /// 16: bytes that follow.
    pub len: U32,
}

/// An export, behind [`info::EXPORT`] or in the answer to `NBD_OPT_EXPORT_NAME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExportHead {
    /// 0: bytes.
    pub size: U64,
    /// 8: of [`flag`].
    pub flags: U16,
}

/// What requests are best and at most, behind [`info::BLOCK_SIZE`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BlockSizes {
    /// 0: what all are multiples of.
    pub least: U32,
    /// 4: what is best.
    pub best: U32,
    /// 8: bytes of one that moves data, at most.
    pub most: U32,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Request {
    /// 0: [`REQUEST_MAGIC`].
    pub magic: U32,
    /// 4: flags of [`command`].
    pub flags: U16,
    /// 6: one of [`command`].
    pub command: U16,
    /// 8: comes back in the reply.
    pub cookie: U64,
    /// 16: the first byte.
    pub offset: U64,
    /// 24: bytes.
    pub len: U32,
}

/// A simple reply. Behind that of a read that succeeded are its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Reply {
    /// 0: [`REPLY_MAGIC`].
    pub magic: U32,
    /// 4: 0, or one of [`error`].
    pub error: U32,
    /// 8: the request's.
    pub cookie: U64,
}

const _: () = {
    use std::mem::offset_of;
    assert!(size_of::<Greeting>() == 18 && offset_of!(Greeting, flags) == 16);
    assert!(size_of::<OptionHead>() == 16 && offset_of!(OptionHead, len) == 12);
    assert!(size_of::<AnswerHead>() == 20 && offset_of!(AnswerHead, kind) == 12);
    assert!(size_of::<ExportHead>() == 10 && offset_of!(ExportHead, flags) == 8);
    assert!(size_of::<BlockSizes>() == 12 && offset_of!(BlockSizes, most) == 8);
    assert!(size_of::<Request>() == 28 && offset_of!(Request, cookie) == 8 && offset_of!(Request, len) == 24);
    assert!(size_of::<Reply>() == 16 && offset_of!(Reply, cookie) == 8);
};

impl OptionHead {
    /// Of an option with that many bytes.
    pub fn new(option: u32, len: u32) -> Self {
        Self { magic: OPTION_MAGIC.into(), option: option.into(), len: len.into() }
    }
}

impl AnswerHead {
    /// Of an answer with that many bytes.
    pub fn new(option: u32, kind: u32, len: u32) -> Self {
        Self { magic: ANSWER_MAGIC.into(), option: option.into(), kind: kind.into(), len: len.into() }
    }
}

impl Request {
    /// A request.
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Self {
        Self {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }
}

impl Reply {
    /// A reply.
    pub fn new(error: u32, cookie: u64) -> Self {
        Self { magic: REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() }
    }
}
