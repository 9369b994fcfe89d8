//! The VM as the host holds it: made, filled, started and stopped by calls.

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use api_channel::call::{
    Call, CpuidEntry, CreateVm, Extent, Groups, HostInfo, Name, RamRequest, StateRequest, Statistic, VCPU_ALL, VM,
    VmCreated,
};
use api_channel::codec::Reader;
use ioreq_ring::wire::{LINE, POSTED_RING, STRING_PAGE};
use ioreq_ring::{SocLane, SocWindows};
use nix::fcntl::posix_fallocate;
use pcie_function::local::sealed_memfd;
use pcie_function::regions::Type;
use pcie_function::{FunctionError, Mapping, Reach, SocFunction, Window, Windowed};

use super::arranger::Arranger;
use super::memory_plan::{MemoryPlan, Request};
use super::ram::GuestRam;
use super::split;
use super::view::{Backing, Memory};
use super::worker::Lane;
use crate::boot::Rom;
use crate::cli::RunConfig;
use crate::layout::MemoryLayout;
use crate::link::{CallError, Channel, Link, LinkError};
use crate::numa::{Numa, NumaError};
use crate::pci::MemoryView;

/// What there is to show to a guest, and where DMA finds each allocation.
type Allocated = (Memory, Vec<(u32, Vec<Extent>)>);

/// How long the host may take to end the VM.
const LAST_CALL: Duration = Duration::from_secs(5);

/// Why the host made no VM.
#[derive(Debug, thiserror::Error)]
pub(super) enum HostError {
    #[error("can't make the VM on the host")]
    Call(#[from] CallError),
    #[error("{option}: the host can't give it")]
    Memory {
        option: String,
        #[source]
        source: CallError,
    },
    #[error("--memory prealloc=on")]
    Prealloc(#[source] FunctionError),
    #[error("{0}: the host can't keep to it")]
    Affinity(&'static str, #[source] CallError),
    #[error(transparent)]
    Numa(#[from] NumaError),
}

/// The VM on the host.
#[derive(Debug)]
pub(super) struct HostVm<F: SocFunction> {
    channel: Channel<F>,
    /// What the host made.
    pub(super) created: VmCreated,
    /// Its memory by DMA.
    pub(super) ram: Arc<GuestRam<F>>,
    vcpus: u32,
}

impl<F: SocFunction> HostVm<F> {
    /// Makes a VM as `config` asks for it, its vCPUs paused, with a Hyper-V SynIC each if `synic`, and its memory, of which the guest
    /// sees what `view` says.
    ///
    /// # Errors
    /// The host refused; its sentence.
    pub(super) async fn create(
        link: &Link<F>,
        channel: Channel<F>,
        config: &RunConfig,
        layout: &MemoryLayout,
        roms: &[Rom],
        view: MemoryView,
        synic: bool,
    ) -> Result<(Self, Arc<Arranger<F>>), HostError> {
        let vcpus = config.topology.cpus();
        let name = Name::new(config.name.as_str());
        let irqchip = split::irqchip(config);
        let flags = if synic { CreateVm::HV_SYNIC } else { 0 };
        let create =
            CreateVm { vcpus, irqchip: irqchip as u32, flags, spin_ns: 0, dirty_ring: config.dirty_ring.0, name };
        let reply = channel.call(&Call::CreateVm(create)).await?;
        let created: VmCreated = Reader::new(&reply.payload).take().map_err(CallError::from)?;
        if !is_sound(&created, vcpus) {
            return Err(CallError::Malformed.into());
        }
        channel.call(&Call::SetApicIds(config.topology.apic_ids().collect())).await?;
        let ram = Arc::new(GuestRam::new(link.function.clone()));
        let vm = Self { channel, created, ram, vcpus };
        let numa = Numa::new(&config.numa, layout);
        let (memory, extents) = vm.fill(MemoryPlan::new(layout, &config.memory, &numa), layout, roms).await?;
        if config.memory.prealloc {
            let (function, extents) = (link.function.clone(), extents.clone());
            tokio::task::block_in_place(|| take_pages(&*function, &extents)).map_err(HostError::Prealloc)?;
        }
        let arranger = Arranger::new(link.function.clone(), vm.channel.clone(), vm.ram.clone(), memory, extents, view);
        arranger.begin().await?;
        if numa.nodes.iter().any(|node| node.pinned) {
            let reply = vm.channel.call(&Call::HostInfo).await?;
            let host = HostInfo::decode(&reply.bulk).map_err(CallError::from)?;
            for (vcpu, cpus) in numa.affinity(&host)? {
                vm.keep_on(vcpu, cpus).await.map_err(|e| HostError::Affinity("--numa", e))?;
            }
        }
        // What is said of one vCPU counts more than what is said of its node.
        for &(vcpu, cpu) in &config.cpu_affinity.0 {
            vm.keep_on(vcpu, vec![cpu.into()]).await.map_err(|e| HostError::Affinity("--cpu-affinity", e))?;
        }
        Ok((vm, Arc::new(arranger)))
    }

    /// Allocates RAM and ROM.
    async fn fill(&self, plan: MemoryPlan, layout: &MemoryLayout, roms: &[Rom]) -> Result<Allocated, HostError> {
        let first_rom = plan.next_id();
        let MemoryPlan { mut requests, ram } = plan;
        for (id, rom) in (first_rom..).zip(roms) {
            let ram = RamRequest { id, node: -1, len: rom.len, iova: rom.start, huge: 0 };
            requests.push(Request { ram, option: "--firmware".to_owned() });
        }
        let mut extents = Vec::new();
        for Request { ram: request, option } in requests {
            let reply = self.channel.call(&Call::AddRam(request)).await.map_err(|e| match e {
                CallError::Refused { .. } => HostError::Memory { option, source: e },
                e => HostError::Call(e),
            })?;
            let mut list = Reader::new(&reply.payload).list::<Extent>(1024).map_err(CallError::from)?;
            list.sort_by_key(|extent| extent.offset);
            if !are_whole(&list, request.len) {
                return Err(CallError::Malformed.into());
            }
            extents.push((request.id, list));
        }
        let rom = |(ram, rom): (u32, &Rom)| Backing { base: rom.start, len: rom.len, ram, offset: 0 };
        let roms = (first_rom..).zip(roms).map(rom).collect();
        Ok((Memory { ram, low_end: layout.low_end(), roms }, extents))
    }

    /// Keeps a vCPU on these CPUs of the host.
    async fn keep_on(&self, vcpu: u16, cpus: Vec<u32>) -> Result<(), CallError> {
        self.channel.call(&Call::SetAffinity { vcpu: vcpu.into(), cpus }).await.map(drop)
    }

    /// The SoC's ends of the lanes, and all their words that outlive the process, which lie in `state_dir`.
    ///
    /// # Errors
    /// The function has too few lanes, or the state file can't be made.
    pub(super) fn lanes(&self, link: &Link<F>, state_dir: Option<&Path>) -> Result<(Vec<Lane<F>>, Window), LinkError> {
        let count = self.vcpus;
        let private_len = (count as usize * Lane::<F>::PRIVATE).next_multiple_of(4096);
        let all_private = private_words(state_dir, private_len)?.window();
        let requests = link.lanes(Type::LANE_REQUESTS, LINE, count)?;
        let controls = link.lanes(Type::LANE_CONTROLS, LINE, count)?;
        let posted = link.lanes(Type::LANE_POSTED, POSTED_RING, count)?;
        let remote = |base: u64, lane: usize, len: usize| link.function.remote(base + (lane * len) as u64, len);
        let windows = requests.into_iter().zip(controls).zip(posted).enumerate();
        let lanes = windows.map(|(i, ((request, control), posted))| {
            let private = all_private.cut(i * Lane::<F>::PRIVATE, Lane::<F>::PRIVATE);
            SocLane::new(SocWindows {
                request,
                control,
                posted,
                completion: remote(self.created.completions, i, LINE),
                credit: remote(self.created.credits, i, LINE),
                outs: remote(self.created.outs, i, STRING_PAGE),
                ins: remote(self.created.ins, i, STRING_PAGE),
                private: private.expect("the file holds every lane's words"),
            })
        });
        Ok((lanes.collect(), all_private))
    }

    /// The CPUID that the host's KVM supports.
    pub(super) async fn supported_cpuid(&self) -> Result<Vec<CpuidEntry>, CallError> {
        let reply = self.channel.call(&Call::SupportedCpuid).await?;
        Ok(Reader::new(&reply.bulk).list(1024)?)
    }

    /// Sets a vCPU's CPUID.
    pub(super) async fn set_cpuid(&self, vcpu: u32, entries: Vec<CpuidEntry>) -> Result<(), CallError> {
        self.channel.call(&Call::SetCpuid { vcpu, entries }).await.map(drop)
    }

    /// Reads every state record of a vCPU, or of the VM ([`VM`]).
    pub(super) async fn state(&self, target: u32) -> Result<Vec<u8>, CallError> {
        let request = StateRequest { target, reserved: 0, groups: Groups::ALL };
        Ok(self.channel.call(&Call::GetState(request)).await?.bulk)
    }

    /// Sets state records.
    pub(super) async fn set_state(&self, target: u32, records: Vec<u8>) -> Result<(), CallError> {
        self.channel.call(&Call::SetState { target, records }).await.map(drop)
    }

    /// Sets the VM's own records: chips and clock.
    pub(super) async fn set_chips(&self, records: Vec<u8>) -> Result<(), CallError> {
        self.set_state(VM, records).await
    }

    /// Reads the VM's own records.
    pub(super) async fn chips(&self) -> Result<Vec<u8>, CallError> {
        self.state(VM).await
    }

    /// Whether the guest can run before all of its pages are there.
    pub(super) async fn can_post_copy(&self) -> Result<(), CallError> {
        self.channel.call(&Call::CanPostCopy).await.map(drop)
    }

    /// Lets these vCPUs run.
    pub(super) async fn run(&self, vcpus: &[usize]) -> Result<(), CallError> {
        if vcpus.len() == self.vcpus as usize {
            return self.channel.call(&Call::Run(VCPU_ALL)).await.map(drop);
        }
        for vcpu in vcpus {
            self.channel.call(&Call::Run(*vcpu as u32)).await?;
        }
        Ok(())
    }

    /// Takes every vCPU out of the guest, its exit finished.
    pub(super) async fn pause(&self) -> Result<(), CallError> {
        self.channel.call(&Call::Pause(VCPU_ALL)).await.map(drop)
    }

    /// Takes one vCPU out of the guest, its exit finished.
    pub(super) async fn pause_one(&self, vcpu: usize) -> Result<(), CallError> {
        self.channel.call(&Call::Pause(vcpu as u32)).await.map(drop)
    }

    /// The host's counters.
    pub(super) async fn statistics(&self) -> Result<Vec<Statistic>, CallError> {
        let reply = self.channel.call(&Call::Statistics).await?;
        Ok(Reader::new(&reply.bulk).list(65536)?)
    }

    /// Bytes of channel messages, sent and received.
    pub(super) fn channel_bytes(&self) -> (u64, u64) {
        self.channel.bytes()
    }

    /// Ends the VM.
    pub(super) async fn destroy(&self) {
        destroy(&self.channel).await;
    }
}

/// Ends whatever VM there is. A host that refuses has none; one that doesn't answer soon is left alone with it, and sees this
/// side go.
pub(super) async fn destroy<F: SocFunction>(channel: &Channel<F>) {
    let _ = tokio::time::timeout(LAST_CALL, channel.call(&Call::DestroyVm)).await;
}

/// The Hyper-V leaves that the host's KVM supports; there need be no VM.
pub(super) async fn supported_hv_cpuid<F: SocFunction>(channel: &Channel<F>) -> Result<Vec<CpuidEntry>, CallError> {
    let reply = channel.call(&Call::SupportedHvCpuid).await?;
    Ok(Reader::new(&reply.bulk).list(1024)?)
}

/// Whether the lanes can lie where the host says: aligned, nothing past the end of addresses.
fn is_sound(created: &VmCreated, vcpus: u32) -> bool {
    let fits = |base: u64, stride: usize| {
        base.is_multiple_of(stride as u64) && base.checked_add(u64::from(vcpus) * stride as u64).is_some()
    };
    [created.completions, created.credits].iter().all(|base| fits(*base, LINE))
        && [created.ins, created.outs].iter().all(|base| fits(*base, STRING_PAGE))
        && created.lane_vector.checked_add(created.lane_vectors).is_some()
}

/// Takes all memory before it is used.
fn take_pages(function: &impl SocFunction, extents: &[(u32, Vec<Extent>)]) -> Result<(), FunctionError> {
    let mut all = extents.iter().flat_map(|(_, extents)| extents);
    all.try_for_each(|extent| function.take_pages(extent.iova, extent.len))
}

/// Whether extents, sorted, are `len` bytes without gap or overlap, at IOVAs that there are.
fn are_whole(extents: &[Extent], len: u64) -> bool {
    let mut end = 0u64;
    let follows = extents.iter().all(|extent| {
        let follows = extent.offset == end && extent.iova.checked_add(extent.len).is_some();
        let next = end.checked_add(extent.len);
        end = next.unwrap_or(end);
        follows && next.is_some()
    });
    follows && end == len
}

/// Memory for the lanes' private words: a file that outlives the process, or, without a directory, a memfd.
fn private_words(dir: Option<&Path>, len: usize) -> Result<Arc<Mapping>, LinkError> {
    match dir {
        Some(dir) => {
            let path = dir.join("lanes");
            let failed = |e| LinkError::StateFile(path.clone(), e);
            let open = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
            let file = open.map_err(failed)?;
            // Every page now: one that a full file system can't give later would be a SIGBUS.
            posix_fallocate(&file, 0, len as i64).map_err(|e| failed(e.into()))?;
            Mapping::guarded(file.as_fd(), 0, len, Reach::Local).map_err(LinkError::State)
        }
        None => {
            let memory = sealed_memfd("outboard-lanes", len as u64).map_err(LinkError::State)?;
            Mapping::new(memory.as_fd(), 0, len, Reach::Local).map_err(LinkError::State)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_must_be_all_of_an_allocation() {
        let extent = |offset, iova, len| Extent { offset, iova, len };
        assert!(are_whole(&[extent(0, 1 << 32, 4096), extent(4096, 0, 4096)], 8192));
        for bad in [
            vec![],
            vec![extent(0, 0, 4096)],
            vec![extent(0, 0, 4096), extent(8192, 0, 4096)],
            vec![extent(0, 0, 8192), extent(4096, 0, 4096)],
            vec![extent(0, u64::MAX - 4095, 8192)],
            vec![extent(0, 0, u64::MAX), extent(u64::MAX, 0, 2)],
        ] {
            assert!(!are_whole(&bad, 8192), "{bad:?}");
        }
    }
}
