//! The calls, one by one.

use api_channel::call::{Call, CreateVm, DirtyFetch, Irqfd, Statistic};
use api_channel::codec::Writer;
use api_channel::{bulk, call};
use ioreq_ring::LineChange;
use pcie_function::header::Role;
use pcie_function::{HostFunction, State};

use super::Session;
use crate::error::Refusal;
use crate::serve::Level;
use crate::vm::{Machine, lines};

/// What a call is answered with.
#[derive(Debug, Default)]
pub(super) struct Reply {
    pub(super) payload: Vec<u8>,
    pub(super) bulk: Vec<u8>,
}

impl Reply {
    fn payload(w: Writer) -> Self {
        Self { payload: w.done(), bulk: Vec::new() }
    }

    fn bulk(bulk: Vec<u8>) -> Self {
        Self { payload: Vec::new(), bulk }
    }
}

impl From<()> for Reply {
    fn from((): ()) -> Self {
        Self::default()
    }
}

impl<F: HostFunction + 'static> Session<'_, F> {
    /// Does what a call asks for. Pauses are not here: they are answered later.
    pub(super) fn execute(&mut self, call: Call) -> Result<Reply, Refusal> {
        let session = self;
        match call {
            Call::Ping => Ok(().into()),
            Call::HostInfo => Ok(Reply::bulk(session.host.inventory().to_vec())),
            Call::SupportedCpuid => Ok(Reply::bulk(Writer::default().list(&session.host.supported_cpuid()?).done())),
            Call::SupportedHvCpuid => {
                Ok(Reply::bulk(Writer::default().list(&session.host.supported_hv_cpuid()?).done()))
            }
            Call::CreateVm(create) => session.create_vm(&create),
            Call::DestroyVm => session.destroy_vm().map(Into::into),
            Call::CanPostCopy => session.host.userfault().map(|_| ().into()),
            Call::Shutdown => {
                session.shutting_down = true;
                Ok(().into())
            }
            call => {
                let Some(machine) = &mut session.machine else {
                    return Err(Refusal::state(session.held.clone().unwrap_or_else(|| "there is no VM".into())));
                };
                match call {
                    Call::AddRam(request) => {
                        let extents = machine.add_ram(session.host, session.offer, &request)?;
                        Ok(Reply::payload(Writer::default().list(&extents)))
                    }
                    Call::SetMemslots(slots) => {
                        machine.set_memslots(session.host, session.offer, &slots).map(Into::into)
                    }
                    Call::Discard(runs) => machine.discard(&session.offer.function, &runs).map(Into::into),
                    Call::SetApicIds(ids) => machine.set_apic_ids(session.host, ids).map(Into::into),
                    Call::PostCopy(on) => machine.post_copy(session.host, on).map(Into::into),
                    Call::Irqfd(irqfd) => session.irqfd(&irqfd).map(Into::into),
                    Call::IoEvent(event) => machine.io_event(&session.offer.function, &event).map(Into::into),
                    Call::PostedRanges(ranges) => {
                        if !ranges.is_empty() && !session.host.tsc_is_synchronised() {
                            let why = "the host's TSCs are not synchronised, so posted writes would lose their order";
                            return Err(Refusal::unavailable(why));
                        }
                        machine.environment.posted.replace(ranges).map(Into::into)
                    }
                    Call::DirtyFetch(fetch) => {
                        let overruns = machine.overruns();
                        let reply = dirty_fetch(machine, &fetch);
                        if overruns == 0 && machine.overruns() != 0 {
                            session.log(Level::Warn, OVERRUN);
                        }
                        reply
                    }
                    call => on_vm(machine, call),
                }
            }
        }
    }

    fn create_vm(&mut self, create: &CreateVm) -> Result<Reply, Refusal> {
        if self.options.role == Role::Host {
            return Err(Refusal::state("this function serves the server itself and runs no VM: use a vm function"));
        }
        if let Some(held) = &self.held {
            return Err(Refusal::state(held.clone()));
        }
        if self.machine.is_some() {
            return Err(Refusal::state("there is a VM already"));
        }
        let machine = Machine::new(self.host, self.offer, create)?;
        let created = machine.created;
        self.machine = Some(machine);
        self.offer.go(State::Running);
        Ok(Reply::payload(Writer::default().put(&created)))
    }

    fn destroy_vm(&mut self) -> Result<(), Refusal> {
        let machine = self.machine.take().ok_or_else(|| Refusal::state("there is no VM"))?;
        if let Some(pausing) = self.pausing.take() {
            let gone = Refusal::state("the VM was destroyed meanwhile");
            // A ring that is full shows at the next answer.
            let _ = self.server.refuse(pausing.asked, gone.status, &gone.why);
        }
        machine.destroy(self.offer);
        self.offer.go(State::Negotiated);
        self.ended_one = true;
        Ok(())
    }

    fn irqfd(&mut self, call: &Irqfd) -> Result<(), Refusal> {
        let Some(machine) = &self.machine else { return Err(Refusal::state("there is no VM")) };
        if call.resample == 1 && machine.created.features & call::VmCreated::RESAMPLE == 0 {
            return Err(Refusal::unavailable("KVM can't tell of the guest's EOI here; use line changes"));
        }
        let vector = machine.free_vector(&self.offer.function, call.vector)?;
        if let Some(event) = machine.environment.lines.wire(call, vector)? {
            self.poller.add_eoi(call.gsi, &event).map_err(Refusal::nix("poll for the guest's EOI"))?;
        }
        Ok(())
    }
}

/// Calls that need no more than the VM.
fn on_vm<F: HostFunction + 'static>(machine: &mut Machine<F>, call: Call) -> Result<Reply, Refusal> {
    match call {
        Call::NotifyPages(pages) => machine.set_notify_pages(&pages).map(Into::into),
        Call::SetCpuid { vcpu, entries } => machine.set_cpuid(vcpu, entries).map(Into::into),
        Call::SetAffinity { vcpu, cpus } => machine.set_affinity(vcpu, cpus).map(Into::into),
        Call::GetState(request) => machine.state(&request).map(Reply::bulk),
        Call::SetState { target, records } => machine.set_state(target, records).map(Into::into),
        Call::Run(vcpu) => machine.run(vcpu).map(Into::into),
        Call::Kick(vcpu) => machine.kick(vcpu).map(Into::into),
        Call::SetRouting(routes) => machine.set_routing(&routes).map(Into::into),
        Call::Msi(msi) => lines::signal_msi(&machine.vm, &msi).map(Into::into),
        Call::Lines(words) => set_lines(machine, &words).map(Into::into),
        Call::DirtyLog(on) => machine.dirty_log(on).map(Into::into),
        Call::DirtyLimit(limit) => machine.dirty_limit(&limit).map(Into::into),
        Call::Lacks(runs) => machine.lacks(&runs).map(Into::into),
        Call::Placed(runs) => machine.placed(&runs).map(Into::into),
        Call::Statistics => Ok(Reply::bulk(statistics(machine))),
        _ => Err(Refusal { status: api_channel::Status::UNKNOWN, why: "this call belongs elsewhere".into() }),
    }
}

/// What a VM's log says once.
const OVERRUN: &str = "KVM overran a vCPU's dirty ring: no page is lost, but each time all count as written, and rates and limits of vCPUs \
                       mean nothing; start the VM without --dirty-ring on this host";

fn dirty_fetch<F: HostFunction + 'static>(machine: &mut Machine<F>, fetch: &DirtyFetch) -> Result<Reply, Refusal> {
    let found = machine.dirty_fetch(fetch)?;
    let bulk = Writer::default().list(&found.runs).done();
    Ok(Reply { payload: Writer::default().put(&found.next).done(), bulk })
}

fn set_lines<F: HostFunction + 'static>(machine: &Machine<F>, words: &[u64]) -> Result<(), Refusal> {
    if machine.is_bare() {
        return Err(Refusal::state("the VM has no interrupt controller before its first memslots"));
    }
    let bad = |word| Refusal::argument(format!("{word:#018x} is no change of a line"));
    let changes: Vec<LineChange> = words
        .iter()
        .filter_map(|&word| LineChange::from_word(word).map_err(bad).transpose())
        .collect::<Result<_, _>>()?;
    for change in changes {
        machine.environment.lines.apply(change);
    }
    Ok(())
}

/// Every counter. Of very many vCPUs those that are 0 are left out first, then what the bulk can't hold.
fn statistics<F: HostFunction + 'static>(machine: &Machine<F>) -> Vec<u8> {
    const MOST: usize = (bulk::MOST - 8) / size_of::<Statistic>();
    let mut list = Vec::new();
    machine.counters(|target, name, value| {
        let mut bytes = [0; 48];
        let len = name.len().min(bytes.len() - 1);
        bytes[..len].copy_from_slice(&name.as_bytes()[..len]);
        list.push(Statistic { name: bytes, target: target.into(), value });
    });
    if list.len() > MOST {
        list.retain(|s: &Statistic| s.value != 0);
        list.truncate(MOST);
    }
    Writer::default().list(&list).done()
}
