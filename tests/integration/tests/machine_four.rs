//! Four VMs on four functions of one server at once: what one of them and its SoC side do, the others never notice.

use std::collections::BTreeSet;
use std::io::{Seek, SeekFrom, Write};

use api_channel::call::{Call, VCPU_ALL, VmCreated};
use integration::hostile::{Running, free_of_trouble};
use integration::machines::{MOST, Server, Watched, but_for_the_emulator, shim_is_small};
use integration::soc::{Board, Shape, Soc};
use integration::test_name;
use nix::sys::signal::Signal;
use payloads::{PASSED, Payload, smp, watch};
use pcie_function::header::HostHeader;
use pcie_function::regions::{self, Spaces};
use pcie_function::{BusError, BusMemory, SocFunction};
use pcie_function_card::CardFunction;
use serde_json::Value;

/// The function that turns hostile.
const HOSTILE: u32 = 3;
/// The other ones.
const QUIET: [u32; 3] = [0, 1, 2];
/// The host function's number.
const HOST: u32 = 4;

#[test]
fn four_vms_at_once_know_nothing_of_each_other() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    but_for_the_emulator(four_vms);
}

fn four_vms() {
    let mut server = Server::start("machine-four", 4);
    let idle = server.stat(HOSTILE, "host_mapped_bytes");
    let payload = |function| watch::watch(Watched::seed(function)).unwrap();
    let start = |function| server.vm(function, &payload(function), &["--log", "info"]);
    let mut vms: Vec<Running> = (0..4).map(start).collect();
    (0..4).for_each(|function| Watched::new(function).goes_on(&server));

    the_inventory_is_the_server_s(&server);
    (0..4).for_each(|function| shim_is_small(&server.bed.server, server.shim(function), 1));

    let hostile = &mut vms[HOSTILE as usize];
    hostile_words_in_card_memory_end_their_own_vm(&server, hostile);
    vms.iter().for_each(|vm| println!("{}", vm.stderr()));
    others_go_on(&server);

    server.kill_shim(HOSTILE);
    server.start_shim(HOSTILE, &[]);
    server.wait_until("the function is offered", || server.stat(HOSTILE, "host_mapped_bytes") == idle);
    let mut soc = server.soc(HOSTILE);
    what_a_vm_had_faults_after_it(&server, &mut soc, idle);
    others_go_on(&server);
    let soc = a_hostile_soc_side_breaks_its_own_connection(&server, soc);
    others_go_on(&server);
    drop(soc);

    // The function is as good as ever, once its shim is started anew.
    server.kill_shim(HOSTILE);
    server.start_shim(HOSTILE, &[]);
    let two = smp::ipi(2).unwrap();
    let ended = server.vm(HOSTILE, &two, &[]).wait(MOST);
    assert_eq!(ended.status.code(), Some(PASSED), "{}", ended.stderr);

    for (function, vm) in QUIET.into_iter().zip(&mut vms) {
        server.counters(function).agree();
        Watched::new(function).goes_on(&server);
        vm.signal(Signal::SIGTERM);
        let ended = vm.wait(MOST);
        free_of_trouble("a VM that was left alone", &ended);
        let quiet = !ended.stderr.lines().any(|line| line.contains("WARN") || line.contains("triple fault"));
        assert!(ended.status.success() && quiet, "{ended:?}");
        server.wait_until("its memory is given back", || server.stat(function, "host_mapped_bytes") == idle);
        assert_eq!(server.stat(function, "faults"), 0);
    }
}

/// soc-vmm's exit status after a payload that saw something wrong.
const FAILED: i32 = (payloads::EXIT_FAIL as i32) << 1 | 1;

fn others_go_on(server: &Server) {
    for function in QUIET {
        Watched::new(function).goes_on(server);
    }
}

/// `soc-vmm host` says what the server's own first process finds in /proc and sysfs.
fn the_inventory_is_the_server_s(server: &Server) {
    let spec = server.spec(HOST);
    let mut host = std::process::Command::new(integration::program("soc-vmm"));
    let output = host.args(["host", "--json", "--function", &spec]).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let told: Value = serde_json::from_slice(&output.stdout).unwrap();
    let own = server.bed.server.inventory().unwrap();

    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let cpu = &told["cpu"];
    assert_eq!((text(&cpu["vendor"]), text(&cpu["model"])), (own.cpu.vendor, own.cpu.model));
    assert_eq!(cpu["count"], own.cpu.count);
    assert_eq!(list(&cpu["flags"]), own.cpu.flags);
    assert_eq!(told["memory_kib"], own.memory_kib);
    let nodes: Vec<_> = own.nodes.into_iter().map(|n| (n.id.into(), n.memory_kib.into(), n.cpus)).collect();
    let told_node = |n: &Value| (n["node"].clone(), n["memory_kib"].clone(), text(&n["cpus"]));
    assert_eq!(list(&told["numa_nodes"]).iter().map(told_node).collect::<Vec<_>>(), nodes);
    let own_pci = own.pci.into_iter().map(|f| {
        let class = format!("{:#08x}", f.class);
        [f.address, format!("{:#06x}", f.id.vendor), format!("{:#06x}", f.id.device), class]
    });
    let told_pci = |f: &Value| ["address", "vendor", "device", "class"].map(|key| text(&f[key]));
    assert_eq!(list(&told["pci"]).iter().map(told_pci).collect::<Vec<_>>(), own_pci.collect::<Vec<_>>());
    assert!(!list(&told["pci"]).is_empty() && own.memory_kib > 1 << 20);
}

/// Random words all over the lanes and rings that soc-vmm reads: it ends with one line, or its guest is told nonsense and ends.
fn hostile_words_in_card_memory_end_their_own_vm(server: &Server, vm: &mut Running) {
    let mut memory = CardMemory::of(vm);
    let mut random = Random(1);
    while vm.runs() {
        // Behind the header line and the region table, where everything is that is looked at again and again.
        memory.store(0x1_0000 + random.below(0x20_0000 - 8), random.next());
    }
    let ended = vm.wait(MOST);
    free_of_trouble("a VM whose lanes are noise", &ended);
    let told = ended.stderr.lines().filter(|line| line.starts_with("soc-vmm: ")).count();
    assert!(matches!((ended.status.code(), told), (Some(6), 1) | (Some(FAILED), 0)), "{ended:?}");
    assert!(server.shim_runs(HOSTILE));
}

/// Card memory as a process has it mapped. Whoever started the process may write it there.
struct CardMemory {
    memory: std::fs::File,
    start: u64,
}

impl CardMemory {
    fn of(process: &Running) -> Self {
        let maps = std::fs::read_to_string(format!("/proc/{}/maps", process.pid())).unwrap();
        let line = maps.lines().find(|line| line.contains("memfd:card-memory")).expect("card memory is mapped");
        let start = line.split('-').next().and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap();
        let memory = std::fs::OpenOptions::new().write(true).open(format!("/proc/{}/mem", process.pid())).unwrap();
        Self { memory, start }
    }

    /// Stores a word; nothing happens once the process has ended.
    fn store(&mut self, offset: u64, word: u64) {
        let at = SeekFrom::Start(self.start + offset / 8 * 8);
        let _ = self.memory.seek(at).and_then(|_| self.memory.write(&word.to_le_bytes()));
    }
}

/// Every page that a VM had for DMA is reached while it is there, and faults when it has ended.
fn what_a_vm_had_faults_after_it(server: &Server, soc: &mut Soc<CardFunction>, idle: u64) {
    const PAGE: usize = 4096;
    let (shape, created) = a_running_guest(soc);
    let ram = (0..shape.memory).step_by(PAGE);
    let lanes = [created.completions, created.credits, created.ins, created.outs];
    let pages: Vec<u64> = ram.chain(lanes).collect();
    let mut page = [0; PAGE];
    for &iova in &pages {
        soc.function.read(iova, &mut page).unwrap();
    }
    soc.ok(&Call::DestroyVm);
    let faults = server.stat(HOSTILE, "faults");
    for &iova in &pages {
        assert_eq!(soc.function.read(iova, &mut page), Err(BusError::Dma), "{iova:#x}");
        assert_eq!(soc.function.write(iova, &page), Err(BusError::Dma), "{iova:#x}");
    }
    assert!(server.stat(HOSTILE, "faults") - faults >= 2 * pages.len() as u64);
    assert_eq!(server.stat(HOSTILE, "host_mapped_bytes"), idle);
}

/// A guest that has shown that it runs, with a little memory.
fn a_running_guest(soc: &mut Soc<CardFunction>) -> (Shape, VmCreated) {
    let payload: Payload = watch::watch(7).unwrap();
    let shape = Shape { memory: 4 << 20, ..Shape::of(&payload) };
    let created = soc.create(&shape);
    soc.load(&payload);
    soc.ok(&Call::Run(VCPU_ALL));
    let mut board = Board::default();
    while board.console.lines().count() < 3 {
        let seen = soc.take();
        let answer = board.serve(&seen);
        soc.answer(&seen, answer);
    }
    (shape, created)
}

/// A SoC side that writes noise wherever its function lets it, and tries everywhere else.
fn a_hostile_soc_side_breaks_its_own_connection(server: &Server, mut soc: Soc<CardFunction>) -> Soc<CardFunction> {
    let (shape, created) = a_running_guest(&mut soc);
    let function = &soc.function;
    let card = function.card_memory();
    let header = HostHeader::load(&card).unwrap().unwrap();
    let spaces = Spaces { card: card.len() as u64, inbox: header.inbox_len.into(), outbox: header.outbox_len.into() };
    let regions = regions::load(&card, header.table, header.regions, &spaces).unwrap();
    let mut random = Random(2);
    let mut met = BTreeSet::new();
    for round in 0..3000 {
        let mut noise = [0; 64];
        noise.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = random.next().to_le_bytes());
        let iova = match round % 6 {
            0 => header.inbox + random.below(header.inbox_len.into()),
            1 => [created.completions, created.credits, created.ins][round % 3] + random.below(4096),
            2 => header.outbox + random.below(header.outbox_len.into()),
            3 => created.outs + random.below(4096),
            4 => random.below(1 << 40),
            _ => random.next(),
        };
        let written = function.write(iova & !7, &noise);
        let read = function.read(iova, &mut noise);
        met.extend([format!("write {written:?}"), format!("read {read:?}")]);
        if matches!(round % 6, 2 | 3) {
            assert_eq!(written, Err(BusError::Dma), "the outbox can be written");
        }
        if matches!(round % 6, 4 | 5) && iova >= shape.memory + 64 {
            assert_eq!((written, read), (Err(BusError::Dma), Err(BusError::Dma)), "{iova:#x} is reached");
        }
        let region = regions[random.below(regions.len() as u64) as usize];
        if region.space == regions::Space::Card {
            card.store((region.offset + random.below(region.len)) as usize & !7, random.next());
        }
        function.raise(random.below(128) as u32);
    }
    let all = ["read Err(Dma)", "read Ok(())", "write Err(Dma)", "write Ok(())"];
    assert_eq!(met.into_iter().collect::<Vec<_>>(), all);
    server.shim_says(HOSTILE, "connection ended: ");
    assert!(server.shim_runs(HOSTILE));
    println!("hostile: {}", server.shim_said(HOSTILE));
    soc
}

/// Numbers without a pattern, the same in every run: xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}
