//! A virtio-serial port that carries lines.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::sync::{Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use testbed_init::Line;

/// How long to look for a port: virtio devices are probed while the first process already runs.
const PATIENCE: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);

/// An open port. Lines may be sent from any thread.
pub(crate) struct Port {
    reader: Mutex<BufReader<File>>,
    writer: Mutex<File>,
}

impl Port {
    /// Opens the virtio-serial port of that name.
    pub(crate) fn open(name: &str) -> Result<Self, String> {
        let file = open_file(name)?;
        let writer = file.try_clone().map_err(|e| format!("port {name}: {e}"))?;
        Ok(Self { reader: Mutex::new(BufReader::new(file)), writer: Mutex::new(writer) })
    }

    /// Sends a line. With nobody at the other end it is lost, as on any serial line.
    pub(crate) fn send(&self, line: &Line) {
        let mut text = match serde_json::to_string(line) {
            Ok(text) => text,
            Err(error) => format!("testbed-init: {error}"),
        };
        text.push('\n');
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = writer.write_all(text.as_bytes());
    }

    /// The next line that isn't empty; waits for whoever will connect.
    pub(crate) fn receive(&self) -> String {
        let mut reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        let mut line = String::new();
        loop {
            match reader.read_line(&mut line) {
                Ok(_) if line.ends_with('\n') => {
                    if !line.trim().is_empty() {
                        return line;
                    }
                    line.clear();
                }
                // Nobody is connected, or bytes that are no text: what came of the line is dropped.
                Ok(_) => {
                    line.clear();
                    sleep(PAUSE);
                }
                Err(_) => {
                    line.clear();
                    sleep(PAUSE);
                }
            }
        }
    }
}

/// Opens the device node of the virtio-serial port `name`.
pub(crate) fn open_file(name: &str) -> Result<File, String> {
    let mut waited = Duration::ZERO;
    loop {
        if let Some(node) = node_of(name) {
            return OpenOptions::new().read(true).write(true).open(&node).map_err(|e| format!("{node}: {e}"));
        }
        if waited >= PATIENCE {
            return Err(format!("there is no virtio-serial port {name}"));
        }
        sleep(PAUSE);
        waited += PAUSE;
    }
}

fn node_of(name: &str) -> Option<String> {
    for entry in fs::read_dir("/sys/class/virtio-ports").ok()? {
        let entry = entry.ok()?;
        let label = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if label.trim() == name {
            return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
        }
    }
    None
}
