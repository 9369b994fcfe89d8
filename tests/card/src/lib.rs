//! The card in software: docs/card.md as vfio-user devices, a host side and a SoC side for each function.
//!
//! [`Card::start`] serves all functions from threads of this process; the program `card` is that and a command line. QEMU's
//! `vfio-user-pci` plugs a host side into an emulated server, and a SoC side into an emulated SoC; `pcie-function-card` is
//! the SoC side as a plain process. What can go wrong with a card goes wrong here on demand.

mod bus;
mod config;
mod control;
mod engine;
mod function;
mod iommu;
mod memory;
mod misbehaviour;
mod server;
mod stats;

use std::hash::{BuildHasher, RandomState};
use std::io::{self, PipeWriter};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pcie_function::card::{ROLE_HOST, ROLE_VM};

use crate::control::Command;
use crate::function::{Function, Link};
pub use crate::misbehaviour::{Dma, Doorbell};
pub use crate::stats::Stats;

/// A card that serves; dropping it takes its sockets away, and its threads end as their clients go.
#[derive(Debug)]
pub struct Card {
    directory: PathBuf,
    functions: Arc<[Arc<Function>]>,
    /// Closed on drop: every server that waits for a client sees it.
    _stop: PipeWriter,
}

impl Card {
    /// Serves `vms` vm functions, and the host function as number `vms`, at sockets in `directory`, which is made if it isn't there.
    ///
    /// # Errors
    /// The directory or a socket can't be made, or a socket of that name is there already.
    pub fn start(directory: &Path, vms: u32) -> io::Result<Self> {
        std::fs::create_dir_all(directory)?;
        let card = RandomState::new().hash_one(directory);
        let functions: Arc<[Arc<Function>]> = (0..=vms)
            .map(|number| {
                let role = if number == vms { ROLE_HOST } else { ROLE_VM };
                Function::new(card, number, role).map(Arc::new)
            })
            .collect::<io::Result<_>>()?;
        let (stopped, stop) = io::pipe()?;
        let started = Self { directory: directory.to_path_buf(), functions, _stop: stop };
        for (number, function) in (0..).zip(started.functions.iter()) {
            for (link, path) in [(Link::Host, started.host_socket(number)), (Link::Soc, started.soc_socket(number))] {
                server::serve(Arc::clone(function), link, &path, stopped.try_clone()?.into())?;
            }
            let function = Arc::clone(function);
            std::thread::Builder::new().name(format!("dma-{number}")).spawn(move || function.engine.work(&function))?;
        }
        control::serve(Arc::clone(&started.functions), &started.control_socket())?;
        Ok(started)
    }

    /// How many functions there are, the host function too.
    pub fn functions(&self) -> u32 {
        self.functions.len() as u32
    }

    /// Where the host side of a function is served.
    pub fn host_socket(&self, function: u32) -> PathBuf {
        self.directory.join(format!("host-{function}.sock"))
    }

    /// Where the SoC side of a function is served.
    pub fn soc_socket(&self, function: u32) -> PathBuf {
        self.directory.join(format!("soc-{function}.sock"))
    }

    /// Where the card takes orders.
    pub fn control_socket(&self) -> PathBuf {
        self.directory.join("control.sock")
    }

    /// Takes the host's link down, or brings it back.
    pub fn set_link(&self, function: u32, up: bool) {
        self.run(function, Command::Link(up));
    }

    /// Pulls the host function out, for good.
    pub fn remove(&self, function: u32) {
        self.run(function, Command::Remove);
    }

    /// Resets the host function.
    pub fn reset(&self, function: u32) {
        self.run(function, Command::Reset);
    }

    /// What becomes of the host's doorbells from now on.
    pub fn set_doorbell(&self, function: u32, doorbell: Doorbell) {
        self.run(function, Command::Doorbell(doorbell));
    }

    /// Whether vectors of the host are lost from now on.
    pub fn lose_vectors(&self, function: u32, lose: bool) {
        self.run(function, Command::LoseVectors(lose));
    }

    /// What becomes of DMA from now on.
    pub fn set_dma(&self, function: u32, dma: Dma) {
        self.run(function, Command::Dma(dma));
    }

    /// State and counts.
    ///
    /// # Panics
    /// There is no such function; the same holds for all orders above.
    pub fn stats(&self, function: u32) -> Stats {
        self.functions[function as usize].stats()
    }

    fn run(&self, function: u32, command: Command) {
        control::run(&self.functions[function as usize], command);
    }
}

impl Drop for Card {
    fn drop(&mut self) {
        for (number, function) in (0..).zip(self.functions.iter()) {
            function.engine.exit();
            for path in [self.host_socket(number), self.soc_socket(number)] {
                // Already gone is as good.
                let _ = std::fs::remove_file(path);
            }
        }
        let _ = std::fs::remove_file(self.control_socket());
    }
}
