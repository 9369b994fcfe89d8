//! A disk that is a file.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::str::FromStr;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{DescriptorChain, QueueOwnedT};
use vm_memory::{ByteValued, GuestAddressSpace, GuestMemoryLoadGuard, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::{Memory, exit_event};

pub(crate) const QUEUES: usize = 2;
/// Bytes of the configuration.
const CONFIG: usize = 60;
const SECTOR: u64 = 512;

/// When to die.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Death {
    place: Place,
    /// Requests until then, with that one.
    count: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Before,
    Done,
    Told,
}

impl FromStr for Death {
    type Err = String;

    fn from_str(s: &str) -> Result<Self, String> {
        let parse = || {
            let (place, count) = s.split_once(':')?;
            let place = match place {
                "before" => Place::Before,
                "done" => Place::Done,
                "told" => Place::Told,
                _ => return None,
            };
            Some(Self { place, count: count.parse().ok().filter(|count| *count > 0)? })
        };
        parse().ok_or_else(|| format!("{s}: write before, done or told, a colon, and a number from 1 on"))
    }
}

/// The disk.
pub(crate) struct Block {
    file: File,
    death: Option<Death>,
    memory: Option<Memory>,
    event_index: bool,
}

type Chain = DescriptorChain<GuestMemoryLoadGuard<GuestMemoryMmap>>;

impl Block {
    pub(crate) fn open(file: &str, death: Option<Death>) -> Result<Self, String> {
        let file = File::options().read(true).write(true).open(file).map_err(|e| format!("{file}: {e}"))?;
        Ok(Self { file, death, memory: None, event_index: false })
    }

    /// Counts a request, with which it may have to die.
    pub(crate) fn dies(&mut self) -> Option<Place> {
        let death = self.death.as_mut()?;
        death.count -= 1;
        (death.count == 0).then_some(death.place)
    }

    /// Its configuration.
    pub(crate) fn config(&self) -> Vec<u8> {
        let sectors = self.file.metadata().map_or(0, |file| file.len()) / SECTOR;
        let mut config = sectors.to_le_bytes().to_vec();
        config.resize(CONFIG, 0);
        config
    }

    /// Does the request that begins with `header`: of `data`, or filling `room`.
    pub(crate) fn obey(&self, header: &[u8; 16], data: &[u8], room: &mut [u8]) -> io::Result<()> {
        let [kind @ .., _, _, _, _, _, _, _, _, _, _, _, _] = *header;
        let [.., a, b, c, d, e, f, g, h] = *header;
        let offset = u64::from_le_bytes([a, b, c, d, e, f, g, h]).saturating_mul(SECTOR);
        match u32::from_le_bytes(kind) {
            VIRTIO_BLK_T_IN => self.file.read_exact_at(room, offset),
            VIRTIO_BLK_T_OUT => self.file.write_all_at(data, offset),
            VIRTIO_BLK_T_FLUSH => self.file.sync_data(),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn visit(&mut self, vring: &VringRwLock) -> io::Result<bool> {
        let Some(memory) = &self.memory else { return Ok(false) };
        let memory = memory.memory();
        let mut ring = vring.get_mut();
        let chains: Vec<Chain> = ring.get_queue_mut().iter(memory.clone()).map_err(io::Error::other)?.collect();
        drop(ring);
        let any = !chains.is_empty();
        for chain in chains {
            let dies = self.dies();
            die_at(dies, Place::Before);
            let head = chain.head_index();
            let written = self.answer(chain, &memory)?;
            die_at(dies, Place::Done);
            vring.add_used(head, written).map_err(io::Error::other)?;
            die_at(dies, Place::Told);
        }
        if any && vring.needs_notification().map_err(io::Error::other)? {
            vring.signal_used_queue()?;
        }
        Ok(any)
    }

    /// Does a request; bytes written.
    fn answer(&self, chain: Chain, memory: &GuestMemoryMmap) -> io::Result<u32> {
        let mut reader = chain.clone().reader(memory).map_err(io::Error::other)?;
        let mut writer = chain.writer(memory).map_err(io::Error::other)?;
        let mut header = [0; 16];
        reader.read_exact(&mut header)?;
        let mut data = vec![0; reader.available_bytes()];
        reader.read_exact(&mut data)?;
        let mut room = vec![0; writer.available_bytes() - 1];
        let obeyed = self.obey(&header, &data, &mut room);
        writer.write_all(&room)?;
        let status = match obeyed {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Err(_) => VIRTIO_BLK_S_IOERR,
        };
        writer.write_all((status as u8).as_slice())?;
        Ok(writer.bytes_written() as u32)
    }
}

/// As if killed.
pub(crate) fn die_at(dies: Option<Place>, place: Place) {
    if dies == Some(place) {
        // It doesn't come back.
        let _ = kill(Pid::this(), Signal::SIGKILL);
    }
}

impl VhostUserBackendMut for Block {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        128
    }

    fn features(&self) -> u64 {
        let own = [VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ];
        let rings = [VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC];
        let features = own.iter().chain(&rings).fold(0, |features, bit| features | 1 << bit);
        features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, enabled: bool) {
        self.event_index = enabled;
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.config().into_iter().skip(offset as usize).take(size as usize).collect()
    }

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        exit_event()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        let vring = &vrings[usize::from(event)];
        if !self.event_index {
            return self.visit(vring).map(drop);
        }
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.visit(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}
