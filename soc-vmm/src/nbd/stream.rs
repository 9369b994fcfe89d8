//! Reading and writing whole structures.

use std::io::{self, Read, Write};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::NbdError;

/// A connection to a peer that may say anything.
pub trait Stream: Read + Write {
    /// The handshake is over: a peer may be silent from now on.
    fn settled(&mut self) {}
}

impl<T: Read + Write + ?Sized> Stream for &mut T
where
    T: Stream,
{
    fn settled(&mut self) {
        (**self).settled();
    }
}

/// Reads a structure.
pub(super) fn get<T: FromBytes + IntoBytes>(stream: &mut impl Read) -> io::Result<T> {
    let mut value = T::new_zeroed();
    stream.read_exact(value.as_mut_bytes())?;
    Ok(value)
}

/// Reads `len` bytes, which are at most `most`: room grows as they come.
pub(super) fn get_bytes(stream: &mut impl Read, len: u32, most: usize) -> Result<Vec<u8>, NbdError> {
    if len as usize > most {
        return Err(NbdError::Protocol("it says more than anybody would"));
    }
    let mut bytes = Vec::new();
    stream.take(len.into()).read_to_end(&mut bytes)?;
    if bytes.len() < len as usize { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(bytes) }
}

/// Reads over `len` bytes.
pub(super) fn skip(stream: &mut impl Read, len: u64) -> io::Result<()> {
    let count = io::copy(&mut stream.take(len), &mut io::sink())?;
    if count < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Writes a structure and what is behind it, at once.
pub(super) fn put(stream: &mut impl Write, head: &(impl IntoBytes + Immutable), tail: &[u8]) -> io::Result<()> {
    stream.write_all(&[head.as_bytes(), tail].concat())
}
