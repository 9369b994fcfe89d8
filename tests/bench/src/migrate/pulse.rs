//! A guest's life as somebody else sees it: when each byte of its debug console came, from whichever VM.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use payloads::wanderer::{BEAT, WORK};

/// A FIFO that debug consoles write to.
#[derive(Debug)]
pub(super) struct Pulse {
    path: PathBuf,
    /// Keeps it open while no VM does, so that no reader sees an end.
    _open: File,
    bytes: Receiver<(Instant, Vec<u8>)>,
}

/// What came in a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Seen {
    /// The longest time without a beat.
    pub(super) gap: Duration,
    /// MiB written in a second.
    pub(super) work: f64,
}

impl Pulse {
    /// Makes the FIFO.
    pub(super) fn new(path: PathBuf) -> io::Result<Self> {
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let open = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut reader = open.try_clone()?;
        let (sender, bytes) = channel();
        // It sleeps in its last read when the FIFO's user is gone, and ends with the process.
        thread::Builder::new().name("pulse".to_owned()).spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = reader.read(&mut buffer) {
                if sender.send((Instant::now(), buffer[..count].to_vec())).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { path, _open: open, bytes })
    }

    /// Where it is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for a line.
    pub(super) fn says(&self, line: &str, limit: Duration) -> io::Result<()> {
        let mut text = String::new();
        let end = Instant::now() + limit;
        while !text.contains(line) {
            let left = end.saturating_duration_since(Instant::now());
            let (_, bytes) = self
                .bytes
                .recv_timeout(left)
                .map_err(|_| io::Error::other(format!("the guest never said {line:?}")))?;
            text += &String::from_utf8_lossy(&bytes);
        }
        Ok(())
    }

    /// Forgets what came so far.
    pub(super) fn forget(&self) {
        self.bytes.try_iter().for_each(drop);
    }

    /// What came from `from` to `to`.
    pub(super) fn seen(&self, from: Instant, to: Instant) -> Seen {
        let (mut last, mut gap, mut work) = (from, Duration::ZERO, 0);
        for (at, bytes) in self.bytes.try_iter().filter(|(at, _)| (from..=to).contains(at)) {
            work += bytes.iter().filter(|&&byte| byte == WORK).count();
            if bytes.contains(&BEAT) {
                gap = gap.max(at - last);
                last = at;
            }
        }
        Seen { gap: gap.max(to - last), work: work as f64 / (to - from).as_secs_f64() }
    }
}
