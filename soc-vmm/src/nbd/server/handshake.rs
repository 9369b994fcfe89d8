//! The handshake, fixed newstyle: options and their answers, until a client has an export or goes.

use std::io::BufReader;

use zerocopy::IntoBytes;

use super::{Export, Gallery};
use crate::nbd::stream::{get, get_bytes, put, skip};
use crate::nbd::wire::{
    AnswerHead, BlockSizes, ExportHead, FIXED_NEWSTYLE, Greeting, MAGIC, NO_ZEROES, OPTION_MAGIC, OptionHead, ZEROES,
    answer, info, option,
};
use crate::nbd::{NAME_MOST, NbdError, REQUEST_MOST, Stream};

/// Options that a client may try.
const OPTIONS_MOST: usize = 64;
/// Bytes of an option that is known: a name, its length, and what is asked of it.
const OPTION_MOST: usize = NAME_MOST + 6 + 64;
/// Bytes of one that isn't, which are read over.
const UNKNOWN_MOST: u32 = 64 << 10;
/// What requests are best multiples of.
const BEST: u32 = 4096;

/// Greets a client; the export that it wants. None: it goes.
pub(super) fn greet<S: Stream>(stream: &mut BufReader<S>, gallery: &dyn Gallery) -> Result<Option<Export>, NbdError> {
    let greeting =
        Greeting { magic: MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: (FIXED_NEWSTYLE | NO_ZEROES).into() };
    put(stream.get_mut(), &greeting, &[])?;
    let flags: zerocopy::byteorder::big_endian::U32 = get(stream)?;
    let known = u32::from(FIXED_NEWSTYLE | NO_ZEROES);
    if flags.get() & !known != 0 || flags.get() & u32::from(FIXED_NEWSTYLE) == 0 {
        return Err(NbdError::Protocol("handshake flags that were not offered"));
    }
    let no_zeroes = flags.get() & u32::from(NO_ZEROES) != 0;
    for _ in 0..OPTIONS_MOST {
        let head: OptionHead = get(stream)?;
        if head.magic.get() != OPTION_MAGIC {
            return Err(NbdError::Protocol("an option without its magic"));
        }
        let (wanted, len) = (head.option.get(), head.len.get());
        let say = |kind: u32, bytes: &[u8], stream: &mut BufReader<S>| {
            put(stream.get_mut(), &AnswerHead::new(wanted, kind, bytes.len() as u32), bytes)
        };
        match wanted {
            option::EXPORT_NAME => {
                let name = get_bytes(stream, len, NAME_MOST)?;
                // There is no way to say no but to go.
                let export = named(&name, gallery).ok_or(NbdError::Protocol("an export that isn't there"))?;
                let zeroes = if no_zeroes { 0 } else { ZEROES };
                put(stream.get_mut(), &head_of(&export), &[0; ZEROES][..zeroes])?;
                return Ok(Some(export));
            }
            option::ABORT => {
                skip(stream, len.min(UNKNOWN_MOST).into())?;
                say(answer::ACK, &[], stream)?;
                return Ok(None);
            }
            option::LIST => {
                skip(stream, len.min(UNKNOWN_MOST).into())?;
                if len > 0 {
                    say(answer::INVALID, &[], stream)?;
                    continue;
                }
                for name in gallery.names() {
                    let bytes = [&(name.len() as u32).to_be_bytes(), name.as_bytes()].concat();
                    say(answer::SERVER, &bytes, stream)?;
                }
                say(answer::ACK, &[], stream)?;
            }
            option::INFO | option::GO => {
                if len as usize > OPTION_MOST {
                    if len > UNKNOWN_MOST {
                        return Err(NbdError::Protocol("an option longer than any"));
                    }
                    skip(stream, len.into())?;
                    say(answer::TOO_BIG, &[], stream)?;
                    continue;
                }
                let bytes = get_bytes(stream, len, OPTION_MOST)?;
                let Some((name, asked)) = wish(&bytes) else {
                    say(answer::INVALID, &[], stream)?;
                    continue;
                };
                let Some(export) = named(name, gallery) else {
                    say(answer::UNKNOWN, b"there is no such export", stream)?;
                    continue;
                };
                let told = [&info::EXPORT.to_be_bytes()[..], head_of(&export).as_bytes()].concat();
                say(answer::INFO, &told, stream)?;
                if asked.chunks(2).any(|kind| kind == info::BLOCK_SIZE.to_be_bytes()) {
                    let sizes = BlockSizes { least: 1.into(), best: BEST.into(), most: REQUEST_MOST.into() };
                    say(answer::INFO, &[&info::BLOCK_SIZE.to_be_bytes()[..], sizes.as_bytes()].concat(), stream)?;
                }
                say(answer::ACK, &[], stream)?;
                if wanted == option::GO {
                    return Ok(Some(export));
                }
            }
            _ => {
                if len > UNKNOWN_MOST {
                    return Err(NbdError::Protocol("an option longer than any"));
                }
                skip(stream, len.into())?;
                say(answer::UNSUPPORTED, &[], stream)?;
            }
        }
    }
    Err(NbdError::Protocol("options without end"))
}

/// The name in `NBD_OPT_INFO` or `GO`, and what is asked of it, 2 bytes each.
fn wish(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (len, rest) = bytes.split_first_chunk()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, asked) = rest.split_first_chunk()?;
    let fits = name.len() <= NAME_MOST && asked.len() == usize::from(u16::from_be_bytes(*count)) * 2;
    fits.then_some((name, asked))
}

fn named(name: &[u8], gallery: &dyn Gallery) -> Option<Export> {
    gallery.find(std::str::from_utf8(name).ok()?)
}

fn head_of(export: &Export) -> ExportHead {
    ExportHead { size: export.image.size().into(), flags: export.flags().into() }
}
