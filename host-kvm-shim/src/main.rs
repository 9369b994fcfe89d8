//! The vCPU runner on the host: see `--help`, and docs/ for the whole picture.

#![deny(
    clippy::print_stderr,
    clippy::print_stdout,
    reason = "they panic where nobody reads, and a VM would end with that"
)]

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use host_kvm_shim::args::{self, Command, Spec};
use host_kvm_shim::say::{self, say};
use host_kvm_shim::{Ended, Options, ServeError, Shim, close_inherited, frugal, signals, socket};
use nix::errno::Errno;
use pcie_function::local::LocalHost;
use pcie_function::vfio::VfioHost;
use pcie_function::{BusError, FunctionError};

/// The command line is wrong.
const USAGE: u8 = 2;
/// KVM, or the function, can't be used.
const UNUSABLE: u8 = 4;

fn main() -> ExitCode {
    let (function, keep, options) = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Serve { function, keep, options }) => (function, keep, options),
        Ok(Command::Help) => return ended(say::print(args::USAGE)),
        Ok(Command::Version) => return ended(say::print(concat!("host-kvm-shim ", env!("CARGO_PKG_VERSION"), "\n"))),
        Err(why) => return fail(USAGE, &why),
    };
    close_inherited(if let Spec::Fd(fd) = function { Some(fd) } else { None });
    frugal();
    signals::ignore_file_size();
    let served = match &function {
        Spec::Unix(path) => serve_unix(path, options),
        Spec::Fd(fd) => serve_fd(*fd, keep, options),
        Spec::Pci(address) => serve_pci(address, options),
    };
    ended(served)
}

fn ended(how: Result<(), String>) -> ExitCode {
    match how {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(UNUSABLE, &why),
    }
}

fn fail(status: u8, why: &str) -> ExitCode {
    say(why);
    ExitCode::from(status)
}

/// Pause after a failed accept, so that a lack of descriptors doesn't spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves one connection after the other.
fn serve_unix(path: &Path, options: Options) -> Result<(), String> {
    let mut shim = Shim::open(options)?;
    let listener = socket::listen(path).map_err(|errno| {
        let todo = if errno == Errno::EADDRINUSE { "; another host-kvm-shim serves it" } else { "" };
        format!("--function unix:{}: can't listen there: {}{todo}", path.display(), errno.desc())
    })?;
    shim.confine()?;
    let mut told = false;
    loop {
        shim.wait_for(listener.as_fd())?;
        let peer = match socket::accept(&listener) {
            Ok(peer) => peer,
            Err(errno) => {
                if !std::mem::replace(&mut told, true) {
                    say(format_args!("can't take a connection, tries on: {}", errno.desc()));
                }
                std::thread::sleep(ACCEPT_PAUSE);
                continue;
            }
        };
        told = false;
        match LocalHost::new(peer).map_err(ServeError::from).and_then(|function| shim.serve(function)) {
            Ok(Ended::Shutdown | Ended::Once) => return Ok(()),
            Ok(Ended::Lost(_)) if options.once && shim.has_ended_vm() => return Ok(()),
            // A peer that hung up; what became of its VM has been said. Before it had one, as a pool that looks whether the function works, it
            // has missed nothing.
            Ok(Ended::Lost(_)) | Err(ServeError::Function(FunctionError::Bus(BusError::Gone))) => {}
            // What else fails while the function is set up is no reason not to serve the next one.
            Err(error @ ServeError::Function(_)) => say(error),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Serves the peer of an inherited socket, and ends with it unless its VM shall be kept.
fn serve_fd(fd: i32, keep: bool, options: Options) -> Result<(), String> {
    let peer = socket::inherited(fd).map_err(|errno| {
        format!("--function fd:{fd}: no connected SOCK_SEQPACKET socket was inherited there: {}", errno.desc())
    })?;
    signals::leave_ends_to_the_soc();
    let lease = if keep { options.lease } else { Duration::ZERO };
    let mut shim = Shim::open(Options { lease, ..options })?;
    shim.confine()?;
    let function = LocalHost::new(peer).map_err(|e| format!("--function fd:{fd}: {e}"))?;
    shim.serve(function)?;
    if shim.holds_vm() {
        signals::obey_ends();
        shim.hold();
    }
    Ok(())
}

/// Serves a PCIe function. Its loss ends this process: whoever started it may start it again, and so open the function anew.
fn serve_pci(address: &str, options: Options) -> Result<(), String> {
    let function = VfioHost::open(address).map_err(|e| format!("--function pci:{address}: {e}"))?;
    let mut shim = Shim::open(Options { role: function.role(), outlives_function: false, ..options })?;
    shim.confine()?;
    match shim.serve(function)? {
        Ended::Shutdown | Ended::Once => Ok(()),
        Ended::Lost(why) => Err(format!("--function pci:{address}: {why}")),
    }
}
