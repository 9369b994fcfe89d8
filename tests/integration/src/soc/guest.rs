//! Making a VM by calls, and putting a guest into it.

use api_channel::call::{
    Call, CpuidEntry, CreateVm, Extent, Groups, Irqchip, Memslot, Name, RamRequest, StateRequest, VM, VmCreated,
};
use api_channel::codec::Reader;
use api_channel::state::{MpState, Records, Regs, Segment, Sregs, Table, Type};
use ioreq_ring::wire::{LINE, STRING_PAGE};
use ioreq_ring::{SocLane, SocWindows};
use payloads::{Image, Payload};
use pcie_function::local::sealed_memfd;
use pcie_function::regions::Type as Region;
use pcie_function::{Mapping, Reach, SocFunction, Windowed};

use super::{Lane, Soc};

/// What a VM is like.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// vCPUs.
    pub vcpus: u32,
    /// Bytes of RAM from guest-physical 0.
    pub memory: u64,
    /// Interrupt controllers.
    pub irqchip: Irqchip,
    /// How long a vCPU spins for an answer, at most; 0: as the host likes.
    pub spin_ns: u64,
    /// Entries of each vCPU's dirty ring; 0: none.
    pub dirty_ring: u32,
}

impl Shape {
    /// For a payload.
    pub fn of(payload: &Payload) -> Self {
        Self { vcpus: payload.vcpus.into(), memory: 64 << 20, irqchip: Irqchip::Full, spin_ns: 0, dirty_ring: 0 }
    }
}

/// Where [`Soc::load_real_mode`] puts its code.
pub const FLAT_CODE: u64 = 0x1000;

impl<F: SocFunction> Soc<F> {
    /// Creates a VM of that shape: memory, lanes, CPUID. Nothing is loaded, and nothing runs.
    pub fn create(&mut self, shape: &Shape) -> VmCreated {
        let Shape { vcpus, memory, irqchip, spin_ns, dirty_ring } = *shape;
        let create = CreateVm { vcpus, irqchip: irqchip as u32, flags: 0, dirty_ring, spin_ns, name: Name::NONE };
        let (payload, _) = self.ok(&Call::CreateVm(create));
        let created: VmCreated = Reader::new(&payload).take().expect("what was created");
        self.created = Some(created);
        self.vcpus = vcpus;
        let (payload, _) = self.ok(&Call::AddRam(RamRequest { id: 0, node: -1, len: memory, iova: 0, huge: 0 }));
        let extents: Vec<Extent> = Reader::new(&payload).list(64).expect("extents");
        assert_eq!(extents.len(), 1, "a local function maps RAM in one piece");
        self.ram = (extents[0].iova, memory);
        self.ok(&Call::SetMemslots(vec![Memslot { base: 0, len: memory, offset: 0, ram: 0, flags: 0 }]));
        self.lanes = self.open_lanes(&created);
        self.polls();
        let (_, bulk) = self.ok(&Call::SupportedCpuid);
        let supported: Vec<CpuidEntry> = Reader::new(&bulk).list(4096).expect("CPUID entries");
        for vcpu in 0..vcpus {
            let mut entries = supported.clone();
            for entry in entries.iter_mut().filter(|e| e.function == 1) {
                entry.ebx = entry.ebx & 0x00ff_ffff | vcpu << 24;
            }
            self.ok(&Call::SetCpuid { vcpu, entries });
        }
        created
    }

    fn open_lanes(&self, created: &VmCreated) -> Vec<Lane<F>> {
        let len = (Lane::<F>::PRIVATE * self.vcpus as usize).next_multiple_of(4096);
        let memory = sealed_memfd("private", len as u64).expect("a memfd");
        let private =
            Mapping::new(std::os::fd::AsFd::as_fd(&memory), 0, len, Reach::Local).expect("a mapping").window();
        let lane = |i: usize| {
            let remote = |base: u64, len: usize| self.function.remote(base + (i * len) as u64, len);
            SocLane::new(SocWindows {
                request: self.lane_window(Region::LANE_REQUESTS, i),
                control: self.lane_window(Region::LANE_CONTROLS, i),
                posted: self.lane_window(Region::LANE_POSTED, i),
                completion: remote(created.completions, LINE),
                credit: remote(created.credits, LINE),
                outs: remote(created.outs, STRING_PAGE),
                ins: remote(created.ins, STRING_PAGE),
                private: private.cut(i * Lane::<F>::PRIVATE, Lane::<F>::PRIVATE).expect("a lane's words"),
            })
        };
        (0..self.vcpus as usize).map(lane).collect()
    }

    /// Writes guest memory by DMA.
    pub fn write(&self, address: u64, bytes: &[u8]) {
        assert!(address + bytes.len() as u64 <= self.ram.1);
        self.function.write(self.ram.0 + address, bytes).expect("DMA to guest memory");
    }

    /// Reads guest memory by DMA.
    pub fn read(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.function.read(self.ram.0 + address, &mut bytes).expect("DMA from guest memory");
        bytes
    }

    /// Copies all of guest memory to another VM's, which is zero, by DMA.
    pub fn copy_memory_to<G: SocFunction>(&self, other: &Soc<G>) {
        const PAGE: usize = 4096;
        let memory = self.read(0, self.ram.1 as usize);
        for (at, page) in (0..).step_by(PAGE).zip(memory.chunks(PAGE)).filter(|(_, page)| page.iter().any(|b| *b != 0))
        {
            other.write(at, page);
        }
    }

    /// Loads a 64-bit payload; its first vCPU starts in flat 32-bit mode, the others wait to be started.
    pub fn load(&mut self, payload: &Payload) {
        let Image::Kernel(kernel) = &payload.image else { panic!("{} is firmware", payload.name) };
        self.write(kernel.load_address().into(), kernel.bytes());
        let segment = |selector, kind| Segment { base: 0, limit: u32::MAX, selector, attributes: CODE_OR_DATA | kind };
        let (code, data) = (segment(0x10, EXECUTE | BIG), segment(0x18, READ_WRITE | BIG));
        let task = Segment { base: 0, limit: 0x67, selector: 0, attributes: PRESENT | BUSY_TASK };
        let sregs = Sregs { tr: task, ldt: UNUSABLE, cr0: CR0_PE | CR0_ET, ..segments(code, data) };
        self.set_registers(0, &sregs, kernel.entry().into(), 0);
    }

    /// Loads real-mode `code` at [`FLAT_CODE`] and starts every vCPU there: segments 0, BX its number, its stack below
    /// 0x8000 + 0x100 × number.
    pub fn load_real_mode(&mut self, code: &[u8]) {
        self.write(FLAT_CODE, code);
        let segment = |kind| Segment { base: 0, limit: 0xffff, selector: 0, attributes: CODE_OR_DATA | kind };
        let task = Segment { base: 0, limit: 0xffff, selector: 0, attributes: PRESENT | BUSY_TASK };
        let ldt = Segment { attributes: PRESENT | 2, ..task };
        for vcpu in 0..self.vcpus {
            let table = Table { base: 0, limit: 0xffff };
            let sregs = Sregs {
                tr: task,
                ldt,
                gdt: table,
                idt: table,
                cr0: CR0_RESET,
                ..segments(segment(EXECUTE), segment(READ_WRITE))
            };
            self.set_registers(vcpu, &sregs, FLAT_CODE, vcpu.into());
        }
    }

    fn set_registers(&mut self, vcpu: u32, sregs: &Sregs, rip: u64, rbx: u64) {
        let base = 0xfee0_0800 | u64::from(vcpu == 0) << 8;
        let records = Records::default()
            .put(Type::SREGS, &Sregs { apic_base: base, ..*sregs })
            .put(Type::REGS, &Regs { rip, rbx, rsp: 0x8000 + 0x100 * u64::from(vcpu), rflags: 2, ..Regs::default() })
            .put(Type::MP_STATE, &MpState::RUNNABLE);
        self.ok(&Call::SetState { target: vcpu, records: records.done() });
    }

    /// Every record of the VM, in the order of setting: the chips' first, then each vCPU's. The VM is paused.
    pub fn records(&mut self) -> Vec<(u32, Vec<u8>)> {
        let targets = std::iter::once(VM).chain(0..self.vcpus);
        let read = |soc: &mut Self, target| {
            soc.ok(&Call::GetState(StateRequest { target, reserved: 0, groups: Groups::ALL })).1
        };
        targets.map(|target| (target, read(self, target))).collect()
    }

    /// Sets what [`Soc::records`] gave.
    pub fn set_records(&mut self, all: Vec<(u32, Vec<u8>)>) {
        for (target, records) in all {
            self.ok(&Call::SetState { target, records });
        }
    }
}

// Attributes of a segment: see `api_channel::state::Segment`.
const PRESENT: u16 = 1 << 7;
const CODE_OR_DATA: u16 = PRESENT | 1 << 4;
const EXECUTE: u16 = 0xb;
const READ_WRITE: u16 = 3;
const BUSY_TASK: u16 = 0xb;
/// 32-bit, its limit in pages.
const BIG: u16 = 1 << 10 | 1 << 11;
const UNUSABLE: Segment = Segment { base: 0, limit: 0, selector: 0, attributes: 1 << 12 };

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
/// Caches off, as after reset.
const CR0_RESET: u64 = 0x6000_0010;

fn segments(cs: Segment, data: Segment) -> Sregs {
    Sregs { cs, ds: data, es: data, fs: data, gs: data, ss: data, ..Sregs::default() }
}
