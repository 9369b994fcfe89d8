//! A vCPU as the API thread holds it.

use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuFd;
use pcie_function::HostFunction;

use super::shared::{Answer, Command, Place, Shared, Want};
use super::{Lane, Runner};
use crate::kvm::{KICK, StatsFd};
use crate::sandbox::VcpuFilter;
use crate::vm::Environment;

/// A vCPU's thread, and the way to it. Dropping it ends the thread.
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    /// KVM's counters of this vCPU, where this KVM tells them.
    pub(crate) stats: Option<StatsFd>,
    thread: Option<JoinHandle<()>>,
}

/// What a thread is made of.
pub(crate) struct Plan<F: HostFunction> {
    pub(crate) fd: VcpuFd,
    pub(crate) lane: Lane<F>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) stats: Option<StatsFd>,
}

/// Bytes of a vCPU thread's stack: little of it is ever touched.
const STACK: usize = 128 << 10;

impl Handle {
    /// Starts the thread of a vCPU, paused, confined by `filter`.
    pub(crate) fn start<F: HostFunction + 'static>(
        plan: Plan<F>,
        environment: Arc<Environment>,
        filter: Option<VcpuFilter>,
    ) -> std::io::Result<Self> {
        let Plan { fd, lane, shared, stats } = plan;
        let runner = Runner::<F> {
            fd,
            lane,
            shared: shared.clone(),
            environment,
            called: true,
            pending: false,
            posted: Arc::from([]),
            generation: 0,
        };
        let name = format!("vcpu{}", shared.index);
        let thread = std::thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
            // Where the filter of the whole process could be applied, this one can: else there is no reason to go on.
            if let Some(Err(error)) = filter.map(|filter| filter.apply()) {
                panic!("a vCPU's thread can't be confined: {error}");
            }
            runner.live();
        })?;
        Ok(Self { shared, stats, thread: Some(thread) })
    }

    /// Gives an order and makes the thread look at it.
    pub(crate) fn want(&self, want: Want) {
        self.shared.want(want);
        self.kick();
    }

    /// Keeps the vCPU out of the guest; [`Handle::out_by`] tells when it is.
    pub(crate) fn hold(&self) {
        self.shared.hold(true);
        self.kick();
    }

    /// Takes a hold back.
    pub(crate) fn release(&self) {
        self.shared.hold(false);
        self.kick();
    }

    /// Makes the vCPU leave and re-enter the guest.
    pub(crate) fn nudge(&self) {
        self.shared.nudge();
        self.kick();
    }

    /// Waits until the vCPU is out of the guest; says whether it is by `deadline`.
    pub(crate) fn out_by(&self, deadline: Instant) -> bool {
        self.shared.out_by(deadline)
    }

    /// Whether a pause is complete.
    pub(crate) fn is_paused(&self) -> bool {
        let (want, place) = self.shared.standing();
        want != Want::Run && matches!(place, Place::Out | Place::Stuck)
    }

    /// Has the thread do something, out of the guest.
    pub(crate) fn ask(&self, command: Command) -> Answer {
        self.shared.ask(command)
    }

    /// The same; where it takes longer than `limit`, `give_up` is called, which has what it waits for end.
    pub(crate) fn ask_in(&self, limit: Duration, command: Command, give_up: impl FnOnce()) -> Answer {
        self.shared.ask_in(limit, command, give_up)
    }

    /// Interrupts KVM_RUN and the sleep on the lane.
    fn kick(&self) {
        let _ = self.shared.wake.write(1);
        if let Some(thread) = &self.thread {
            // It fails only for a thread that has ended.
            let _ = nix::sys::pthread::pthread_kill(thread.as_pthread_t(), KICK);
        }
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.want(Want::Stop);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
