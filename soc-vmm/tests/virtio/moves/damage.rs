//! States that a peer made up, or that were damaged: refused by name, or harmless.

use std::io;
use std::sync::Arc;

use proptest::collection::vec;
use proptest::prelude::*;
use soc_vmm::pci::PciFunction;
use soc_vmm::virtio::balloon::{self, BalloonConfig, BalloonEvents, BalloonHandle, PageRun, Pages, PagesError};
use soc_vmm::virtio::block::{self, BlockConfig};
use soc_vmm::virtio::console::{self, ConsoleConfig, ConsoleHandle, HostEnd, PortConfig, PortEvents};
use soc_vmm::virtio::entropy::{self, EntropyConfig};
use soc_vmm::virtio::net::{self, NetConfig};
use soc_vmm::virtio::vsock::{self, VsockConfig};
use soc_vmm::virtio::{Plumbing, Rate, RateLimits};
use tempfile::TempDir;

use super::{elsewhere, halt, load, save};
use crate::hurt::{Damage, hurt};
use crate::rig::{Guest, HeapDisk, HeapNet, eventually};

/// Whoever hears and does nothing.
struct Nobody;

impl PortEvents for Nobody {
    fn guest_open(&self, _: &str, _: bool) {}
}

impl BalloonEvents for Nobody {
    fn changed(&self, _: u64) {}
}

impl Pages for Nobody {
    fn pinned(&self) -> Option<String> {
        None
    }

    fn revoke(&mut self, _: &[PageRun]) -> Result<(), PagesError> {
        Ok(())
    }

    fn free(&mut self, _: &[PageRun]) -> Result<u64, PagesError> {
        Ok(0)
    }
}

pub(super) const KINDS: usize = 6;

/// Makes a device of each kind; each time in a directory of its own.
fn plug(kind: usize, plumbing: Plumbing<'_>) -> io::Result<(Box<dyn PciFunction>, TempDir)> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("socket");
    let function = match kind {
        0 => {
            let operations = Some(Rate { per_second: 1, burst: 1 });
            let limits = RateLimits { operations, bytes: None };
            let disk = BlockConfig::new("d", Arc::new(HeapDisk::new(64)), "s");
            block::new(BlockConfig { limits, queues: 2, ..disk }, plumbing)?
        }
        1 => {
            let backends = (0..2).map(|_| Box::new(HeapNet::new([vec![1; 60]], 9)) as Box<_>).collect();
            net::new(NetConfig::new("n".into(), backends, [2; 6]).map_err(io::Error::from)?, plumbing)?
        }
        2 => {
            let end = HostEnd::listen(&path).map_err(io::Error::other)?;
            let ports = vec![PortConfig { id: "p".into(), name: "port".into(), end }];
            let handle = Arc::new(ConsoleHandle::new()?);
            console::new(ConsoleConfig { name: "c".into(), ports, handle, events: Arc::new(Nobody) }, plumbing)?
        }
        3 => vsock::new(VsockConfig::listen("v".into(), 7, &path).map_err(io::Error::other)?, plumbing)?,
        4 => {
            let handle = Arc::new(BalloonHandle::new(1 << 20)?);
            handle.set_target(1 << 19).map_err(io::Error::other)?;
            let (pages, events) = (Box::new(Nobody), Arc::new(Nobody));
            let config =
                BalloonConfig { name: "b".into(), deflate_on_oom: true, reporting: true, pages, handle, events };
            balloon::new(config, plumbing).map_err(io::Error::other)?
        }
        _ => entropy::new(EntropyConfig { name: "r".into(), limit: None }, plumbing)?,
    };
    Ok((function, dir))
}

pub(super) fn guest(kind: usize, on: Option<&Guest>) -> (Guest, TempDir) {
    let mut dir = None;
    let plug = |plumbing: Plumbing<'_>| {
        let (function, its) = plug(kind, plumbing)?;
        dir = Some(its);
        Ok(function)
    };
    let guest = match on {
        None => Guest::new(plug),
        Some(guest) => Guest::on(elsewhere(&guest.board), plug),
    };
    (guest, dir.unwrap())
}

/// A device with a driver that has made something of everything available.
pub(super) fn busy(kind: usize) -> (Guest, TempDir) {
    let (mut guest, dir) = guest(kind, None);
    // But for what makes another state of it elsewhere: it would be asked to announce itself.
    let features = guest.offered() & !(1 << 21);
    guest.enable_msix(3);
    guest.negotiate(features);
    let mut queues: Vec<_> = (0..6).map(|index| guest.queue(index, 16)).collect();
    guest.go();
    for (index, queue) in (0u16..).zip(&mut queues) {
        for n in 0..4 {
            let addr = 0x8_0000 + 0x1000 * u64::from(4 * index + n);
            guest.board.ram.set(addr, &[0; 64]);
            // Most are requests of some kind, or buffers, and none is anything that breaks a queue.
            match (kind, index) {
                (0, _) => drop(queue.add(&[(addr, 16, false), (addr + 64, 512, true), (addr + 1024, 1, true)])),
                (1, 4) => drop(queue.add(&[(addr, 3, false), (addr + 64, 1, true)])),
                (1, 1 | 3) | (2, 1) => drop(queue.add(&[(addr, 64, false)])),
                (2, 3) | (4, 0..=2) => drop(queue.add(&[(addr, 8, false)])),
                (3, 1) => drop(queue.add(&[(addr, 44, false)])),
                (2, 5) => {}
                _ => drop(queue.add(&[(addr, 256, true)])),
            }
        }
        guest.kick(index);
    }
    (guest, dir)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn a_damaged_state_is_refused_or_harmless(kind in 0..KINDS, damages in vec(any::<Damage>(), 1..4)) {
        let (mut source, _dir) = busy(kind);
        halt(&mut source);
        let states = hurt(save(&source), &damages);
        let (mut guest, _dir) = guest(kind, Some(&source));
        drop(source);
        if let Err(error) = load(&mut guest, states) {
            let text = error.to_string();
            prop_assert!(!text.is_empty() && !text.contains('\n'), "{text}");
            return Ok(());
        }
        guest.function.go_on();
        (0..6).for_each(|queue| guest.kick(queue));
        for offset in 0..0x3c {
            guest.get(offset, 1);
        }
        for offset in (0..0x1000).step_by(4) {
            guest.function.read_config(offset, 4);
        }
        // Its thread lives.
        guest.function.halt();
        eventually(|| guest.function.is_halted().then_some(()));
        save(&guest);
        guest.function.go_on();
        guest.function.reset();
        prop_assert_eq!(guest.status(), 0);
    }
}

#[test]
fn an_undamaged_state_is_taken() {
    for kind in 0..KINDS {
        let (mut source, _dir) = busy(kind);
        halt(&mut source);
        let states = save(&source);
        let (mut guest, _dir) = guest(kind, Some(&source));
        assert_eq!(load(&mut guest, states.clone()), Ok(()), "{kind}");
        // And it is what it was.
        assert!(save(&guest) == states, "{kind}");
        assert_eq!(guest.status(), 0xf);
    }
}
