//! `soc-vmm run`: from a checked command line to an exit status.

use std::fs::File;
use std::sync::Arc;

use pcie_function::SocFunction;
use pcie_function::header::Role;
use pcie_function::modelled::{Crossings, ModelledSoc};

use super::host;
use super::life::{Blueprint, LifeError, Streams, Vm};
use super::media;
use super::worker::Waker;
use crate::chardev::ChardevError;
use crate::cli::{ExitStatus, Failure, Original, RunConfig};
use crate::console::{Attached, ConsoleError, DebugconBackend, SerialBackend};
use crate::control::{self, Claim, RunDir, RunDirError, VmControl, VmInfo, VmName};
use crate::daemon::{PidFile, Side, detach};
use crate::devices::{input_pipe, output_pipe};
use crate::function::{self, Use};
use crate::layout::MemoryLayout;
use crate::link::Link;
use crate::migrate::{Secure, Way, WayError};
use crate::qemu::ObjectKind;
use crate::qmp;
use crate::runtime::runtime;
use crate::say::{self, say};

/// Bytes that may wait between the guest's serial port and its far end, each way.
const SERIAL_QUEUE: usize = 4096;
/// Bytes of the debug console that may wait; more is lost, and counted.
const DEBUGCON_QUEUE: usize = 1 << 20;

/// Runs a VM until it ends.
///
/// # Errors
/// What went wrong, in one line, with its exit status (docs/operations.md).
pub fn run(config: &RunConfig) -> Result<ExitStatus, Failure> {
    let unavailable = |doing: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, doing, e);
    // Before there are threads.
    let mut ready = match config.process.daemonize.then(detach).transpose()? {
        Some(Side::Front(status)) => return Ok(ExitStatus::Daemon(status)),
        Some(Side::Back(ready)) => Some(ready),
        None => None,
    };
    let original = config.original.as_ref().map(Original::find).transpose()?;
    let info = VmInfo {
        name: config.process.guest.clone().unwrap_or_else(|| config.name.to_string()),
        cpus: config.cpus,
        memory: config.memory.size,
        function: config.function.to_string(),
    };
    let (handle, mut control) = control::channel(info);
    handle.actions().set(config.machine.actions);
    control.set_autostart(!config.paused);
    if config.process.emulator {
        control.emulate();
    }
    if let Some(uri) = &config.incoming {
        let failed = |e: WayError| Failure::of(ExitStatus::Usage, "--incoming", &e);
        let mut way = Way::of(uri, false, handle.fds()).map_err(failed)?;
        if let Some(dir) = &config.tls_dir {
            let tls = Secure::destination(dir).map_err(|e| Failure::of(ExitStatus::Usage, "--tls-dir", &e))?;
            way = way.map(|way| way.with(tls)).transpose().map_err(failed)?;
        }
        control.waits_for_guest(way);
    }
    for object in config.hardware.iter().flat_map(|hardware| &hardware.objects) {
        if let ObjectKind::Tls(spec) = &object.kind {
            spec.load().map_err(|e| Failure::of(ExitStatus::Usage, &format!("-object {}", object.id), &e))?;
        }
    }
    // Files first: a wrong one is refused before anything is touched.
    let layout = MemoryLayout::new(config.memory.size).map_err(|e| Failure::of(ExitStatus::Usage, "--memory", &e))?;
    let (plan, media) = media::open(config, &layout, &handle)?;
    runtime(2)?.block_on(async {
        // From here on a signal leaves nothing behind.
        control::end_on_signals(handle.clone()).map_err(|e| unavailable("can't watch for signals", &e))?;
        let mut claim = claim(config)?;
        let mut sockets: Vec<_> = claim.take_socket().into_iter().collect();
        for path in &config.qmp {
            sockets
                .push(control::ListeningSocket::bind(path).map_err(|e| Failure::of(ExitStatus::Usage, "--qmp", &e))?);
        }
        let hardware = config.hardware.as_ref();
        for monitor in hardware.iter().flat_map(|hardware| &hardware.monitors) {
            sockets.push(handle.chardevs().take_listener(monitor, "monitor").map_err(|e| of_chardev("-mon", &e))?);
        }
        // What is written to it would destroy it.
        let is_no_image = |option: &str, file: Option<&File>| {
            let role = file.and_then(|file| file.metadata().ok()).and_then(|file| plan.role_of(&file));
            let role = role.map(|role| format!("{role} image"));
            let role = role.or_else(|| file.and_then(|file| media.role_of(file)).map(str::to_owned));
            role.map_or(Ok(()), |role| {
                let why = format!("{option}: the file is the {role} of this VM; give another one");
                Err(Failure::new(ExitStatus::Usage, why))
            })
        };
        let pid_file = config.process.pid_file.as_deref();
        let write = |path| PidFile::write(path, |file| is_no_image("-pidfile", Some(file)));
        let _pid_file = pid_file.map(write).transpose()?;
        let greet = if config.process.emulator { qmp::Greet::WhenBuilt } else { qmp::Greet::AtOnce };
        let mut monitors =
            qmp::Server::start(&handle, sockets, greet).map_err(|e| unavailable("can't serve QMP", &e))?;

        let _on_its_way = original.map(|original| original.follows(handle.migration())).transpose()?;

        let waker = Waker::new().map_err(|e| unavailable("can't start", &e))?;
        let (output, reader) = output_pipe(SERIAL_QUEUE, waker.clone());
        let (writer, input) = input_pipe(SERIAL_QUEUE, waker.clone());
        let wrong = |option: &str, e: &ConsoleError| Failure::of(ExitStatus::Usage, option, e);
        let serial = match hardware.and_then(|hardware| hardware.serial.as_ref()) {
            Some(chardev) => {
                handle.chardevs().take_serial(chardev, "serial0").map_err(|e| of_chardev("-device isa-serial", &e))?
            }
            None => SerialBackend::open(&config.serial).map_err(|e| wrong("--serial", &e))?,
        };
        if let Some(path) = serial.pty_path().filter(|_| hardware.is_none()) {
            say(format_args!("soc-vmm: the serial port is {}", path.display()));
        }
        serial.files().try_for_each(|file| is_no_image("--serial", Some(file)))?;
        let mut consoles = vec![serial.attach(reader, writer, &handle).map_err(|e| wrong("--serial", &e))?];
        let mut debugcon = None;
        let backend = match (hardware.and_then(|hardware| hardware.debugcon.as_ref()), &config.debugcon) {
            (Some(chardev), _) => {
                let serial = handle.chardevs().take_serial(chardev, "isa-debugcon");
                let serial = serial.map_err(|e| of_chardev("-device isa-debugcon", &e))?;
                Some(DebugconBackend::of(serial).map_err(|e| wrong("-device isa-debugcon", &e))?)
            }
            (None, Some(spec)) => Some(DebugconBackend::open(spec).map_err(|e| wrong("--debugcon", &e))?),
            (None, None) => None,
        };
        if let Some(backend) = backend {
            let (output, reader) = output_pipe(DEBUGCON_QUEUE, waker.clone());
            is_no_image("--debugcon", backend.file())?;
            consoles.push(backend.attach(reader).map_err(|e| wrong("--debugcon", &e))?);
            debugcon = Some(output);
        }
        let streams = Streams { serial: (output, input), debugcon };
        let (listener, device_listeners) = (control.slot_listener(), control.device_listeners());
        let trays = Arc::new(control.tray_listeners());
        let cpu_listener = control.cpu_listener();
        let state_dir = claim.state_dir();
        let blueprint = Blueprint {
            config,
            layout,
            plan,
            media,
            trays,
            listener,
            device_listeners,
            cpu_listener,
            streams,
            waker,
            state_dir,
            incoming: config.incoming.is_some(),
        };
        let setup = Setup { blueprint, control, consoles: &consoles };
        let ended = {
            let vm = function::open(&config.function, Role::Vm, setup);
            tokio::pin!(vm);
            tokio::select! {
                // Who is built and ends at once was built.
                biased;
                is_built = handle.built(), if ready.is_some() => {
                    // What fails before that is said on the standard error that the process in front shares.
                    if let Some(ready) = ready.take().filter(|_| is_built) {
                        ready.say().map_err(|e| unavailable("-daemonize", &e))?;
                    }
                    vm.await
                }
                ended = &mut vm => ended,
            }
        };
        for console in consoles {
            console.finish().await;
        }
        // Who waits at a monitor reads why when that is closed.
        let ended = ended.map_err(Failure::tell);
        if ended.is_err() && config.process.emulator {
            say::until_read();
            monitors.until_met().await;
        }
        monitors.close().await;
        ended
    })
}

/// Where what must outlive the process is kept, and where it is found by others.
fn claim(config: &RunConfig) -> Result<Claim, Failure> {
    let unavailable = |e: &RunDirError| Failure::of(ExitStatus::Unavailable, "--name", e);
    if config.process.emulator {
        // Whoever drives an emulator knows it by its sockets, and may have several of one name.
        let directory = RunDir::of_emulator().map_err(|e| unavailable(&e))?;
        return directory.claim(&VmName::of_process()).map_err(|e| unavailable(&e));
    }
    let directory = RunDir::of_user().map_err(|e| unavailable(&e))?;
    directory.claim(&config.name).map_err(|e| unavailable(&e))
}

fn of_chardev(option: &str, e: &ChardevError) -> Failure {
    Failure::of(ExitStatus::Usage, option, e)
}

/// What is to be done with the function: build the VM, and keep it until it ends.
struct Setup<'a> {
    blueprint: Blueprint<'a>,
    control: VmControl,
    consoles: &'a [Attached],
}

impl Use for Setup<'_> {
    type Output = ExitStatus;

    fn vm(&self) -> String {
        self.blueprint.config.name.to_string()
    }

    async fn given_up(&mut self) -> ExitStatus {
        self.control.told_to_quit().await;
        ExitStatus::Done
    }

    async fn on<F: SocFunction>(mut self, function: F) -> Result<ExitStatus, Failure> {
        // By now what had to be started is, a shim of its own say; nothing of the guest, or of the host, was looked at yet.
        if let Some(sandbox) = &self.blueprint.config.sandbox {
            sandbox.apply().map_err(|e| Failure::of(ExitStatus::Unavailable, "--sandbox", &e))?;
        }
        let crossings = Arc::<Crossings>::default();
        let function = Arc::new(ModelledSoc::new(function, crossings.clone()));
        let opened = tokio::select! {
            opened = Link::open(function, Role::Vm) => opened,
            () = self.control.told_to_quit() => return Ok(ExitStatus::Done),
        };
        let (link, end) = opened.map_err(|e| LifeError::from(e).failure())?;
        // The channel carries for as long as its notices are taken.
        let (channel, notices) = end.listen();
        let built = tokio::select! {
            built = Vm::build(&link, channel.clone(), crossings, self.blueprint) => Some(built),
            () = self.control.told_to_quit() => None,
        };
        let ended = match built {
            Some(Ok(vm)) => {
                drop((link, channel));
                return vm.live(notices, self.control, self.consoles).await;
            }
            Some(Err(error)) => Err(error.failure()),
            None => Ok(ExitStatus::Done),
        };
        // A host would hold what there is of a VM for a soc-vmm to come.
        host::destroy(&channel).await;
        ended
    }
}
