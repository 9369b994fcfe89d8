//! The VM as a migration has it: its memory at once and from any thread, everything else by orders to the VM's control loop.

pub(super) mod clock;
mod description;
mod log;
mod memory;
mod writes;

use std::time::Duration;

use migration::stream::Run;
use migration::{DestinationVm, DeviceState, Region, SourceVm, State, VmError};
use pcie_function::SocFunction;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};

use crate::migrate::{AllWritten, Movable, VcpuWrites, WritingVcpus};
use crate::persist::{Saved, States};

pub(super) use description::Description;
pub(super) use memory::Memory;
pub(super) use writes::Writes;

/// What the control loop is to do; it answers by what it did, or why it couldn't.
#[derive(Debug)]
pub(super) enum MoveOrder {
    /// Tell what the machine is, its devices by name.
    Describe(Reply<Vec<u8>>),
    /// Whether this machine can go on as what is described there.
    Check(Vec<u8>, Reply<()>),
    /// Tell why the guest can't be moved, if it can't.
    Blocker(Reply<Option<String>>),
    /// Tell why no guest can go on here before all of its pages are there, if none can.
    PostCopyBlocker(Reply<Option<String>>),
    /// Have vCPUs and devices stand still.
    Hold(Reply<()>),
    /// Have them go on as they did.
    Release(Reply<()>),
    /// Tell the state of all of them.
    Save(Reply<State>),
    /// Have vCPUs stand still so many percent of their time.
    Throttle(u8, Reply<()>),
    /// The guest is at its destination.
    Gone(Reply<()>),
    /// The guest stays here, and is in a file too, or perhaps elsewhere: it goes on, or stands still if that is wanted.
    Stays(bool, Reply<()>),
    /// Take a guest's state over.
    Load(State, Reply<()>),
    /// Let it go on here.
    Start(Reply<()>),
    /// No guest will come, and why.
    Failed(String),
}

/// Who waits for an order.
pub(super) type Reply<T> = oneshot::Sender<Result<T, VmError>>;

/// Orders that may wait: a migration gives one at a time.
const QUEUED: usize = 4;

/// A VM for a migration.
#[derive(Debug)]
pub(super) struct Mover<F: SocFunction> {
    memory: Memory<F>,
    writes: Writes<F>,
    orders: mpsc::Sender<MoveOrder>,
    runtime: Handle,
}

impl<F: SocFunction> Mover<F> {
    /// A VM with this memory, whose vCPUs write so, and where its control loop finds the orders. Called within a runtime.
    pub(super) fn new(memory: Memory<F>, writes: Writes<F>) -> (Self, mpsc::Receiver<MoveOrder>) {
        let (orders, receiver) = mpsc::channel(QUEUED);
        (Self { memory, writes, orders, runtime: Handle::current() }, receiver)
    }

    fn order<T>(&self, order: impl FnOnce(Reply<T>) -> MoveOrder) -> Result<T, VmError> {
        let (reply, answer) = oneshot::channel();
        let ended = || VmError::from("the VM has ended");
        self.orders.blocking_send(order(reply)).map_err(|_| ended())?;
        answer.blocking_recv().map_err(|_| ended())?
    }
}

impl<F: SocFunction> SourceVm for Mover<F> {
    fn description(&self) -> Result<Vec<u8>, VmError> {
        self.order(MoveOrder::Describe)
    }

    fn regions(&self) -> Vec<Region> {
        self.memory.regions()
    }

    fn comes_whole(&self, region: u32) -> bool {
        self.memory.is_rom(region)
    }

    fn start_log(&self) -> Result<(), VmError> {
        Ok(self.runtime.block_on(self.memory.start_log())?)
    }

    fn take_dirty(&self, region: u32) -> Result<Vec<Run>, VmError> {
        Ok(self.runtime.block_on(self.memory.take_dirty(region))?)
    }

    fn stop_log(&self) {
        self.runtime.block_on(self.memory.stop_log());
    }

    fn read(&self, run: Run, to: &mut [u8]) -> Result<(), VmError> {
        Ok(self.memory.read(run, to)?)
    }

    fn pause(&self) -> Result<(), VmError> {
        self.order(MoveOrder::Hold)
    }

    fn resume(&self) -> Result<(), VmError> {
        self.order(MoveOrder::Release)
    }

    fn state(&self) -> Result<State, VmError> {
        self.order(MoveOrder::Save)
    }

    fn throttle(&self, percent: u8) -> Result<(), VmError> {
        self.order(|reply| MoveOrder::Throttle(percent, reply))
    }

    fn limit_writes(&self, bytes: u64) -> Result<(), VmError> {
        Ok(self.runtime.block_on(self.writes.limit_move(bytes))?)
    }

    fn gone(&self) {
        // A VM that has ended is gone as well.
        let _ = self.order(MoveOrder::Gone);
    }

    fn in_doubt(&self) {
        // A VM that has ended runs no guest.
        let _ = self.order(|reply| MoveOrder::Stays(true, reply));
    }

    fn stays(&self, paused: bool) -> Result<(), VmError> {
        self.order(|reply| MoveOrder::Stays(paused, reply))
    }
}

impl<F: SocFunction> DestinationVm for Mover<F> {
    fn needs_whole(&self, region: u32) -> bool {
        self.memory.is_rom(region)
    }

    fn prepare(&self, description: &[u8]) -> Result<Vec<Region>, VmError> {
        self.order(|reply| MoveOrder::Check(description.to_vec(), reply))?;
        Ok(self.memory.regions())
    }

    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), VmError> {
        Ok(self.memory.write(run, bytes)?)
    }

    fn clear(&self, run: Run) -> Result<(), VmError> {
        static ZEROS: [u8; 64 << 12] = [0; 64 << 12];
        for part in run.parts(64) {
            self.memory.write(part, &ZEROS)?;
        }
        Ok(())
    }

    fn load(&self, state: State) -> Result<(), VmError> {
        self.order(|reply| MoveOrder::Load(state, reply))
    }

    fn start(&self) -> Result<(), VmError> {
        // KVM may have touched pages for the state that was loaded: it is only from here on that it waits for any.
        self.runtime.block_on(self.memory.watch())?;
        self.order(MoveOrder::Start)
    }

    fn can_post_copy(&self) -> bool {
        match self.post_copy_blocker() {
            None => true,
            Some(why) => {
                tracing::info!("{why}");
                false
            }
        }
    }

    fn lacks(&self, runs: &[Run]) -> Result<(), VmError> {
        Ok(self.memory.lacks(runs)?)
    }

    fn wanted(&self, at_most: Duration) -> Vec<Run> {
        self.memory.wanted(at_most)
    }

    fn place(&self, run: Run, bytes: Option<&[u8]>) -> Result<(), VmError> {
        if let Some(bytes) = bytes {
            self.memory.write(run, bytes)?;
        }
        Ok(self.runtime.block_on(self.memory.came(run))?)
    }
}

impl<F: SocFunction> Movable for Mover<F> {
    fn failed(&self, why: String) {
        // The control loop may wait for somebody who waits for a page.
        self.memory.give_up();
        // A VM that has ended needs no reason any more.
        let _ = self.orders.blocking_send(MoveOrder::Failed(why));
    }

    fn blocker(&self) -> Option<String> {
        // Of a VM that has ended there is none.
        self.order(MoveOrder::Blocker).unwrap_or_default()
    }

    fn post_copy_blocker(&self) -> Option<String> {
        self.order(MoveOrder::PostCopyBlocker).unwrap_or_default()
    }
}

impl<F: SocFunction> WritingVcpus for Mover<F> {
    fn tells_vcpus_apart(&self) -> bool {
        self.writes.are_told()
    }

    fn count_writes(&self, on: bool) -> Result<(), VmError> {
        Ok(self.runtime.block_on(self.writes.count(on))?)
    }

    fn written(&self) -> Result<AllWritten, VmError> {
        Ok(self.runtime.block_on(self.writes.so_far())?)
    }

    fn limit_vcpu(&self, vcpu: Option<u32>, bytes: u64) -> Result<(), VmError> {
        Ok(self.runtime.block_on(self.writes.limit(vcpu, bytes))?)
    }

    fn limited_vcpus(&self) -> Result<Vec<VcpuWrites>, VmError> {
        Ok(self.runtime.block_on(self.writes.limited())?)
    }
}

/// States as they travel.
pub(super) fn packed(states: States) -> Vec<DeviceState> {
    let pack = |(name, Saved { version, state })| DeviceState { name, version, state };
    states.into_iter().map(pack).collect()
}

/// States as they came.
///
/// # Errors
/// One is there twice.
pub(super) fn unpacked(devices: Vec<DeviceState>) -> Result<States, crate::persist::StateError> {
    let mut states = States::default();
    for DeviceState { name, version, state } in devices {
        states.add(&name, Saved { version, state })?;
    }
    Ok(states)
}
