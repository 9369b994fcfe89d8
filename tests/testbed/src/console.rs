//! A machine's serial console: what it printed is a file, what is typed goes to a socket.

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

const PAUSE: Duration = Duration::from_millis(10);

/// The console of a running machine.
#[derive(Debug)]
pub struct Console {
    log: PathBuf,
    socket: PathBuf,
    /// Connected when first something is typed, so that a person may connect to the machines where nothing is.
    typing: Mutex<Option<UnixStream>>,
}

impl Console {
    pub(crate) fn new(log: PathBuf, socket: PathBuf) -> Self {
        Self { log, socket, typing: Mutex::default() }
    }

    /// The file that holds everything printed so far.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The socket that a person can connect to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Everything printed so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// The last `count` lines printed.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(count)..].join("\n")
    }

    /// Waits, at most for `limit`, until a whole line holds `needle`, and returns that line; `None` after `limit`.
    #[must_use]
    pub fn wait_for_line(&self, needle: &str, limit: Duration) -> Option<String> {
        let end = Instant::now() + limit;
        loop {
            let text = self.text();
            // A line that is still being printed may go on.
            let whole = text.rfind('\n').map_or("", |at| &text[..at]);
            if let Some(line) = whole.lines().find(|line| line.contains(needle)) {
                return Some(line.trim_end().to_owned());
            }
            if Instant::now() >= end {
                return None;
            }
            sleep(PAUSE);
        }
    }

    /// Types `text`.
    ///
    /// # Errors
    /// The machine is gone, or somebody else is connected.
    pub fn send(&self, text: &str) -> io::Result<()> {
        let mut typing = self.typing.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = match typing.as_mut() {
            Some(stream) => stream,
            None => typing.insert(UnixStream::connect(&self.socket)?),
        };
        stream.write_all(text.as_bytes())
    }
}
