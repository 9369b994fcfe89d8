//! The kernel's VFIO calls (linux/vfio.h) as three kinds of descriptor: container, group, device.
//!
//! `unsafe`: ioctl. Crate vfio-ioctls doesn't fit: whatever it maps the device may write, it doesn't tell the IOMMU's valid ranges, it sets all
//! vectors or none, and it brings guest memory and KVM along.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::uio::{pread, pwrite};
use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_GROUP_FLAGS_VIABLE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE1v2_IOMMU,
    vfio_group_status, vfio_info_cap_header, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
    vfio_iommu_type1_info, vfio_irq_info, vfio_irq_set, vfio_region_info,
};

use super::iova::Range;
use crate::{BusMemory, Iova, Window};

/// `_IO(VFIO_TYPE, VFIO_BASE + n)`.
mod call {
    use nix::{ioctl_none_bad, ioctl_readwrite_bad, ioctl_write_int_bad, ioctl_write_ptr_bad, request_code_none};
    use vfio_bindings::bindings::vfio::{
        VFIO_BASE, VFIO_TYPE, vfio_group_status, vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap,
        vfio_iommu_type1_info, vfio_irq_info, vfio_irq_set, vfio_region_info,
    };

    ioctl_none_bad!(get_api_version, request_code_none!(VFIO_TYPE, VFIO_BASE));
    ioctl_write_int_bad!(set_iommu, request_code_none!(VFIO_TYPE, VFIO_BASE + 2));
    ioctl_readwrite_bad!(group_get_status, request_code_none!(VFIO_TYPE, VFIO_BASE + 3), vfio_group_status);
    ioctl_write_ptr_bad!(group_set_container, request_code_none!(VFIO_TYPE, VFIO_BASE + 4), i32);
    ioctl_write_ptr_bad!(group_get_device, request_code_none!(VFIO_TYPE, VFIO_BASE + 6), std::ffi::c_char);
    ioctl_readwrite_bad!(get_region_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 8), vfio_region_info);
    ioctl_readwrite_bad!(get_irq_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 9), vfio_irq_info);
    ioctl_write_ptr_bad!(set_irqs, request_code_none!(VFIO_TYPE, VFIO_BASE + 10), vfio_irq_set);
    ioctl_readwrite_bad!(iommu_info, request_code_none!(VFIO_TYPE, VFIO_BASE + 12), vfio_iommu_type1_info);
    ioctl_write_ptr_bad!(map_dma, request_code_none!(VFIO_TYPE, VFIO_BASE + 13), vfio_iommu_type1_dma_map);
    ioctl_readwrite_bad!(unmap_dma, request_code_none!(VFIO_TYPE, VFIO_BASE + 14), vfio_iommu_type1_dma_unmap);
}

/// An IOMMU domain.
#[derive(Debug)]
pub(super) struct Container(File);

/// A group of functions that the IOMMU can't tell apart.
#[derive(Debug)]
pub(super) struct Group(File);

/// A function.
#[derive(Debug)]
pub(super) struct Device(OwnedFd);

/// What an IOMMU domain can map.
#[derive(Debug)]
pub(super) struct DomainInfo {
    /// Bytes of its smallest page.
    pub(super) page: u64,
    /// Valid ranges, ascending.
    pub(super) ranges: Vec<Range>,
}

/// A region of a function: where in its descriptor, and how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) size: u64,
    pub(super) mappable: bool,
}

impl Container {
    /// Opens /dev/vfio/vfio; ENODEV where it speaks another version.
    pub(super) fn open() -> Result<Self, Errno> {
        let file = open(Path::new("/dev/vfio/vfio"))?;
        // SAFETY: the call has no argument.
        let version = unsafe { call::get_api_version(file.as_raw_fd()) }?;
        if version as u32 == VFIO_API_VERSION { Ok(Self(file)) } else { Err(Errno::ENODEV) }
    }

    /// Makes it a domain of the group's IOMMU. The first group only.
    pub(super) fn attach(&self, group: &Group) -> Result<(), Errno> {
        let fd: i32 = self.0.as_raw_fd();
        // SAFETY: the kernel reads one int, which lives through the call.
        unsafe { call::group_set_container(group.0.as_raw_fd(), &raw const fd) }?;
        // SAFETY: the argument is a number.
        unsafe { call::set_iommu(self.0.as_raw_fd(), VFIO_TYPE1v2_IOMMU as i32) }?;
        Ok(())
    }

    /// What the domain can map.
    pub(super) fn info(&self) -> Result<DomainInfo, Errno> {
        const FIXED: usize = size_of::<vfio_iommu_type1_info>();
        let mut buffer = vec![0u64; FIXED.div_ceil(8)];
        loop {
            let room = buffer.len() * 8;
            let info = buffer.as_mut_ptr().cast::<vfio_iommu_type1_info>();
            // SAFETY: the buffer holds the structure, aligned and zeroed.
            unsafe { (*info).argsz = room as u32 };
            // SAFETY: the kernel writes at most `argsz` bytes, which the buffer has.
            unsafe { call::iommu_info(self.0.as_raw_fd(), info) }?;
            // SAFETY: as above; the kernel has filled it in.
            let fixed = unsafe { *info };
            if fixed.argsz as usize > room {
                buffer = vec![0; (fixed.argsz as usize).div_ceil(8)];
                continue;
            }
            let sizes = if fixed.flags & VFIO_IOMMU_INFO_PGSIZES != 0 { fixed.iova_pgsizes } else { 0 };
            let page = if sizes == 0 { 4096 } else { 1 << sizes.trailing_zeros() };
            let bytes: Vec<u8> = buffer.iter().flat_map(|word| word.to_ne_bytes()).collect();
            let caps = if fixed.flags & VFIO_IOMMU_INFO_CAPS != 0 { fixed.cap_offset as usize } else { 0 };
            // A kernel that tells no ranges (before 5.4) has an IOMMU of at least 39 bits.
            let ranges = iova_ranges(&bytes, caps).unwrap_or_else(|| vec![Range { first: 0, last: (1 << 39) - 1 }]);
            return Ok(DomainInfo { page, ranges });
        }
    }

    /// Pins `memory` and maps it. The pages stay the device's until they are unmapped, also where `memory` itself goes.
    pub(super) fn map(&self, memory: &Window, iova: Iova, device_writes: bool) -> Result<(), Errno> {
        let writes = if device_writes { VFIO_DMA_MAP_FLAG_WRITE } else { 0 };
        let map = vfio_iommu_type1_dma_map {
            argsz: size_of::<vfio_iommu_type1_dma_map>() as u32,
            flags: VFIO_DMA_MAP_FLAG_READ | writes,
            vaddr: memory.address(),
            iova,
            size: memory.len() as u64,
        };
        // SAFETY: the kernel reads the structure. What the device may write is a window's memory, mapped shared, which every process
        // that maps it reaches as memory that changes under it.
        unsafe { call::map_dma(self.0.as_raw_fd(), &raw const map) }.map(drop)
    }

    /// Takes a mapping back.
    pub(super) fn unmap(&self, iova: Iova, len: u64) -> Result<(), Errno> {
        let mut unmap = vfio_iommu_type1_dma_unmap {
            argsz: size_of::<vfio_iommu_type1_dma_unmap>() as u32,
            iova,
            size: len,
            ..Default::default()
        };
        // SAFETY: the kernel reads and writes the structure, which lives through the call.
        unsafe { call::unmap_dma(self.0.as_raw_fd(), &raw mut unmap) }?;
        if unmap.size == len { Ok(()) } else { Err(Errno::ENOENT) }
    }
}

impl Group {
    /// Opens a group, which nobody else may have open (EBUSY).
    pub(super) fn open(number: u32) -> Result<Self, Errno> {
        open(&Path::new("/dev/vfio").join(number.to_string())).map(Self)
    }

    /// Whether all its functions are out of the hands of other drivers.
    pub(super) fn is_viable(&self) -> Result<bool, Errno> {
        let mut status = vfio_group_status { argsz: size_of::<vfio_group_status>() as u32, flags: 0 };
        // SAFETY: the kernel writes the structure, which lives through the call.
        unsafe { call::group_get_status(self.0.as_raw_fd(), &raw mut status) }?;
        Ok(status.flags & VFIO_GROUP_FLAGS_VIABLE != 0)
    }

    /// Opens a function of it, which resets the function where it can be reset.
    pub(super) fn device(&self, address: &CStr) -> Result<Device, Errno> {
        // SAFETY: the kernel reads a string that ends with NUL.
        let fd: RawFd = unsafe { call::group_get_device(self.0.as_raw_fd(), address.as_ptr()) }?;
        // SAFETY: the kernel has just opened this descriptor for the caller.
        Ok(Device(unsafe { OwnedFd::from_raw_fd(fd) }))
    }
}

impl Device {
    /// A region by its index: BAR 0–5, 7 for configuration space.
    pub(super) fn region(&self, index: u32) -> Result<Region, Errno> {
        let mut info =
            vfio_region_info { argsz: size_of::<vfio_region_info>() as u32, index, ..vfio_region_info::default() };
        // SAFETY: the kernel writes the structure, which lives through the call.
        unsafe { call::get_region_info(self.0.as_raw_fd(), &raw mut info) }?;
        let mappable = info.flags & VFIO_REGION_INFO_FLAG_MMAP != 0;
        Ok(Region { offset: info.offset, size: info.size, mappable })
    }

    /// How many interrupts of a kind it has (`VFIO_PCI_*_IRQ_INDEX`).
    pub(super) fn interrupts(&self, index: u32) -> Result<u32, Errno> {
        let mut info = vfio_irq_info { argsz: size_of::<vfio_irq_info>() as u32, index, ..vfio_irq_info::default() };
        // SAFETY: the kernel writes the structure, which lives through the call.
        unsafe { call::get_irq_info(self.0.as_raw_fd(), &raw mut info) }?;
        Ok(info.count)
    }

    /// Has the interrupts from `start` signal these eventfds; `None` takes one out of use.
    pub(super) fn set_interrupts(
        &self,
        index: u32,
        start: u32,
        events: &[Option<BorrowedFd<'_>>],
    ) -> Result<(), Errno> {
        let len = size_of::<vfio_irq_set>() + size_of_val(events);
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        let mut set = vec![len as u32, flags, index, start, events.len() as u32];
        // -1 is no descriptor.
        set.extend(events.iter().map(|event| event.map_or(u32::MAX, |fd| fd.as_raw_fd() as u32)));
        // SAFETY: the kernel reads `argsz` bytes: the structure's five words, then a descriptor for each interrupt.
        unsafe { call::set_irqs(self.0.as_raw_fd(), set.as_ptr().cast::<vfio_irq_set>()) }.map(drop)
    }

    /// Writes configuration space.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        let at = self.config_at(offset)?;
        if pwrite(&self.0, data, at)? == data.len() { Ok(()) } else { Err(Errno::EIO) }
    }

    /// Reads configuration space.
    pub(super) fn read_config<const N: usize>(&self, offset: u64) -> Result<[u8; N], Errno> {
        let (at, mut data) = (self.config_at(offset)?, [0; N]);
        if pread(&self.0, &mut data, at)? == N { Ok(data) } else { Err(Errno::EIO) }
    }

    fn config_at(&self, offset: u64) -> Result<i64, Errno> {
        let config = self.region(VFIO_PCI_CONFIG_REGION_INDEX)?;
        i64::try_from(config.offset + offset).map_err(|_| Errno::EINVAL)
    }
}

impl From<OwnedFd> for Container {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl From<OwnedFd> for Group {
    fn from(fd: OwnedFd) -> Self {
        Self(fd.into())
    }
}

impl From<OwnedFd> for Device {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Container> for OwnedFd {
    fn from(Container(file): Container) -> Self {
        file.into()
    }
}

impl From<Group> for OwnedFd {
    fn from(Group(file): Group) -> Self {
        file.into()
    }
}

impl From<Device> for OwnedFd {
    fn from(Device(fd): Device) -> Self {
        fd
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn open(path: &Path) -> Result<File, Errno> {
    let opened = OpenOptions::new().read(true).write(true).open(path);
    opened.map_err(|e| e.raw_os_error().map_or(Errno::EIO, Errno::from_raw))
}

/// The IOVA-range capability of the chain that starts at `next`: header, count, reserved, ranges of two 64-bit words.
fn iova_ranges(info: &[u8], mut next: usize) -> Option<Vec<Range>> {
    const HEADER: usize = size_of::<vfio_info_cap_header>();
    let half = |at: usize| Some(u16::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    let word = |at: usize| Some(u32::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    let wide = |at: usize| Some(u64::from_ne_bytes(*info.get(at..)?.first_chunk()?));
    // Each capability takes some bytes: a chain with more links goes round.
    for _ in 0..info.len() / HEADER {
        if next == 0 {
            return None;
        }
        if u32::from(half(next)?) == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count = word(next + HEADER)? as usize;
            let first = next + HEADER + 8;
            let range = |i: usize| Some(Range { first: wide(first + i * 16)?, last: wide(first + i * 16 + 8)? });
            return (0..count).map(range).collect();
        }
        next = word(next + 4)? as usize;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_found_behind_other_capabilities_and_nothing_malformed_is() {
        let mut info = vec![0u8; 24];
        let mut put = |words: &[u32]| info.extend(words.iter().flat_map(|w| w.to_ne_bytes()));
        put(&[3 | 1 << 16, 36, 65535]);
        put(&[1 | 1 << 16, 0, 2, 0, 0, 0, 0xfedf_ffff, 0, 0xfef0_0000, 0, u32::MAX, 0x7f]);
        let ranges = iova_ranges(&info, 24).unwrap();
        assert_eq!(ranges, [Range { first: 0, last: 0xfedf_ffff }, Range { first: 0xfef0_0000, last: 0x7f_ffff_ffff }]);
        assert_eq!(iova_ranges(&info, 0), None);
        assert_eq!(iova_ranges(&info[..60], 24), None, "cut short");
        info[28..32].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(iova_ranges(&info, 24), None, "goes round");
    }

    #[test]
    fn the_calls_have_the_numbers_of_the_kernels_header() {
        // linux/vfio.h: _IO(';', 100 + 14) is VFIO_IOMMU_UNMAP_DMA.
        let request = nix::request_code_none!(
            vfio_bindings::bindings::vfio::VFIO_TYPE,
            vfio_bindings::bindings::vfio::VFIO_BASE + 14
        );
        assert_eq!(request, 0x3b72);
    }
}
