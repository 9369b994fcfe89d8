//! A conversation by JSON, an object a line: QMP, or QEMU's guest agent.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long an answer may take: an emulated guest starves where much else runs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to who answers.
#[derive(Debug)]
pub struct Talk(BufReader<UnixStream>);

impl Talk {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Nobody listens there.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Says a line as it is.
    ///
    /// # Errors
    /// Nobody is there any more.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.0.get_mut(), "{line}")
    }

    /// The next line, with its end.
    ///
    /// # Errors
    /// None comes.
    pub fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        match self.0.read_line(&mut line)? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(line),
        }
    }

    /// Has a command executed; what it returns. What else is said meanwhile (a greeting, events) is passed over.
    ///
    /// # Panics
    /// It fails, or isn't answered.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Value {
        let request = match arguments {
            Value::Null => serde_json::json!({ "execute": command }),
            arguments => serde_json::json!({ "execute": command, "arguments": arguments }),
        };
        self.say(&request.to_string()).expect(command);
        loop {
            let line = self.line().unwrap_or_else(|e| panic!("{command}: {e}"));
            let mut said: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{command}: {e} in {line}"));
            assert!(said.get("error").is_none(), "{command}: {line}");
            if let Some(answer) = said.get_mut("return") {
                return answer.take();
            }
        }
    }
}
