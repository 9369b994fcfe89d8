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
use crate::cli::{ExitStatus, Failure, RunConfig};
use crate::console::{Attached, ConsoleError, DebugconBackend, SerialBackend};
use crate::control::{self, RunDir, VmControl, VmInfo};
use crate::devices::{input_pipe, output_pipe};
use crate::function::{self, Use};
use crate::layout::MemoryLayout;
use crate::link::Link;
use crate::qmp;
use crate::runtime::runtime;
use crate::say::say;

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
    // Files first: a wrong one is refused before anything is touched.
    let layout = MemoryLayout::new(config.memory.size).map_err(|e| Failure::of(ExitStatus::Usage, "--memory", &e))?;
    let (plan, media) = media::open(config, &layout)?;
    runtime(2)?.block_on(async {
        let info = VmInfo {
            name: config.name.to_string(),
            cpus: config.cpus,
            memory: config.memory.size,
            function: config.function.to_string(),
        };
        let (handle, mut control) = control::channel(info);
        control.set_autostart(!config.paused);
        // From here on a signal leaves nothing behind.
        control::end_on_signals(handle.clone()).map_err(|e| unavailable("can't watch for signals", &e))?;
        let directory = RunDir::of_user().map_err(|e| unavailable("--name", &e))?;
        let mut claim = directory.claim(&config.name).map_err(|e| unavailable("--name", &e))?;
        let mut sockets: Vec<_> = claim.take_socket().into_iter().collect();
        for path in &config.qmp {
            sockets
                .push(control::ListeningSocket::bind(path).map_err(|e| Failure::of(ExitStatus::Usage, "--qmp", &e))?);
        }
        let monitors = qmp::Server::start(&handle, sockets).map_err(|e| unavailable("can't serve QMP", &e))?;

        let waker = Waker::new().map_err(|e| unavailable("can't start", &e))?;
        let (output, reader) = output_pipe(SERIAL_QUEUE, waker.clone());
        let (writer, input) = input_pipe(SERIAL_QUEUE, waker.clone());
        let wrong = |option: &str, e: &ConsoleError| Failure::of(ExitStatus::Usage, option, e);
        let serial = SerialBackend::open(&config.serial).map_err(|e| wrong("--serial", &e))?;
        if let Some(path) = serial.pty_path() {
            say(format_args!("soc-vmm: the serial port is {}", path.display()));
        }
        // Its output would destroy it.
        let is_no_image = |option: &str, file: Option<&File>| {
            let role = file.and_then(|file| file.metadata().ok()).and_then(|file| plan.role_of(&file));
            let role = role.map(|role| format!("{role} image"));
            let role = role.or_else(|| file.and_then(|file| media.role_of(file)).map(str::to_owned));
            role.map_or(Ok(()), |role| {
                let why = format!("{option}: the file is the {role} of this VM; give another one");
                Err(Failure::new(ExitStatus::Usage, why))
            })
        };
        is_no_image("--serial", serial.file())?;
        let mut consoles = vec![serial.attach(reader, writer, &handle).map_err(|e| wrong("--serial", &e))?];
        let mut debugcon = None;
        if let Some(spec) = &config.debugcon {
            let (output, reader) = output_pipe(DEBUGCON_QUEUE, waker.clone());
            let backend = DebugconBackend::open(spec).map_err(|e| wrong("--debugcon", &e))?;
            is_no_image("--debugcon", backend.file())?;
            consoles.push(backend.attach(reader).map_err(|e| wrong("--debugcon", &e))?);
            debugcon = Some(output);
        }
        let streams = Streams { serial: (output, input), debugcon };
        let (tray, listener, device_listeners) =
            (control.tray_listener(), control.slot_listener(), control.device_listeners());
        let cpu_listener = control.cpu_listener();
        let state_dir = claim.state_dir();
        let blueprint = Blueprint {
            config,
            layout,
            plan,
            media,
            tray,
            listener,
            device_listeners,
            cpu_listener,
            streams,
            waker,
            state_dir,
        };
        let setup = Setup { blueprint, control, consoles: &consoles };
        let ended = function::open(&config.function, Role::Vm, setup).await;
        for console in consoles {
            console.finish().await;
        }
        monitors.close().await;
        ended
    })
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
