//! An Ethernet switch between programs of this machine: what a network of servers is for VMs that move from one to the other, without privileges.
//!
//! Each connection at its socket is a port, as QEMU's `stream` netdev and soc-vmm's `--net stream=` make one (each frame behind its length, 32 bits,
//! big-endian). It learns which address is behind which port, and a frame for one that it doesn't know goes to all others (IEEE 802.1D §7.8).

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::machine::Error;

/// Bytes of a frame at most: a TCP segment of 64 KiB and its headers.
const MOST: usize = 68 << 10;
/// Frames that wait at a port; what comes on top is lost, as on any wire.
const QUEUE: usize = 512;
/// The shortest frame has both addresses and a type.
const HEADER: usize = 14;

type Mac = [u8; 6];
type PortId = u64;

/// A running switch. It ends with this handle.
#[derive(Debug)]
pub struct Switch {
    socket: PathBuf,
    ports: Arc<Mutex<Ports>>,
}

#[derive(Debug, Default)]
struct Ports {
    next: PortId,
    all: BTreeMap<PortId, Port>,
    behind: HashMap<Mac, PortId>,
    is_over: bool,
}

#[derive(Debug)]
struct Port {
    frames: SyncSender<Arc<[u8]>>,
    stream: UnixStream,
}

impl Switch {
    /// Starts it; whoever connects to `socket` is plugged in.
    ///
    /// # Errors
    /// The socket can't be made.
    pub fn start(socket: PathBuf) -> Result<Self, Error> {
        let listener = UnixListener::bind(&socket).map_err(Error::file(&socket))?;
        let ports: Arc<Mutex<Ports>> = Arc::default();
        let shared = Arc::clone(&ports);
        thread::spawn(move || {
            for stream in listener.incoming() {
                if lock(&shared).is_over {
                    return;
                }
                // Who couldn't be plugged in sees the end of the connection.
                let _ = stream.and_then(|stream| plug(&shared, stream));
            }
        });
        Ok(Self { socket, ports })
    }

    /// Plugs in somebody who listens, such as passt.
    ///
    /// # Errors
    /// Nobody does.
    pub fn connect(&self, to: &Path) -> Result<(), Error> {
        UnixStream::connect(to).and_then(|stream| plug(&self.ports, stream)).map_err(Error::file(to))
    }

    /// Where others connect.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        {
            let mut ports = lock(&self.ports);
            ports.is_over = true;
            for port in std::mem::take(&mut ports.all).into_values() {
                let _ = port.stream.shutdown(Shutdown::Both);
            }
        }
        // Whoever waits for a connection gets one.
        let _ = UnixStream::connect(&self.socket);
    }
}

fn lock(ports: &Mutex<Ports>) -> MutexGuard<'_, Ports> {
    ports.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Adds a port, with a thread for each direction.
fn plug(ports: &Arc<Mutex<Ports>>, stream: UnixStream) -> io::Result<()> {
    let (frames, queue) = sync_channel(QUEUE);
    let (reader, writer) = (stream.try_clone()?, stream.try_clone()?);
    let id = {
        let mut ports = lock(ports);
        if ports.is_over {
            return Err(io::ErrorKind::NotConnected.into());
        }
        ports.next += 1;
        let id = ports.next;
        ports.all.insert(id, Port { frames, stream });
        id
    };
    thread::spawn(move || send(&queue, writer));
    let ports = Arc::clone(ports);
    thread::spawn(move || {
        // Its end, or no frame: the port is unplugged.
        let _ = receive(&ports, id, reader);
        let mut ports = lock(&ports);
        if let Some(port) = ports.all.remove(&id) {
            // Who writes to it may wait for somebody who doesn't read.
            let _ = port.stream.shutdown(Shutdown::Both);
        }
        ports.behind.retain(|_, port| *port != id);
    });
    Ok(())
}

fn send(queue: &Receiver<Arc<[u8]>>, mut to: UnixStream) {
    for frame in queue {
        let len = u32::try_from(frame.len()).unwrap_or_default().to_be_bytes();
        if to.write_all(&[&len, &*frame].concat()).is_err() {
            return;
        }
    }
}

fn receive(ports: &Mutex<Ports>, from: PortId, mut stream: UnixStream) -> io::Result<()> {
    loop {
        let mut len = [0; 4];
        stream.read_exact(&mut len)?;
        let len = u32::from_be_bytes(len) as usize;
        if !(HEADER..=MOST).contains(&len) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut frame = vec![0; len];
        stream.read_exact(&mut frame)?;
        lock(ports).forward(from, &frame.into());
    }
}

impl Ports {
    fn forward(&mut self, from: PortId, frame: &Arc<[u8]>) {
        let [to, by] = [0, 6].map(|at| <Mac>::try_from(&frame[at..at + 6]).unwrap_or_default());
        let is_of_a_group = |mac: Mac| mac[0] & 1 != 0;
        if !is_of_a_group(by) {
            self.behind.insert(by, from);
        }
        let known = self.behind.get(&to).filter(|_| !is_of_a_group(to));
        let to = self.all.iter().filter(|(id, _)| **id != from && known.is_none_or(|known| known == *id));
        // A full queue loses the frame.
        to.for_each(|(_, port)| drop(port.frames.try_send(Arc::clone(frame))));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn frame(to: u8, by: u8, text: u8) -> Vec<u8> {
        [[2, 0, 0, 0, 0, to], [2, 0, 0, 0, 0, by]].concat().into_iter().chain([8, 0, text]).collect()
    }

    fn put(port: &mut UnixStream, frame: &[u8]) {
        port.write_all(&[&(frame.len() as u32).to_be_bytes(), frame].concat()).unwrap();
    }

    fn get(port: &mut UnixStream) -> Vec<u8> {
        let mut len = [0; 4];
        port.read_exact(&mut len).unwrap();
        let mut frame = vec![0; u32::from_be_bytes(len) as usize];
        port.read_exact(&mut frame).unwrap();
        frame
    }

    #[test]
    fn a_frame_goes_where_its_address_was_seen_last() {
        let dir = tempfile::tempdir().unwrap();
        let switch = Switch::start(dir.path().join("switch")).unwrap();
        let mut ports = [(); 3].map(|()| UnixStream::connect(switch.socket()).unwrap());
        ports.iter().for_each(|port| port.set_read_timeout(Some(Duration::from_secs(60))).unwrap());
        while lock(&switch.ports).all.len() < ports.len() {
            thread::yield_now();
        }
        let [a, b, c] = &mut ports;
        // Nobody knows 2 yet.
        put(a, &frame(2, 1, 0));
        assert_eq!((get(b), get(c)), (frame(2, 1, 0), frame(2, 1, 0)));
        put(b, &frame(1, 2, 1));
        assert_eq!(get(a), frame(1, 2, 1));
        put(a, &frame(2, 1, 2));
        assert_eq!(get(b), frame(2, 1, 2));
        // It moves, and says so to all.
        put(c, &[[0xff; 6].to_vec(), frame(0, 2, 3)[6..].to_vec()].concat());
        assert_eq!((get(a)[14], get(b)[14]), (3, 3));
        put(a, &frame(2, 1, 4));
        // The frames for b alone, and those before it, never came here.
        assert_eq!(get(c), frame(2, 1, 4));
        // A length that no frame has.
        a.write_all(&[0; 4]).unwrap();
        assert_eq!(a.read(&mut [0; 1]).unwrap(), 0, "it is unplugged");
    }
}
