//! What resets, powering off and panics of the guest come to: as QEMU's `-action`, `-no-reboot` and `-no-shutdown` have it.

use pcie_function::SocFunction;

use super::{LifeError, Vm};
use crate::cli::{ExitStatus, Failure};
use crate::control::{CrashAction, ShutdownCause, VmControl};
use crate::qemu::small::{PanicAction, RebootAction, ShutdownAction};

impl<F: SocFunction> Vm<F> {
    /// The guest wants a reset: it gets one, or that is as good as powering off.
    pub(super) async fn guest_reset(&mut self, control: &mut VmControl) -> Result<Option<ExitStatus>, Failure> {
        if control.actions().reboot == RebootAction::Shutdown {
            return Ok(self.powered_off(ShutdownCause::GuestReset, ExitStatus::Done, control).await);
        }
        self.reset_and_run(control).await.map_err(|e| e.of_a_vm())?;
        control.guest_reset();
        Ok(None)
    }

    /// The machine is off: the VM ends with `status`, or waits to be reset or ended.
    pub(super) async fn powered_off(
        &mut self,
        cause: ShutdownCause,
        status: ExitStatus,
        control: &mut VmControl,
    ) -> Option<ExitStatus> {
        let stays = control.actions().shutdown == ShutdownAction::Pause;
        if stays && let Err(e) = self.host.pause().await {
            // A lost host is reported on its own.
            tracing::warn!("the vCPUs of a machine that is off don't stop: {e}");
        }
        control.ends(cause);
        (!stays).then_some(status)
    }

    /// The guest's kernel told of its panic.
    pub(super) async fn guest_panicked(&mut self, control: &mut VmControl) -> Result<Option<ExitStatus>, Failure> {
        let chosen = control.actions();
        let stays = chosen.shutdown == ShutdownAction::Pause;
        match chosen.panic {
            PanicAction::None => {
                control.panicked(CrashAction::Run);
                Ok(None)
            }
            PanicAction::Pause => self.stop_after_panic(control).await,
            PanicAction::Shutdown if stays => self.stop_after_panic(control).await,
            PanicAction::Shutdown | PanicAction::ExitFailure => {
                control.panicked(CrashAction::Poweroff);
                control.ends(ShutdownCause::GuestPanic);
                Err(Failure::new(ExitStatus::Failed, "the guest's kernel panicked; see its console"))
            }
        }
    }

    async fn stop_after_panic(&mut self, control: &mut VmControl) -> Result<Option<ExitStatus>, Failure> {
        if control.state().is_running() {
            self.host.pause().await.map_err(|e| LifeError::from(e).of_a_vm())?;
            control.stopped_by_panic();
        } else {
            control.panicked(CrashAction::Pause);
        }
        Ok(None)
    }
}
