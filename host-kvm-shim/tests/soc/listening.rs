//! A shim that peers come to and leave, one after the other.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use pcie_function::SocFunction;
use pcie_function::header::HostHeader;
use pcie_function::local::LocalSoc;

use super::Soc;

/// A shim that listens on a socket of its own.
pub struct Listening {
    pub child: Option<Child>,
    pub path: PathBuf,
    /// What the shim was heard to say.
    pub heard: String,
}

impl Listening {
    pub fn start(name: &str, args: &[&str]) -> Self {
        Self::start_with(name, args, Stdio::piped())
    }

    /// What the shim says goes to `stderr`.
    pub fn start_with(name: &str, args: &[&str], stderr: Stdio) -> Self {
        let path = std::env::temp_dir().join(format!("shim-{}-{name}.sock", std::process::id()));
        let child = Command::new(super::program())
            .args(["--function", &format!("unix:{}", path.display())])
            .args(args)
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        Self { child: Some(child), path, heard: String::new() }
    }

    pub fn connect(&self) -> Soc {
        Soc::connect(connected(&self.path))
    }

    /// What the shim has said so far.
    pub fn said(&mut self) -> &str {
        let stderr = self.child.as_mut().unwrap().stderr.as_mut().unwrap();
        let mut bytes = [0; 4096];
        while poll(&mut [PollFd::new(stderr.as_fd(), PollFlags::POLLIN)], PollTimeout::ZERO).unwrap() > 0 {
            let count = stderr.read(&mut bytes).unwrap();
            assert_ne!(count, 0, "the shim has ended: {}", self.heard);
            self.heard.push_str(&String::from_utf8_lossy(&bytes[..count]));
        }
        &self.heard
    }

    /// Kills the shim; what it said.
    pub fn kill(mut self) -> String {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        let mut said = std::mem::take(&mut self.heard);
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        child.wait().unwrap();
        said
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A connection to whoever listens at `path`, now or soon.
pub fn connected(path: &Path) -> OwnedFd {
    let deadline = Instant::now() + super::PATIENCE;
    loop {
        let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None).unwrap();
        if connect(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).is_ok() {
            return fd;
        }
        assert!(Instant::now() < deadline, "nobody listens");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits for another offer than `old`, and answers it.
pub fn offered_again(mut soc: Soc, nonce: u64) -> Soc {
    let old = soc.header.nonce;
    let card = soc.function.card_memory();
    let deadline = Instant::now() + super::PATIENCE;
    let header = loop {
        if let Ok(Some(header)) = HostHeader::load(&card)
            && header.nonce != old
        {
            break header;
        }
        assert!(Instant::now() < deadline, "no new offer");
        std::thread::sleep(Duration::from_millis(1));
    };
    let child = soc.child.take();
    let function: LocalSoc = soc.into_function();
    let mut soc = Soc::answer(function, header, nonce);
    soc.child = child;
    soc
}
