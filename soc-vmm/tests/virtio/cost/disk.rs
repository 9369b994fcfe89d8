//! A disk's requests.

use pcie_function::modelled::Counts;
use soc_vmm::block::{self, ImageSpec};
use soc_vmm::virtio::Session;
use soc_vmm::virtio::block::{BlockConfig, BlockEngine};

use super::{Bus, serve};
use crate::rig::{Driver, EVENT_INDEX, VERSION_1};

const FLUSH: u64 = 1 << 9;
/// Bytes of a request's data.
const PIECE: u32 = 4096;
const HEADERS: u64 = 0x2_0000;
const STATUS: u64 = 0x2_8000;
const DATA: u64 = 0x4_0000;

/// A disk and its driver, with a bus between them.
struct Bench {
    bus: Bus,
    driver: Driver,
    session: Session,
    engine: BlockEngine,
    _dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bus = Bus::new();
        let driver = Driver::new(&bus.board.ram, 0x1_0000, 128);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![7; 64 * PIECE as usize]).unwrap();
        let config = BlockConfig::new("disk0", block::open(&ImageSpec::new(path)).unwrap(), "s");
        let session = bus.board.session(VERSION_1 | FLUSH | EVENT_INDEX, &[driver.at]);
        let engine = BlockEngine::new(config).unwrap();
        Self { bus, driver, session, engine, _dir: dir }
    }

    /// Makes `depth` requests at once and has them served; what that cost.
    fn costs(&mut self, write: bool, depth: u32) -> Counts {
        let ram = &self.bus.board.ram;
        for n in 0..u64::from(depth) {
            let header = [u64::from(write).to_le_bytes(), (8 * n).to_le_bytes()].concat();
            ram.set(HEADERS + 16 * n, &header);
            let data = (DATA + u64::from(PIECE) * n, PIECE, !write);
            self.driver.add(&[(HEADERS + 16 * n, 16, false), data, (STATUS + n, 1, true)]);
        }
        let before = self.bus.crossings.counts();
        let (driver, mut answered) = (&mut self.driver, 0);
        serve(&mut self.engine, &mut self.session, || {
            while let Some((_, used)) = driver.take_used() {
                assert_eq!(used, if write { 1 } else { PIECE + 1 });
                answered += 1;
            }
            answered == depth
        });
        self.bus.since(before)
    }
}

#[test]
fn a_request_by_itself_costs_four_writes_and_its_bytes() {
    let mut bench = Bench::new();
    for write in [false, true] {
        for _ in 0..20 {
            let cost = bench.costs(write, 1);
            // Data, status, the used ring's entry and its index; what is read and which requests there are.
            let (writes, bytes) = if write { (3, 1 + 8 + 8) } else { (4, 4096 + 1 + 8 + 8) };
            assert_eq!((cost.dma_writes, cost.dma_write_bytes), (writes, bytes), "{cost:?}");
            let data = if write { 4096 } else { 0 };
            assert!(cost.dma_reads <= 12 && cost.dma_read_bytes <= data + 320, "{cost:?}");
            assert_eq!((cost.posted, cost.reads), (0, 0), "{cost:?}");
        }
    }
}

#[test]
fn of_32_requests_at_once_each_costs_little_but_its_data() {
    const DEPTH: u64 = 32;
    let mut bench = Bench::new();
    for write in [false, true] {
        for _ in 0..20 {
            let cost = bench.costs(write, DEPTH as u32);
            // Used entries and indices are shared, and so are descriptors and the available ring.
            let data = if write { (0, DEPTH * 4096) } else { (DEPTH * 4096, 0) };
            let (writes, reads) = if write { (DEPTH, 2 * DEPTH) } else { (2 * DEPTH, DEPTH) };
            assert!(cost.dma_writes <= writes + DEPTH / 4 && cost.dma_write_bytes <= data.0 + 12 * DEPTH, "{cost:?}");
            assert!(cost.dma_reads <= reads + DEPTH / 2 && cost.dma_read_bytes <= data.1 + 128 * DEPTH, "{cost:?}");
            assert_eq!((cost.posted, cost.reads), (0, 0), "{cost:?}");
        }
    }
}
