//! A VM's vCPUs as its life moves them: into the state of a reset, into the guest, parked.

use pcie_function::SocFunction;

use super::{LifeError, Vm};
use crate::boot::Entry;
use crate::cli::{ExitStatus, Failure, with_causes};
use crate::control::VmControl;
use crate::cpus::{CpuError, NewCpu, Work};
use crate::link::CallError;
use crate::vm::state;

impl<F: SocFunction> Vm<F> {
    /// Puts chips and vCPUs into the state of a reset, the boot processor at `first`.
    pub(super) async fn set_processors(&self, first: Entry) -> Result<(), LifeError> {
        let (cpus, chips) = &self.pristine;
        self.host.set_chips(state::chips(chips)?).await?;
        for (vcpu, pristine) in cpus.iter().enumerate() {
            let entry = if vcpu == 0 { first } else { Entry::application_processor(self.signature) };
            self.host.set_state(vcpu as u32, state::start(pristine, &entry)?).await?;
        }
        Ok(())
    }

    /// Where the boot processor starts; firmware finds the processor's signature in EDX, as after power on.
    pub(super) fn first_entry(&self) -> Entry {
        let mut entry = *self.plan.entry();
        if !self.plan.roms().is_empty() {
            entry.regs.rdx = self.signature.into();
        }
        entry
    }

    /// Lets the processors that are there run.
    pub(super) async fn run(&self) -> Result<(), CallError> {
        self.host.run(&self.cpus.present()).await
    }

    /// Puts a processor in before the machine runs.
    pub(super) async fn add_processor(&mut self, cpu: NewCpu, control: &VmControl) -> Result<(), Failure> {
        let handle = self.cpus.handle();
        let added = handle.add(cpu);
        tokio::pin!(added);
        loop {
            tokio::select! {
                added = &mut added => {
                    return added.map(drop).map_err(|e| Failure::of(ExitStatus::Usage, "-device", &e));
                }
                work = self.cpus.next() => self.change_cpus(work, control).await.map_err(|e| e.of_a_vm())?,
            }
        }
    }

    /// Puts processors in, and parks those that the guest let go.
    pub(super) async fn change_cpus(&mut self, work: Work, control: &VmControl) -> Result<(), LifeError> {
        match work {
            Work::Add(order) => match self.cpus.admit(&order) {
                Ok((cpu, id)) => match self.start_processor(cpu, control.state().is_running()).await {
                    Ok(()) => {
                        self.cpus.insert(cpu, id.clone());
                        order.answer(Ok(id));
                    }
                    Err(e) => {
                        order.answer(Err(CpuError::Host(with_causes(&e))));
                        return if e.is_loss() { Err(e) } else { Ok(()) };
                    }
                },
                Err(e) => order.answer(Err(e)),
            },
            Work::Park => {
                for cpu in self.cpus.ejected() {
                    self.host.pause_one(cpu).await?;
                    self.reset_processor(cpu).await?;
                    self.cpus.gone(cpu);
                }
            }
        }
        Ok(())
    }

    /// Has a parked vCPU wait to be started by the guest: it forgets what it was told while it was parked.
    async fn start_processor(&self, cpu: usize, runs: bool) -> Result<(), LifeError> {
        self.reset_processor(cpu).await?;
        if runs { Ok(self.host.run(&[cpu]).await?) } else { Ok(()) }
    }

    /// Puts a paused vCPU into the state of a reset, while others may run.
    async fn reset_processor(&self, cpu: usize) -> Result<(), LifeError> {
        let (cpus, _) = &self.pristine;
        let records = state::join(&cpus[cpu], &Entry::application_processor(self.signature))?;
        Ok(self.host.set_state(cpu as u32, records).await?)
    }
}
