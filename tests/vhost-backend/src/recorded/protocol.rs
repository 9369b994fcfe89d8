//! What the front end says to it.

use std::fs::File;
use std::io;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight, VhostUserLog,
    VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

use super::ring::record_len;
use super::{Queue, Recorded};
use crate::block::QUEUES;

/// Most buffers of a request but header and status.
const SEGMENTS: u32 = 30;

fn refused<T>() -> Result<T> {
    Err(Error::InvalidOperation("not offered"))
}

fn failed(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::ReqHandlerError(io::Error::other(error))
}

impl Recorded {
    fn queue(&mut self, index: u32) -> Result<&mut Queue> {
        if index as usize >= QUEUES {
            return Err(Error::InvalidParam);
        }
        Ok(self.queues.entry(index).or_default())
    }

    fn guest(&self, addr: u64) -> Result<u64> {
        let place = self.places.iter().find(|(user, _, len)| (*user..*user + *len).contains(&addr));
        place.map(|(user, guest, _)| guest + (addr - user)).ok_or(Error::InvalidParam)
    }
}

impl VhostUserBackendReqHandlerMut for Recorded {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        refused()
    }

    fn get_features(&mut self) -> Result<u64> {
        let bits = [VIRTIO_F_VERSION_1, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_SEG_MAX];
        let features = bits.iter().fold(0, |features, bit| features | 1 << bit);
        Ok(features | (VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL).bits())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        self.log.on = features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Result<Option<Vec<u64>>> {
        let map = |(region, file): (&VhostUserMemoryRegion, File)| {
            let mapping = MmapRegion::from_file(FileOffset::new(file, region.mmap_offset), region.memory_size as usize);
            let mapping = mapping.map_err(failed)?;
            GuestRegionMmap::new(mapping, GuestAddress(region.guest_phys_addr)).ok_or(Error::InvalidParam)
        };
        let mapped: Result<Vec<_>> = regions.iter().zip(files).map(map).collect();
        self.memory = GuestMemoryMmap::from_regions(mapped?).map_err(failed)?;
        self.places = regions.iter().map(|r| (r.user_addr, r.guest_phys_addr, r.memory_size)).collect();
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.queue(index)?.ring.size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let [descriptors, available, used] = [descriptor, available, used].map(|addr| self.guest(addr));
        let (descriptors, available, used) = (descriptors?, available?, used?);
        let queue = self.queue(index)?;
        (queue.ring.descriptors, queue.ring.available, queue.ring.used) = (descriptors, available, used);
        queue.ring.log = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG).then_some(log);
        queue.recovered = false;
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.queue(index)?.ring.next = base as u16;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let queue = self.queue(index)?;
        (queue.kick, queue.call, queue.enabled) = (None, None, false);
        Ok(VhostUserVringState::new(index, queue.ring.next.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queue(index.into())?.kick = fd;
        Ok(())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.queue(index.into())?.call = fd;
        Ok(())
    }

    fn set_vring_err(&mut self, _: u8, _: Option<File>) -> Result<()> {
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let features = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG;
        let record = VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::LOG_SHMFD;
        Ok(features | VhostUserProtocolFeatures::REPLY_ACK | record)
    }

    fn set_protocol_features(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(QUEUES as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.queue(index)?.enabled = enable;
        Ok(())
    }

    fn get_config(&mut self, offset: u32, size: u32, _: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let mut config = self.disk.config();
        config[12..16].copy_from_slice(&SEGMENTS.to_le_bytes());
        Ok(config.into_iter().skip(offset as usize).take(size as usize).collect())
    }

    fn set_config(&mut self, _: u32, _: &[u8], _: VhostUserConfigFlags) -> Result<()> {
        refused()
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Result<()> {
        refused()
    }

    fn get_shared_object(&mut self, _: VhostUserSharedMsg) -> Result<File> {
        refused()
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let size = usize::from(asked.num_queues) * record_len(asked.queue_size.into());
        let file: File = memfd_create(c"record", MFdFlags::MFD_CLOEXEC).map_err(failed)?.into();
        file.set_len(size as u64).map_err(failed)?;
        Ok((VhostUserInflight { mmap_size: size as u64, mmap_offset: 0, ..*asked }, file))
    }

    fn set_inflight_fd(&mut self, record: &VhostUserInflight, file: File) -> Result<()> {
        let place = FileOffset::new(file, record.mmap_offset);
        self.record = Some(MmapRegion::from_file(place, record.mmap_size as usize).map_err(failed)?);
        self.entries = record.queue_size.into();
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        refused()
    }

    fn add_mem_region(&mut self, _: &VhostUserSingleMemoryRegion, _: File, _: Option<bool>) -> Result<Option<u64>> {
        refused()
    }

    fn remove_mem_region(&mut self, _: &VhostUserSingleMemoryRegion) -> Result<()> {
        refused()
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        refused()
    }

    fn check_device_state(&mut self) -> Result<()> {
        refused()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        refused()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let place = FileOffset::new(file, log.mmap_offset);
        self.log.bits = Some(MmapRegion::from_file(place, log.mmap_size as usize).map_err(failed)?);
        Ok(())
    }
}
