//! What a program on the SoC says first: `CONNECT P\n`.

use std::io::{self, ErrorKind, Read};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use nix::sys::socket::{MsgFlags, recv};

/// Bytes of a line that names a port, at most: `CONNECT `, ten digits, CR, LF.
const LINE: usize = 20;

/// The port that the peer wants; none: the line isn't there yet. What is behind the line stays in the socket.
///
/// # Errors
/// It says something else, or is gone.
pub(super) fn wanted_port(socket: &UnixStream) -> io::Result<Option<u32>> {
    let mut bytes = [0; LINE];
    let count = match recv(socket.as_raw_fd(), &mut bytes, MsgFlags::MSG_PEEK).map_err(io::Error::from) {
        Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
        Ok(count) => count,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => return Ok(None),
        Err(error) => return Err(error),
    };
    let Some(end) = bytes[..count].iter().position(|byte| *byte == b'\n') else {
        return if count < LINE { Ok(None) } else { Err(ErrorKind::InvalidData.into()) };
    };
    let mut socket = socket;
    let mut line = [0; LINE];
    socket.read_exact(&mut line[..=end])?;
    port_in(&line[..end]).map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
}

fn port_in(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?.strip_suffix('\r').unwrap_or(std::str::from_utf8(line).ok()?);
    let (word, port) = line.split_once(' ')?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    if word.eq_ignore_ascii_case("connect") && digits { port.parse().ok() } else { None }
}
