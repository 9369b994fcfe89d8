//! Requests and replies, one after the other. A request's bytes are moved piece by piece, so that a connection holds one piece.

use std::io::{BufReader, Read};

use zerocopy::IntoBytes;

use super::Export;
use crate::block::{BlockBackend, BlockError};
use crate::nbd::stream::{get, skip};
use crate::nbd::wire::{REQUEST_MAGIC, Reply, Request, command, error};
use crate::nbd::{NbdError, PIECE, REQUEST_MOST, Stream};

/// Bytes of a reply's head.
const HEAD: usize = size_of::<Reply>();

/// Serves requests until the client goes.
pub(super) fn serve<S: Stream>(stream: &mut BufReader<S>, export: &Export) -> Result<(), NbdError> {
    let mut buffer = Vec::new();
    loop {
        let request: Request = get(stream)?;
        if request.magic.get() != REQUEST_MAGIC {
            return Err(NbdError::Protocol("a request without its magic"));
        }
        let (offset, len) = (request.offset.get(), request.len.get());
        let outcome = match request.command.get() {
            command::READ => {
                read(stream, export, &request, &mut buffer)?;
                continue;
            }
            command::WRITE => write(stream, export, &request, &mut buffer)?,
            command::DISCONNECT => return Ok(()),
            command::FLUSH => done(&request, 0, export.image.flush()),
            command::TRIM => change(export, &request, command::FUA, |image| image.discard(offset, len.into())),
            command::WRITE_ZEROES => {
                let may_unmap = request.flags.get() & command::NO_HOLE == 0;
                let flags = command::FUA | command::NO_HOLE;
                change(export, &request, flags, |image| image.write_zeroes(offset, len.into(), may_unmap))
            }
            _ => Err(error::INVAL),
        };
        reply(stream, &request, outcome)?;
    }
}

fn reply<S: Stream>(stream: &mut BufReader<S>, request: &Request, outcome: Result<(), u32>) -> Result<(), NbdError> {
    let reply = Reply::new(outcome.err().unwrap_or(0), request.cookie.get());
    Ok(stream.get_mut().write_all(reply.as_bytes())?)
}

/// Reads. Once the head of the reply is written only the end of the connection can tell of an error.
fn read<S: Stream>(
    stream: &mut BufReader<S>,
    export: &Export,
    request: &Request,
    buffer: &mut Vec<u8>,
) -> Result<(), NbdError> {
    let (mut at, len) = (request.offset.get(), request.len.get());
    if let Err(number) = check(export, request, command::FUA) {
        return reply(stream, request, Err(number));
    }
    let end = at + u64::from(len);
    let mut head = Some(Reply::new(0, request.cookie.get()));
    while head.is_some() || at < end {
        let (count, skipped) = ((end - at).min(PIECE as u64) as usize, if head.is_some() { HEAD } else { 0 });
        buffer.resize(skipped + count, 0);
        if let Err(e) = export.image.read_at(&mut buffer[skipped..], at) {
            export.complain("read", &e);
            return match head {
                Some(_) => reply(stream, request, Err(number(&e))),
                None => Err(NbdError::Failed(number(&e))),
            };
        }
        if let Some(head) = head.take() {
            buffer[..HEAD].copy_from_slice(head.as_bytes());
        }
        stream.get_mut().write_all(buffer)?;
        at += count as u64;
    }
    Ok(())
}

/// Writes; what is behind a refused request is read over.
fn write<S: Stream>(
    stream: &mut BufReader<S>,
    export: &Export,
    request: &Request,
    buffer: &mut Vec<u8>,
) -> Result<Result<(), u32>, NbdError> {
    let (mut at, mut left) = (request.offset.get(), request.len.get());
    if left > REQUEST_MOST {
        return Err(NbdError::Protocol("more bytes than a request may have"));
    }
    let mut outcome = check_write(export, request, command::FUA);
    while left > 0 {
        if outcome.is_err() {
            skip(stream, left.into())?;
            break;
        }
        let count = left.min(PIECE as u32);
        buffer.resize(count as usize, 0);
        stream.read_exact(buffer)?;
        outcome = export.image.write_at(buffer, at).map_err(|e| {
            export.complain("write", &e);
            number(&e)
        });
        (at, left) = (at + u64::from(count), left - count);
    }
    Ok(outcome.and_then(|()| force(export, request)))
}

/// What else changes a disk.
fn change(
    export: &Export,
    request: &Request,
    flags: u16,
    how: impl FnOnce(&dyn BlockBackend) -> Result<(), BlockError>,
) -> Result<(), u32> {
    check_write(export, request, flags)?;
    how(&*export.image).map_err(|e| {
        export.complain("change", &e);
        number(&e)
    })?;
    force(export, request)
}

/// Makes durable what a client wants so.
fn force(export: &Export, request: &Request) -> Result<(), u32> {
    if request.flags.get() & command::FUA == 0 { Ok(()) } else { done(request, command::FUA, export.image.flush()) }
}

fn done(request: &Request, flags: u16, result: Result<(), BlockError>) -> Result<(), u32> {
    if request.flags.get() & !(flags | command::FUA) != 0 {
        return Err(error::INVAL);
    }
    result.map_err(|e| number(&e))
}

fn check_write(export: &Export, request: &Request, flags: u16) -> Result<(), u32> {
    if !export.writable {
        return Err(error::PERM);
    }
    check(export, request, flags).map_err(|number| if number == error::INVAL { error::NOSPC } else { number })
}

/// Whether a request is one that makes sense: flags, place, length.
fn check(export: &Export, request: &Request, flags: u16) -> Result<(), u32> {
    let (offset, len) = (request.offset.get(), request.len.get());
    if request.flags.get() & !flags != 0 {
        return Err(error::INVAL);
    }
    if request.command.get() == command::READ && len > REQUEST_MOST {
        return Err(error::OVERFLOW);
    }
    let end = offset.checked_add(len.into());
    if end.is_none_or(|end| end > export.image.size()) { Err(error::INVAL) } else { Ok(()) }
}

fn number(error: &BlockError) -> u32 {
    match error {
        BlockError::ReadOnly => error::PERM,
        BlockError::OutOfRange { .. } => error::INVAL,
        full if full.is_no_space() => error::NOSPC,
        _ => error::IO,
    }
}
