//! The vfio-user servers of a function: one socket for its host side, one for its SoC side.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use pcie_function::card::bar;
use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE,
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS, VFIO_PCI_NUM_REGIONS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info,
    vfio_region_sparse_mmap_area,
};
use vfio_user::{DmaMapFlags, DmaUnmapFlags, IrqInfo, Server, ServerBackend, ServerRegion, SparseArea};

use crate::config;
use crate::function::{Function, Identity, Link, MEMORY_SIZE};
use crate::iommu::Access;
use crate::memory;

/// Serves one side of a function at `path` to one client after another, on a thread of its own, until `stop` is closed at its other end.
pub(crate) fn serve(function: Arc<Function>, link: Link, path: &Path, stop: OwnedFd) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let waiting = listener.try_clone()?;
    let memory = function.memory_file.as_raw_fd();
    let irqs = irqs(function.identity.vectors(link));
    let server = Server::from_owned_fd(listener.into(), true, irqs, regions(&function.identity, link, memory));
    let name = format!("{link:?}-{}", function.identity.number).to_lowercase();
    std::thread::Builder::new().name(name.clone()).spawn(move || {
        while wait(&waiting, &stop) {
            function.connected(link);
            let mut backend = Backend { function: &function, link, msix: vec![0; bar::MSIX_SIZE as usize] };
            if let Err(error) = server.run(&mut backend) {
                eprintln!("card: {name}: {error}");
            }
            function.disconnected(link);
        }
    })?;
    Ok(())
}

/// Whether a client waits (or, false, the card ends).
fn wait(listener: &UnixListener, stop: &OwnedFd) -> bool {
    let mut ready = [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
    loop {
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) => return ready[1].any() == Some(false),
            Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return false,
        }
    }
}

fn irqs(vectors: u32) -> Vec<IrqInfo> {
    (0..VFIO_PCI_NUM_IRQS)
        .map(|index| match index {
            VFIO_PCI_MSIX_IRQ_INDEX => IrqInfo { index, flags: VFIO_IRQ_INFO_EVENTFD, count: vectors },
            _ => IrqInfo { index, flags: 0, count: 0 },
        })
        .collect()
}

fn region_size(identity: &Identity, link: Link, region: u32) -> u64 {
    match region {
        bar::REGISTERS => bar::REGISTERS_SIZE,
        bar::MEMORY => MEMORY_SIZE,
        bar::MSIX => bar::MSIX_SIZE,
        bar::NOTIFY => identity.notify_size(link),
        VFIO_PCI_CONFIG_REGION_INDEX => config::SIZE as u64,
        _ => 0,
    }
}

fn regions(identity: &Identity, link: Link, memory: std::os::fd::RawFd) -> Vec<ServerRegion> {
    let region = |index| {
        let size = region_size(identity, link, index);
        let access = if size == 0 { 0 } else { VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE };
        let mapped = index == bar::MEMORY;
        let flags = if mapped { access | VFIO_REGION_INFO_FLAG_MMAP } else { access };
        let argsz = size_of::<vfio_region_info>() as u32;
        ServerRegion {
            region_info: vfio_region_info { argsz, flags, index, cap_offset: 0, size, offset: 0 },
            // The crate hands out the descriptor only with a list of mappable areas.
            sparse_areas: if mapped {
                vec![SparseArea { area: vfio_region_sparse_mmap_area { offset: 0, size } }]
            } else {
                Vec::new()
            },
            mmap_fd: mapped.then_some(memory),
        }
    };
    (0..VFIO_PCI_NUM_REGIONS).map(region).collect()
}

/// One client of one side.
struct Backend<'a> {
    function: &'a Arc<Function>,
    link: Link,
    /// BAR 4. Whoever plugs the device in keeps a table of its own; this one holds what is written.
    msix: Vec<u8>,
}

impl Backend<'_> {
    /// Whether this side reads all ones and writes in vain.
    fn is_gone(&self) -> bool {
        self.link == Link::Host && !self.function.bus().link()
    }

    fn check(&self, region: u32, offset: u64, len: usize) -> io::Result<usize> {
        let size = region_size(&self.function.identity, self.link, region);
        let end = offset.checked_add(len as u64).filter(|end| *end <= size);
        end.map(|_| offset as usize).ok_or(io::Error::from(io::ErrorKind::InvalidInput))
    }
}

impl ServerBackend for Backend<'_> {
    fn region_read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let at = self.check(region, offset, data.len())?;
        if self.is_gone() {
            data.fill(0xff);
            return Ok(());
        }
        match region {
            bar::REGISTERS => self.function.read_register(self.link, offset, data),
            bar::MEMORY => self.function.memory.read_bytes(at, data),
            bar::MSIX => data.copy_from_slice(&self.msix[at..at + data.len()]),
            VFIO_PCI_CONFIG_REGION_INDEX => self.function.config(self.link).read(at, data),
            // Notify pages, too.
            _ => data.fill(0),
        }
        Ok(())
    }

    fn region_write(&mut self, region: u32, offset: u64, data: &[u8]) -> io::Result<()> {
        let at = self.check(region, offset, data.len())?;
        if self.is_gone() {
            return Ok(());
        }
        match region {
            bar::REGISTERS => self.function.write_register(self.link, offset, data),
            bar::MEMORY => memory::store(&self.function.memory, at, data),
            bar::MSIX => self.msix[at..at + data.len()].copy_from_slice(data),
            bar::NOTIFY => self.function.notify(offset),
            VFIO_PCI_CONFIG_REGION_INDEX => self.function.write_config(self.link, at, data),
            _ => {}
        }
        Ok(())
    }

    fn dma_map(
        &mut self,
        flags: DmaMapFlags,
        offset: u64,
        address: u64,
        size: u64,
        fd: Option<File>,
    ) -> io::Result<()> {
        let access = Access { read: flags.contains(DmaMapFlags::READ), write: flags.contains(DmaMapFlags::WRITE) };
        let mut bus = self.function.bus_mut();
        let side = crate::function::side_mut(&mut bus, self.link);
        side.map.map(address, size, access, fd, offset)
    }

    fn dma_unmap(&mut self, flags: DmaUnmapFlags, address: u64, size: u64) -> io::Result<()> {
        let mut bus = self.function.bus_mut();
        let side = crate::function::side_mut(&mut bus, self.link);
        if flags.contains(DmaUnmapFlags::UNMAP_ALL) {
            side.map.clear();
            return Ok(());
        }
        side.map.unmap(address, size)
    }

    fn reset(&mut self) -> io::Result<()> {
        self.function.reset(self.link);
        Ok(())
    }

    fn set_irqs(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> io::Result<()> {
        if index != VFIO_PCI_MSIX_IRQ_INDEX || flags & VFIO_IRQ_SET_ACTION_TRIGGER == 0 {
            // Other interrupts there are none; masking is done by whoever plugs the device in.
            return Ok(());
        }
        let vectors = self.function.vectors(self.link);
        if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 {
            vectors.assign(start, count, fds)
        } else if flags & VFIO_IRQ_SET_DATA_NONE != 0 && count == 0 {
            vectors.clear();
            Ok(())
        } else {
            (start..start.saturating_add(count)).for_each(|vector| {
                vectors.raise(vector);
            });
            Ok(())
        }
    }
}
