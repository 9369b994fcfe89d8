//! A network interface that is a stream of frames.

use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackendMut, VringRwLock, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventNotifier};

use crate::{Memory, exit_event};

/// The event that there is a frame, behind those of the queues, and one of the crate's own.
pub(crate) const FRAME: u64 = 3;
pub(crate) const EVENTS: EventSet = EventSet::IN;
/// The queues.
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
/// Bytes of a frame's header on a queue, and of its length on the stream.
const HEADER: usize = 12;
const LENGTH: usize = 4;
const MAX_FRAME: usize = 65536;

/// The interface.
pub(crate) struct Net {
    stream: UnixStream,
    memory: Option<Memory>,
}

impl Net {
    pub(crate) fn connect(path: &str) -> Result<Self, String> {
        let stream = UnixStream::connect(path).map_err(|e| format!("{path}: {e}"))?;
        Ok(Self { stream, memory: None })
    }

    pub(crate) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Frames of the guest.
    fn transmit(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let Some(memory) = &self.memory else { return Ok(()) };
        let memory = memory.memory();
        loop {
            let Some(chain) = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone()) else { break };
            let head = chain.head_index();
            let mut reader = chain.reader(&memory).map_err(io::Error::other)?;
            let mut packet = vec![0; reader.available_bytes()];
            reader.read_exact(&mut packet)?;
            if let Some(frame) = packet.get(HEADER..).filter(|frame| (1..=MAX_FRAME).contains(&frame.len())) {
                let length = (frame.len() as u32).to_be_bytes();
                self.stream.write_all(&[&length[..], frame].concat())?;
            }
            vring.add_used(head, 0).map_err(io::Error::other)?;
        }
        vring.signal_used_queue()
    }

    /// A frame for the guest. Without a buffer for it, it is dropped.
    fn receive(&mut self, vring: &VringRwLock) -> io::Result<()> {
        let mut length = [0; LENGTH];
        self.stream.read_exact(&mut length)?;
        let mut packet = vec![0; HEADER + (u32::from_be_bytes(length) as usize).min(MAX_FRAME)];
        self.stream.read_exact(&mut packet[HEADER..])?;
        // In one buffer (virtio 1.2 §5.1.6.4).
        packet[10] = 1;
        let Some(memory) = &self.memory else { return Ok(()) };
        let memory = memory.memory();
        let Some(chain) = vring.get_mut().get_queue_mut().pop_descriptor_chain(memory.clone()) else { return Ok(()) };
        let head = chain.head_index();
        let mut writer = chain.writer(&memory).map_err(io::Error::other)?;
        let fits = packet.len() <= writer.available_bytes();
        if fits {
            writer.write_all(&packet)?;
        }
        vring.add_used(head, if fits { packet.len() as u32 } else { 0 }).map_err(io::Error::other)?;
        vring.signal_used_queue()
    }
}

impl VhostUserBackendMut for Net {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        2
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::empty()
    }

    fn set_event_idx(&mut self, _: bool) {}

    fn update_memory(&mut self, memory: Memory) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _: usize) -> Option<(EventConsumer, EventNotifier)> {
        exit_event()
    }

    fn handle_event(&mut self, event: u16, _: EventSet, vrings: &[VringRwLock], _: usize) -> io::Result<()> {
        match usize::from(event) {
            TRANSMIT => self.transmit(&vrings[TRANSMIT]),
            event if event as u64 == FRAME => self.receive(&vrings[RECEIVE]),
            // Buffers for frames.
            _ => Ok(()),
        }
    }
}
