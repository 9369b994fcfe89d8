//! The processors of a machine: those that are there, and those that can be put in and taken out while the guest runs.
//!
//! The host makes a vCPU for each that there can be, when it makes the VM. One that isn't there is parked: its vCPU is paused, in the
//! state of a reset, and whatever start-up interrupts the guest sends it are forgotten when it is put in. So a guest can't run on a
//! processor that it wasn't given. The guest sees what there is by ACPI ([`crate::devices::CpuHotplug`]).
//!
//! Who asks for a processor has a [`CpusHandle`]; the VM's control loop, which alone has vCPUs run and stop, has the [`Cpus`].

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use crate::cpuid::{Place, Topology};
use crate::devices::{AcpiHandle, CpuHotplug, CpuHotplugHandle, CpuReport, CpuSink};
use crate::slots::is_name;

/// Orders that may wait.
const QUEUED: usize = 16;
/// How long one may take: an emulated server starves for seconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// A processor to put in.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewCpu {
    /// Where; none: the first place that is free.
    pub place: Option<Place>,
    /// The name that it is known by; none: `cpuN`, by its number.
    pub id: Option<String>,
}

/// A place for a processor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSlot {
    /// The processor's number.
    pub index: usize,
    /// Where it is.
    pub place: Place,
    /// The processor that is there, or is just leaving; none: there is none.
    pub occupant: Option<Occupant>,
}

/// A processor that is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Occupant {
    /// Its name.
    pub id: String,
    /// Where it is in QEMU's tree of objects.
    pub path: String,
}

impl Occupant {
    /// One that was there from the start.
    fn initial(index: usize) -> Self {
        Self { id: own_name(index), path: format!("/machine/unattached/device[{index}]") }
    }

    fn added(id: String) -> Self {
        Self { path: format!("/machine/peripheral/{id}"), id }
    }
}

/// Why a processor can't be put in or taken out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CpuError {
    /// Its name isn't one.
    #[error("id={0}: an id is a letter, then letters, digits and any of '-', '.', '_', at most 64 characters")]
    Malformed(String),
    /// Another processor has its name.
    #[error("id={0} is a processor of this VM already: give another id")]
    Taken(String),
    /// Every place has one.
    #[error("all {0} processors that this VM can have are there: --cpus N,maxcpus=M leaves room for more")]
    Full(usize),
    /// That place has one.
    #[error("there is a processor at socket {}, core {}, thread {} already", .0.socket, .0.core, .0.thread)]
    Occupied(Place),
    /// The place's last processor is not parked yet.
    #[error("the processor at socket {}, core {}, thread {} is just leaving: try again", .0.socket, .0.core, .0.thread)]
    Leaving(Place),
    /// There is no such place.
    #[error("this VM has no place for a processor at socket {}, core {}, thread {}", .0.socket, .0.core, .0.thread)]
    NoPlace(Place),
    /// There is no such processor.
    #[error("there is no processor '{0}'")]
    NotFound(String),
    /// The boot processor.
    #[error("'{0}' is the processor that the VM starts on: it stays")]
    First(String),
    /// The host did not do its part.
    #[error("the host can't let the processor run: {0}")]
    Host(String),
    /// Nobody answers.
    #[error("the VM did not answer within {} s", PATIENCE.as_secs())]
    Timeout,
    /// There is no machine any more.
    #[error("the VM has ended")]
    Ended,
}

/// Hears of processors.
pub trait CpuListener: Send + Sync {
    /// A processor was taken out, and is parked.
    fn deleted(&self, cpu: Occupant);

    /// The guest reports of a processor, which has this name if it is there.
    fn reported(&self, id: Option<String>, report: CpuReport);
}

/// A machine's processors, for the VM's control loop.
pub struct Cpus {
    shared: Arc<Shared>,
    orders: mpsc::Receiver<Order>,
}

/// The way to a machine's processors for as long as it is there. Any thread may use it; cheap to clone.
#[derive(Clone, Debug)]
pub struct CpusHandle(Weak<Shared>);

/// What is to be done by the control loop.
#[derive(Debug)]
pub enum Work {
    /// Put a processor in.
    Add(Order),
    /// Park those that the guest ejected: [`Cpus::ejected`].
    Park,
}

/// A processor to put in, and who waits for it.
#[derive(Debug)]
pub struct Order {
    new: NewCpu,
    reply: oneshot::Sender<Result<String, CpuError>>,
}

impl Order {
    /// Tells what came of it.
    pub fn answer(self, outcome: Result<String, CpuError>) {
        // Who asked may have gone.
        let _ = self.reply.send(outcome);
    }
}

struct Shared {
    topology: Topology,
    hotplug: CpuHotplugHandle,
    occupants: Arc<Mutex<Occupants>>,
    listener: Arc<dyn CpuListener>,
    ejected: Arc<Notify>,
    orders: mpsc::Sender<Order>,
}

/// By number.
type Occupants = Vec<Option<Occupant>>;

impl Cpus {
    /// The processors of `topology`, of which the first `present` are there, and their registers. `acpi` tells the guest of changes.
    pub fn new(
        topology: Topology,
        present: u16,
        acpi: AcpiHandle,
        listener: Arc<dyn CpuListener>,
    ) -> (Self, CpuHotplug) {
        let apic_ids: Vec<u32> = topology.apic_ids().collect();
        let initial = usize::from(present);
        let occupant = |index| (index < initial).then(|| Occupant::initial(index));
        let occupants = Arc::new(Mutex::new((0..apic_ids.len()).map(occupant).collect()));
        let ejected = Arc::<Notify>::default();
        let sink = Sink { occupants: Arc::clone(&occupants), listener: listener.clone(), ejected: ejected.clone() };
        let (registers, hotplug) = CpuHotplug::new(acpi, apic_ids, initial, Arc::new(sink));
        let (sender, orders) = mpsc::channel(QUEUED);
        let shared = Shared { topology, hotplug, occupants, listener, ejected, orders: sender };
        (Self { shared: Arc::new(shared), orders }, registers)
    }

    /// The way to them.
    pub fn handle(&self) -> CpusHandle {
        CpusHandle(Arc::downgrade(&self.shared))
    }

    /// What the guest's firmware and tables ask.
    pub fn registers(&self) -> &CpuHotplugHandle {
        &self.shared.hotplug
    }

    /// The numbers of those that are there.
    pub fn present(&self) -> Vec<usize> {
        self.shared.hotplug.present()
    }

    /// Waits for something to do. Safe to cancel.
    pub async fn next(&mut self) -> Work {
        tokio::select! {
            () = self.shared.ejected.notified() => Work::Park,
            // It has a sender of its own, so that it is never closed.
            Some(order) = self.orders.recv() => Work::Add(order),
        }
    }

    /// Whether what is ordered can be done, where, and by which name. The control loop then has its vCPU run, and calls
    /// [`Cpus::insert`].
    ///
    /// # Errors
    /// It can't.
    pub fn admit(&self, order: &Order) -> Result<(usize, String), CpuError> {
        self.shared.admit(&order.new)
    }

    /// A processor is ready to be started: the guest hears of it.
    pub fn insert(&self, index: usize, id: String) {
        lock(&self.shared.occupants)[index] = Some(Occupant::added(id));
        self.shared.hotplug.insert(index);
    }

    /// The guest starts anew, its vCPUs stopped: what it was asked to let go, it has no more.
    pub fn start_anew(&self) {
        self.shared.hotplug.start_anew();
    }

    /// The numbers of those that are to be parked; [`Cpus::gone`] then.
    pub fn ejected(&self) -> Vec<usize> {
        self.shared.hotplug.ejected()
    }

    /// A processor is parked.
    pub fn gone(&self, index: usize) {
        let occupant = lock(&self.shared.occupants)[index].take();
        self.shared.hotplug.gone(index);
        if let Some(cpu) = occupant {
            self.shared.listener.deleted(cpu);
        }
    }
}

impl CpusHandle {
    /// Puts a processor in; its name. The guest hears of it, and starts it when it wants.
    ///
    /// # Errors
    /// Nothing has changed, unless it is [`CpuError::Timeout`].
    pub async fn add(&self, new: NewCpu) -> Result<String, CpuError> {
        let (reply, answer) = oneshot::channel();
        let orders = self.shared()?.orders.clone();
        let exchange = async {
            orders.send(Order { new, reply }).await.map_err(|_| CpuError::Ended)?;
            answer.await.map_err(|_| CpuError::Ended)?
        };
        tokio::time::timeout(PATIENCE, exchange).await.map_err(|_| CpuError::Timeout)?
    }

    /// Asks the guest to let go of a processor; a reset takes it too. May be asked again.
    ///
    /// # Errors
    /// There is none, or it is the first one.
    pub fn remove(&self, id: &str) -> Result<(), CpuError> {
        let shared = self.shared()?;
        match lock(&shared.occupants).iter().position(|cpu| has_name(cpu, id)) {
            None => Err(CpuError::NotFound(id.into())),
            Some(0) => Err(CpuError::First(id.into())),
            Some(index) => {
                // One that is just leaving has been let go.
                shared.hotplug.ask_out(index);
                Ok(())
            }
        }
    }

    /// Whether a processor has this name.
    pub fn has(&self, id: &str) -> bool {
        self.0.upgrade().is_some_and(|shared| lock(&shared.occupants).iter().any(|cpu| has_name(cpu, id)))
    }

    /// Every place.
    pub fn slots(&self) -> Vec<CpuSlot> {
        let Some(shared) = self.0.upgrade() else { return Vec::new() };
        let occupants = lock(&shared.occupants).clone();
        let slot = |(index, occupant)| CpuSlot { index, place: shared.place(index), occupant };
        occupants.into_iter().enumerate().map(slot).collect()
    }

    fn shared(&self) -> Result<Arc<Shared>, CpuError> {
        self.0.upgrade().ok_or(CpuError::Ended)
    }
}

impl Shared {
    fn place(&self, index: usize) -> Place {
        self.topology.place(self.topology.apic_id(index as u32))
    }

    fn admit(&self, new: &NewCpu) -> Result<(usize, String), CpuError> {
        let occupants = lock(&self.occupants);
        let index = match new.place {
            None => occupants.iter().position(Option::is_none).ok_or(CpuError::Full(occupants.len()))?,
            Some(place) => {
                let index = (0..occupants.len()).find(|index| self.place(*index) == place);
                let index = index.ok_or(CpuError::NoPlace(place))?;
                if self.hotplug.ejected().contains(&index) {
                    return Err(CpuError::Leaving(place));
                }
                if occupants[index].is_some() {
                    return Err(CpuError::Occupied(place));
                }
                index
            }
        };
        let id = new.id.clone().unwrap_or_else(|| own_name(index));
        if !is_name(&id) {
            return Err(CpuError::Malformed(id));
        }
        if occupants.iter().any(|cpu| has_name(cpu, &id)) {
            return Err(CpuError::Taken(id));
        }
        Ok((index, id))
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { topology, occupants, .. } = self;
        f.debug_struct("Shared").field("topology", topology).field("occupants", occupants).finish_non_exhaustive()
    }
}

/// Hears what the guest does, on the thread that serves it.
struct Sink {
    occupants: Arc<Mutex<Occupants>>,
    listener: Arc<dyn CpuListener>,
    ejected: Arc<Notify>,
}

impl CpuSink for Sink {
    fn ejected(&self) {
        self.ejected.notify_one();
    }

    fn reported(&self, report: CpuReport) {
        let occupant = lock(&self.occupants).get(report.cpu).cloned().flatten();
        let id = occupant.map(|cpu| cpu.id);
        self.listener.reported(id, report);
    }
}

/// The name of a processor that was given none.
pub(crate) fn own_name(index: usize) -> String {
    format!("cpu{index}")
}

fn has_name(cpu: &Option<Occupant>, id: &str) -> bool {
    cpu.as_ref().is_some_and(|cpu| cpu.id == id)
}

fn lock(occupants: &Mutex<Occupants>) -> MutexGuard<'_, Occupants> {
    occupants.lock().unwrap_or_else(PoisonError::into_inner)
}
