//! This terminal connected to a socket, byte by byte.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Ctrl-], as in telnet.
const LEAVE: u8 = 0x1d;

/// Connects standard input and output to `socket` until Ctrl-] or the other side's end.
pub(crate) fn attach(socket: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(socket)?;
    let mut incoming = stream.try_clone()?;
    let raw = Raw::enter();
    let shown = thread::spawn(move || {
        let mut output = io::stdout();
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = incoming.read(&mut buffer) {
            if output.write_all(&buffer[..count]).and_then(|()| output.flush()).is_err() {
                return;
            }
        }
    });
    let mut buffer = [0; 256];
    while !shown.is_finished() {
        let count = io::stdin().read(&mut buffer)?;
        let typed = &buffer[..count];
        if count == 0 || typed.contains(&LEAVE) {
            break;
        }
        stream.write_all(typed)?;
    }
    drop(raw);
    println!();
    Ok(())
}

/// Raw mode for as long as it lives, where standard input is a terminal.
struct Raw {
    before: Option<Termios>,
}

impl Raw {
    fn enter() -> Self {
        let before = tcgetattr(io::stdin()).ok();
        if let Some(before) = &before {
            let mut raw = before.clone();
            cfmakeraw(&mut raw);
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &raw);
        }
        Self { before }
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, before);
        }
    }
}
