//! The client's side of the handshake: `NBD_OPT_GO`, or the old `EXPORT_NAME` where a server doesn't know that.

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, IntoBytes};

use crate::nbd::stream::{get, get_bytes, put, skip};
use crate::nbd::wire::{
    ANSWER_MAGIC, AnswerHead, BlockSizes, ExportHead, FIXED_NEWSTYLE, Greeting, MAGIC, NO_ZEROES, OPTION_MAGIC,
    OptionHead, ZEROES, answer, flag, info, option,
};
use crate::nbd::{NAME_MOST, NbdError, REQUEST_MOST, Stream};

/// Answers to one option at most.
const ANSWERS_MOST: usize = 64;
/// Bytes of an answer at most.
const ANSWER_MOST: usize = 64 << 10;

/// What a server offers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// Bytes.
    pub size: u64,
    /// Of [`flag`].
    pub flags: u16,
    /// Bytes of one request at most.
    pub most: u32,
}

/// Takes that export of a server.
///
/// # Errors
/// It has none of that name, it is of no use as a disk, or that is no server.
pub fn negotiate(stream: &mut impl Stream, export: &str) -> Result<Offer, NbdError> {
    let greeting: Greeting = get(stream)?;
    let flags = greeting.flags.get();
    if greeting.magic.get() != MAGIC || greeting.option_magic.get() != OPTION_MAGIC || flags & FIXED_NEWSTYLE == 0 {
        return Err(NbdError::Protocol("no greeting of the fixed newstyle kind"));
    }
    if export.len() > NAME_MOST {
        return Err(NbdError::Protocol("an export's name has at most 4096 bytes"));
    }
    let common = FIXED_NEWSTYLE | flags & NO_ZEROES;
    put(stream, &U32::from(u32::from(common)), &[])?;
    let len = export.len() as u32;
    let wish =
        [&len.to_be_bytes()[..], export.as_bytes(), &1u16.to_be_bytes(), &info::BLOCK_SIZE.to_be_bytes()].concat();
    put(stream, &OptionHead::new(option::GO, wish.len() as u32), &wish)?;
    let (mut head, mut most) = (None, REQUEST_MOST);
    for _ in 0..ANSWERS_MOST {
        let answer: AnswerHead = get(stream)?;
        if answer.magic.get() != ANSWER_MAGIC || answer.option.get() != option::GO {
            return Err(NbdError::Protocol("no answer to what was asked"));
        }
        let bytes = get_bytes(stream, answer.len.get(), ANSWER_MOST)?;
        match answer.kind.get() {
            answer::INFO => match bytes.split_first_chunk() {
                Some((kind, told)) if *kind == info::EXPORT.to_be_bytes() => head = Some(read::<ExportHead>(told)?),
                Some((kind, told)) if *kind == info::BLOCK_SIZE.to_be_bytes() => most = least(&read(told)?)?,
                Some(_) => {}
                None => return Err(NbdError::Protocol("information without its kind")),
            },
            answer::ACK => {
                let head = head.ok_or(NbdError::Protocol("an export of which nothing is told"))?;
                return offer(head, most);
            }
            answer::UNSUPPORTED => return by_name(stream, export, common),
            kind if kind & answer::ERROR != 0 => return Err(NbdError::Refused { kind }),
            _ => return Err(NbdError::Protocol("an answer of another option")),
        }
    }
    Err(NbdError::Protocol("answers without end"))
}

/// The old way, to which a server that has no such export says nothing.
fn by_name(stream: &mut impl Stream, export: &str, common: u16) -> Result<Offer, NbdError> {
    put(stream, &OptionHead::new(option::EXPORT_NAME, export.len() as u32), export.as_bytes())?;
    let head: ExportHead = get(stream)?;
    if common & NO_ZEROES == 0 {
        skip(stream, ZEROES as u64)?;
    }
    offer(head, REQUEST_MOST)
}

fn offer(head: ExportHead, most: u32) -> Result<Offer, NbdError> {
    let (size, flags) = (head.size.get(), head.flags.get());
    if size == 0 || !size.is_multiple_of(512) || size > i64::MAX as u64 {
        return Err(NbdError::OddSize(size));
    }
    Ok(Offer { size, flags: if flags & flag::HAS_FLAGS == 0 { 0 } else { flags }, most })
}

/// The most bytes of a request: whole sectors are what is asked for here.
fn least(sizes: &BlockSizes) -> Result<u32, NbdError> {
    let most = sizes.most.get();
    if sizes.least.get() > 512 || most < 512 {
        return Err(NbdError::Protocol("it moves nothing smaller than what a disk's sectors are"));
    }
    Ok(most.min(REQUEST_MOST) & !511)
}

fn read<T: FromBytes + IntoBytes>(bytes: &[u8]) -> Result<T, NbdError> {
    T::read_from_bytes(bytes).map_err(|_| NbdError::Protocol("information of another length"))
}
