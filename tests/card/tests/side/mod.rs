//! A side of a function without QEMU: the vfio-user client of crate `vfio_user`, some memory, some eventfds.
#![allow(dead_code)] // each test file uses its part

use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use pcie_function::card::{bar, register};
use pcie_function::{Mapping, Reach, Window, local};
use vfio_user::Client;

/// Where a side maps its memory, unless a test says otherwise.
pub(crate) const RAM: u64 = 0x1_0000_0000;
/// Bytes of it.
pub(crate) const RAM_SIZE: usize = 8 << 20;
const CONFIG: u32 = 7;
const MSIX: u32 = 2;
const EVENTFD_TRIGGER: u32 = 1 << 2 | 1 << 5;

/// One side, plugged in.
pub(crate) struct Side {
    pub(crate) client: Client,
    pub(crate) ram: Window,
    pub(crate) file: OwnedFd,
    pub(crate) card: Window,
    pub(crate) vectors: Vec<EventFd>,
}

impl Side {
    /// Plugs in, masters the bus, maps [`RAM`], takes `vectors` vectors.
    pub(crate) fn plug(socket: &Path, vectors: u32) -> Self {
        let mut client = Client::new(socket).unwrap();
        let file = local::sealed_memfd("side", RAM_SIZE as u64).unwrap();
        let ram = Mapping::new(file.as_fd(), 0, RAM_SIZE, Reach::Local).unwrap().window();
        client.dma_map(0, RAM, RAM_SIZE as u64, file.as_raw_fd()).unwrap();
        let memory = client.region(bar::MEMORY).unwrap();
        assert_eq!(memory.sparse_areas.len(), 1);
        let fd = memory.file_offset.as_ref().unwrap().file();
        let card = Mapping::new(fd.as_fd(), 0, memory.size as usize, Reach::Local).unwrap().window();
        let vectors: Vec<EventFd> =
            (0..vectors).map(|_| EventFd::from_flags(EfdFlags::EFD_NONBLOCK).unwrap()).collect();
        for (at, events) in (0..).step_by(16).zip(vectors.chunks(16)) {
            let fds: Vec<RawFd> = events.iter().map(|event| event.as_fd().as_raw_fd()).collect();
            client.set_irqs(MSIX, EVENTFD_TRIGGER, at, fds.len() as u32, &fds).unwrap();
        }
        let mut side = Self { client, ram, file, card, vectors };
        side.master(true);
        side
    }

    /// Sets or clears Bus Master Enable.
    pub(crate) fn master(&mut self, on: bool) {
        let command: u16 = if on { 0x0006 } else { 0x0002 };
        self.client.region_write(CONFIG, 4, &command.to_le_bytes()).unwrap();
    }

    pub(crate) fn config(&mut self, offset: u64) -> u32 {
        let mut value = [0; 4];
        self.client.region_read(CONFIG, offset, &mut value).unwrap();
        u32::from_le_bytes(value)
    }

    pub(crate) fn read(&mut self, register: u64) -> u32 {
        let mut value = [0; 4];
        self.client.region_read(bar::REGISTERS, register, &mut value).unwrap();
        u32::from_le_bytes(value)
    }

    pub(crate) fn read_wide(&mut self, register: u64) -> u64 {
        let mut value = [0; 8];
        self.client.region_read(bar::REGISTERS, register, &mut value).unwrap();
        u64::from_le_bytes(value)
    }

    pub(crate) fn write(&mut self, register: u64, value: u32) {
        self.client.region_write(bar::REGISTERS, register, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn write_wide(&mut self, register: u64, value: u64) {
        self.client.region_write(bar::REGISTERS, register, &value.to_le_bytes()).unwrap();
    }

    pub(crate) fn ring(&mut self, doorbell: u32) {
        self.write(register::DOORBELL, doorbell);
    }

    /// How often a vector has been raised since the last call.
    pub(crate) fn raised(&self, vector: u32) -> u64 {
        self.vectors[vector as usize].read().unwrap_or(0)
    }
}

/// Whether `fd` becomes readable in time.
pub(crate) fn readable(fd: impl AsFd, limit: Duration) -> bool {
    let mut ready = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    poll(&mut ready, PollTimeout::try_from(limit).unwrap()).unwrap() == 1
}

/// Waits until `condition` holds.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(60), "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Bytes that name their place and a seed.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}
