//! The card in software (docs/card.md §6) as a process of its own, as a real one is hardware of its own.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use pcie_function::card::id;

use crate::fetch::Arch;
use crate::machine::Error;
use crate::process::Child;
use crate::protocol::PciId;
use crate::{build, scratch};

// Both are a moment, but for a busy machine.
const START_LIMIT: Duration = Duration::from_secs(120);
const CONTROL_LIMIT: Duration = Duration::from_secs(60);

/// The host side of a vm function.
pub const HOST_VM: PciId = PciId { vendor: id::VENDOR, device: id::HOST_VM };
/// The host side of the host function.
pub const HOST_HOST: PciId = PciId { vendor: id::VENDOR, device: id::HOST_HOST };
/// The SoC side of a vm function.
pub const SOC_VM: PciId = PciId { vendor: id::VENDOR, device: id::SOC_VM };
/// The SoC side of the host function.
pub const SOC_HOST: PciId = PciId { vendor: id::VENDOR, device: id::SOC_HOST };

/// A running card. It ends with this handle.
#[derive(Debug)]
pub struct Card {
    functions: u32,
    // Dropped in this order: the process, then its sockets.
    _process: Child,
    sockets: tempfile::TempDir,
}

impl Card {
    /// Starts a card of that many vm functions and one host function.
    ///
    /// # Errors
    /// It can't be built or started.
    pub fn start(functions: u32) -> Result<Self, Error> {
        let program = build::programs(Arch::Amd64, &["card"])?.remove(0);
        let sockets = scratch::dir().map_err(Error::file(std::env::temp_dir()))?;
        let mut command = Command::new(&program);
        command
            .arg("--directory")
            .arg(sockets.path())
            .args(["--functions", &functions.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut card = Self { functions, _process: Child::spawn(command)?, sockets };
        card.wait_until_it_listens(&program)?;
        Ok(card)
    }

    /// How many vm functions it has.
    #[must_use]
    pub fn functions(&self) -> u32 {
        self.functions
    }

    /// Number of the host function.
    #[must_use]
    pub fn host_function(&self) -> u32 {
        self.functions
    }

    /// The socket of function `number`'s host side.
    #[must_use]
    pub fn host_socket(&self, number: u32) -> PathBuf {
        self.sockets.path().join(format!("host-{number}.sock"))
    }

    /// The socket of function `number`'s SoC side.
    #[must_use]
    pub fn soc_socket(&self, number: u32) -> PathBuf {
        self.sockets.path().join(format!("soc-{number}.sock"))
    }

    /// The sockets of all functions' host sides, the host function last.
    #[must_use]
    pub fn host_sockets(&self) -> Vec<PathBuf> {
        (0..=self.functions).map(|n| self.host_socket(n)).collect()
    }

    /// The sockets of all functions' SoC sides, the host function last.
    #[must_use]
    pub fn soc_sockets(&self) -> Vec<PathBuf> {
        (0..=self.functions).map(|n| self.soc_socket(n)).collect()
    }

    /// Sends a line to the card's control socket and returns its answer.
    ///
    /// # Errors
    /// The card is gone, or doesn't answer.
    pub fn control(&self, line: &str) -> Result<String, Error> {
        let path = self.control_socket();
        let mut stream = UnixStream::connect(&path).map_err(Error::file(&path))?;
        stream.set_read_timeout(Some(CONTROL_LIMIT)).map_err(Error::file(&path))?;
        writeln!(stream, "{line}").map_err(Error::file(&path))?;
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).map_err(Error::file(&path))?;
        Ok(answer.trim_end().to_owned())
    }

    /// Whether the host has memory of function `number` mapped for the card.
    ///
    /// # Errors
    /// As [`Self::control`].
    pub fn is_offered(&self, number: u32) -> Result<bool, Error> {
        let answer = self.control(&format!("stats {number}"))?;
        let stats: serde_json::Value =
            serde_json::from_str(&answer).map_err(|e| Error::file(self.control_socket())(e.into()))?;
        Ok(stats["host_mapped_bytes"].as_u64().is_some_and(|bytes| bytes > 0))
    }

    /// The card's control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.sockets.path().join("control.sock")
    }

    fn wait_until_it_listens(&mut self, program: &Path) -> Result<(), Error> {
        let end = Instant::now() + START_LIMIT;
        let mut awaited = self.host_sockets();
        awaited.extend(self.soc_sockets());
        awaited.push(self.control_socket());
        while !awaited.iter().all(|socket| socket.exists()) {
            if Instant::now() >= end {
                let source = std::io::ErrorKind::TimedOut.into();
                return Err(Error::file(program)(source));
            }
            sleep(Duration::from_millis(5));
        }
        Ok(())
    }
}
