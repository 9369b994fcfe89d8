//! Where an interface's frames go, as a command line says it.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use super::{NetBackend, StreamBackend, TapBackend, passt};

/// Pairs of queues that an interface has at most.
pub const MAX_QUEUES: u16 = 16;

/// A network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetSource {
    /// A UNIX socket on which frames go as QEMU's `-netdev stream` frames them: passt's.
    Stream {
        /// Where its peer listens.
        path: PathBuf,
        /// How long to wait before each attempt to find a peer that left; none: it is not looked for.
        reconnect: Option<Duration>,
    },
    /// A TAP interface of this system.
    Tap(TapSource),
}

/// How to get at a TAP interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TapSource {
    /// By its name.
    Named {
        /// The name.
        name: String,
        /// How many of its queues: 1 to [`MAX_QUEUES`].
        queues: u16,
    },
    /// By descriptors that this process was started with, one a queue.
    Inherited(Vec<RawFd>),
}

/// Opens a network: one back end a pair of queues.
///
/// # Errors
/// It is not there, or not for us.
pub fn open(source: &NetSource) -> Result<Vec<Box<dyn NetBackend>>, OpenError> {
    match source {
        NetSource::Stream { path, reconnect } => match StreamBackend::connect(path) {
            Ok(stream) => Ok(vec![Box::new(stream.with_reconnect(path.clone(), *reconnect))]),
            Err(why) => Err(OpenError::Stream { path: path.clone(), why }),
        },
        NetSource::Tap(tap) => {
            Ok(TapBackend::open(tap)?.into_iter().map(|queue| Box::new(queue) as Box<dyn NetBackend>).collect())
        }
    }
}

/// A TAP interface by descriptors that are open: one back end each.
///
/// # Errors
/// One is of something else.
pub fn passed(queues: Vec<OwnedFd>) -> Result<Vec<Box<dyn NetBackend>>, OpenError> {
    let queue = |fd| TapBackend::passed(fd).map(|queue| Box::new(queue) as Box<dyn NetBackend>);
    queues.into_iter().map(queue).collect()
}

/// A user's own network, by a passt that ends with it.
///
/// # Errors
/// It can't be started.
pub fn user() -> Result<Vec<Box<dyn NetBackend>>, OpenError> {
    Ok(vec![Box::new(passt::start()?)])
}

/// Why a network can't be used, in one line: what, why, what to do.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Nobody to connect to.
    #[error("can't connect to {}: {why}; {}", path.display(), match why.kind() {
        io::ErrorKind::TimedOut => "its peer accepts nobody: is it stopped, or has it a client already?",
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => "start its peer (passt, say) first",
        io::ErrorKind::InvalidFilename => "a socket's path has at most 107 bytes",
        io::ErrorKind::PermissionDenied => "let this user write the socket, or start its peer as this user",
        _ => "give the socket that its peer (passt, say) listens on, and look at the limits of the VM's process",
    })]
    Stream {
        /// The socket's path.
        path: PathBuf,
        /// What the system says.
        why: io::Error,
    },
    /// No passt.
    #[error(
        "can't start passt: {why}; install it (package passt), and give user networks at the VM's start if it may start no processes"
    )]
    Passt {
        /// What the system says.
        why: io::Error,
    },
    /// The system has no TAP interfaces at all.
    #[error("can't open /dev/net/tun: {why}; load the module tun, or pass an open interface (tap=fd:N)")]
    Device {
        /// What the system says.
        why: io::Error,
    },
    /// No interface of that name.
    #[error("there is no interface {name}: make it first (ip tuntap add mode tap name {name})")]
    NoInterface {
        /// The name.
        name: String,
    },
    /// An interface of another kind.
    #[error("interface {name} is no TAP interface: give one that ip tuntap add mode tap has made")]
    NoTap {
        /// The name.
        name: String,
    },
    /// An interface that can't have several queues.
    #[error("interface {name} has one queue, or is no TAP interface: make it with multi_queue, or leave queues= out")]
    OneQueue {
        /// The name.
        name: String,
    },
    /// It has no more queues to give.
    #[error("interface {name} has no more queues: ask for fewer, or stop who uses it")]
    TooManyQueues {
        /// The name.
        name: String,
    },
    /// Another program uses it.
    #[error("interface {name} is in use by another program: stop that one, or give another interface")]
    Busy {
        /// The name.
        name: String,
    },
    /// Another user's.
    #[error(
        "interface {name} may not be used by this user: make it with user U (ip tuntap add), or pass it open (tap=fd:N)"
    )]
    Forbidden {
        /// The name.
        name: String,
    },
    /// What the system says else of an interface.
    #[error("can't use interface {name}")]
    Tap {
        /// The name.
        name: String,
        /// What the system says.
        source: io::Error,
    },
    /// Not a descriptor that was left open for this process.
    #[error(
        "descriptor {number} was not passed to this process, or is used twice: pass it open, without close-on-exec"
    )]
    NotPassed {
        /// The number.
        number: RawFd,
    },
    /// A descriptor of something else.
    #[error("descriptor {number} is no TAP interface without packet information (IFF_TAP, IFF_NO_PI)")]
    PassedNoTap {
        /// The number.
        number: RawFd,
    },
}
