//! A vCPU: its thread runs the guest and carries its exits to the SoC.

mod exit;
mod handle;
mod lane;
mod lanes;
mod shared;
mod state;

use std::sync::Arc;
use std::time::Duration;

use api_channel::call::PostedRange;
use ioreq_ring::wire::STRING_PAGE;
use ioreq_ring::{BusMemory, Completion, Direction, Kind, Request, Status};
use kvm_ioctls::VcpuFd;
use nix::errno::Errno;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use pcie_function::HostFunction;

pub(crate) use handle::{Handle, Plan};
pub(crate) use lane::{Lane, Spin};
pub(crate) use lanes::Lanes;
pub(crate) use shared::{Command, Shared, Want};
pub(crate) use state::{Abilities, from_cpuid, skip_or_refuse};

use crate::error::Refusal;
use crate::kvm::{self, host_tsc};
use crate::vm::Environment;
use exit::Action;
use lane::Unanswered;
use shared::{Count, Next};

/// What a vCPU's thread owns.
struct Runner<F: HostFunction> {
    fd: VcpuFd,
    lane: Lane<F>,
    shared: Arc<Shared>,
    environment: Arc<Environment>,
    /// Orders were acknowledged on the lane: look at them before entering the guest.
    called: bool,
    /// The guest ran since its last exit was finished.
    pending: bool,
    /// Ranges of posted writes, sorted, as of `generation`.
    posted: Arc<[PostedRange]>,
    generation: u64,
}

impl<F: HostFunction> Runner<F> {
    /// The thread's whole life.
    fn live(mut self) {
        if let Err(Unanswered::Broken(error)) = self.run() {
            self.environment.notices.lane_broken(self.shared.index, error);
            self.shared.stuck();
        }
    }

    fn run(&mut self) -> Result<(), Unanswered> {
        loop {
            if self.called || self.shared.called() {
                self.called = false;
                match self.shared.attend(self.pending)? {
                    Next::Enter => {}
                    Next::Settle => {
                        self.settle()?;
                        self.called = true;
                        continue;
                    }
                    Next::Do(command) => {
                        let answer = self.obey(command);
                        self.shared.answer(answer);
                        self.called = true;
                        continue;
                    }
                }
            }
            self.pending = true;
            match kvm::run(&self.fd) {
                Ok(()) => self.exit()?,
                Err(Errno::EINTR) => self.shared.page.stay(),
                // A vCPU that waits for SIPI was woken.
                Err(Errno::EAGAIN) => {}
                Err(errno) => self.report(&exit::run_failed(errno as i32, host_tsc()))?,
            }
        }
    }

    /// Finishes the pending exit without running the guest: KVM applies its answer, and comes back at once. A string or an access
    /// across a page can exit again; that is served too.
    fn settle(&mut self) -> Result<(), Unanswered> {
        self.shared.page.leave();
        loop {
            match kvm::run(&self.fd) {
                Ok(()) => self.exit()?,
                Err(Errno::EAGAIN) => {}
                Err(Errno::EINTR) => {
                    self.pending = false;
                    // Its soft-lockup watchdog need not bark when it goes on. A guest without kvmclock has no place for the note.
                    let _ = self.fd.kvmclock_ctrl();
                    break;
                }
                Err(errno) => {
                    self.report(&exit::run_failed(errno as i32, host_tsc()))?;
                    self.pending = false;
                    break;
                }
            }
            if self.called {
                break;
            }
        }
        self.shared.page.stay();
        Ok(())
    }

    /// Carries one exit to the SoC and its answer to KVM.
    #[inline]
    fn exit(&mut self) -> Result<(), Unanswered> {
        let tsc = host_tsc();
        match exit::action(&self.shared.page.exit(), tsc) {
            Action::Enter => Ok(()),
            Action::MakeRoom => self.make_room(),
            Action::Ask(request) => self.ask(&request),
            Action::Report(request) => self.report(&request),
        }
    }

    /// Makes room in the dirty ring, or stands still until a limit allows it; the next entry tells whether there is room.
    #[cold]
    fn make_room(&mut self) -> Result<(), Unanswered> {
        self.shared.counters.add(Count::RingFull, 1);
        match self.environment.rings.as_ref().map_or(Err(Errno::ENOSYS), |rings| rings.full(self.shared.index)) {
            Ok(Duration::ZERO) => Ok(()),
            Ok(time) => {
                let stood = self.shared.stand(time);
                self.shared.counters.add(Count::StandNs, stood.as_nanos() as u64);
                Ok(())
            }
            Err(errno) => self.report(&exit::run_failed(errno as i32, host_tsc())),
        }
    }

    fn ask(&mut self, request: &Request) -> Result<(), Unanswered> {
        self.shared.counters.add(kind_count(request.kind), 1);
        if request.string {
            self.shared.counters.add(Count::String, 1);
        }
        if request.direction == Direction::Write && self.is_posted(request) && self.lane.post(request, &self.shared)? {
            return Ok(());
        }
        if request.string && request.direction == Direction::Write {
            self.send_string(request.length.into());
        }
        let completion = self.lane.ask(request, &self.shared, &mut self.called)?;
        self.apply(request, &completion);
        self.follow_up(&completion);
        Ok(())
    }

    /// Tells the SoC why the vCPU can't go on; it stays out of the guest until it is told to run.
    #[cold]
    fn report(&mut self, request: &Request) -> Result<(), Unanswered> {
        self.shared.counters.add(Count::Report, 1);
        let completion = self.lane.ask(request, &self.shared, &mut self.called)?;
        self.follow_up(&Completion { park: true, ..completion });
        Ok(())
    }

    /// Gives KVM the answer to the pending exit.
    fn apply(&mut self, request: &Request, completion: &Completion) {
        match completion.status {
            Status::OK => {}
            Status::UNCLAIMED => self.shared.counters.add(Count::Unclaimed, 1),
            _ => self.shared.counters.add(Count::Failed, 1),
        }
        let page = &self.shared.page;
        let data = exit::read_data(completion);
        match (request.kind, request.direction) {
            (Kind::PIO, Direction::Read) if request.string => {
                self.take_string(request.length.into(), completion.status == Status::OK);
            }
            (Kind::PIO, Direction::Read) => page.write_io(0, &data.to_le_bytes()),
            (Kind::MMIO, Direction::Read) => page.write_mmio(data),
            (Kind::MSR, _) => page.write_msr(data, completion.status != Status::OK),
            (Kind::HV_HYPERCALL, _) => page.write_hv_hypercall(exit::hv_result(completion)),
            (Kind::HYPERCALL, _) => page.write_hypercall(data),
            _ => {}
        }
    }

    /// Line changes, before the guest runs again: else it would end an interrupt whose line is still high. Then a park.
    #[inline]
    fn follow_up(&mut self, completion: &Completion) {
        for change in completion.lines.iter().flatten() {
            if !self.environment.lines.apply(*change) {
                self.shared.counters.add(Count::LineStale, 1);
            }
        }
        if completion.park {
            self.shared.park();
        }
    }

    fn is_posted(&mut self, request: &Request) -> bool {
        if let Some((ranges, generation)) = self.environment.posted.newer_than(self.generation) {
            (self.posted, self.generation) = (ranges, generation);
        }
        !self.posted.is_empty() && crate::vm::posted::contains(&self.posted, request)
    }

    fn send_string(&self, len: usize) {
        let mut chunk = [0; 256];
        for at in (0..len.min(STRING_PAGE)).step_by(chunk.len()) {
            let some = chunk.len().min(len - at);
            self.shared.page.read_io(at, &mut chunk[..some]);
            self.lane.ring().outs().copy_in(at, &chunk[..some]);
        }
    }

    fn take_string(&self, len: usize, answered: bool) {
        let mut chunk = [0xff; 256];
        for at in (0..len.min(STRING_PAGE)).step_by(chunk.len()) {
            let some = chunk.len().min(len - at);
            if answered {
                self.lane.ring().ins().copy_out(at, &mut chunk[..some]);
            }
            self.shared.page.write_io(at, &chunk[..some]);
        }
    }

    fn obey(&self, command: Command) -> shared::Answer {
        match command {
            Command::Read(groups) => state::read(&self.fd, &self.environment.abilities, groups),
            Command::Write(records) => {
                state::write(&self.fd, &self.environment.abilities, &records).map(|()| Vec::new())
            }
            Command::SetCpuid(entries) => state::set_cpuid(&self.fd, &entries).map(|()| Vec::new()),
            Command::Pin(cpus) => pin(&cpus).map(|()| Vec::new()),
        }
    }
}

/// Keeps this thread on these CPUs of the host: sched_setaffinity(2).
fn pin(cpus: &[u32]) -> Result<(), Refusal> {
    if cpus.is_empty() {
        return Err(Refusal::argument("no CPU is named".into()));
    }
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu as usize)
            .map_err(|_| Refusal::argument(format!("CPU {cpu}: numbers end at {}", CpuSet::count() - 1)))?;
    }
    sched_setaffinity(Pid::from_raw(0), &set).map_err(|errno| match errno {
        Errno::EINVAL => Refusal::argument(format!("the host has no CPU {cpus:?} that this shim may use")),
        errno => Refusal::os("set a vCPU's CPUs", errno),
    })
}

fn kind_count(kind: Kind) -> Count {
    match kind {
        Kind::PIO => Count::Pio,
        Kind::MMIO => Count::Mmio,
        Kind::MSR => Count::Msr,
        Kind::HYPERCALL | Kind::HV_HYPERCALL => Count::Hypercall,
        Kind::EOI => Count::Eoi,
        _ => Count::OtherKind,
    }
}
