//! A QMP client for the command line: one command at a time, bounded in time.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::types::{Greeting, Response};
use super::{MAX_COMMAND, QmpError};
use crate::dial::dial;

/// Events that are kept for who waits for one.
const KEPT_EVENTS: usize = 64;

/// Why a VM can't be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens, or not any more.
    #[error("no VM answers")]
    Connect(#[source] io::Error),
    /// The connection broke or took too long.
    #[error("the VM stopped answering")]
    Lost(#[source] io::Error),
    /// What answers speaks no QMP.
    #[error("what answers speaks no QMP")]
    NotQmp(#[source] serde_json::Error),
    /// The VM refused.
    #[error(transparent)]
    Refused(#[from] QmpError),
}

/// A negotiated connection to a VM's control socket.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    /// What was received behind the last message.
    unread: Vec<u8>,
    /// Events that came while the last command was executed.
    events: VecDeque<Value>,
    patience: Duration,
}

impl Client {
    /// Connects and negotiates. That, and every command, ends after `patience`, whatever the peer sends meanwhile; see
    /// [`Client::with_patience`].
    ///
    /// # Errors
    /// See [`ClientError`]; likewise below.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let deadline = Instant::now() + patience;
        let stream = dial(path, patience).map_err(|e| match e.kind() {
            // The queue of a process that is stopped is full.
            io::ErrorKind::TimedOut => ClientError::Lost(e),
            _ => ClientError::Connect(e),
        })?;
        let mut client = Self { stream, unread: Vec::new(), events: VecDeque::new(), patience };
        let first = client.receive(deadline)?;
        // A server that has no room says so instead of greeting.
        if let Some(error) = first.get("error") {
            return Err(QmpError::deserialize(error).map_err(ClientError::NotQmp)?.into());
        }
        serde_json::from_value::<Greeting>(first).map_err(ClientError::NotQmp)?;
        client.execute_by::<Value>("qmp_capabilities", &json!({}), deadline)?;
        Ok(client)
    }

    /// The same, where a command may take another time than to connect: who greets at once may have much to do.
    #[must_use]
    pub fn with_patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Executes a command without arguments and gives what it returns.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn execute<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, ClientError> {
        self.execute_with(command, &json!({}))
    }

    /// The same with arguments, an object.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn execute_with<T: DeserializeOwned>(&mut self, command: &str, arguments: &Value) -> Result<T, ClientError> {
        self.execute_by(command, arguments, Instant::now() + self.patience)
    }

    fn execute_by<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: &Value,
        deadline: Instant,
    ) -> Result<T, ClientError> {
        self.events.clear();
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let sent = self.stream.set_write_timeout(Some(left(deadline)?));
        sent.and_then(|()| self.stream.write_all(line.as_bytes())).map_err(ClientError::Lost)?;
        loop {
            let message = self.receive(deadline)?;
            if message.get("event").is_some() {
                if self.events.len() < KEPT_EVENTS {
                    self.events.push_back(message);
                }
                continue;
            }
            return match serde_json::from_value(message).map_err(ClientError::NotQmp)? {
                Response::Return { value, .. } => serde_json::from_value(value).map_err(ClientError::NotQmp),
                Response::Error { error, .. } => Err(error.into()),
            };
        }
    }

    /// Waits for an event since the last command was sent of which `what` (name, data) says what it means; that.
    ///
    /// # Errors
    /// [`ClientError::Lost`]: none came within `patience`.
    pub fn wait_for_event<T>(
        &mut self,
        what: impl Fn(&str, &Value) -> Option<T>,
        patience: Duration,
    ) -> Result<T, ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            let message = match self.events.pop_front() {
                Some(event) => event,
                None => self.receive(deadline)?,
            };
            if let Some(it) = message["event"].as_str().and_then(|name| what(name, &message["data"])) {
                return Ok(it);
            }
        }
    }

    /// Waits until the VM closes the connection: it has ended then.
    ///
    /// # Errors
    /// [`ClientError::Lost`]: it is still there after `patience`.
    pub fn wait_for_end(&mut self, patience: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + patience;
        loop {
            self.unread.clear();
            match self.read(deadline) {
                Ok(0) => return Ok(()),
                Err(ClientError::Lost(e)) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                result => result.map(drop)?,
            }
        }
    }

    /// The next message.
    fn receive(&mut self, deadline: Instant) -> Result<Value, ClientError> {
        let mut seen = 0;
        loop {
            if let Some(end) = self.unread[seen..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.unread.drain(..=seen + end).collect();
                return serde_json::from_slice(&line).map_err(ClientError::NotQmp);
            }
            seen = self.unread.len();
            if seen > MAX_COMMAND {
                return Err(ClientError::Lost(io::Error::other("its reply has no end")));
            }
            if self.read(deadline)? == 0 {
                return Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()));
            }
        }
    }

    /// Reads more; how many bytes.
    fn read(&mut self, deadline: Instant) -> Result<usize, ClientError> {
        let mut some = [0; 4096];
        loop {
            let limited = self.stream.set_read_timeout(Some(left(deadline)?));
            match limited.and_then(|()| self.stream.read(&mut some)) {
                Ok(n) => {
                    self.unread.extend_from_slice(&some[..n]);
                    return Ok(n);
                }
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(e) => return Err(ClientError::Lost(e)),
            }
        }
    }
}

/// The time until `deadline`.
fn left(deadline: Instant) -> Result<Duration, ClientError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(ClientError::Lost(io::ErrorKind::TimedOut.into())) } else { Ok(left) }
}
