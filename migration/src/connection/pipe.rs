//! Files and pipes that can be cut: nothing like shutdown(2) wakes who waits for a pipe, so nobody may wait in read(2) or write(2).

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Cut;

/// Milliseconds until somebody who waits looks whether it was cut.
const SLICE: u8 = 100;

/// One end of a pipe, or a file.
pub(super) struct Cuttable {
    file: File,
    is_cut: Arc<AtomicBool>,
}

/// That file, and what cuts it.
pub(super) fn cuttable(file: File) -> io::Result<(Cuttable, Cut)> {
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    let is_cut = Arc::new(AtomicBool::new(false));
    let cut = Arc::clone(&is_cut);
    Ok((Cuttable { file, is_cut }, Arc::new(move || cut.store(true, Ordering::Release))))
}

impl Cuttable {
    /// Does `what` once it can be done without waiting.
    fn once(&mut self, when: PollFlags, mut what: impl FnMut(&mut File) -> io::Result<usize>) -> io::Result<usize> {
        loop {
            if self.is_cut.load(Ordering::Acquire) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
            match what(&mut self.file) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [PollFd::new(self.file.as_fd(), when)];
                    match poll(&mut fds, PollTimeout::from(SLICE)) {
                        Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                done => return done,
            }
        }
    }
}

impl Read for Cuttable {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.once(PollFlags::POLLIN, |file| file.read(to))
    }
}

impl Write for Cuttable {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.once(PollFlags::POLLOUT, |file| file.write(bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.once(PollFlags::POLLOUT, |file| file.write_vectored(slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
