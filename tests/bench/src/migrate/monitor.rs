//! A monitor of whichever VMM: QMP, as far as moving a guest takes it.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// How long a VMM may take to listen, and to answer.
const LIMIT: Duration = Duration::from_secs(60);

/// A connection to a monitor.
#[derive(Debug)]
pub(super) struct Monitor {
    stream: BufReader<UnixStream>,
    /// Those that came while an answer was waited for.
    events: Vec<Value>,
}

impl Monitor {
    /// Connects as soon as somebody listens, and negotiates.
    pub(super) fn connect(socket: &Path) -> io::Result<Self> {
        let end = Instant::now() + LIMIT;
        let stream = loop {
            match UnixStream::connect(socket) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= end => return Err(error),
                Err(_) => sleep(Duration::from_millis(5)),
            }
        };
        stream.set_read_timeout(Some(LIMIT))?;
        let mut monitor = Self { stream: BufReader::new(stream), events: Vec::new() };
        monitor.receive()?;
        monitor.execute("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Executes a command; what it returns.
    pub(super) fn execute(&mut self, command: &str, arguments: &Value) -> io::Result<Value> {
        // At once: QEMU acts on a whole command, and `quit` has it gone before the end of the line.
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.stream.get_mut().write_all(line.as_bytes())?;
        loop {
            let mut message = self.receive()?;
            if message.get("event").is_some() {
                self.events.push(message);
            } else if let Some(error) = message.get("error") {
                return Err(io::Error::other(format!("{command}: {}", error["desc"])));
            } else {
                return Ok(message["return"].take());
            }
        }
    }

    /// The next event that `wanted` is true of; when it was, in µs of the system's clock.
    pub(super) fn event(&mut self, wanted: impl Fn(&Value) -> bool) -> io::Result<u64> {
        loop {
            let message = if self.events.is_empty() { self.receive()? } else { self.events.remove(0) };
            if message.get("event").is_some() && wanted(&message) {
                let number = |name: &str| message["timestamp"][name].as_u64().unwrap_or_default();
                return Ok(number("seconds") * 1_000_000 + number("microseconds"));
            }
        }
    }

    fn receive(&mut self) -> io::Result<Value> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        serde_json::from_str(&line).map_err(io::Error::from)
    }
}
