//! A VM's life on its function: built, started, kept, ended.

mod ends;
mod error;
mod moves;
mod processors;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api_channel::call::{PAGE, VmCreated};
use ioreq_ring::SocIdle;
use pcie_function::SocFunction;
use pcie_function::modelled::Crossings;
use tokio::sync::mpsc::Receiver;

use super::arranger::Arranger;
use super::chipset::Trays;
use super::counters::Counters;
use super::guest::{DiskErrors, GuestEvent, Relay};
use super::host::{self, HostVm};
use super::lines::Lines;
use super::machine::{BuildError, Machine, Parts};
use super::media::Media;
use super::messages::Messages;
use super::moving::{Description, Memory, MoveOrder, Mover};
use super::pages::RamPages;
use super::shape::Shape;
use super::split::{self, Split};
use super::state;
use super::throttle::Throttle;
use super::worker::{Command, Serving, Waker, Worker};
use crate::acpi::AcpiConfig;
use crate::boot::{BootError, BootPlan, Entry};
use crate::cli::{ExitStatus, Failure, RunConfig, with_causes};
use crate::console::Attached;
use crate::control::{self, Action, CdromDrive, Order, RunState, ShutdownCause, VmControl};
use crate::cpuid::{CpuidConfig, HostCpu, Processor};
use crate::cpus::{CpuListener, Cpus, NewCpu};
use crate::devices::{AcpiHandle, InputQueue, OutputQueue};
use crate::hyperv::Hyperv;
use crate::layout::MemoryLayout;
use crate::link::{CallError, Channel, Link, Notice};
use crate::memory::GuestMemory;
use crate::pci::MemoryView;
use crate::power::{CrashEvent, PowerEvent};
use crate::qemu::small::RebootAction;
use crate::slots::{DeviceListeners, NewBalloon, SlotListener, Slots};
use crate::smbios::{SMBIOS_START, Smbios};
use crate::virtio::NotifyPages;

pub(super) use error::LifeError;
use error::lost;

/// How long the guest and its devices may take to stop at the VM's end.
const HALT: Duration = Duration::from_secs(2);

/// How long monitors may ask after the guest has left.
const PARTING: Duration = Duration::from_secs(1);

/// The far ends of a machine's byte streams.
pub(super) struct Streams {
    /// COM1's.
    pub(super) serial: (OutputQueue, InputQueue),
    /// The debug console's.
    pub(super) debugcon: Option<OutputQueue>,
}

/// All that a VM is built from but its function.
pub(super) struct Blueprint<'a> {
    pub(super) config: &'a RunConfig,
    pub(super) layout: MemoryLayout,
    pub(super) plan: BootPlan,
    pub(super) media: Media,
    /// Makes those who hear of CD-ROM drives' trays.
    pub(super) trays: Trays,
    /// Hears of devices that were taken out.
    pub(super) listener: Arc<dyn SlotListener>,
    /// Who hear of what devices meet.
    pub(super) device_listeners: DeviceListeners,
    /// Hears of processors.
    pub(super) cpu_listener: Arc<dyn CpuListener>,
    pub(super) streams: Streams,
    pub(super) waker: Arc<Waker>,
    /// Where what must outlive the process is kept.
    pub(super) state_dir: &'a Path,
    /// The guest comes from elsewhere: nothing is loaded.
    pub(super) incoming: bool,
}

/// A VM with its vCPUs paused or running.
pub(super) struct Vm<F: SocFunction> {
    host: HostVm<F>,
    arranger: Arc<Arranger<F>>,
    plan: BootPlan,
    /// Every vCPU's records as the host made it, then the VM's.
    pristine: (Vec<Vec<u8>>, Vec<u8>),
    signature: u32,
    /// What the guest's tables tell.
    shape: Shape,
    cpus: Cpus,
    /// What control planes ask of the host.
    host_cpu: HostCpu,
    acpi: AcpiHandle,
    cdroms: Vec<CdromDrive>,
    /// Processors that are put in before the machine runs.
    added: Vec<NewCpu>,
    slots: Slots,
    worker: Serving,
    relay: Arc<Relay>,
    guest: Receiver<GuestEvent>,
    counters: Arc<Counters>,
    crossings: Arc<Crossings>,
    /// By what a migration reaches it, until the control plane has it.
    mover: Option<Arc<Mover<F>>>,
    /// What a migration wants of it.
    moves: Receiver<MoveOrder>,
    /// Devices stand still, and what the VM was before.
    held: Option<RunState>,
    throttle: Throttle,
    /// Pages of each allocation, and the boot processor's CPUID: what another machine has to have too.
    regions: BTreeMap<u32, u64>,
    cpuid: Vec<[u32; 7]>,
}

impl<F: SocFunction> Vm<F> {
    /// Builds the VM behind `link`, everything loaded, nothing running. Where it fails or is cancelled, the host has part of a VM.
    pub(super) async fn build(
        link: &Link<F>,
        channel: Channel<F>,
        crossings: Arc<Crossings>,
        blueprint: Blueprint<'_>,
    ) -> Result<Self, LifeError> {
        let Blueprint { config, layout, mut plan, mut media, trays, listener, device_listeners, .. } = blueprint;
        let Blueprint { cpu_listener, streams, waker, state_dir, incoming, .. } = blueprint;
        let vcpus = config.topology.cpus();
        // Without firmware the chipset is as firmware would leave it.
        let prepared = plan.roms().is_empty();
        let view = if prepared { MemoryView::SHADOWED } else { MemoryView::default() };
        let hyperv = match config.cpu.hyperv() {
            None => None,
            Some(wanted) => wanted.given(&host::supported_hv_cpuid(&channel).await?)?,
        };
        let synic = hyperv.is_some_and(|hyperv| hyperv.has_synic());
        let created = HostVm::create(link, channel.clone(), config, &layout, plan.roms(), view, synic);
        let (host, arranger) = created.await?;
        if synic && host.created.features & VmCreated::RESAMPLE == 0 {
            return Err(LifeError::NoEoi);
        }
        let supported = host.supported_cpuid().await?;
        let cpuid = CpuidConfig {
            topology: config.topology,
            tsc_khz: Some(host.created.tsc_khz),
            // KVM's in-kernel LAPIC has it, whatever the host's own CPU does (KVM api.rst §4.46).
            tsc_deadline: true,
        };
        let host_cpu = HostCpu::new(&supported, cpuid.tsc_deadline)?;
        let processor = Processor::new(&supported, &config.cpu, cpuid)?.with_hyperv(hyperv);
        let page = config.memory.hugepages.map_or(PAGE, |pages| pages.size());
        let memory = Memory::new(channel.clone(), host.ram.clone(), arranger.extents(), arranger.roms(), page);
        let writes = memory.writes(vcpus, config.dirty_ring.0);
        let (mover, moves) = Mover::new(memory, writes);
        let physical_bits = processor.physical_address_bits();
        layout.check_address_width(physical_bits)?;
        for vcpu in 0..vcpus {
            host.set_cpuid(vcpu, processor.table(vcpu)).await?;
        }
        let signature = processor.signature();
        let mut cpus = Vec::new();
        for vcpu in 0..vcpus {
            cpus.push(host.state(vcpu).await?);
        }
        let pristine = (cpus, host.chips().await?);

        let (relay, guest) = Relay::new();
        let relay = Arc::new(relay);
        let messages =
            Messages::new(link.function.clone(), channel.clone(), &host.created, split::irqchip(config), waker.clone());
        let messages = Arc::new(messages);
        let hyperv = synic.then(|| Arc::new(Hyperv::new(vcpus as u16, host.ram.clone(), messages.sints())));
        let lines = Lines::new(channel.clone());
        let counters = Arc::new(Counters::default());
        let (shape, cpuid) = (Shape::new(config, &layout), processor.table(0));
        if prepared {
            plan.place(SMBIOS_START, Smbios::for_kernel(&shape.smbios(&cpuid)).map_err(BuildError::from)?.placed());
        }
        let added = std::mem::take(&mut media.cpus);
        let parts = Parts {
            name: config.name.as_str(),
            prepared,
            platform: arranger.clone(),
            messages: messages.clone(),
            split: config.iommu.map(|_| Split { pins: messages.pins(), settling: messages.settling() }),
            memory: host.ram.clone(),
            notify: Arc::new(if host.created.features & VmCreated::NOTIFY != 0 {
                NotifyPages::of(link.function.clone())
            } else {
                NotifyPages::default()
            }),
            physical_bits,
            shape: shape.clone(),
            cpuid: &cpuid,
            tsc_khz: host.created.tsc_khz,
            serial: streams.serial,
            debugcon: streams.debugcon,
            debug_exit: config.debug_exit,
            test_devices: &config.test_devices,
            hyperv: hyperv.clone(),
            lines: lines.clone(),
            power: relay.clone(),
            crash: relay.clone(),
            wake: waker.clone(),
            media,
            balloon: config.balloon.map(|spec| NewBalloon {
                spec,
                pages: Box::new(RamPages::new(host.ram.clone(), channel.clone(), &host.created, config)),
                memory: config.memory.size,
            }),
            flash: arranger.clone(),
            incoming,
            trays,
            listener,
            device_listeners: DeviceListeners {
                disks: Arc::new(DiskErrors { monitors: device_listeners.disks, relay: relay.clone() }),
                ..device_listeners
            },
            cpu_listener,
        };
        // Flash goes to its memory by DMA.
        let machine = tokio::task::block_in_place(|| Machine::new(parts))?;
        if host.created.features & VmCreated::POSTING != 0 {
            arranger.post_always(machine.posted);
        }
        arranger.start(relay.clone());
        messages.start(relay.clone());
        let (commands, receiver) = std::sync::mpsc::channel();
        let idle = ioreq_ring::wire::LINE;
        let flag = pcie_function::Windowed::cut(&link.soc_lines, api_channel::lines::soc::LANES_IDLE, idle);
        let (lanes, private) = host.lanes(link, Some(state_dir))?;
        let worker = Worker {
            function: link.function.clone(),
            lanes,
            private,
            vectors: (0..vcpus).map(|lane| host.created.vector_of(lane)).collect(),
            idle: SocIdle::new(flag.ok_or(LifeError::Records)?),
            buses: machine.buses,
            io_apic: machine.io_apic,
            hyperv,
            lines,
            relay: relay.clone(),
            counters: counters.clone(),
            waker,
            commands: receiver,
            halting: Vec::new(),
        };
        let worker = worker.start(commands).map_err(LifeError::Thread)?;
        let vm = Self {
            host,
            arranger,
            plan,
            pristine,
            signature,
            shape,
            cpus: machine.cpus,
            host_cpu,
            acpi: machine.acpi,
            cdroms: machine.cdroms,
            added,
            slots: machine.slots,
            worker,
            relay,
            guest,
            counters,
            crossings,
            moves,
            held: None,
            throttle: Throttle::default(),
            regions: migration::SourceVm::regions(&mover).into_iter().map(|region| (region.id, region.pages)).collect(),
            cpuid: Description::words(&cpuid),
            mover: Some(Arc::new(mover)),
        };
        if incoming {
            vm.arranger.settled().await;
            vm.stand_still().await;
        } else {
            vm.start_state().await?;
        }
        Ok(vm)
    }

    /// Loads the images and puts every vCPU where it starts.
    async fn start_state(&self) -> Result<(), LifeError> {
        self.arranger.settled().await;
        self.host.ram.whole().await;
        let mut loading = self.plan.load();
        // The loader waits for DMA: off the threads that serve sockets. Between two steps the VM may be given up.
        while tokio::task::block_in_place(|| loading.step(&self.host.ram.loader()))? {
            tokio::task::yield_now().await;
        }
        self.set_processors(self.first_entry()).await
    }

    /// Resets the machine, of which every vCPU is out of the guest. It starts with the processors that it has by now.
    async fn reset(&mut self) -> Result<(), LifeError> {
        self.cpus.start_anew();
        self.reset_devices().await;
        // Every vCPU starts from the state in which it is parked.
        self.cpus.ejected().into_iter().for_each(|cpu| self.cpus.gone(cpu));
        let acpi = AcpiConfig { absent: self.shape.absent(&self.cpus.present()), ..self.shape.acpi(None) };
        self.plan.describe(&self.shape.layout, &acpi)?;
        self.start_state().await
    }

    async fn reset_devices(&self) {
        let (done, waits) = tokio::sync::oneshot::channel();
        self.worker.command(Command::Reset(done));
        // The worker ends only when the function is lost, which is reported on its own.
        let _ = waits.await;
    }

    /// Keeps the VM until it ends; how it ended.
    pub(super) async fn live(
        mut self,
        mut notices: Receiver<Notice>,
        mut control: VmControl,
        consoles: &[Attached],
    ) -> Result<ExitStatus, Failure> {
        let wanted = control.wanted_to_end();
        let cut = async {
            let cause = wanted.await;
            tokio::time::sleep(HALT).await;
            cause
        };
        let gives_up = self.gives_up_pages(&control);
        // What the host was asked before may wait for it for a minute: who wants the VM to end doesn't.
        let mut halts = true;
        let kept = async {
            self.begin(consoles, &mut control).await?;
            self.keep(&mut notices, &mut control).await
        };
        let kept = tokio::select! {
            biased;
            ended = kept => Ok(ended),
            cause = cut => Err(cause),
        };
        let ended = kept.unwrap_or_else(|cause| {
            halts = false;
            control.ends(cause);
            Ok(ExitStatus::Done)
        });
        gives_up.abort();
        self.host.ram.give_up();
        if ended.is_err() && control.state() != RunState::Shutdown {
            control.ends(ShutdownCause::HostError);
        }
        if ended.is_ok() && halts {
            self.halt().await;
        }
        let left = control.state() == RunState::Postmigrate;
        // Whoever waits for an order to be carried out waits no longer.
        self.moves.close();
        while self.moves.try_recv().is_ok() {}
        // They hold images, which are closed with the slots.
        tokio::task::block_in_place(|| {
            control.jobs().end();
            control.exports().end();
            control.migration().end();
        });
        self.end().await;
        if left && ended.is_ok() {
            // Who moved the guest asks for the figures once more.
            tokio::time::sleep(PARTING).await;
        }
        ended
    }

    /// Lets it run, if it shall: from here on it leaves traces.
    async fn begin(&mut self, consoles: &[Attached], control: &mut VmControl) -> Result<(), Failure> {
        for console in consoles {
            console.begin().map_err(|e| Failure::of(ExitStatus::Usage, "", &e))?;
        }
        control.has_cdroms(std::mem::take(&mut self.cdroms));
        control.has_slots(self.slots.handle());
        control.has_cpus(self.cpus.handle());
        control.has_host(Some(self.host_cpu.clone()));
        for cpu in std::mem::take(&mut self.added) {
            self.add_processor(cpu, control).await?;
        }
        if let Some(mover) = self.mover.take() {
            control.has_mover(mover);
        }
        control.is_built();
        if control.state() == RunState::Inmigrate {
            return control.opens_door().map_err(|e| Failure::of(ExitStatus::Usage, "--incoming", &e));
        }
        if control.autostart() {
            // The guest may have run before the host said so.
            self.run().await.map_err(|e| LifeError::Call(e).of_a_vm())?;
            control.started();
        }
        Ok(())
    }

    /// Does what is asked for until the VM is to end.
    async fn keep(&mut self, notices: &mut Receiver<Notice>, control: &mut VmControl) -> Result<ExitStatus, Failure> {
        loop {
            tokio::select! {
                order = control.next() => match order {
                    Some(order) => if let Some(status) = self.obey(order, control).await { return Ok(status) },
                    None => return Ok(ExitStatus::Done),
                },
                Some(event) = self.guest.recv() => if let Some(status) = self.hear(event, control).await? {
                    return Ok(status);
                },
                Some(notice) = notices.recv() => Self::note(notice)?,
                Some(order) = self.moves.recv() => if let Some(status) = self.do_move(order, control).await? {
                    return Ok(status);
                },
                stand = self.throttle.turn() => self.throttled(stand, control).await.map_err(|e| e.of_a_vm())?,
                work = self.cpus.next() => self.change_cpus(work, control).await.map_err(|e| e.of_a_vm())?,
            }
        }
    }

    async fn obey(&mut self, order: Order, control: &mut VmControl) -> Option<ExitStatus> {
        let action = order.action();
        let outcome = match action {
            Action::Count => match self.count().await {
                Ok(counters) => {
                    control.answer(order, counters);
                    return None;
                }
                Err(e) => Err(e.into()),
            },
            Action::Pause => {
                self.stays_paused();
                self.host.pause().await.map_err(LifeError::from)
            }
            Action::Resume => match self.unhold().await {
                Ok(()) => self.run().await.map_err(LifeError::from),
                Err(e) => Err(LifeError::Moved(e)),
            },
            Action::Reset if control.actions().reboot == RebootAction::Shutdown => {
                control.finish_otherwise(order);
                return self.powered_off(ShutdownCause::HostQmpSystemReset, ExitStatus::Done, control).await;
            }
            Action::Reset => self.reset_and_run(control).await,
            Action::PowerButton => {
                self.acpi.press_power_button();
                Ok(())
            }
            Action::Quit(_) => Ok(()),
        };
        let runs = action == Action::Resume && outcome.is_ok();
        control.finish(order, outcome.map_err(|e| with_causes(&e)));
        if runs {
            // What fails again stops the VM again: monitors hear that after they heard that it runs, and this loop after that.
            self.slots.handle().retry();
        }
        matches!(action, Action::Quit(_)).then_some(ExitStatus::Done)
    }

    /// Every counter by name: this side's, the bus's, the host's.
    async fn count(&self) -> Result<control::Counters, CallError> {
        let mut all = self.counters.by_name();
        let bus = self.crossings.counts();
        let channel = self.host.channel_bytes();
        let named = [
            ("dma.reads", bus.dma_reads),
            ("dma.read-bytes", bus.dma_read_bytes),
            ("dma.writes", bus.dma_writes),
            ("dma.write-bytes", bus.dma_write_bytes),
            ("channel.sent-bytes", channel.0),
            ("channel.received-bytes", channel.1),
        ];
        all.extend(named.map(|(name, value)| (name.to_owned(), value)));
        for statistic in self.host.statistics().await? {
            let name = statistic.name.split(|&b| b == 0).next().unwrap_or_default();
            let sum = all.entry(format!("host.{}", String::from_utf8_lossy(name))).or_default();
            *sum = sum.saturating_add(statistic.value);
        }
        Ok(all)
    }

    /// Where a vCPU stands, for a log; the VM is paused.
    async fn standing(&self, vcpu: u32) -> Result<String, LifeError> {
        self.host.pause().await?;
        Ok(state::standing(&self.host.state(vcpu).await?)?)
    }

    /// Resets the VM; it runs on if it ran. Where that fails halfway, it is left stopped, until another reset.
    async fn reset_and_run(&mut self, control: &mut VmControl) -> Result<(), LifeError> {
        // First: a VM whose images are damaged goes on as it is.
        self.plan.check()?;
        self.host.pause().await?;
        let reset = async {
            self.reset().await?;
            let runs = control.state().is_running() || control.state() == RunState::Suspended;
            if runs { Ok(self.run().await?) } else { Ok(()) }
        };
        let outcome = reset.await;
        if outcome.is_err() && control.state().may_become(RunState::InternalError) {
            control.stopped(RunState::InternalError);
        }
        outcome
    }

    /// Goes on after S3: the machine is reset, memory is as it was, and the boot processor starts where the guest said.
    async fn wake_up(&self) -> Result<(), LifeError> {
        self.reset_devices().await;
        self.acpi.woke();
        self.arranger.settled().await;
        let mut vector = [0; 4];
        if let Some(at) = self.plan.waking_vector() {
            tokio::task::block_in_place(|| self.host.ram.read(at, &mut vector)).map_err(BootError::from)?;
        }
        self.set_processors(Entry::waking(self.signature, u32::from_le_bytes(vector))).await?;
        Ok(self.run().await?)
    }

    async fn hear(&mut self, event: GuestEvent, control: &mut VmControl) -> Result<Option<ExitStatus>, Failure> {
        match event {
            GuestEvent::TripleFault(vcpu) => {
                let stood = self.standing(vcpu).await.unwrap_or_else(|e| format!("its registers can't be read: {e}"));
                tracing::info!(vcpu, "a triple fault resets the machine: {stood}");
                self.guest_reset(control).await
            }
            GuestEvent::Power(PowerEvent::Reset) => self.guest_reset(control).await,
            GuestEvent::Power(PowerEvent::Suspend) => {
                // Ordered to stop while it fell asleep, it sleeps stopped.
                if control.state().is_running() {
                    self.host.pause().await.map_err(|e| LifeError::from(e).of_a_vm())?;
                    control.stopped(RunState::Suspended);
                }
                Ok(None)
            }
            GuestEvent::Power(PowerEvent::WakeUp) => {
                if control.state() == RunState::Suspended {
                    self.wake_up().await.map_err(|e| e.of_a_vm())?;
                    control.woke();
                }
                Ok(None)
            }
            GuestEvent::Power(PowerEvent::PowerOff) => {
                Ok(self.powered_off(ShutdownCause::GuestShutdown, ExitStatus::Done, control).await)
            }
            GuestEvent::Power(PowerEvent::DebugExit(value)) => {
                control.ends(ShutdownCause::GuestShutdown);
                Ok(Some(ExitStatus::DebugExit(value)))
            }
            GuestEvent::DiskStopped => {
                self.relay.heard_of_stop();
                if control.state().is_running() {
                    self.host.pause().await.map_err(|e| LifeError::from(e).of_a_vm())?;
                    control.stopped(RunState::IoError);
                }
                Ok(None)
            }
            GuestEvent::Crashed(CrashEvent::CrashLoaded) => {
                control.crash_loaded();
                Ok(None)
            }
            GuestEvent::Crashed(CrashEvent::Panicked) => self.guest_panicked(control).await,
            GuestEvent::Failed(why) => Err(Failure::new(ExitStatus::Failed, format!("the guest failed: {why}"))),
            GuestEvent::Lost(why) => Err(lost(&why)),
        }
    }

    fn note(notice: Notice) -> Result<(), Failure> {
        match notice {
            Notice::Silent(true) => tracing::warn!("the host is silent: its heartbeat stopped"),
            // As loud as what it takes back.
            Notice::Silent(false) => tracing::warn!("the host's heartbeat goes on"),
            Notice::Over(why) => return Err(lost(&why)),
        }
        Ok(())
    }

    /// Stops the guest, then its devices: what they still do for it would fail once the host has taken its memory back, and be reported.
    /// Left alone where the host, or the worker, does not do its part soon.
    async fn halt(&self) {
        let halted = async {
            if self.host.pause().await.is_ok() {
                self.reset_devices().await;
            }
        };
        let _ = tokio::time::timeout(HALT, halted).await;
    }

    async fn end(self) {
        self.host.destroy().await;
        let Self { worker, slots, guest, counters, .. } = self;
        // The worker's last report must not wait for room.
        drop(guest);
        tokio::task::block_in_place(|| {
            worker.end();
            slots.end();
        });
        tracing::debug!(?counters, "the VM has ended");
    }
}
