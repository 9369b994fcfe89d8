//! Signals that ask this process to end.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;

use super::{ControlError, ShutdownCause, VmHandle};

/// From now on SIGINT, SIGTERM and SIGHUP end `vm` in order instead of killing this process, and SIGXFSZ does nothing. Must be called
/// inside a tokio runtime.
///
/// # Errors
/// The signals can't be caught.
pub fn end_on_signals(vm: VmHandle) -> io::Result<JoinHandle<()>> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // Caught, and nothing else: a file that may not grow is an error where it is written.
    let _ = signal(SignalKind::from_raw(nix::libc::SIGXFSZ))?;
    Ok(tokio::spawn(async move {
        // Each of them again: the first may have come when the VM could not end yet.
        let mut told = false;
        loop {
            let name = tokio::select! {
                _ = interrupt.recv() => "SIGINT",
                _ = terminate.recv() => "SIGTERM",
                _ = hangup.recv() => "SIGHUP",
            };
            if !std::mem::replace(&mut told, true) {
                tracing::info!("{name}: the VM ends");
            }
            match vm.quit(ShutdownCause::HostSignal).await {
                Ok(()) | Err(ControlError::Ended) => {}
                Err(e) => tracing::warn!("{name}: {e}"),
            }
        }
    }))
}

#[cfg(test)]
mod tests {
    use nix::sys::signal::{Signal, raise};

    use super::*;
    use crate::control::{Action, VmInfo, channel};

    #[tokio::test]
    async fn each_signal_is_a_quit() {
        let (vm, mut control) = channel(VmInfo { name: "t".into(), cpus: 1, memory: 4096, function: "local".into() });
        let task = end_on_signals(vm).unwrap();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            raise(signal).unwrap();
            let order = control.next().await.unwrap();
            assert_eq!(order.action(), Action::Quit(ShutdownCause::HostSignal));
            control.finish(order, Err("not yet".into()));
        }
        task.abort();
    }
}
