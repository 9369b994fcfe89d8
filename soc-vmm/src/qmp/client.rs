//! A QMP client for the command line: one command at a time, bounded in time.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::types::{Greeting, Response};
use super::{MAX_COMMAND, QmpError};

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
    stream: BufReader<UnixStream>,
}

impl Client {
    /// Connects and negotiates. Every wait of this client ends after `patience`.
    ///
    /// # Errors
    /// See [`ClientError`]; likewise below.
    pub fn connect(path: &Path, patience: Duration) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(ClientError::Connect)?;
        stream.set_read_timeout(Some(patience)).map_err(ClientError::Connect)?;
        stream.set_write_timeout(Some(patience)).map_err(ClientError::Connect)?;
        let mut client = Self { stream: BufReader::new(stream) };
        serde_json::from_value::<Greeting>(client.receive()?).map_err(ClientError::NotQmp)?;
        client.execute::<Value>("qmp_capabilities")?;
        Ok(client)
    }

    /// Executes a command without arguments and gives what it returns; events are skipped.
    ///
    /// # Errors
    /// See [`ClientError`].
    pub fn execute<T: DeserializeOwned>(&mut self, command: &str) -> Result<T, ClientError> {
        let line = format!("{}\n", json!({ "execute": command }));
        self.stream.get_mut().write_all(line.as_bytes()).map_err(ClientError::Lost)?;
        loop {
            let message = self.receive()?;
            if message.get("event").is_some() {
                continue;
            }
            return match serde_json::from_value(message).map_err(ClientError::NotQmp)? {
                Response::Return { value, .. } => serde_json::from_value(value).map_err(ClientError::NotQmp),
                Response::Error { error, .. } => Err(error.into()),
            };
        }
    }

    /// Waits until the VM closes the connection: it has ended then.
    ///
    /// # Errors
    /// [`ClientError::Lost`]: it is still there after `patience`.
    pub fn wait_for_end(mut self, patience: Duration) -> Result<(), ClientError> {
        let deadline = Instant::now() + patience;
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
                Err(e) if e.kind() != io::ErrorKind::WouldBlock => return Err(ClientError::Lost(e)),
                Err(e) if Instant::now() > deadline => return Err(ClientError::Lost(e)),
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn receive(&mut self) -> Result<Value, ClientError> {
        let mut line = Vec::new();
        self.stream.by_ref().take(MAX_COMMAND as u64).read_until(b'\n', &mut line).map_err(ClientError::Lost)?;
        if line.is_empty() {
            return Err(ClientError::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_slice(&line).map_err(ClientError::NotQmp)
    }
}
