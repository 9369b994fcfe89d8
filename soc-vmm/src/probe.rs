//! QEMU's `-machine none`: no VM, and no function; only monitors, which tell a control plane what this program and its host can do.

use std::future::pending;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use api_channel::call::{Call, CpuidEntry};
use api_channel::codec::Reader;
use pcie_function::SocFunction;
use pcie_function::header::Role;

use crate::cli::{ExitStatus, Failure, FunctionSpec};
use crate::control::{self, Action, ListeningSocket, VmControl, VmHandle, VmInfo};
use crate::cpuid::HostCpu;
use crate::daemon::{PidFile, Ready, Side, detach};
use crate::function::{self, Use};
use crate::link::Link;
use crate::qemu::{Chardev, ChardevKind, Probe, Socket};
use crate::qmp;
use crate::runtime::runtime;
use crate::say::say;

/// Serves the monitors until it is told to end.
///
/// # Errors
/// They can't be served. That there is no host to ask is none: it is what they tell.
pub fn serve(probe: &Probe) -> Result<ExitStatus, Failure> {
    let ready = match probe.daemonize.then(detach).transpose()? {
        Some(Side::Front(status)) => return Ok(ExitStatus::Daemon(status)),
        Some(Side::Back(ready)) => Some(ready),
        None => None,
    };
    runtime(1)?.block_on(serve_in_background(probe, ready))?;
    Ok(ExitStatus::Done)
}

async fn serve_in_background(probe: &Probe, ready: Option<Ready>) -> Result<(), Failure> {
    let unavailable = |doing: &str, e: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, doing, e);
    let info = VmInfo { name: "none".into(), cpus: 0, memory: 0, function: "none".into() };
    let (handle, control) = control::channel(info);
    control::end_on_signals(handle.clone()).map_err(|e| unavailable("can't watch for signals", &e))?;
    let sockets = probe.monitors.iter().map(|chardev| socket(&handle, chardev)).collect::<Result<Vec<_>, _>>()?;
    let host = host_cpu().await;
    if let Err(e) = &host {
        // Who started this may show it; what it tells by QMP is that there is no KVM.
        say(format_args!("soc-vmm: {e}"));
    }
    control.has_host(host.ok());
    let monitors =
        qmp::Server::start(&handle, sockets, qmp::Greet::AtOnce).map_err(|e| unavailable("can't serve QMP", &e))?;
    let pid_file = probe.pid_file.as_deref().map(|path| PidFile::write(path, |_| Ok(()))).transpose()?;
    if let Some(ready) = ready {
        ready.say().map_err(|e| unavailable("-daemonize", &e))?;
    }
    until_the_end(control).await;
    monitors.close().await;
    drop(pid_file);
    Ok(())
}

/// Where a monitor listens.
fn socket(vm: &VmHandle, chardev: &Chardev) -> Result<ListeningSocket, Failure> {
    let wrong = |e: &dyn std::error::Error| Failure::of(ExitStatus::Usage, &format!("-chardev id={}", chardev.id), e);
    match &chardev.kind {
        ChardevKind::Listen(Socket::Path(path)) => ListeningSocket::bind(path).map_err(|e| wrong(&e)),
        ChardevKind::Listen(Socket::Descriptor(name)) => {
            let fd: OwnedFd = vm.fds().take(name).map_err(|e| wrong(&e))?;
            ListeningSocket::inherited(fd).map_err(|e| wrong(&e))
        }
        _ => Err(Failure::new(
            ExitStatus::Usage,
            format!(
                "-chardev id={}: a monitor is on a socket that listens: write socket,path=F,server=on,wait=off",
                chardev.id
            ),
        )),
    }
}

/// Refuses what needs a machine, until it is told to end.
async fn until_the_end(mut control: VmControl) {
    while let Some(order) = control.next().await {
        let action = order.action();
        if let Action::Quit(_) = action {
            control.finish(order, Ok(()));
            return;
        }
        control.finish(order, Err("there is no machine: this process was started with -machine none".into()));
    }
}

/// The host's processor, by the function of the configuration that is the host's own: a VM's is not touched.
async fn host_cpu() -> Result<HostCpu, Failure> {
    let table = match FunctionSpec::by_configuration()? {
        FunctionSpec::Pool => crate::pool::host_cpuid()?,
        spec => function::open(&spec, Role::Host, Ask).await?,
    };
    // KVM's in-kernel local APIC has the timer's TSC-deadline mode whatever the host's own processor does (KVM api.rst §4.46).
    HostCpu::new(&table, true).map_err(|e| Failure::of(ExitStatus::Unavailable, "the host's processor", &e))
}

/// Asks a host for the CPUID that its KVM supports.
pub(crate) struct Ask;

impl Use for Ask {
    type Output = Vec<CpuidEntry>;

    async fn given_up(&mut self) -> Self::Output {
        // A signal ends this process.
        pending().await
    }

    fn vm(&self) -> String {
        "none".into()
    }

    async fn on<F: SocFunction>(self, function: F) -> Result<Self::Output, Failure> {
        let failed = |e: &dyn std::error::Error, loss| {
            Failure::of(ExitStatus::Unavailable, "the host's processor", e).by_loss(loss)
        };
        let opened = Link::open(Arc::new(function), Role::Host).await;
        let (_link, end) = opened.map_err(|e| failed(&e, e.is_loss()))?;
        let (channel, _notices) = end.listen();
        let reply = channel.call(&Call::SupportedCpuid).await.map_err(|e| failed(&e, e.is_loss()))?;
        /// More than any processor has.
        const MOST: usize = 512;
        Reader::new(&reply.bulk).list(MOST).map_err(|_| failed(&crate::link::CallError::Malformed, false))
    }
}
