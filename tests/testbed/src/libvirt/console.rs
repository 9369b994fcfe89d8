//! A person at a domain's console, by `virsh console`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::socket::{Shutdown, shutdown};
use nix::sys::termios::{LocalFlags, tcgetattr};

use crate::debian::Terminal;
use crate::machine;
use crate::process::Child;

use super::{Error, Libvirt};

/// A terminal on which `virsh console` runs. It is left when dropped.
#[derive(Debug)]
pub struct Console {
    terminal: File,
    screen: Arc<Screen>,
    /// Up to where its text was expected already.
    seen: usize,
    /// Where it runs on this machine.
    virsh: Option<Child>,
}

/// What virsh says when it is at the console.
pub(super) const BEGINS: &str = "Escape character is";
/// What virsh leaves the console by.
const ESCAPE: &[u8] = b"\x1d";

#[derive(Debug, Default)]
struct Screen {
    text: Mutex<String>,
    grew: Condvar,
}

impl Console {
    pub(super) fn open(libvirt: &Libvirt, domain: &str) -> Result<Self, Error> {
        let failed = |errno: nix::Error| Error::file(Path::new("/dev/ptmx"))(errno.into());
        let pair = openpty(None, None).map_err(failed)?;
        let (terminal, slave) = (File::from(pair.master), File::from(pair.slave));
        let copy = |file: &File| file.try_clone().map_err(Error::file(Path::new("/dev/ptmx")));
        let mut virsh = libvirt.command("virsh");
        virsh.args(["console", domain, "--force"]);
        virsh.stdin(copy(&slave)?).stdout(copy(&slave)?).stderr(slave);
        let virsh = Child::spawn(virsh)?;
        let mut console = Self::on(terminal, Some(virsh))?;
        console.expect(BEGINS, super::LIMIT)?;
        console.wait_for_virsh()?;
        Ok(console)
    }

    /// A terminal with a `virsh console` that was just started.
    pub(super) fn on(terminal: File, virsh: Option<Child>) -> Result<Self, Error> {
        let screen = Arc::new(Screen::default());
        let mut output = terminal.try_clone().map_err(Error::file(Path::new("virsh console")))?;
        let filled = screen.clone();
        thread::spawn(move || {
            let mut bytes = [0; 4096];
            // It ends when nobody has the terminal's other end any more.
            while let Ok(length @ 1..) = output.read(&mut bytes) {
                filled
                    .text
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push_str(&String::from_utf8_lossy(&bytes[..length]));
                filled.grew.notify_all();
            }
        });
        Ok(Self { terminal, screen, seen: 0, virsh })
    }

    /// What is typed before virsh has taken the terminal over, which it does after it said so, is lost.
    fn wait_for_virsh(&self) -> Result<(), Error> {
        let end = Instant::now() + super::LIMIT;
        let is_taken = || tcgetattr(&self.terminal).map(|it| !it.local_flags.contains(LocalFlags::ICANON));
        while !is_taken().map_err(|errno| Error::file(Path::new("/dev/ptmx"))(errno.into()))? {
            if Instant::now() >= end {
                return Err(Error::Late { what: "virsh didn't take its terminal".to_owned(), story: self.text() });
            }
            thread::sleep(super::PAUSE);
        }
        Ok(())
    }

    /// Types `text`.
    ///
    /// # Errors
    /// Nobody reads it.
    pub fn type_text(&mut self, text: &str) -> Result<(), Error> {
        self.terminal.write_all(text.as_bytes()).map_err(Error::file(Path::new("virsh console")))
    }

    /// Waits until `text` has been shown, behind what was expected before; what was shown in front of it.
    ///
    /// # Errors
    /// It isn't, within `limit`.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String, Error> {
        let end = Instant::now() + limit;
        let mut shown = self.screen.text.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = shown[self.seen..].find(text) {
                let before = shown[self.seen..][..at].to_owned();
                self.seen += at + text.len();
                return Ok(before);
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::Late { what: format!("the console didn't show {text:?}"), story: shown.clone() });
            }
            shown = self.screen.grew.wait_timeout(shown, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// All that was shown.
    #[must_use]
    pub fn text(&self) -> String {
        self.screen.text.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // One of another machine's isn't killed with this handle.
        if self.virsh.is_none() {
            let _ = self.terminal.write_all(ESCAPE);
            let _ = shutdown(self.terminal.as_raw_fd(), Shutdown::Both);
        }
    }
}

impl Terminal for Console {
    fn read_until(&mut self, text: &str, limit: Duration) -> Result<String, machine::Error> {
        self.expect(text, limit).map_err(at_the_console)
    }

    fn type_text(&mut self, text: &str) -> Result<(), machine::Error> {
        Self::type_text(self, text).map_err(at_the_console)
    }
}

pub(super) fn at_the_console(error: Error) -> machine::Error {
    machine::Error::file("virsh console")(io::Error::other(error))
}
