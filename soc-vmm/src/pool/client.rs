//! The other side: a soc-vmm that wants a function, or wants to see them all.

use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use api_channel::call::CpuidEntry;
use nix::errno::Errno;
use pcie_function::vfio::VfioDescriptors;

use super::wire::{Complaint, Listed, MOST_REPLY, Reply, Request, Standing, VERSION, line};
use crate::cli::{self, ExitStatus, Failure};
use crate::config::{Config, FILE, PoolFunction};
use crate::dial::dial;
use crate::rights::{self, Received};

/// How long the pool may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may take for its answer: it may open one function after the other, each for some seconds.
const ANSWER: Duration = Duration::from_secs(120);

/// A function of the pool's. It is this process' until this is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct Loan {
    /// What it is.
    pub(crate) lent: Lent,
    connection: Lease,
}

/// What keeps a function this process'.
#[derive(Debug)]
pub(crate) struct Lease(UnixStream);

/// What of a function this process was handed.
#[derive(Debug)]
pub(crate) enum Lent {
    /// A connection to a shim that has greeted.
    Unix(OwnedFd),
    /// A vfio-user connection on which a version is agreed on.
    Card(OwnedFd),
    /// A function through VFIO, at this address.
    Pci(String, VfioDescriptors),
}

impl Loan {
    /// Has the pool lend a function to the VM `vm`. It blocks.
    ///
    /// # Errors
    /// In one line: there is no pool, or none of its functions is free.
    pub(crate) fn ask(vm: &str) -> Result<Self, Failure> {
        let connection = connect(&socket()?)?;
        say(&connection, &line(&Request::Function { version: VERSION, vm: vm.to_owned() }))?;
        let (reply, fds) = answer(&connection)?;
        match reply {
            Reply::Function { function, .. } => {
                let function = PoolFunction::try_from(function).map_err(broken)?;
                let lent = Lent::new(&function, fds).ok_or_else(|| broken("it sent other descriptors than it said"))?;
                Ok(Self { lent, connection: Lease(connection) })
            }
            Reply::Refused { why, .. } => Err(unavailable(why)),
            Reply::List { .. } | Reply::Host { .. } => Err(broken("it answered another question")),
        }
    }

    /// The function, and what keeps it.
    pub(crate) fn split(self) -> (Lent, Lease) {
        (self.lent, self.connection)
    }
}

impl Lease {
    /// Gives the function back with a word on why it couldn't be used, so that the pool doesn't give it to the next one at once.
    pub(crate) fn complain(mut self, why: &str) {
        // Where it can't be said, the function is given back all the same.
        let _ = self.0.write_all(&line(&Complaint::new(why)));
    }
}

impl Lent {
    fn new(function: &PoolFunction, fds: Vec<OwnedFd>) -> Option<Self> {
        let mut fds = fds.into_iter();
        let lent = match function {
            PoolFunction::Unix(_) => Self::Unix(fds.next()?),
            PoolFunction::Card(_) => Self::Card(fds.next()?),
            PoolFunction::Pci(address) => {
                let (container, group, device) = (fds.next()?, fds.next()?, fds.next()?);
                Self::Pci(address.to_string(), VfioDescriptors { container, group, device })
            }
        };
        fds.next().is_none().then_some(lent)
    }
}

/// `soc-vmm pool list`: prints all functions of the pool.
///
/// # Errors
/// There is no pool, or it refuses.
pub fn list(json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let connection = connect(&socket()?)?;
    say(&connection, &line(&Request::List { version: VERSION }))?;
    let functions = match answer(&connection)?.0 {
        Reply::List { functions, .. } => functions,
        Reply::Refused { why, .. } => return Err(unavailable(why)),
        Reply::Function { .. } | Reply::Host { .. } => return Err(broken("it answered another question")),
    };
    let text = if json {
        let text = serde_json::to_string_pretty(&functions);
        text.map_err(|e| Failure::of(ExitStatus::Unavailable, "pool list", &e))? + "\n"
    } else {
        functions.iter().map(|function| row(function, SystemTime::now())).collect()
    };
    cli::print(&text, out)
}

/// The CPUID that the server's KVM supports. It blocks.
///
/// # Errors
/// There is no pool, or it knows of no host.
pub(crate) fn host_cpuid() -> Result<Vec<CpuidEntry>, Failure> {
    let connection = connect(&socket()?)?;
    say(&connection, &line(&Request::Host { version: VERSION }))?;
    match answer(&connection)?.0 {
        Reply::Host { cpuid, .. } => {
            let entry = |[function, index, flags, eax, ebx, ecx, edx]: [u32; 7]| CpuidEntry {
                function,
                index,
                flags,
                eax,
                ebx,
                ecx,
                edx,
                reserved: 0,
            };
            Ok(cpuid.into_iter().map(entry).collect())
        }
        Reply::Refused { why, .. } => Err(unavailable(why)),
        Reply::Function { .. } | Reply::List { .. } => Err(broken("it answered another question")),
    }
}

fn row(listed: &Listed, now: SystemTime) -> String {
    let Listed { function, state, vm, pid, uid, since, why } = listed;
    let state = match state {
        Standing::Free => "free",
        Standing::Used => "used",
        Standing::Clearing => "clearing",
        Standing::Broken => "broken",
    };
    let now = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
    let age = match now.saturating_sub(*since) {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} d", seconds / 86_400),
    };
    let mut row = format!("{function:<30} {state:<8} {age:<7}");
    for (what, value) in [("VM", vm.clone()), ("pid", pid.map(|n| n.to_string())), ("uid", uid.map(|n| n.to_string()))]
    {
        if let Some(value) = value {
            row += &format!(" {what} {value}");
        }
    }
    row += &why.as_ref().map(|why| format!(" {why}")).unwrap_or_default();
    cli::one_line(row.trim_end()) + "\n"
}

fn socket() -> Result<PathBuf, Failure> {
    match Config::load()?.pool {
        Some(pool) => Ok(pool.socket),
        None => Err(unavailable(format!("the configuration has no [pool]: write one to {FILE}"))),
    }
}

fn connect(path: &Path) -> Result<UnixStream, Failure> {
    let connection = dial(path, CONNECT).map_err(|e| {
        let at = path.display();
        unavailable(match e.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                format!("no pool serves at {at}: start soc-vmm pool serve (systemctl start outboard-pool)")
            }
            ErrorKind::PermissionDenied => format!("this user may not open {at}: see pool.group and pool.mode"),
            _ => format!("can't connect to the pool at {at}: {e}"),
        })
    })?;
    connection.set_read_timeout(Some(ANSWER)).map_err(|e| unavailable(format!("can't wait for the pool: {e}")))?;
    Ok(connection)
}

fn say(mut connection: &UnixStream, line: &[u8]) -> Result<(), Failure> {
    // One that refuses may have hung up already; what it says is there to read.
    match connection.write_all(line) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(unavailable(format!("can't ask the pool: {e}"))),
        _ => Ok(()),
    }
}

/// Most descriptors of a function: one through VFIO.
const MOST_DESCRIPTORS: usize = 3;

/// The pool's line, and the descriptors that came with it.
fn answer(connection: &UnixStream) -> Result<(Reply, Vec<OwnedFd>), Failure> {
    let (mut read, mut fds) = (Vec::new(), Vec::new());
    let mut some = vec![0; 16 << 10];
    let line = loop {
        match rights::receive(connection, &mut some) {
            Ok(Received { bytes: 0, .. }) => return Err(broken("it hung up: it has too many clients, or was ended")),
            Ok(Received { lost: true, .. }) => {
                return Err(broken(
                    "it sends more descriptors than a function has, or than this process may have (ulimit -n)",
                ));
            }
            Ok(received) if fds.len() + received.fds.len() > MOST_DESCRIPTORS => {
                return Err(broken("it sends more descriptors than a function has"));
            }
            Ok(received) => {
                read.extend_from_slice(&some[..received.bytes]);
                fds.extend(received.fds);
            }
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => return Err(broken("it doesn't answer")),
            Err(e) => return Err(unavailable(format!("can't hear the pool: {}", e.desc()))),
        }
        match read.iter().position(|byte| *byte == b'\n') {
            Some(end) => break &read[..end],
            None if read.len() >= MOST_REPLY => return Err(broken("its answer has no end")),
            None => {}
        }
    };
    Ok((Reply::parse(line).map_err(unavailable)?, fds))
}

fn broken(why: impl AsRef<str>) -> Failure {
    unavailable(format!("what listens at the pool's socket can't be used: {}", why.as_ref()))
}

fn unavailable(why: impl AsRef<str>) -> Failure {
    Failure::new(ExitStatus::Unavailable, format!("--function pool: {}", why.as_ref()))
}
