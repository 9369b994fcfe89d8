#![allow(unsafe_code)] // hands guest memory to KVM

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use payloads::{Image, Payload};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::devices::{Devices, TestDevice};
use super::vcpu::{self, End};
use super::{Driver, Error, Event, Irqchip, kvm};

/// Guest-physical address under which a firmware image is seen at reset.
const FIRMWARE_TOP: u64 = 1 << 32;
const FIRMWARE_LOW: u64 = 0xf_0000;
const FIRMWARE_SLOT: u32 = 1;

/// How a machine is made.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Its interrupt controllers.
    pub irqchip: Irqchip,
    /// RAM from address 0, in bytes.
    pub memory: u64,
    /// Whether KVM logs dirty pages of RAM (slot 0).
    pub dirty_log: bool,
}

impl Default for Options {
    fn default() -> Self {
        Options { irqchip: Irqchip::Full, memory: 16 << 20, dirty_log: false }
    }
}

/// A VM with a payload in it.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    memory: GuestMemoryMmap,
    irqchip: Irqchip,
    test_device: TestDevice,
    // KVM reads it as long as the VM exists.
    _firmware: Option<GuestMemoryMmap>,
}

/// What a run showed.
#[derive(Debug)]
pub struct Outcome {
    /// How each vCPU came to its end.
    pub ends: Vec<End>,
    /// The byte that was written to the debug-exit port.
    pub exit_code: Option<u8>,
    /// What was written to the debug console.
    pub console: String,
    /// All other exits to ports and memory, in their order.
    pub events: Vec<Event>,
}

impl Machine {
    /// A VM whose vCPUs stand at the payload's first instruction.
    pub fn new(payload: &Payload, options: Options) -> Result<Self, Error> {
        let system = Kvm::new().map_err(kvm("open /dev/kvm"))?;
        let vm = system.create_vm().map_err(kvm("KVM_CREATE_VM"))?;
        vm.set_tss_address(0xfffb_d000).map_err(kvm("KVM_SET_TSS_ADDR"))?;

        let memory = map(0, options.memory as usize)?;
        let flags = if options.dirty_log { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        add_slot(&vm, 0, flags, &memory, GuestAddress(0))?;
        let firmware = match &payload.image {
            Image::Kernel(kernel) => {
                write(&memory, kernel.load_address().into(), kernel.bytes())?;
                None
            }
            Image::Firmware(firmware) => {
                write(&memory, FIRMWARE_LOW, firmware.bytes())?;
                let base = FIRMWARE_TOP - firmware.bytes().len() as u64;
                let high = map(base, firmware.bytes().len())?;
                write(&high, base, firmware.bytes())?;
                add_slot(&vm, FIRMWARE_SLOT, 0, &high, GuestAddress(base))?;
                Some(high)
            }
        };
        match options.irqchip {
            Irqchip::None => {}
            Irqchip::Full => vm.create_irq_chip().map_err(kvm("KVM_CREATE_IRQCHIP"))?,
            Irqchip::Split => {
                let mut split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
                split.args[0] = 24;
                vm.enable_cap(&split).map_err(kvm("KVM_CAP_SPLIT_IRQCHIP"))?;
            }
        }

        let features = system.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))?;
        let mut vcpus = Vec::new();
        for id in 0..payload.vcpus {
            let vcpu = vm.create_vcpu(id.into()).map_err(kvm("KVM_CREATE_VCPU"))?;
            vcpu.set_cpuid2(&with_apic_id(features.clone(), id)).map_err(kvm("KVM_SET_CPUID2"))?;
            if let (0, Image::Kernel(kernel)) = (id, &payload.image) {
                enter_flat(&vcpu, kernel.entry())?;
            }
            vcpus.push(vcpu);
        }
        Ok(Machine {
            vm: Arc::new(vm),
            vcpus,
            memory,
            irqchip: options.irqchip,
            test_device: TestDevice::default(),
            _firmware: firmware,
        })
    }

    /// The VM.
    pub fn vm(&self) -> &Arc<VmFd> {
        &self.vm
    }

    /// The vCPUs; their state is theirs while the machine does not run.
    pub fn vcpus(&mut self) -> &mut [VcpuFd] {
        &mut self.vcpus
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// What pc-testdev keeps, from one run to the next.
    pub fn test_device(&mut self) -> &mut TestDevice {
        &mut self.test_device
    }

    /// Runs until the payload ends itself, a vCPU can't go on, or the time is over. A vCPU that was stopped has no exit
    /// pending: its state can be read.
    pub fn run(&mut self, driver: impl Driver + 'static, limit: Duration) -> Result<Outcome, Error> {
        let test_device = std::mem::take(&mut self.test_device);
        let devices = Devices::new(self.vm.clone(), self.irqchip, test_device, Box::new(driver));
        let devices = Arc::new(Mutex::new(devices));
        let served = devices.clone();
        let ends = self.run_vcpus(limit, move |vcpu, id, stop| vcpu::run(vcpu, id, &served, stop))?;

        let mut devices = devices.lock().unwrap_or_else(PoisonError::into_inner);
        self.test_device = std::mem::take(&mut devices.test_device);
        Ok(Outcome {
            ends,
            exit_code: devices.exit_code,
            console: String::from_utf8_lossy(&devices.console).into_owned(),
            events: std::mem::take(&mut devices.events),
        })
    }

    /// Runs a payload of one vCPU with the debug console alone, and nothing on the way from an exit to its answer:
    /// the least that an exit costs. Gives what the payload wrote.
    pub fn run_floor(&mut self, limit: Duration) -> Result<String, Error> {
        let console = Arc::new(Mutex::new(Vec::new()));
        let written = console.clone();
        self.run_vcpus(limit, move |vcpu, _, stop| {
            let mut console = Vec::new();
            let end = vcpu::run_floor(vcpu, &mut console, stop);
            *written.lock().unwrap_or_else(PoisonError::into_inner) = console;
            end
        })?;
        let console = console.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(String::from_utf8_lossy(&console).into_owned())
    }

    /// Runs each vCPU's loop in a thread of its own. The first that ends, or the limit, stops the others.
    fn run_vcpus(
        &mut self,
        limit: Duration,
        run: impl Fn(&mut VcpuFd, u8, &AtomicBool) -> End + Clone + Send + 'static,
    ) -> Result<Vec<End>, Error> {
        register_signal_handler(SIGRTMIN(), interrupted).map_err(std::io::Error::from)?;
        let stop = Arc::new(AtomicBool::new(false));
        let (ended, first_end) = mpsc::channel();

        let mut threads: Vec<JoinHandle<(VcpuFd, End)>> = Vec::new();
        for (id, mut vcpu) in (0u8..).zip(self.vcpus.drain(..)) {
            let (run, stop, ended) = (run.clone(), stop.clone(), ended.clone());
            threads.push(std::thread::Builder::new().name(format!("vcpu {id}")).spawn(move || {
                let end = run(&mut vcpu, id, &stop);
                // The receiver lives until every thread is joined.
                let _ = ended.send(());
                (vcpu, end)
            })?);
        }

        // Time over and a vCPU's end are the same to the others.
        let _ = first_end.recv_timeout(limit);
        stop.store(true, Ordering::Release);
        let mut ends = Vec::new();
        for thread in threads {
            // A signal that comes just before KVM_RUN is lost: repeat it.
            while !thread.is_finished() {
                let _ = thread.kill(SIGRTMIN());
                std::thread::sleep(Duration::from_millis(2));
            }
            let (vcpu, end) = thread.join().map_err(|_| std::io::Error::other("a vCPU thread panicked"))?;
            self.vcpus.push(vcpu);
            ends.push(end);
        }
        Ok(ends)
    }
}

extern "C" fn interrupted(_: i32, _: *mut libc::siginfo_t, _: *mut std::ffi::c_void) {}

fn map(base: u64, size: usize) -> Result<GuestMemoryMmap, Error> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(base), size)]).map_err(|error| Error::Memory(error.to_string()))
}

fn write(memory: &GuestMemoryMmap, address: u64, bytes: &[u8]) -> Result<(), Error> {
    memory.write_slice(bytes, GuestAddress(address)).map_err(|error| Error::Memory(error.to_string()))
}

fn add_slot(vm: &VmFd, slot: u32, flags: u32, memory: &GuestMemoryMmap, base: GuestAddress) -> Result<(), Error> {
    let host = memory.get_host_address(base).map_err(|error| Error::Memory(error.to_string()))?;
    let size = memory.last_addr().0 - base.0 + 1;
    let region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: base.0,
        memory_size: size,
        userspace_addr: host as u64,
    };
    // SAFETY: the mapping is `size` bytes long, and the machine keeps it as long as the VM.
    unsafe { vm.set_user_memory_region(region) }.map_err(kvm("KVM_SET_USER_MEMORY_REGION"))
}

/// 32-bit protected mode, flat, paging off: what PVH and multiboot promise.
fn enter_flat(vcpu: &VcpuFd, entry: u32) -> Result<(), Error> {
    let mut sregs = vcpu.get_sregs().map_err(kvm("KVM_GET_SREGS"))?;
    let flat = |selector, type_| kvm_bindings::kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    };
    sregs.cs = flat(0x8, 0xb);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = flat(0x10, 0x3);
    }
    sregs.cr0 = 0x11;
    vcpu.set_sregs(&sregs).map_err(kvm("KVM_SET_SREGS"))?;
    let regs = kvm_bindings::kvm_regs { rip: entry.into(), rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(kvm("KVM_SET_REGS"))
}

fn with_apic_id(mut features: CpuId, id: u8) -> CpuId {
    for entry in features.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24,
            0xb | 0x1f => entry.edx = id.into(),
            _ => {}
        }
    }
    features
}
