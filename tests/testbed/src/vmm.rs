//! soc-vmm at work on a function of a [`Bed`]: on this machine, or on the bed's Arm SoC. Or on its server, with no function at all.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::bed::{Bed, GUEST_INITRD, GUEST_KERNEL, SOC_VMM, soc_channel};
use crate::card::{SOC_HOST, SOC_VM};
use crate::debian::Terminal;
use crate::fetch::Arch;
use crate::machine::{Error, Machine};
use crate::process::Child;
use crate::protocol::{Ended, Status};
use crate::{build, guest, network, scratch};

const SIGKILL: i32 = 9;
/// How long a soc-vmm command other than `run` may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(90);

/// How long to look at a screen before looking whether there is still somebody who prints.
const SLICE: Duration = Duration::from_millis(500);

/// What a VM boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Boot {
    /// The guest's image ([`guest::image`]).
    #[default]
    Guest,
    /// What its further arguments say.
    AsTold,
}

/// A VM to be run.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Its name.
    pub name: String,
    /// Its vCPUs, unless `args` has `--cpus`.
    pub cpus: u32,
    /// Its RAM, as `--memory` takes it.
    pub memory: String,
    /// The function of the card that carries it.
    pub function: u32,
    /// The value of `--function`, where it isn't to name that one.
    pub spec: Option<String>,
    /// What it boots.
    pub boot: Boot,
    /// Further arguments of `soc-vmm run`.
    pub args: Vec<String>,
    /// A process in whose network namespace a soc-vmm on this machine runs; its own, else.
    pub network_of: Option<u32>,
}

impl VmConfig {
    /// 2 vCPUs and 512 MiB of huge pages.
    #[must_use]
    pub fn new(name: &str, function: u32) -> Self {
        Self {
            name: name.to_owned(),
            cpus: 2,
            memory: "512M,hugepages=2M".to_owned(),
            function,
            spec: None,
            boot: Boot::Guest,
            args: Vec::new(),
            network_of: None,
        }
    }
}

/// A running `soc-vmm run` whose guest's serial line is here. It is killed when this handle is dropped.
#[derive(Debug)]
pub struct Vmm<'a> {
    name: String,
    /// Where the VM's vCPUs run.
    server: &'a Machine,
    place: Place<'a>,
    keyboard: Box<dyn Keyboard>,
    screen: Arc<Screen>,
    /// How much of the screen has been looked at by [`Self::expect`].
    seen: usize,
}

#[derive(Debug)]
enum Place<'a> {
    Native {
        program: PathBuf,
        process: Child,
        errors: PathBuf,
        _dir: tempfile::TempDir,
    },
    /// The port takes one visitor at a time: the next VM's waits until this one has hung up.
    Machine {
        machine: &'a Machine,
        pid: i32,
        port: UnixStream,
    },
}

/// Where keys go.
trait Keyboard: Write + Send + std::fmt::Debug {}
impl<T: Write + Send + std::fmt::Debug> Keyboard for T {}

/// What the guest printed.
#[derive(Debug, Default)]
struct Screen {
    bytes: Mutex<Vec<u8>>,
    grown: Condvar,
}

impl<'a> Vmm<'a> {
    /// Runs a VM on a function of `bed`.
    ///
    /// # Errors
    /// soc-vmm can't be built or started. That it can't use the function shows at its end.
    pub fn run(bed: &'a Bed, config: &VmConfig) -> Result<Self, Error> {
        let started = match &bed.soc {
            Some(soc) => {
                let spec = format!("pci:{}", soc_address(soc, config.function)?);
                on_machine(soc, config, &spec, &soc_channel(config.function))?
            }
            None => native(bed, config)?,
        };
        Self::started(config, &bed.server, started)
    }

    /// Runs a VM on a server that has soc-vmm ([`BedConfig::with_soc_vmm_on_the_server`]), by a shim of its own. Its
    /// function is a number that no other VM of the server has.
    ///
    /// # Errors
    /// soc-vmm can't be started.
    pub fn run_on_the_server(server: &'a Machine, config: &VmConfig) -> Result<Self, Error> {
        Self::started(config, server, on_machine(server, config, "local", &soc_channel(config.function))?)
    }

    fn started(config: &VmConfig, server: &'a Machine, started: Started<'a>) -> Result<Self, Error> {
        let (place, keyboard, output) = started;
        let screen = Arc::new(Screen::default());
        screen.fill_from(output)?;
        Ok(Self { name: config.name.clone(), server, place, keyboard, screen, seen: 0 })
    }

    /// Waits, at most for `limit`, until the guest has printed `text` beyond what was expected before.
    ///
    /// # Errors
    /// [`Error::Dead`] if it hasn't by then, or can't any more since soc-vmm has ended.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<(), Error> {
        self.read_until(text, limit).map(drop)
    }

    /// [`Self::expect`], and what the guest printed before `text` since what was expected last.
    ///
    /// # Errors
    /// As it has.
    pub fn read_until(&mut self, text: &str, limit: Duration) -> Result<String, Error> {
        let end = Instant::now() + limit;
        loop {
            // Looked at before the screen is: what it printed last is there then.
            let ended = self.ended(Duration::ZERO)?;
            let slice = end.saturating_duration_since(Instant::now()).min(SLICE);
            if let Some(at) = self.screen.find(text, self.seen, slice) {
                let from = std::mem::replace(&mut self.seen, at);
                let bytes = self.screen.bytes.lock().unwrap_or_else(PoisonError::into_inner);
                return Ok(String::from_utf8_lossy(&bytes[from..at - text.len()]).into_owned());
            }
            if let Some(status) = ended {
                return Err(self.dead(&format!("ended ({status:?}) and didn't print {text:?}")));
            }
            if Instant::now() >= end {
                return Err(self.dead(&format!("didn't print {text:?} within {limit:?}")));
            }
        }
    }

    /// Types `text` at the guest's serial line.
    ///
    /// # Errors
    /// soc-vmm is gone.
    pub fn type_text(&mut self, text: &str) -> Result<(), Error> {
        let name = self.name.clone();
        self.keyboard.write_all(text.as_bytes()).and_then(|()| self.keyboard.flush()).map_err(Error::file(name))
    }

    /// Everything the guest printed.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes = self.screen.bytes.lock();
        let bytes = bytes.unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// What soc-vmm wrote to its standard error.
    #[must_use]
    pub fn errors(&self) -> String {
        match &self.place {
            Place::Native { errors, .. } => std::fs::read_to_string(errors).unwrap_or_default(),
            Place::Machine { machine, pid, .. } => machine.control().output(*pid).join("\n"),
        }
    }

    /// [`Self::errors`], but that the host was silent for a while: an emulated server starves for seconds where much else runs.
    #[must_use]
    pub fn complaints(&self) -> String {
        let errors = self.errors();
        let lines = errors.lines().filter(|line| !line.contains("the host is silent: its heartbeat stopped"));
        lines.collect::<Vec<_>>().join("\n")
    }

    /// What soc-vmm has open, as [`crate::protocol::descriptors`] has it.
    ///
    /// # Errors
    /// It is gone.
    pub fn descriptors(&self) -> Result<Vec<String>, Error> {
        match &self.place {
            Place::Native { process, .. } => {
                crate::protocol::descriptors(process.id()).map_err(Error::file(&self.name))
            }
            Place::Machine { machine, pid, .. } => machine.descriptors(*pid),
        }
    }

    /// Runs another soc-vmm command for this VM, where soc-vmm runs: `soc-vmm VERB… NAME`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn command(&self, verb: &[&str]) -> Result<Ended, Error> {
        let args = [verb, &[&self.name]].concat();
        match &self.place {
            Place::Machine { machine, .. } => machine.exec(SOC_VMM, &args, COMMAND_LIMIT),
            Place::Native { program, .. } => {
                let output =
                    Command::new(program).args(&args).stdin(Stdio::null()).output().map_err(Error::file(program))?;
                Ok(Ended {
                    status: status_of(output.status),
                    stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
                })
            }
        }
    }

    /// Has the guest move to a VM of `config` on `bed`, which is asked for here, by a socket in `dir`, with more words of `soc-vmm migrate`;
    /// that VM, and what the command printed.
    ///
    /// # Errors
    /// The VM doesn't start, or the guest doesn't move: it is where it was.
    pub fn move_to<'b>(
        &mut self,
        bed: &'b Bed,
        config: &VmConfig,
        dir: &Path,
        words: &[&str],
    ) -> Result<(Vmm<'b>, String), Error> {
        let door = dir.join(&config.name);
        let uri = format!("unix:{}", door.display());
        let mut config = config.clone();
        config.args.extend(["--incoming".to_owned(), uri.clone()]);
        let mut there = Vmm::run(bed, &config)?;
        let end = Instant::now() + COMMAND_LIMIT;
        while !door.exists() {
            if there.ended(Duration::from_millis(20))?.is_some() || Instant::now() >= end {
                return Err(there.dead("waits for no guest"));
            }
        }
        let ended = self.command(&[&["migrate", &uri], words].concat())?;
        match ended.status {
            Status::Code(0) => Ok((there, ended.stdout)),
            _ => Err(self.dead(&format!("didn't let its guest go: {}", ended.stderr.trim()))),
        }
    }

    /// Waits for soc-vmm's end, at most for `limit`.
    ///
    /// # Errors
    /// [`Error::Dead`] if it still runs then.
    pub fn wait_for_exit(&mut self, limit: Duration) -> Result<Status, Error> {
        self.ended(limit)?.ok_or_else(|| self.dead(&format!("still runs after {limit:?}")))
    }

    /// How soc-vmm ended, if it does so within `limit`.
    fn ended(&mut self, limit: Duration) -> Result<Option<Status>, Error> {
        Ok(match &mut self.place {
            Place::Native { process, .. } => process.wait(limit).map_err(Error::file(&self.name))?.map(status_of),
            Place::Machine { machine, pid, .. } => machine.control().wait_for_exit(*pid, limit),
        })
    }

    /// Kills soc-vmm, as a crash would.
    ///
    /// # Errors
    /// It is gone already.
    pub fn kill(&mut self) -> Result<(), Error> {
        match &mut self.place {
            Place::Native { process, .. } => process.kill().map_err(Error::file(&self.name)),
            Place::Machine { machine, pid, .. } => machine.signal(*pid, SIGKILL),
        }
    }

    fn dead(&self, what: &str) -> Error {
        let text = self.text();
        let lines: Vec<&str> = text.lines().collect();
        Error::Dead {
            name: self.name.clone(),
            what: what.to_owned(),
            console: lines[lines.len().saturating_sub(30)..].join("\n"),
            said: format!("soc-vmm said: {}{}", self.errors(), self.server.last_words().unwrap_or_default()),
        }
    }
}

impl Terminal for Vmm<'_> {
    fn read_until(&mut self, text: &str, limit: Duration) -> Result<String, Error> {
        Self::read_until(self, text, limit)
    }

    fn type_text(&mut self, text: &str) -> Result<(), Error> {
        Self::type_text(self, text)
    }
}

impl Drop for Vmm<'_> {
    fn drop(&mut self) {
        // The native one dies with its handle. This one's port is free for the next VM when it is gone.
        if let Place::Machine { machine, pid, port } = &self.place {
            if machine.control().wait_for_exit(*pid, Duration::ZERO).is_none() {
                let _ = machine.signal(*pid, SIGKILL);
                let _ = machine.control().wait_for_exit(*pid, COMMAND_LIMIT);
            }
            let _ = port.shutdown(Shutdown::Both);
        }
    }
}

impl Screen {
    /// Copies `output` to the screen until its end.
    fn fill_from(self: &Arc<Self>, mut output: Box<dyn Read + Send>) -> Result<(), Error> {
        let screen = Arc::clone(self);
        thread::Builder::new()
            .name("testbed-screen".to_owned())
            .spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(count @ 1..) = output.read(&mut buffer) {
                    let bytes = screen.bytes.lock();
                    bytes.unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..count]);
                    screen.grown.notify_all();
                }
            })
            .map_err(Error::file("testbed-screen"))?;
        Ok(())
    }

    /// Where `text` ends, looked for from byte `from` on; `None` after `limit`.
    fn find(&self, text: &str, from: usize, limit: Duration) -> Option<usize> {
        let end = Instant::now() + limit;
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let mut from = from;
        loop {
            let at = bytes[from..].windows(text.len()).position(|window| window == text.as_bytes());
            if let Some(at) = at {
                return Some(from + at + text.len());
            }
            // What was looked at is not looked at again, but for the start of a `text` that isn't all there.
            from = from.max((bytes.len() + 1).saturating_sub(text.len()));
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            let (grown, _) = self.grown.wait_timeout(bytes, left).unwrap_or_else(PoisonError::into_inner);
            bytes = grown;
        }
    }
}

type Started<'a> = (Place<'a>, Box<dyn Keyboard>, Box<dyn Read + Send>);

/// soc-vmm on an emulated machine that has it, its standard streams at a port of that machine's.
fn on_machine<'a>(machine: &'a Machine, config: &VmConfig, spec: &str, channel: &str) -> Result<Started<'a>, Error> {
    let args = arguments(config, spec, GUEST_KERNEL, GUEST_INITRD);
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let port = machine.channel(channel)?;
    let clone = || port.try_clone().map_err(Error::file(channel));
    let (keyboard, output) = (clone()?, clone()?);
    let pid = machine.run(SOC_VMM, &args, Some(channel))?;
    Ok((Place::Machine { machine, pid, port }, Box::new(keyboard), Box::new(output)))
}

fn native<'a>(bed: &Bed, config: &VmConfig) -> Result<Started<'a>, Error> {
    let program = build::programs(Arch::Amd64, &["soc-vmm"])?.remove(0);
    let image = guest::image()?;
    let spec = format!("card:{}", bed.card.soc_socket(config.function).display());
    let (kernel, initrd) = (image.kernel.display(), image.initrd.display());
    let dir = scratch::dir().map_err(Error::file(std::env::temp_dir()))?;
    let errors = dir.path().join("errors");
    let mut command = Command::new(&program);
    command.args(arguments(config, &spec, &kernel.to_string(), &initrd.to_string()));
    if let Some(id) = config.network_of {
        command = network::inside(id, &command);
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors).map_err(Error::file(&errors))?);
    let mut process = Child::spawn(command)?;
    let (Some(keyboard), Some(output)) = (process.stdin(), process.stdout()) else {
        return Err(Error::file(&program)(io::ErrorKind::BrokenPipe.into()));
    };
    let place = Place::Native { program, process, errors, _dir: dir };
    Ok((place, Box::new(keyboard), Box::new(output)))
}

fn arguments(config: &VmConfig, spec: &str, kernel: &str, initrd: &str) -> Vec<String> {
    let cpus = config.cpus.to_string();
    let spec = config.spec.as_deref().unwrap_or(spec);
    let mut args = vec!["run", "--name", &config.name, "--memory", &config.memory, "--function", spec];
    if !config.args.iter().any(|arg| arg == "--cpus") {
        args.extend(["--cpus", &cpus]);
    }
    if config.boot == Boot::Guest {
        args.extend(["--kernel", kernel, "--initrd", initrd, "--cmdline", "console=ttyS0 quiet"]);
    }
    let mut args: Vec<String> = args.into_iter().map(str::to_owned).collect();
    args.extend(config.args.iter().cloned());
    args
}

/// The address of function `number` in the SoC: functions are in the order of their slots.
fn soc_address(soc: &Machine, number: u32) -> Result<String, Error> {
    let functions = soc.inventory()?.pci.into_iter();
    let index = usize::try_from(number).unwrap_or(usize::MAX);
    functions
        .filter(|function| [SOC_VM, SOC_HOST].contains(&function.id))
        .nth(index)
        .map(|function| function.address)
        .ok_or_else(|| Error::file(format!("function {number}"))(io::ErrorKind::NotFound.into()))
}

fn status_of(status: std::process::ExitStatus) -> Status {
    match (status.code(), status.signal()) {
        (Some(code), _) => Status::Code(code),
        (None, signal) => Status::Signal(signal.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_expected_is_not_found_again() {
        let screen = Arc::new(Screen::default());
        screen.fill_from(Box::new(&b"up\r\n# up\r\n"[..])).unwrap();
        let limit = Duration::from_secs(60);
        let first = screen.find("up", 0, limit).unwrap();
        let second = screen.find("up", first, limit).unwrap();
        assert!(second > first);
        assert_eq!(screen.find("up", second, Duration::from_millis(20)), None);
    }
}
