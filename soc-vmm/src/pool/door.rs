//! Opening a function so that another process can use it, and taking it back.
//!
//! | function | what the client gets | what it could do with it later | why it can't |
//! | --- | --- | --- | --- |
//! | `unix:` | the socket to the shim | talk to the shim; ring eventfds, write memory that it mapped | the pool shuts the connection down for all who hold it, and the shim makes memory and eventfds anew for each |
//! | `card:` | the vfio-user socket | have the card reach memory that it gave it | the pool shuts the connection down, which ends the card's use of the memory; the next one resets the function |
//! | `pci:` | VFIO's container, group and device | have the device reach its own memory, write registers | the pool keeps none of them: the group can be opened again once nobody holds one, and then the kernel has stopped the device and taken all memory away |

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, Shutdown, recv, shutdown};
use pcie_function::FunctionError;
use pcie_function::local::LocalSoc;
use pcie_function::vfio::VfioDescriptors;
use pcie_function_card::Door;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::cli::with_causes;
use crate::config::PoolFunction;

/// A function that nobody else is at work on.
#[derive(Debug)]
pub(super) struct Opened {
    /// What a client gets.
    pub(super) descriptors: Vec<OwnedFd>,
    /// What stays here to take it back by.
    pub(super) hold: Hold,
}

/// What takes a function back from who has its descriptors.
#[derive(Debug)]
pub(super) enum Hold {
    /// A connection that can be shut down under them.
    Connection(OwnedFd),
    /// Nothing: it can't be opened until they are closed.
    Nothing,
}

impl Hold {
    /// Takes the function back.
    pub(super) fn revoke(self) {
        if let Self::Connection(socket) = self {
            // Fails where the other side has gone: there is nothing to take back then.
            let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
        }
    }
}

/// Opens a function. Where another process has it this waits until that one is gone, however long: put a bound on it.
///
/// # Errors
/// Why it can't be opened, in one line.
pub(super) async fn open(function: &PoolFunction) -> Result<Opened, String> {
    let opened = match function.clone() {
        PoolFunction::Unix(path) => {
            let socket = blocking(move || LocalSoc::knock(&path)).await;
            connection(async { greeted(socket?).await }.await)
        }
        PoolFunction::Card(path) => {
            let door = blocking(move || Door::knock(&path)).await;
            let entered = async {
                let door = readable(door?).await?;
                blocking(move || door.enter()).await
            };
            connection(entered.await)
        }
        PoolFunction::Pci(address) => {
            let address = address.to_string();
            let opened = blocking(move || VfioDescriptors::open(&address)).await;
            opened.map(|VfioDescriptors { container, group, device }| Opened {
                descriptors: vec![container, group, device],
                hold: Hold::Nothing,
            })
        }
    };
    opened.map_err(|e| with_causes(&e))
}

/// The client's copy of a connection, and the pool's.
fn connection(socket: Result<OwnedFd, FunctionError>) -> Result<Opened, FunctionError> {
    let socket = socket?;
    let copy = socket.try_clone().map_err(|_| FunctionError::Os("keep a connection", Errno::EMFILE))?;
    Ok(Opened { descriptors: vec![socket], hold: Hold::Connection(copy) })
}

/// Waits until the shim has done with whom it serves. What it says then is for the client to read.
async fn greeted(socket: OwnedFd) -> Result<OwnedFd, FunctionError> {
    let socket = readable(socket).await?;
    let flags = MsgFlags::MSG_PEEK | MsgFlags::MSG_DONTWAIT;
    match recv(socket.as_raw_fd(), &mut [0; 1], flags) {
        Ok(1..) => Ok(socket),
        Ok(0) | Err(Errno::ECONNRESET) => Err(FunctionError::Unusable(
            "the host-kvm-shim there hung up before it had said anything: see what it printed".into(),
        )),
        Err(e) => Err(FunctionError::Os("hear the host-kvm-shim there", e)),
    }
}

/// Waits until there is something to read, or the other side has hung up.
///
/// `unsafe`: tokio takes a descriptor by its number.
#[allow(unsafe_code)]
async fn readable<T: AsFd>(what: T) -> Result<T, FunctionError> {
    let failed = |e: std::io::Error| {
        FunctionError::Os("wait for a function", e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
    };
    {
        // SAFETY: it is borrowed from `what`, which outlives it, and stays the same.
        let watched = unsafe { AsyncFd::register_with_interest(what.as_fd(), Interest::READABLE) };
        let watched = watched.map_err(|e| failed(e.into()))?;
        watched.readable().await.map_err(failed)?.retain_ready();
    }
    Ok(what)
}

/// Does what may block for some seconds on a thread for such things.
async fn blocking<T: Send + 'static>(
    open: impl FnOnce() -> Result<T, FunctionError> + Send + 'static,
) -> Result<T, FunctionError> {
    let done = tokio::task::spawn_blocking(open).await;
    done.unwrap_or(Err(FunctionError::Os("start a thread", Errno::EAGAIN)))
}
