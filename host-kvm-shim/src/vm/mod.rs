//! The VM: made once a call asks for it, gone when this is dropped.

pub(crate) mod chips;
mod dirty;
mod io_events;
mod late;
pub(crate) mod lines;
mod notices;
mod notify;
pub(crate) mod posted;
mod ram;
mod slots;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use api_channel::Status;
use api_channel::call::{
    CreateVm, DirtyFetch, DirtyLimit, Discard, Extent, IoEvent, Irqchip, LateRun, Memslot, NotifyPage, PAGE,
    RamRequest, Route, StateRequest, VCPU_ALL, VM, VmCreated,
};
use api_channel::codec::Malformed;
use ioreq_ring::HostLane;
use kvm_bindings::{
    KVM_CAP_HYPERV_SYNIC, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API,
    KVM_DIRTY_LOG_INITIALLY_SET, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_PIT_SPEAKER_DUMMY,
    KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK, KVM_X2APIC_API_USE_32BIT_IDS, kvm_pit_config,
};
use kvm_ioctls::VmFd;
use pcie_function::HostFunction;

pub(crate) use dirty::{Found, Rings};
pub(crate) use notices::Notices;

use crate::bootstrap::Offer;
use crate::error::Refusal;
use crate::host::Host;
use crate::kvm::{RunPage, StatsFd, enable_cap, stats_fd};
use crate::vcpu::{Abilities, Command, Handle, Lane, Lanes, Plan, Shared, Spin, Want};
use dirty::Log;
use io_events::IoEvents;
use late::{Lacks, Late};
use lines::Lines;
use notify::NotifyPages;
use posted::Posted;
use ram::Ram;
use slots::Slots;

/// What vCPU threads share with the API thread and with each other.
#[derive(Debug)]
pub(crate) struct Environment {
    pub(crate) lines: Lines,
    pub(crate) posted: Posted,
    pub(crate) notices: Arc<Notices>,
    /// The vCPUs' dirty rings, if they have any.
    pub(crate) rings: Option<Arc<Rings>>,
    pub(crate) abilities: Abilities,
}

/// A VM. Fields are dropped in order: the threads first, then KVM's VM, then the memory.
pub(crate) struct Machine<F: HostFunction> {
    vcpus: Vec<Handle>,
    /// Pages that come later, and those of a guest that runs without them.
    lacks: Lacks,
    late: Option<Late>,
    io_events: IoEvents,
    pub(crate) environment: Arc<Environment>,
    pub(crate) vm: Arc<VmFd>,
    stats: Option<StatsFd>,
    pub(crate) irqchip: Irqchip,
    pub(crate) created: VmCreated,
    create: CreateVm,
    /// APIC ids of the vCPUs by their numbers: KVM's vCPU ids.
    apic_ids: Vec<u32>,
    name: String,
    slots: Slots,
    notify: NotifyPages,
    log: Log,
    lanes: Lanes<F>,
    rams: BTreeMap<u32, Ram>,
}

impl<F: HostFunction> Drop for Machine<F> {
    fn drop(&mut self) {
        self.end_vcpus();
    }
}

impl<F: HostFunction> Machine<F> {
    /// Ends the vCPUs' threads. One that waits for a page is woken when it can't run on any more with what it finds there.
    fn end_vcpus(&mut self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.want(Want::Stop));
        self.late = None;
        self.vcpus.clear();
    }
}

/// How long a vCPU may take to leave the guest.
const OUT: Duration = Duration::from_secs(5);
/// The same while some of the guest's pages are still to come: whoever asked asks again.
const OUT_LATE: Duration = Duration::from_millis(20);
/// Pages below 4 GiB that Intel's real mode needs: out of the way of 16 MiB of flash, where QEMU has them too.
const IDENTITY_MAP: u64 = 0xfeff_c000;
const TSS: usize = 0xfeff_d000;

impl<F: HostFunction + 'static> Machine<F> {
    /// Creates KVM's VM and the lanes. The in-kernel interrupt controllers and the vCPUs come with the first memslots: in that
    /// order it takes 1 ms, the other way round 8 (each new slot then waits for KVM's readers).
    pub(crate) fn new(host: &Host, offer: &mut Offer<F>, create: &CreateVm) -> Result<Self, Refusal> {
        let CreateVm { vcpus, irqchip, flags, dirty_ring, spin_ns, name } = *create;
        if flags & !CreateVm::HV_SYNIC != 0 {
            return Err(Malformed.into());
        }
        let name = name.text()?.to_owned();
        let irqchip = match irqchip {
            1 => Irqchip::Full,
            2 => Irqchip::Split,
            other => return Err(Refusal::argument(format!("no interrupt controller is of kind {other}"))),
        };
        let most = offer.lanes().min(host.most_vcpus());
        if vcpus == 0 || vcpus > most {
            return Err(Refusal::argument(format!(
                "{vcpus} vCPUs: this function has lanes, and KVM vCPUs, for 1 to {most}"
            )));
        }
        if spin_ns > 10_000_000 {
            return Err(Refusal::argument(format!("spinning {spin_ns} ns for an answer: at most 10 ms")));
        }
        let mut abilities = host.abilities().clone();
        if flags & CreateVm::HV_SYNIC != 0 {
            if !host.has_synic() {
                return Err(Refusal::unavailable("this KVM has no Hyper-V SynIC (KVM_CAP_HYPERV_SYNIC)"));
            }
            abilities = abilities.with_synic();
        }
        let vm = Arc::new(host.kvm().create_vm().map_err(Refusal::kvm("create a VM"))?);
        let rings = if dirty_ring == 0 {
            let log = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
            enable_cap(&*vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, [log.into(), 0, 0, 0])
                .map_err(Refusal::nix("make the dirty log exact"))?;
            None
        } else {
            Some(Arc::new(Rings::new(&vm, dirty_ring)?))
        };
        let lanes = Lanes::new(offer, vcpus)?;
        let mut created = lanes.created(host, irqchip);
        let notify = NotifyPages::new(offer.function.notify_pages(), host.most_memslots());
        if notify.count() != 0 {
            created.features |= VmCreated::NOTIFY;
        }
        let log = Log::new(rings.as_ref());
        let environment = Environment {
            lines: Lines::new(vm.clone()),
            posted: Posted::default(),
            notices: offer.notices.clone(),
            rings,
            abilities,
        };
        Ok(Self {
            vcpus: Vec::new(),
            lacks: Lacks::default(),
            late: None,
            io_events: IoEvents::default(),
            environment: Arc::new(environment),
            stats: stats_fd(&*vm).ok().map(StatsFd::new),
            irqchip,
            created,
            create: *create,
            apic_ids: (0..vcpus).collect(),
            name,
            slots: Slots::new(host.most_memslots() - notify.count()),
            notify,
            log,
            lanes,
            rams: BTreeMap::new(),
            vm,
        })
    }

    /// Gives the vCPUs to come their APIC ids.
    pub(crate) fn set_apic_ids(&mut self, host: &Host, ids: Vec<u32>) -> Result<(), Refusal> {
        if !self.is_bare() {
            return Err(Refusal::state("the vCPUs have their APIC ids already"));
        }
        if ids.len() != self.apic_ids.len() {
            return Err(Refusal::argument(format!("{} APIC ids for {} vCPUs", ids.len(), self.apic_ids.len())));
        }
        if ids.first() != Some(&0) {
            return Err(Refusal::argument("vCPU 0 is the boot processor, whose APIC id is 0".into()));
        }
        let most = host.most_vcpu_ids();
        if let Some(id) = ids.iter().find(|id| **id >= most) {
            return Err(Refusal::argument(format!("APIC id {id}: this KVM has those below {most}")));
        }
        let mut sorted = ids.clone();
        sorted.sort_unstable();
        if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(Refusal::argument(format!("two vCPUs with the APIC id {}", pair[0])));
        }
        self.apic_ids = ids;
        Ok(())
    }

    /// Ends the VM: threads joined, memory out of the device's reach, then freed.
    pub(crate) fn destroy(mut self, offer: &mut Offer<F>) {
        self.end_vcpus();
        // What its vCPUs said last is no reason to end the connection of the next VM.
        let _ = offer.notices.take_broken();
        for ram in self.rams.values() {
            // A function that is gone has no mapping left.
            let _ = ram.unmap(&mut offer.function);
        }
        self.lanes.unmap(&mut offer.function);
    }

    /// Allocates RAM.
    pub(crate) fn add_ram(
        &mut self,
        host: &Host,
        offer: &mut Offer<F>,
        request: &RamRequest,
    ) -> Result<Vec<Extent>, Refusal> {
        if self.rams.contains_key(&request.id) {
            return Err(Refusal::argument(format!("RAM {} exists already", request.id)));
        }
        let (ram, extents) = Ram::new(&mut offer.function, host.memory(), &self.rams, request)?;
        self.rams.insert(request.id, ram);
        Ok(extents)
    }

    /// Gives memory back to the host: all of the runs, or those before the first that can't be.
    pub(crate) fn discard(&self, function: &F, runs: &[Discard]) -> Result<(), Refusal> {
        if runs.iter().any(|run| run.reserved != 0) {
            return Err(Malformed.into());
        }
        if function.pins() {
            return Err(Refusal::unavailable(
                "guest memory is pinned for this function's device, so it can't be given back",
            ));
        }
        for run in runs {
            let ram = self.rams.get(&run.ram);
            ram.ok_or_else(|| Refusal::argument(format!("there is no RAM {}", run.ram)))?.discard(run)?;
        }
        Ok(())
    }

    /// Replaces the memslots; the first set brings the chips and the vCPUs.
    pub(crate) fn set_memslots(&mut self, host: &Host, offer: &Offer<F>, wanted: &[Memslot]) -> Result<(), Refusal> {
        self.slots.check(wanted, &self.rams)?;
        if let Some(slot) = wanted.iter().find(|slot| self.notify.meets(slot.base, slot.len)) {
            let Memslot { base, len, .. } = slot;
            return Err(Refusal::argument(format!("memslot at {base:#x}+{len:#x}: a notify page is there")));
        }
        if self.vcpus.is_empty() {
            if wanted.is_empty() {
                return Err(Refusal::argument("the first set of memslots is empty".into()));
            }
            self.slots.replace(&self.vm, wanted, &self.rams, &mut self.log)?;
            // A VM that is left half made by an error can only be destroyed.
            self.create_chips()?;
            return self.create_vcpus(host, offer).inspect_err(|_| self.vcpus.clear());
        }
        self.with_vcpus_out(|this| this.slots.replace(&this.vm, wanted, &this.rams, &mut this.log))
    }

    /// Replaces the set of notify pages that the guest sees.
    pub(crate) fn set_notify_pages(&mut self, wanted: &[NotifyPage]) -> Result<(), Refusal> {
        if wanted.iter().any(|page| page.reserved != 0) {
            return Err(Malformed.into());
        }
        self.named(VCPU_ALL)?;
        self.notify.check(wanted, |base, len| self.slots.meets(base, len))?;
        if self.notify.is(wanted) {
            return Ok(());
        }
        self.with_vcpus_out(|this| this.notify.replace(&*this.vm, wanted))
    }

    /// Holds every vCPU out of the guest while `change` is made. One that waits for the SoC is out: it goes on waiting.
    fn with_vcpus_out(&mut self, change: impl FnOnce(&mut Self) -> Result<(), Refusal>) -> Result<(), Refusal> {
        // One that waits for a page may not come out before it is there, and it is by this thread that it would come.
        let patience = if self.late.is_some() { OUT_LATE } else { OUT };
        let deadline = Instant::now() + patience;
        self.vcpus.iter().for_each(Handle::hold);
        let inside = self.vcpus.iter().find(|vcpu| !vcpu.out_by(deadline)).map(|vcpu| vcpu.shared.index);
        let done = match inside {
            None => change(self),
            Some(index) if self.late.is_some() => {
                Err(Refusal { status: Status::LATE, why: format!("vCPU {index} waits for a page") })
            }
            Some(index) => {
                Err(Refusal::state(format!("vCPU {index} did not leave the guest within {} s", OUT.as_secs())))
            }
        };
        self.vcpus.iter().for_each(Handle::release);
        done
    }

    fn create_chips(&self) -> Result<(), Refusal> {
        // 255 is every APIC's in 8 bits.
        if self.apic_ids.iter().any(|id| *id >= 255) {
            let ids = KVM_X2APIC_API_USE_32BIT_IDS | KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK;
            let cap = enable_cap(&*self.vm, KVM_CAP_X2APIC_API, [ids.into(), 0, 0, 0]);
            cap.map_err(Refusal::nix("use 32-bit APIC ids"))?;
        }
        self.vm.set_identity_map_address(IDENTITY_MAP).map_err(Refusal::kvm("place the identity map"))?;
        self.vm.set_tss_address(TSS).map_err(Refusal::kvm("place the TSS"))?;
        match self.irqchip {
            Irqchip::Full => {
                self.vm.create_irq_chip().map_err(Refusal::kvm("create the interrupt controllers"))?;
                let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
                self.vm.create_pit2(pit).map_err(Refusal::kvm("create the PIT"))
            }
            Irqchip::Split => {
                // 24 routes are left to the IOAPIC on the SoC: their level-triggered EOIs are exits.
                enable_cap(&*self.vm, KVM_CAP_SPLIT_IRQCHIP, [24, 0, 0, 0])
                    .map_err(Refusal::nix("split the interrupt controllers"))
            }
        }
    }

    fn create_vcpus(&mut self, host: &Host, offer: &Offer<F>) -> Result<(), Refusal> {
        let spin_ns = if self.create.spin_ns == 0 { Spin::DEFAULT_NS } else { self.create.spin_ns };
        let spin = Spin::new(spin_ns, host.tsc_khz(), host.has_one_cpu());
        for (index, &apic_id) in (0u32..).zip(&self.apic_ids) {
            let fd = self.vm.create_vcpu(apic_id.into()).map_err(Refusal::kvm("create a vCPU"))?;
            if self.has_synic() {
                // Not the newer KVM_CAP_HYPERV_SYNIC2: there nobody clears a page of the guest's that becomes the SynIC's.
                enable_cap(&fd, KVM_CAP_HYPERV_SYNIC, [0; 4]).map_err(Refusal::nix("give a vCPU its SynIC"))?;
            }
            if let Some(rings) = &self.environment.rings {
                rings.add(&fd)?;
            }
            let page = RunPage::map(&fd, self.vm.run_size()).map_err(Refusal::nix("map a vCPU's run page"))?;
            let shared = Shared::new(index, page, self.environment.notices.clone());
            let shared = Arc::new(shared.map_err(Refusal::nix("create an eventfd"))?);
            let windows = self.lanes.windows(index).ok_or_else(|| Refusal::unavailable("the lane has no room"))?;
            let vector = offer.function.vector(self.created.vector_of(index));
            let vector = vector.ok_or_else(|| Refusal::unavailable("the function lacks a vector"))?;
            let lane = Lane::new(HostLane::new(windows), offer.function.bell(), vector, &shared, spin)
                .map_err(Refusal::nix("create an epoll"))?;
            let stats = stats_fd(&fd).ok().map(StatsFd::new);
            let plan = Plan { fd, lane, shared, stats };
            let handle = Handle::start::<F>(plan, self.environment.clone(), host.vcpu_filter());
            let handle = handle.map_err(|e| Refusal::unavailable(format!("can't start a vCPU's thread: {e}")))?;
            self.vcpus.push(handle);
        }
        Ok(())
    }

    fn has_synic(&self) -> bool {
        self.create.flags & CreateVm::HV_SYNIC != 0
    }

    /// Replaces the interrupt routing.
    pub(crate) fn set_routing(&self, routes: &[Route]) -> Result<(), Refusal> {
        let synics = if self.has_synic() { self.create.vcpus } else { 0 };
        lines::set_routing(&self.vm, self.irqchip, synics, routes)
    }

    /// The vCPUs that a call names.
    fn named(&self, vcpu: u32) -> Result<&[Handle], Refusal> {
        if self.vcpus.is_empty() {
            return Err(Refusal::state("the VM has no vCPUs before its first memslots"));
        }
        if vcpu == VCPU_ALL {
            return Ok(&self.vcpus);
        }
        let i = vcpu as usize;
        self.vcpus.get(i..=i).ok_or_else(|| Refusal::argument(format!("vCPU {vcpu} of {}", self.vcpus.len())))
    }

    /// Lets vCPUs run.
    pub(crate) fn run(&self, vcpu: u32) -> Result<(), Refusal> {
        if self.late.as_ref().is_some_and(Late::is_given_up) {
            return Err(Refusal::state(
                "a state that was set needed a page that had not come: the VM can't run any more",
            ));
        }
        self.named(vcpu)?.iter().for_each(|v| v.want(Want::Run));
        Ok(())
    }

    /// Tells vCPUs to pause; gives those that ran.
    pub(crate) fn pause(&self, vcpu: u32) -> Result<Vec<u32>, Refusal> {
        let running: Vec<_> = self.named(vcpu)?.iter().filter(|v| v.shared.standing().0 == Want::Run).collect();
        running.iter().for_each(|v| v.want(Want::Pause));
        Ok(running.iter().map(|v| v.shared.index).collect())
    }

    /// The first of the named vCPUs whose pause is not complete.
    pub(crate) fn unpaused(&self, vcpu: u32) -> Option<u32> {
        self.named(vcpu).ok()?.iter().find(|v| !v.is_paused()).map(|v| v.shared.index)
    }

    /// Makes vCPUs leave and re-enter the guest.
    pub(crate) fn kick(&self, vcpu: u32) -> Result<(), Refusal> {
        self.named(vcpu)?.iter().for_each(Handle::nudge);
        Ok(())
    }

    /// Reads state records.
    pub(crate) fn state(&self, request: &StateRequest) -> Result<Vec<u8>, Refusal> {
        if request.reserved != 0 {
            return Err(Malformed.into());
        }
        if request.target == VM {
            self.all_paused()?;
            return chips::read(&self.vm, self.irqchip, request.groups);
        }
        self.one(request.target)?.ask(Command::Read(request.groups))
    }

    /// Sets state records.
    pub(crate) fn set_state(&self, target: u32, records: Vec<u8>) -> Result<(), Refusal> {
        if target == VM {
            self.all_paused()?;
            return chips::write(&self.vm, self.irqchip, &records);
        }
        // KVM touches guest memory for some of it. This thread waits for that, and takes no call by which a page could come.
        let give_up = || self.late.iter().for_each(Late::give_up);
        self.one(target)?.ask_in(OUT, Command::Write(records), give_up).map(drop)
    }

    /// Sets a vCPU's CPUID.
    pub(crate) fn set_cpuid(&self, vcpu: u32, entries: Vec<api_channel::call::CpuidEntry>) -> Result<(), Refusal> {
        self.one(vcpu)?.ask(Command::SetCpuid(entries)).map(drop)
    }

    /// Keeps a vCPU's thread on these CPUs.
    pub(crate) fn set_affinity(&self, vcpu: u32, cpus: Vec<u32>) -> Result<(), Refusal> {
        self.one(vcpu)?.ask(Command::Pin(cpus)).map(drop)
    }

    fn one(&self, vcpu: u32) -> Result<&Handle, Refusal> {
        match self.named(vcpu)? {
            [one] if vcpu != VCPU_ALL => Ok(one),
            _ => Err(Refusal::argument("this is done a vCPU at a time".into())),
        }
    }

    fn all_paused(&self) -> Result<(), Refusal> {
        self.named(VCPU_ALL)?;
        match self.unpaused(VCPU_ALL) {
            None => Ok(()),
            Some(vcpu) => Err(Refusal::state(format!("vCPU {vcpu} runs: pause the VM first"))),
        }
    }

    /// Adds or removes an ioeventfd.
    pub(crate) fn io_event(&mut self, function: &F, event: &IoEvent) -> Result<(), Refusal> {
        let change = |this: &mut Self| this.io_events.change(&this.vm, function, event);
        // KVM waits for every vCPU that is in it just then: for one that waits for a page, this thread would wait for itself.
        if self.late.is_some() { self.with_vcpus_out(change) } else { change(self) }
    }

    /// The eventfd of a vector that may be wired to a GSI.
    pub(crate) fn free_vector<'a>(&self, function: &'a F, vector: u32) -> Result<BorrowedFd<'a>, Refusal> {
        let free = self.created.free_vector..self.created.free_vector + self.created.free_vectors;
        let event = function.vector(vector).filter(|_| free.contains(&vector));
        event.ok_or_else(|| Refusal::argument(format!("vector {vector} is none of {}..{}", free.start, free.end)))
    }

    /// Starts or stops the dirty log.
    pub(crate) fn dirty_log(&mut self, on: bool) -> Result<(), Refusal> {
        self.named(VCPU_ALL)?;
        if self.slots.logging() == on {
            return Ok(());
        }
        self.with_vcpus_out(|this| this.switch_log(on))
    }

    fn switch_log(&mut self, on: bool) -> Result<(), Refusal> {
        self.slots.log(&self.vm, &self.rams, on)?;
        self.log.switched(&self.slots)
    }

    /// Limits how fast vCPUs write clean pages.
    pub(crate) fn dirty_limit(&self, limit: &DirtyLimit) -> Result<(), Refusal> {
        if limit.reserved != 0 {
            return Err(Malformed.into());
        }
        let named = self.named(limit.vcpu)?;
        let Some(rings) = &self.environment.rings else {
            return Err(Refusal::unavailable(
                "the VM was created without dirty rings, so nothing tells which vCPU wrote",
            ));
        };
        named.iter().for_each(|vcpu| rings.limit(vcpu.shared.index, limit.pages));
        Ok(())
    }

    /// These pages come later.
    pub(crate) fn lacks(&mut self, runs: &[LateRun]) -> Result<(), Refusal> {
        self.all_paused()?;
        if self.late.is_some() {
            return Err(Refusal::state("post-copy is under way"));
        }
        self.lacks.add(&self.rams, runs)
    }

    /// Begins post-copy, or ends one of which every page has come.
    pub(crate) fn post_copy(&mut self, host: &Host, on: bool) -> Result<(), Refusal> {
        match &self.late {
            None if on => {
                self.all_paused()?;
                let lacks = std::mem::take(&mut self.lacks);
                let notices = &self.environment.notices;
                self.late = Some(Late::begin(host.userfault()?, &self.rams, lacks, notices, host.vcpu_filter())?);
                Ok(())
            }
            Some(late) if !on => match late.left() {
                0 => {
                    self.late = None;
                    Ok(())
                }
                pages => Err(Refusal::state(format!("{pages} pages of the guest's are still to come"))),
            },
            None => Err(Refusal::state("no post-copy is under way")),
            Some(_) => Err(Refusal::state("post-copy is under way")),
        }
    }

    /// Pages that were said to come later are there.
    pub(crate) fn placed(&self, runs: &[LateRun]) -> Result<(), Refusal> {
        let late = self.late.as_ref().ok_or_else(|| Refusal::state("no post-copy is under way"))?;
        late.placed(&self.rams, runs)
    }

    /// See [`Late::tell`].
    pub(crate) fn tell_wanted(&self, told: impl FnMut(LateRun) -> bool) {
        if let Some(late) = &self.late {
            late.tell(told);
        }
    }

    /// How often the log began anew, every page written, because KVM had lost some.
    pub(crate) fn overruns(&self) -> u64 {
        self.environment.rings.as_ref().map_or(0, |rings| rings.overruns())
    }

    /// Fetches dirty pages.
    pub(crate) fn dirty_fetch(&mut self, fetch: &DirtyFetch) -> Result<Found, Refusal> {
        if !self.slots.logging() {
            return Err(Refusal::state("the dirty log is off"));
        }
        let ram =
            self.rams.get(&fetch.ram).ok_or_else(|| Refusal::argument(format!("RAM {} does not exist", fetch.ram)))?;
        let pages = ram.memory.len() / PAGE;
        if fetch.flags & DirtyFetch::AS_READ == 0 && self.log.read()? {
            self.with_vcpus_out(|this| this.switch_log(false).and_then(|()| this.switch_log(true)))?;
        }
        self.log.fetch(&self.vm, &self.slots, pages, fetch)
    }

    /// Counters of KVM and the shim, of the VM and of each vCPU.
    pub(crate) fn counters(&self, mut tell: impl FnMut(u32, &str, u64)) {
        let mut kvm = |target, stats: Option<&StatsFd>| {
            for counter in stats.and_then(|s| s.read().ok()).unwrap_or_default() {
                tell(target, &counter.name, counter.value);
            }
        };
        kvm(VM, self.stats.as_ref());
        for vcpu in &self.vcpus {
            kvm(vcpu.shared.index, vcpu.stats.as_ref());
        }
        if let Some(rings) = &self.environment.rings {
            tell(VM, "shim.rings_overrun", rings.overruns());
        }
        for vcpu in &self.vcpus {
            for (name, value) in vcpu.shared.counters.read() {
                tell(vcpu.shared.index, name, value);
            }
            if let Some(rings) = &self.environment.rings {
                tell(vcpu.shared.index, "shim.dirtied", rings.dirtied(vcpu.shared.index));
            }
        }
    }

    /// The VM as a sentence names it.
    pub(crate) fn title(&self) -> String {
        match (&*self.name, self.create.vcpus) {
            ("", 1) => "a VM without a name, of 1 vCPU".into(),
            ("", n) => format!("a VM without a name, of {n} vCPUs"),
            (name, _) => format!("VM {name}"),
        }
    }

    /// Whether the memslots, and so the vCPUs, are still to come.
    pub(crate) fn is_bare(&self) -> bool {
        self.slots.is_empty()
    }
}
