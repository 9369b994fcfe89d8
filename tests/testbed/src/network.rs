//! A network of a test's own: a namespace of this machine in which a server listens, with a TAP interface for a guest. Nothing
//! of the machine's own network is touched.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::machine::Error;
use crate::process::Child;

/// How long the server may take to listen.
const LIMIT: Duration = Duration::from_secs(120);

/// Makes the interface, which several queues may be opened of, and goes on as the server.
const SETUP: &str = "\
name=$1 address=$2; shift 2
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
ip link set lo up &&
ip tuntap add mode tap name $name multi_queue &&
ip addr add $address dev $name &&
ip link set $name up &&
exec \"$@\"
";

/// A network namespace. It ends with this handle, and so does its server.
#[derive(Debug)]
pub struct Network {
    server: Child,
    log: PathBuf,
}

impl Network {
    /// The TAP interface.
    pub const TAP: &str = "guests";
    /// Its address.
    pub const ADDRESS: &str = "10.0.3.1";
    /// An address for the guest behind it.
    pub const GUEST: &str = "10.0.3.2/24";

    /// Makes it, and waits until `server`, which runs in it and writes to `log`, has said `listens` there. It takes root.
    ///
    /// # Errors
    /// No namespace or no TAP interface can be made, or the server doesn't listen.
    pub fn start(server: &Command, log: PathBuf, listens: &str) -> Result<Self, Error> {
        let output = File::create(&log).map_err(Error::file(&log))?;
        let errors = output.try_clone().map_err(Error::file(&log))?;
        let mut command = Command::new("unshare");
        command
            .args(["--net", "sh", "-c", SETUP, "sh", Self::TAP, &format!("{}/24", Self::ADDRESS)])
            .arg(server.get_program())
            .args(server.get_args())
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors);
        let mut network = Self { server: Child::spawn(command)?, log };
        let end = Instant::now() + LIMIT;
        while !network.said().contains(listens) {
            let ended = network.server.try_wait().map_err(Error::file(&network.log))?;
            if ended.is_some() || Instant::now() >= end {
                return Err(Error::file(&network.log)(io::Error::other(network.said())));
            }
            sleep(Duration::from_millis(20));
        }
        Ok(network)
    }

    /// A process that is in it.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.server.id()
    }

    /// What the server wrote.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// What the kernel counted of the TAP interface: bytes and frames from the guest, then those to it.
    ///
    /// # Errors
    /// The namespace is gone.
    pub fn counts(&self) -> Result<[(u64, u64); 2], Error> {
        let path = format!("/proc/{}/net/dev", self.id());
        let text = fs::read_to_string(&path).map_err(Error::file(&path))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix(Self::TAP)?.strip_prefix(':'));
        let numbers: Vec<u64> = line.unwrap_or_default().split_whitespace().filter_map(|n| n.parse().ok()).collect();
        match numbers[..] {
            [bytes, frames, _, _, _, _, _, _, bytes_out, frames_out, ..] => {
                Ok([(bytes, frames), (bytes_out, frames_out)])
            }
            _ => Err(Error::file(&path)(io::ErrorKind::InvalidData.into())),
        }
    }
}

/// `command`, to be run in the network namespace of process `id`.
#[must_use]
pub(crate) fn inside(id: u32, command: &Command) -> Command {
    let mut inside = Command::new("nsenter");
    inside.args(["--net", "--target", &id.to_string()]).arg(command.get_program()).args(command.get_args());
    inside
}

/// Whether somebody takes connections at a UNIX socket, in the network of this process or of process `of`. Its file says little: it may be
/// that of one who went, and it is there before he listens.
#[must_use]
pub fn is_listened_on(socket: &Path, of: Option<u32>) -> bool {
    const LISTENS: &str = "00010000";
    let of = of.map_or_else(|| "self".to_owned(), |id| id.to_string());
    let sockets = fs::read_to_string(format!("/proc/{of}/net/unix")).unwrap_or_default();
    sockets
        .lines()
        .any(|line| line.split_whitespace().nth(3) == Some(LISTENS) && line.ends_with(&*socket.to_string_lossy()))
}
