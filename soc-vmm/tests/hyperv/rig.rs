//! A guest's Hyper-V side without a host: memory, SINTs that remember, the test device on a bus.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};

use soc_vmm::bus::{Access, Answer, Bus, Deferred, LateAnswer, RequestId, Ticket, Wake};
use soc_vmm::devices::HypervTestdev;
use soc_vmm::hyperv::{Hyperv, Sint, SintRoute, SintSink};
use soc_vmm::memory::{GuestMemory, MemoryError};

/// Bytes of RAM, from 0 on.
pub(crate) const RAM: u64 = 0x10_0000;
/// vCPUs.
pub(crate) const VCPUS: u16 = 2;
/// Routes that the host has.
pub(crate) const ROUTES: usize = 6;

/// What the guest does when the SoC is about to reach its memory for the n-th time.
type Moment = (usize, Box<dyn FnOnce(&mut [u8]) + Send>);

/// RAM in which the guest may act between any two accesses of the SoC.
pub(crate) struct Ram {
    bytes: Mutex<Vec<u8>>,
    moment: Mutex<Option<Moment>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Ram {
    /// Has the guest act before the SoC's access number `n`, counted from 0.
    pub(crate) fn before(&self, n: usize, act: impl FnOnce(&mut [u8]) + Send + 'static) {
        *lock(&self.moment) = Some((n, Box::new(act)));
    }

    /// The guest's own access.
    pub(crate) fn guest<T>(&self, act: impl FnOnce(&mut [u8]) -> T) -> T {
        act(&mut lock(&self.bytes))
    }

    fn reach(&self, addr: u64, len: usize) -> Result<(MutexGuard<'_, Vec<u8>>, usize), MemoryError> {
        let mut bytes = lock(&self.bytes);
        let mut moment = lock(&self.moment);
        match moment.take() {
            Some((0, act)) => act(&mut bytes),
            Some((n, act)) => *moment = Some((n - 1, act)),
            None => {}
        }
        let end = addr.checked_add(len as u64);
        match end.is_some_and(|end| end <= RAM) {
            true => Ok((bytes, addr as usize)),
            false => Err(MemoryError::NotRam { addr, len: len as u64 }),
        }
    }
}

impl GuestMemory for Ram {
    fn read(&self, addr: u64, data: &mut [u8]) -> Result<(), MemoryError> {
        let (bytes, at) = self.reach(addr, data.len())?;
        data.copy_from_slice(&bytes[at..][..data.len()]);
        Ok(())
    }

    fn write(&self, addr: u64, data: &[u8]) -> Result<(), MemoryError> {
        let (mut bytes, at) = self.reach(addr, data.len())?;
        bytes[at..][..data.len()].copy_from_slice(data);
        Ok(())
    }
}

/// The host's SINTs.
#[derive(Default)]
pub(crate) struct Sints {
    /// How many routes there are to each.
    pub(crate) routes: BTreeMap<Sint, usize>,
    /// Interrupts that were raised.
    pub(crate) raised: Vec<Sint>,
    /// SINTs of which the guest has ended an interrupt.
    pub(crate) ended: Vec<Sint>,
    /// Accesses that wait until the host has their routes.
    pub(crate) waiting: Vec<Ticket>,
}

struct Sink(Arc<Mutex<Sints>>);

impl SintSink for Sink {
    fn route(&self, sint: Sint) -> Option<Box<dyn SintRoute>> {
        let mut sints = lock(&self.0);
        if sints.routes.values().sum::<usize>() >= ROUTES {
            return None;
        }
        *sints.routes.entry(sint).or_default() += 1;
        Some(Box::new(Route { sints: self.0.clone(), sint }))
    }

    fn take_ended(&self) -> Vec<Sint> {
        std::mem::take(&mut lock(&self.0).ended)
    }
}

struct Route {
    sints: Arc<Mutex<Sints>>,
    sint: Sint,
}

impl SintRoute for Route {
    fn raise(&self) {
        lock(&self.sints).raised.push(self.sint);
    }

    fn when_ready(&self, ticket: Ticket) {
        lock(&self.sints).waiting.push(ticket);
    }
}

impl Drop for Route {
    fn drop(&mut self) {
        let mut sints = lock(&self.sints);
        let count = sints.routes.entry(self.sint).or_default();
        *count -= 1;
        if *count == 0 {
            sints.routes.remove(&self.sint);
        }
    }
}

#[derive(Debug)]
struct NoWake;

impl Wake for NoWake {
    fn wake(&self) {}
}

/// All of it.
pub(crate) struct Rig {
    pub(crate) ram: Arc<Ram>,
    pub(crate) hyperv: Arc<Hyperv>,
    pub(crate) bus: Bus,
    device: Arc<Mutex<HypervTestdev>>,
    sints: Arc<Mutex<Sints>>,
    sequence: u32,
    late: (mpsc::Sender<LateAnswer>, mpsc::Receiver<LateAnswer>),
}

impl Rig {
    pub(crate) fn new() -> Self {
        let ram = Arc::new(Ram { bytes: Mutex::new(vec![0; RAM as usize]), moment: Mutex::new(None) });
        let sints = Arc::<Mutex<Sints>>::default();
        let hyperv = Arc::new(Hyperv::new(VCPUS, ram.clone(), Arc::new(Sink(sints.clone()))));
        let mut bus = Bus::default();
        let device = Arc::new(Mutex::new(HypervTestdev::new(hyperv.clone())));
        bus.insert(HypervTestdev::RANGES.ports, Box::new(device.clone())).expect("nothing else is there");
        Self { ram, hyperv, bus, device, sints, sequence: 0, late: mpsc::channel() }
    }

    /// What the host's SINTs remember.
    pub(crate) fn sints(&self) -> MutexGuard<'_, Sints> {
        lock(&self.sints)
    }

    /// The test device.
    pub(crate) fn device(&self) -> MutexGuard<'_, HypervTestdev> {
        lock(&self.device)
    }

    /// A write to the test device; whether it is complete, the host not having done anything since.
    pub(crate) fn write(&mut self, offset: u64, len: u8, data: u64) -> bool {
        self.sequence += 1;
        let wake: Arc<dyn Wake> = Arc::new(NoWake);
        let id = RequestId { vcpu: 0, sequence: self.sequence };
        let access = Access { vcpu: 0, host_tsc: 0, len };
        let reply = Deferred::new(id, &self.late.0, &wake);
        !matches!(self.bus.write(0x3000 + offset, data, &access, reply), Answer::Deferred)
    }

    /// The host makes its routes; how many accesses that completes.
    pub(crate) fn settle(&self) -> usize {
        let waiting = std::mem::take(&mut self.sints().waiting);
        waiting.into_iter().for_each(|ticket| ticket.done(0));
        self.late.1.try_iter().filter(|late| matches!(late.answer, Answer::Done(_))).count()
    }

    /// A command of the test device, complete.
    pub(crate) fn command(&mut self, command: u8, vcpu: u8, sint: u8, connection: u8) {
        self.write(0, 4, u32::from_le_bytes([sint, vcpu, command, connection]).into());
        self.settle();
    }
}
