//! A disk that is a file, by a back end that keeps a record of what it has in flight (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`), and does what
//! it has last first: its successor finds holes. The crate that the others stand on has no such record.

mod protocol;
mod ring;

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vhost::vhost_user::BackendReqHandler;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion, VolatileMemory};

use self::ring::{Buffer, Ring};
use crate::block::{Block, Place};

/// A disk and its queues.
pub(crate) struct Recorded {
    disk: Block,
    memory: GuestMemoryMmap,
    /// Of each region the front end's address, the guest's, and bytes.
    places: Vec<(u64, u64, u64)>,
    record: Option<MmapRegion>,
    /// Entries of a queue in it.
    entries: usize,
    log: Log,
    queues: HashMap<u32, Queue>,
}

/// Where it notes which pages it writes, and whether it does.
#[derive(Default)]
struct Log {
    bits: Option<MmapRegion>,
    on: bool,
}

impl Log {
    fn mark(&self, addr: u64, len: u64) -> io::Result<()> {
        let Some(bits) = self.bits.as_ref().filter(|_| self.on) else { return Ok(()) };
        for page in addr / 4096..(addr + len).div_ceil(4096) {
            let byte = bits.get_atomic_ref::<AtomicU8>((page / 8) as usize).map_err(io::Error::other)?;
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
        Ok(())
    }
}

/// A queue as far as it is known.
#[derive(Default)]
struct Queue {
    ring: Ring,
    enabled: bool,
    kick: Option<File>,
    call: Option<File>,
    /// Its predecessor's requests are done.
    recovered: bool,
}

impl Recorded {
    pub(crate) fn new(disk: Block) -> Self {
        Self {
            disk,
            memory: GuestMemoryMmap::new(),
            places: Vec::new(),
            record: None,
            entries: 0,
            log: Log::default(),
            queues: HashMap::new(),
        }
    }

    /// Does what there is in a queue that was kicked.
    fn visit(&mut self, index: u32) -> io::Result<()> {
        let Some(queue) = self.queues.get_mut(&index).filter(|queue| queue.enabled) else { return Ok(()) };
        let Some(record) = &self.record else { return Err(io::Error::other("a queue without a record")) };
        let mut ring = ring::InUse::new(&mut queue.ring, &self.memory, &self.log, record, self.entries, index);
        let mut heads = if queue.recovered { Vec::new() } else { ring.recover()? };
        queue.recovered = true;
        loop {
            heads.extend(ring.take()?);
            if heads.is_empty() {
                break;
            }
            while let Some(head) = heads.pop() {
                let dies = self.disk.dies();
                crate::block::die_at(dies, Place::Before);
                let written = answer(&self.disk, &self.memory, &self.log, &ring.buffers(head)?)?;
                crate::block::die_at(dies, Place::Done);
                ring.give_back(head, written)?;
                crate::block::die_at(dies, Place::Told);
            }
            if ring.wants_call()?
                && let Some(call) = &queue.call
            {
                nix::unistd::write(call, &1u64.to_ne_bytes())?;
            }
        }
        Ok(())
    }
}

/// Does a request; bytes written.
fn answer(disk: &Block, memory: &GuestMemoryMmap, log: &Log, buffers: &[Buffer]) -> io::Result<u32> {
    let (written, read): (Vec<&Buffer>, Vec<&Buffer>) = buffers.iter().partition(|buffer| buffer.writable);
    let mut request = Vec::new();
    for buffer in read {
        let mut data = vec![0; buffer.len as usize];
        memory.read_slice(&mut data, GuestAddress(buffer.addr)).map_err(io::Error::other)?;
        request.extend(data);
    }
    let room: usize = written.iter().map(|buffer| buffer.len as usize).sum();
    let (header, data) = request.split_first_chunk::<16>().ok_or(io::ErrorKind::InvalidData)?;
    let mut answer = vec![0; room.checked_sub(1).ok_or(io::ErrorKind::InvalidData)?];
    let status = match disk.obey(header, data, &mut answer) {
        Ok(()) => VIRTIO_BLK_S_OK,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
        Err(_) => VIRTIO_BLK_S_IOERR,
    };
    answer.push(status as u8);
    let mut rest = &answer[..];
    for buffer in written {
        let (now, later) = rest.split_at(buffer.len as usize);
        memory.write_slice(now, GuestAddress(buffer.addr)).map_err(io::Error::other)?;
        log.mark(buffer.addr, buffer.len.into())?;
        rest = later;
    }
    Ok(room as u32)
}

/// Serves one connection.
pub(crate) fn serve(disk: Block, socket: &str) -> Result<(), String> {
    // Its predecessor's, which may have been killed.
    _ = std::fs::remove_file(socket);
    let listener = UnixListener::bind(socket).map_err(|e| format!("{socket}: {e}"))?;
    let (stream, _) = listener.accept().map_err(|e| e.to_string())?;
    let device = Arc::new(Mutex::new(Recorded::new(disk)));
    let mut handler = BackendReqHandler::from_stream(stream.try_clone().map_err(|e| e.to_string())?, device.clone());
    loop {
        let kicks: Vec<(u32, File)> = {
            let device = device.lock().expect("nobody panicked");
            let kick = |(index, queue): (&u32, &Queue)| Some((*index, queue.kick.as_ref()?.try_clone().ok()?));
            device.queues.iter().filter_map(kick).collect()
        };
        let watched: Vec<BorrowedFd<'_>> =
            std::iter::once(stream.as_fd()).chain(kicks.iter().map(|(_, kick)| kick.as_fd())).collect();
        let mut fds: Vec<PollFd<'_>> = watched.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
        poll(&mut fds, PollTimeout::NONE).map_err(|e| e.to_string())?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        if ready[0] {
            // It ends with its connection.
            if handler.handle_request().is_err() {
                return Ok(());
            }
            continue;
        }
        for ((index, mut kick), _) in kicks.into_iter().zip(&ready[1..]).filter(|(_, ready)| **ready) {
            if kick.read(&mut [0; 8]).is_ok() {
                device.lock().expect("nobody panicked").visit(index).map_err(|e| e.to_string())?;
            }
        }
    }
}
