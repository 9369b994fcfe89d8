//! passt: a guest's network without privileges. It speaks to a VMM on a UNIX socket and to the world by sockets of its own.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::time::{Duration, Instant};

use crate::fetch;
use crate::machine::{Error, Machine};
use crate::network::{self, Network};
use crate::process::Child;

use super::soc::SOC_PASST;
use super::{PASST, Tools, command};

/// How long it may take to listen.
const LIMIT: Duration = Duration::from_secs(120);

/// Addresses of its own, so that it doesn't matter which ones its machine has. Where that has none, passt gives the guest
/// link-local ones instead, with a router of another address; [`Passt::HOST`] is mapped all the same.
const ARGUMENTS: [&str; 14] = [
    "--foreground",
    "--one-off",
    "--ipv4-only",
    "--no-dhcp-dns",
    "--dns",
    "none",
    "--address",
    "10.0.2.15",
    "--netmask",
    "24",
    "--gateway",
    Passt::HOST,
    "--map-host-loopback",
    Passt::HOST,
];

/// A running passt, for one VMM's connection: it ends with that, or with this handle.
#[derive(Debug)]
pub struct Passt {
    socket: PathBuf,
    // Kept for its end. One on a SoC ends by itself.
    _process: Option<Child>,
}

impl Tools {
    /// Writes a program `to` that is passt, for whoever starts it by that name.
    ///
    /// # Errors
    /// The system's.
    pub fn write_passt(&self, to: &Path) -> io::Result<()> {
        let passt = command(&self.dir.join(PASST), "usr/bin/passt");
        let words = std::iter::once(passt.get_program()).chain(passt.get_args());
        let words: Vec<String> = words.map(|word| format!("'{}'", word.display())).collect();
        std::fs::write(to, format!("#!/bin/sh\nexec {} \"$@\"\n", words.join(" ")))?;
        std::fs::set_permissions(to, std::fs::Permissions::from_mode(0o755))
    }
}

impl Passt {
    /// What the guest reaches the loopback interface of passt's machine by.
    pub const HOST: &str = "10.0.2.2";

    /// Starts it on this machine, listening at `socket`.
    ///
    /// # Errors
    /// It can't be started, or doesn't listen.
    pub fn start(tools: &Tools, socket: PathBuf) -> Result<Self, fetch::Error> {
        Self::start_as(tools, socket, None, &[])
    }

    /// [`Self::start`], as a back end over vhost-user.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_vhost_user(tools: &Tools, socket: PathBuf) -> Result<Self, fetch::Error> {
        Self::start_as(tools, socket, None, &["--vhost-user"])
    }

    /// [`Self::start`], in a network of a test's own: [`Self::HOST`] is that one's loopback interface. It takes `more` arguments:
    /// `--vhost-user` makes it a back end.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_in(network: &Network, tools: &Tools, socket: PathBuf, more: &[&str]) -> Result<Self, fetch::Error> {
        Self::start_as(tools, socket, Some(network.id()), more)
    }

    fn start_as(tools: &Tools, socket: PathBuf, network_of: Option<u32>, more: &[&str]) -> Result<Self, fetch::Error> {
        let mut passt = command(&tools.dir.join(PASST), "usr/bin/passt");
        passt.args(ARGUMENTS).args(more).args(["--quiet", "--socket"]).arg(&socket);
        let mut passt = match network_of {
            Some(id) => network::inside(id, &passt),
            None => passt,
        };
        passt.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Child::spawn(passt)?;
        let end = Instant::now() + LIMIT;
        while !network::is_listened_on(&socket, network_of) {
            let status = process.wait(Duration::from_millis(20)).map_err(|e| fetch::Error::file(&socket, e))?;
            if status.is_some() || Instant::now() >= end {
                return Err(fetch::Error::file(&socket, io::ErrorKind::NotConnected.into()));
            }
        }
        Ok(Self { socket, _process: Some(process) })
    }

    /// Starts it on a SoC that was equipped for it (see [`super::equip`]).
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_on(soc: &Machine) -> Result<Self, Error> {
        // The one before ends by itself, but not at once.
        static STARTED: AtomicU32 = AtomicU32::new(0);
        let socket = format!("/tmp/passt-{}", STARTED.fetch_add(1, Relaxed));
        // Started by root it becomes somebody else, whom it would look for in /etc/passwd.
        let own = ["--runas", "65534:65534", "--socket", &socket];
        let pid = soc.run(SOC_PASST, &[&ARGUMENTS[..], &own].concat(), None)?;
        if soc.control().wait_for_output(pid, "UNIX domain socket bound at", LIMIT).is_none() {
            let said = soc.control().output(pid).join("\n");
            return Err(Error::file(SOC_PASST)(io::Error::new(io::ErrorKind::NotConnected, said)));
        }
        Ok(Self { socket: socket.into(), _process: None })
    }

    /// Where a VMM connects.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
