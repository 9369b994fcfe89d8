//! The vCPU runner on the host: see `--help`, and docs/ for the whole picture.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use host_kvm_shim::args::{self, Command, Spec};
use host_kvm_shim::{Ended, Options, ServeError, Shim, close_inherited, frugal, socket};
use nix::errno::Errno;
use pcie_function::local::LocalHost;
use pcie_function::vfio::VfioHost;

/// The command line is wrong.
const USAGE: u8 = 2;
/// KVM, or the function, can't be used.
const UNUSABLE: u8 = 4;

fn main() -> ExitCode {
    let (function, keep, options) = match args::parse(std::env::args_os().skip(1)) {
        Ok(Command::Serve { function, keep, options }) => (function, keep, options),
        Ok(Command::Help) => {
            print!("{}", args::USAGE);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("host-kvm-shim {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Err(why) => return fail(USAGE, &why),
    };
    close_inherited(if let Spec::Fd(fd) = function { Some(fd) } else { None });
    frugal();
    let served = match &function {
        Spec::Unix(path) => serve_unix(path, options),
        Spec::Fd(fd) => serve_fd(*fd, keep, options),
        Spec::Pci(address) => serve_pci(address, options),
    };
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => fail(UNUSABLE, &why),
    }
}

fn fail(status: u8, why: &str) -> ExitCode {
    // What was typed may have line ends in it, or worse.
    let line: String = why.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    eprintln!("host-kvm-shim: {line}");
    ExitCode::from(status)
}

/// Serves one connection after the other.
fn serve_unix(path: &Path, options: Options) -> Result<(), String> {
    let mut shim = Shim::open(options)?;
    let listener = socket::listen(path).map_err(|errno| {
        let todo = if errno == Errno::EADDRINUSE { "; another host-kvm-shim serves it" } else { "" };
        format!("--function unix:{}: can't listen there: {}{todo}", path.display(), errno.desc())
    })?;
    shim.confine()?;
    loop {
        shim.wait_for(listener.as_fd())?;
        let Ok(peer) = socket::accept(&listener) else { continue };
        match LocalHost::new(peer).map_err(ServeError::from).and_then(|function| shim.serve(function)) {
            Ok(Ended::Shutdown | Ended::Once) => return Ok(()),
            Ok(Ended::Lost(_)) if options.once && !shim.holds_vm() => return Ok(()),
            // A peer that hung up; what became of its VM has been said.
            Ok(Ended::Lost(_)) => {}
            // A peer that left while the function was set up is no reason not to serve the next one.
            Err(error @ ServeError::Function(_)) => eprintln!("host-kvm-shim: {error}"),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Serves the peer of an inherited socket, and ends with it unless its VM shall be kept.
fn serve_fd(fd: i32, keep: bool, options: Options) -> Result<(), String> {
    let peer = socket::inherited(fd).map_err(|errno| {
        format!("--function fd:{fd}: no connected SOCK_SEQPACKET socket was inherited there: {}", errno.desc())
    })?;
    let lease = if keep { options.lease } else { Duration::ZERO };
    let mut shim = Shim::open(Options { lease, ..options })?;
    shim.confine()?;
    let function = LocalHost::new(peer).map_err(|e| format!("--function fd:{fd}: {e}"))?;
    shim.serve(function)?;
    if shim.holds_vm() {
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
