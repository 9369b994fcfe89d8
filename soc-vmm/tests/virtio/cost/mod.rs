//! What requests and frames cost on the bus, counted at a function that models it: each DMA is a trip there and back, so few are to be made,
//! and no byte twice.

mod disk;
mod net;

use std::os::fd::AsFd;
use std::sync::Arc;

use api_channel::call::{Extent, Memslot};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use pcie_function::HostFunction;
use pcie_function::local::{LocalHost, LocalSoc};
use pcie_function::modelled::{Counts, Crossings, ModelledSoc};
use soc_vmm::virtio::{Engine, Session};
use soc_vmm::vm::GuestRam;

use super::rig::{Board, RAM};

/// A board whose memory is across a bus.
struct Bus {
    board: Board,
    crossings: Arc<Crossings>,
    _host: LocalHost,
}

impl Bus {
    fn new() -> Self {
        let mut board = Board::default();
        let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
        let (ours, theirs) = pair.unwrap();
        let greeting = std::thread::spawn(|| LocalHost::new(ours).unwrap());
        let function = LocalSoc::new(theirs).unwrap();
        let mut host = greeting.join().unwrap();
        host.map_ram(board.ram.file.as_fd(), 0, 0, RAM as u64, true).unwrap();
        let crossings = Arc::<Crossings>::default();
        let ram = GuestRam::new(Arc::new(ModelledSoc::new(function, crossings.clone())));
        let slot = Memslot { base: 0, len: RAM as u64, offset: 0, ram: 0, flags: 0 };
        ram.set(&[slot], &[(0, vec![Extent { offset: 0, iova: 0, len: RAM as u64 }])]);
        board.memory = Arc::new(ram);
        Self { board, crossings, _host: host }
    }

    /// What has crossed since then.
    fn since(&self, before: Counts) -> Counts {
        let after = self.crossings.counts();
        Counts {
            dma_reads: after.dma_reads - before.dma_reads,
            dma_read_bytes: after.dma_read_bytes - before.dma_read_bytes,
            dma_writes: after.dma_writes - before.dma_writes,
            dma_write_bytes: after.dma_write_bytes - before.dma_write_bytes,
            ..Counts { posted: after.posted - before.posted, reads: after.reads - before.reads, ..before }
        }
    }
}

/// Has an engine served, as the device's thread does it, until all is done; what `is_done` looks at it may take.
fn serve(engine: &mut impl Engine, session: &mut Session, mut is_done: impl FnMut() -> bool) {
    loop {
        let wait = engine.serve(session).unwrap();
        if is_done() {
            return;
        }
        if wait.timeout.is_none() {
            poll(&mut [PollFd::new(engine.source().unwrap(), PollFlags::POLLIN)], PollTimeout::NONE).unwrap();
        }
    }
}
