//! A vfio-user client: one connection to one device.
//!
//! Not the one of crate `vfio_user` (0.1.7): that takes an error reply for success (a refused DMA_MAP would look mapped) or waits for
//! the rest of it for ever, has no time limit against a card that is stuck, and can't post a write, which is what a doorbell is.

use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, recvmsg,
    sendmsg, socket,
};
use pcie_function::{BusError, FunctionError};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use crate::wire::{Access, DeviceInfo, DmaMap, Header, RegionInfo, SetIrqs, Version, command, flag};

/// How long a message may take, one way. A card answers in microseconds; one that is stuck must not hold its users.
const PATIENCE: Duration = Duration::from_secs(10);
/// The longest reply that is read.
const REPLY_MAX: usize = 64 << 10;
/// `VFIO_DEVICE_FLAGS_PCI`.
const FLAGS_PCI: u32 = 1 << 1;
/// `VFIO_PCI_MSIX_IRQ_INDEX`.
const MSIX: u32 = 2;
/// `VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER`.
const SET_EVENTFD: u32 = 1 << 2 | 1 << 5;

/// A connection. Any error but [`FunctionError::Unusable`] ends its use.
#[derive(Debug)]
pub(crate) struct Client {
    stream: UnixStream,
    next: u16,
}

/// A connection to a card that may still serve another client: it serves one at a time, and the next one waits at its door.
#[derive(Debug)]
pub(crate) struct Door {
    client: Client,
    /// Of the message that asks for a version.
    id: u16,
}

impl Door {
    /// Waits for the card, for some seconds.
    ///
    /// # Errors
    /// It doesn't answer, or is no vfio-user PCI device.
    pub(crate) fn enter(self) -> Result<Client, FunctionError> {
        let Self { mut client, id } = self;
        let reply = client.reply(command::VERSION, id);
        let (reply, _) = reply.map_err(|error| if let FunctionError::Bus(_) = error { in_use() } else { error })?;
        match Version::read_from_prefix(&reply) {
            Ok((Version { major, .. }, _)) if major.get() == 0 => {}
            _ => return Err(unusable("speaks another version of vfio-user")),
        }
        let ask = DeviceInfo { argsz: (size_of::<DeviceInfo>() as u32).into(), ..DeviceInfo::new_zeroed() };
        let info: DeviceInfo = client.ask(command::GET_INFO, &ask, None)?.0;
        if info.flags.get() & FLAGS_PCI == 0 {
            return Err(unusable("is no PCI device"));
        }
        Ok(client)
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.client.as_fd()
    }
}

/// A region of the device.
#[derive(Debug)]
pub(crate) struct Region {
    /// Bytes.
    pub(crate) size: u64,
    /// The file behind it and where in that it starts, if it can be mapped.
    pub(crate) file: Option<(OwnedFd, u64)>,
}

impl Client {
    /// Connects to the device at `path` and asks it to agree on a version.
    ///
    /// # Errors
    /// Nobody listens there, or so many wait already that there is no room.
    pub(crate) fn knock(path: &Path) -> Result<Door, FunctionError> {
        let os = |what| move |e| FunctionError::Os(what, e);
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Unix, SockType::Stream, flags, None).map_err(os("make a socket"))?;
        let address = UnixAddr::new(path).map_err(os("name the card's socket"))?;
        connect(socket.as_raw_fd(), &address).map_err(|e| match e {
            Errno::EAGAIN => in_use(),
            e => FunctionError::Os("connect to the card", e),
        })?;
        let mut client = Self::adopt(socket)?;
        let version = Version { major: 0.into(), minor: 1.into() };
        let text = b"{\"capabilities\":{\"max_msg_fds\":1,\"max_data_xfer_size\":1048576}}\0";
        let id = client.send(command::VERSION, 0, &[version.as_bytes(), text], None)?;
        Ok(Door { client, id })
    }

    /// Connects to the device at `path`, and agrees on a version.
    ///
    /// # Errors
    /// Nobody listens there, or no vfio-user PCI device does.
    pub(crate) fn connect(path: &Path) -> Result<Self, FunctionError> {
        Self::knock(path)?.enter()
    }

    /// Goes on with a connection on which a version is agreed on.
    ///
    /// # Errors
    /// It is no socket.
    pub(crate) fn adopt(socket: OwnedFd) -> Result<Self, FunctionError> {
        let os = |e: std::io::Error| FunctionError::Os("connect to the card", errno(&e));
        let stream = UnixStream::from(socket);
        stream.set_nonblocking(false).map_err(os)?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(os)?;
        stream.set_write_timeout(Some(PATIENCE)).map_err(os)?;
        Ok(Self { stream, next: 0 })
    }

    /// The connection, for [`Client::adopt`].
    pub(crate) fn into_socket(self) -> OwnedFd {
        self.stream.into()
    }

    /// Size and file of a region.
    pub(crate) fn region(&mut self, index: u32) -> Result<Region, FunctionError> {
        // Room for the list of areas that says what can be mapped: a server passes the file only where that fits. What can be mapped
        // is all of it, or the caller will find it too small.
        const ROOM: u32 = 4096;
        let ask = RegionInfo { argsz: ROOM.into(), index: index.into(), ..RegionInfo::new_zeroed() };
        let (info, file): (RegionInfo, _) = self.ask(command::GET_REGION_INFO, &ask, None)?;
        Ok(Region { size: info.size.get(), file: file.map(|file| (file, info.offset.get())) })
    }

    /// Reads `N` bytes of a region.
    pub(crate) fn read<const N: usize>(&mut self, region: u32, offset: u64) -> Result<[u8; N], FunctionError> {
        let access = Access { offset: offset.into(), region: region.into(), count: (N as u32).into() };
        let (reply, _) = self.call(command::REGION_READ, &[access.as_bytes()], None)?;
        let data = reply.get(size_of::<Access>()..).and_then(|data| data.try_into().ok());
        data.ok_or_else(|| unusable("answers a read with another length"))
    }

    /// Writes to a region, and waits until the device has it.
    pub(crate) fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), FunctionError> {
        let access = Access { offset: offset.into(), region: region.into(), count: (data.len() as u32).into() };
        self.call(command::REGION_WRITE, &[access.as_bytes(), data], None).map(drop)
    }

    /// Writes to a region and doesn't wait: a later message arrives after it.
    pub(crate) fn post(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<(), FunctionError> {
        let access = Access { offset: offset.into(), region: region.into(), count: (data.len() as u32).into() };
        self.send(command::REGION_WRITE, flag::NO_REPLY, &[access.as_bytes(), data], None).map(drop)
    }

    /// Lets the device read and write `size` bytes of `memory` at `iova`.
    pub(crate) fn map(&mut self, memory: BorrowedFd<'_>, iova: u64, size: u64) -> Result<(), FunctionError> {
        let map = DmaMap {
            argsz: (size_of::<DmaMap>() as u32).into(),
            flags: 3.into(),
            offset: 0.into(),
            iova: iova.into(),
            size: size.into(),
        };
        self.call(command::DMA_MAP, &[map.as_bytes()], Some(memory)).map(drop)
    }

    /// Has an MSI-X vector signal `event`.
    pub(crate) fn set_vector(&mut self, vector: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        let set = SetIrqs {
            argsz: (size_of::<SetIrqs>() as u32).into(),
            flags: SET_EVENTFD.into(),
            index: MSIX.into(),
            start: vector.into(),
            count: 1.into(),
        };
        self.call(command::SET_IRQS, &[set.as_bytes()], Some(event)).map(drop)
    }

    /// Resets the device.
    pub(crate) fn reset(&mut self) -> Result<(), FunctionError> {
        self.call(command::RESET, &[], None).map(drop)
    }

    fn ask<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        command: u16,
        body: &T,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(T, Option<OwnedFd>), FunctionError> {
        let (reply, fd) = self.call(command, &[body.as_bytes()], fd)?;
        let (body, _) = T::read_from_prefix(&reply).map_err(|_| unusable("gives too short an answer"))?;
        Ok((body, fd))
    }

    /// Sends a message and waits for its reply: what follows the header, and a descriptor.
    fn call(
        &mut self,
        command: u16,
        body: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(Vec<u8>, Option<OwnedFd>), FunctionError> {
        let id = self.send(command, 0, body, fd)?;
        self.reply(command, id)
    }

    /// Waits for the reply to message `id`.
    fn reply(&mut self, command: u16, id: u16) -> Result<(Vec<u8>, Option<OwnedFd>), FunctionError> {
        loop {
            let (header, body, fd) = self.receive()?;
            // An error may come for a posted write too: what it was for says so by its own means.
            if header.id.get() != id || header.flags.get() & flag::REPLY == 0 {
                continue;
            }
            if header.flags.get() & flag::ERROR != 0 {
                let errno = Errno::from_raw(header.error.get() as i32);
                return Err(unusable(&format!("refuses vfio-user command {command}: {}", errno.desc())));
            }
            return Ok((body, fd));
        }
    }

    fn send(
        &mut self,
        command: u16,
        flags: u32,
        body: &[&[u8]],
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<u16, FunctionError> {
        let id = self.next;
        self.next = id.wrapping_add(1);
        let size = size_of::<Header>() + body.iter().map(|part| part.len()).sum::<usize>();
        let header = Header {
            id: id.into(),
            command: command.into(),
            size: (size as u32).into(),
            flags: flags.into(),
            error: 0.into(),
        };
        let mut message = Vec::with_capacity(size);
        message.extend_from_slice(header.as_bytes());
        body.iter().for_each(|part| message.extend_from_slice(part));

        let raw = fd.map(|fd| [fd.as_raw_fd()]);
        let mut rights = raw.as_ref().map(|raw| ControlMessage::ScmRights(raw));
        let mut rest = message.as_slice();
        while !rest.is_empty() {
            let socket = self.stream.as_raw_fd();
            let parts = [IoSlice::new(rest)];
            match sendmsg::<UnixAddr>(socket, &parts, rights.as_slice(), MsgFlags::MSG_NOSIGNAL, None) {
                Ok(sent) => {
                    // The descriptor has gone with the first part.
                    rights = None;
                    rest = &rest[sent..];
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(gone(errno, "send to the card")),
            }
        }
        Ok(id)
    }

    fn receive(&mut self) -> Result<(Header, Vec<u8>, Option<OwnedFd>), FunctionError> {
        let mut header = Header::new_zeroed();
        let mut space = nix::cmsg_space!([RawFd; 1]);
        let (read, fd) = loop {
            let mut parts = [IoSliceMut::new(header.as_mut_bytes())];
            let socket = self.stream.as_raw_fd();
            match recvmsg::<UnixAddr>(socket, &mut parts, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC) {
                Ok(message) => {
                    let rights = message.cmsgs().map_err(|e| FunctionError::Os("receive from the card", e))?;
                    break (message.bytes, rights.filter_map(descriptor).next());
                }
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(gone(errno, "receive from the card")),
            }
        };
        if read == 0 {
            return Err(FunctionError::Bus(BusError::Gone));
        }
        let io = |e: std::io::Error| gone(errno(&e), "receive from the card");
        self.stream.read_exact(&mut header.as_mut_bytes()[read..]).map_err(io)?;
        let rest = (header.size.get() as usize).checked_sub(size_of::<Header>()).filter(|rest| *rest <= REPLY_MAX);
        let mut body = vec![0; rest.ok_or_else(|| unusable("gives an answer of no legal length"))?];
        self.stream.read_exact(&mut body).map_err(io)?;
        Ok((header, body, fd))
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

/// The first descriptor that came with a message; others are closed.
///
/// `unsafe`: the kernel gives numbers.
#[allow(unsafe_code)]
fn descriptor(rights: ControlMessageOwned) -> Option<OwnedFd> {
    let ControlMessageOwned::ScmRights(numbers) = rights else { return None };
    // SAFETY: the kernel has just opened these descriptors for this process, and nobody else knows of them.
    let mut owned = numbers.into_iter().map(|number| unsafe { OwnedFd::from_raw_fd(number) });
    let first = owned.next();
    owned.for_each(drop);
    first
}

/// What a transfer error means: the card hung up or is stuck, or this process is in trouble.
fn gone(errno: Errno, what: &'static str) -> FunctionError {
    match errno {
        // EAGAIN: the time limit has passed.
        Errno::EPIPE | Errno::ECONNRESET | Errno::EAGAIN | Errno::UnknownErrno => FunctionError::Bus(BusError::Gone),
        errno => FunctionError::Os(what, errno),
    }
}

fn errno(error: &std::io::Error) -> Errno {
    // Without one: the stream ended in the middle of a message.
    error.raw_os_error().map_or(Errno::EPIPE, Errno::from_raw)
}

fn in_use() -> FunctionError {
    unusable("does not answer: another soc-vmm uses the function, or the card is stuck")
}

fn unusable(why: &str) -> FunctionError {
    FunctionError::Unusable(format!("what listens at the card's socket {why}"))
}
