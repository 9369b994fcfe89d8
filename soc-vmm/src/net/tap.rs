//! A TAP interface of this system: frames with virtio's header before them, so that the kernel finishes what the guest's driver left
//! undone, and the other way round.
//!
//! The interface is there before: whoever makes it adds it to a bridge or to Open vSwitch, and gives it to the user that runs this
//! process (`ip tuntap add mode tap user U`) or passes it open.

mod sys;

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::libc::{self, c_int, c_uint};
use nix::net::if_::if_nametoindex;
use nix::unistd::{read, write};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6,
};

use super::{HEADER, MAX_FRAME, NetBackend, NetError, Offloads, OpenError, TapSource};

/// Where queues of interfaces come from.
const DEVICE: &str = "/dev/net/tun";
/// Frames alone, behind virtio's header.
const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;

/// One queue of a TAP interface.
#[derive(Debug)]
pub struct TapBackend {
    name: String,
    queue: File,
    /// What the kernel does; none: frames have no header.
    offloads: Option<Offloads>,
    /// What the guest does.
    guest: Offloads,
    /// Frames of the interface may come to it.
    active: bool,
    received: Box<[u8]>,
    /// Bytes of the frame in there, its header included, until it is consumed.
    waiting: Option<usize>,
}

impl TapBackend {
    /// The queues of an interface, as many as are asked for or were passed.
    ///
    /// # Errors
    /// There is no such interface, it is none, or it is another's: what, and what to do.
    pub fn open(source: &TapSource) -> Result<Vec<Self>, OpenError> {
        match source {
            TapSource::Named { name, queues: 1 } => match Self::attach(name, false) {
                // One with many queues takes none otherwise.
                Err(no_tap @ OpenError::NoTap { .. }) => Ok(vec![Self::attach(name, true).map_err(|_| no_tap)?]),
                queue => Ok(vec![queue?]),
            },
            TapSource::Named { name, queues } => (0..*queues).map(|_| Self::attach(name, true)).collect(),
            TapSource::Inherited(numbers) => numbers.iter().map(|number| Self::inherit(*number)).collect(),
        }
    }

    fn attach(name: &str, many: bool) -> Result<Self, OpenError> {
        let refused = |errno: Errno| match errno {
            Errno::EBUSY => OpenError::Busy { name: name.into() },
            Errno::EPERM | Errno::EACCES => OpenError::Forbidden { name: name.into() },
            Errno::E2BIG => OpenError::TooManyQueues { name: name.into() },
            Errno::EINVAL if many => OpenError::OneQueue { name: name.into() },
            Errno::EINVAL => OpenError::NoTap { name: name.into() },
            errno => OpenError::Tap { name: name.into(), source: errno.into() },
        };
        let index = || if_nametoindex(name).map_err(|_| OpenError::NoInterface { name: name.into() });
        let before = index()?;
        let flags = OFlag::O_NONBLOCK.bits();
        let queue =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open(DEVICE).map_err(|why| {
                match why.raw_os_error().map(Errno::from_raw) {
                    Some(errno @ (Errno::EPERM | Errno::EACCES)) => refused(errno),
                    _ => OpenError::Device { why },
                }
            })?;
        let many = if many { libc::IFF_MULTI_QUEUE } else { 0 };
        sys::attach(queue.as_fd(), name, FLAGS | many).map_err(refused)?;
        // The kernel makes an interface where there is none: one that went meanwhile is not to come back as another.
        if index()? != before {
            return Err(OpenError::NoInterface { name: name.into() });
        }
        Self::new(name, queue)
    }

    fn inherit(number: RawFd) -> Result<Self, OpenError> {
        Self::passed(crate::fds::inherit(number).map_err(|_| OpenError::NotPassed { number })?)
    }

    /// A queue that is open.
    ///
    /// # Errors
    /// It is something else.
    pub fn passed(queue: OwnedFd) -> Result<Self, OpenError> {
        let number = queue.as_raw_fd();
        let (name, flags) = sys::describe(queue.as_fd()).map_err(|_| OpenError::PassedNoTap { number })?;
        if flags & libc::IFF_TAP == 0 || flags & libc::IFF_NO_PI == 0 {
            return Err(OpenError::PassedNoTap { number });
        }
        // Not File::set_nonblocking, which is for sockets; the flag is its description's, which its passer has no more use for.
        let set = fcntl(&queue, FcntlArg::F_GETFL)
            .and_then(|flags| fcntl(&queue, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) | OFlag::O_NONBLOCK)));
        set.map_err(|errno| OpenError::Tap { name: name.clone(), source: errno.into() })?;
        Self::new(&name, queue.into())
    }

    /// Makes the header that was received one for this driver; false: its frame is none. The kernel may have queued that frame for the
    /// driver before, which did more.
    fn finish_header(&mut self) -> bool {
        let Offloads { checksum, tso4, tso6, .. } = self.guest;
        let understood = match u32::from(self.received[1]) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE => true,
            VIRTIO_NET_HDR_GSO_TCPV4 => tso4,
            VIRTIO_NET_HDR_GSO_TCPV6 => tso6,
            _ => false,
        };
        if !checksum {
            // The kernel says what it has verified to whoever it comes to; a driver that didn't ask has no such flag.
            self.received[0] &= !(VIRTIO_NET_HDR_F_DATA_VALID as u8);
        }
        // The count of buffers is the device's to fill in (virtio 1.2 §5.1.6.4): mostly it is this one.
        self.received[10..HEADER].copy_from_slice(&1u16.to_le_bytes());
        understood && (checksum || self.received[0] == 0)
    }

    fn new(name: &str, queue: File) -> Result<Self, OpenError> {
        let failed = |errno: Errno| OpenError::Tap { name: name.into(), source: errno.into() };
        let (_, flags) = sys::describe(queue.as_fd()).map_err(failed)?;
        let mut offloads = None;
        if flags & libc::IFF_VNET_HDR != 0 {
            sys::set_header_size(queue.as_fd(), HEADER).map_err(failed)?;
            let all = Offloads { checksum: true, tso4: true, tso6: true, ecn: true };
            let known = [all, Offloads { checksum: true, ..Offloads::NONE }, Offloads::NONE];
            let can = |offloads: &Offloads| sys::set_offloads(queue.as_fd(), bits(*offloads)).is_ok();
            offloads = Some(known.into_iter().find(can).unwrap_or(Offloads::NONE));
            // Until the guest says what it does.
            sys::set_offloads(queue.as_fd(), 0).map_err(failed)?;
        }
        let received = vec![0; HEADER + MAX_FRAME].into();
        let guest = Offloads::NONE;
        Ok(Self { name: format!("tap {name}"), queue, offloads, guest, active: true, received, waiting: None })
    }
}

impl NetBackend for TapBackend {
    fn name(&self) -> &str {
        &self.name
    }

    fn fd(&self) -> BorrowedFd<'_> {
        self.queue.as_fd()
    }

    fn offloads(&self) -> Option<Offloads> {
        self.offloads
    }

    fn set_guest_offloads(&mut self, offloads: Offloads) -> Result<(), NetError> {
        if self.offloads.is_some() && self.guest != offloads {
            sys::set_offloads(self.queue.as_fd(), bits(offloads)).map_err(gone)?;
        }
        self.guest = offloads;
        Ok(())
    }

    fn set_active(&mut self, active: bool) -> Result<(), NetError> {
        if self.active != active {
            sys::set_queue(self.queue.as_fd(), active).map_err(gone)?;
        }
        self.active = active;
        Ok(())
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, NetError> {
        match write(&self.queue, frame) {
            Ok(_) => Ok(true),
            Err(errno) => lost(errno).map(|()| false),
        }
    }

    fn receive(&mut self) -> Result<Option<&[u8]>, NetError> {
        let header = if self.offloads.is_some() { HEADER } else { 0 };
        if self.waiting.is_none() {
            match read(&self.queue, &mut self.received) {
                Ok(len) if len > header => self.waiting = Some(len),
                Ok(_) => return Ok(None),
                Err(errno) => lost(errno)?,
            }
            if header > 0 && self.waiting.is_some() && !self.finish_header() {
                self.waiting = None;
            }
        }
        Ok(self.waiting.map(|len| &self.received[..len]))
    }

    fn consume(&mut self) {
        self.waiting = None;
    }
}

/// Whether an error of one frame means that the interface is gone: the others are that frame's (the kernel finds no sense in it, has no
/// room, or the interface is down).
fn lost(errno: Errno) -> Result<(), NetError> {
    match errno {
        Errno::EBADFD | Errno::EBADF | Errno::ENODEV | Errno::ENXIO => Err(NetError::Gone),
        _ => Ok(()),
    }
}

fn gone(errno: Errno) -> NetError {
    if errno == Errno::EBADFD { NetError::Gone } else { NetError::Io(errno.into()) }
}

fn bits(offloads: Offloads) -> c_uint {
    let Offloads { checksum, tso4, tso6, ecn } = offloads.consistent();
    [(checksum, libc::TUN_F_CSUM), (tso4, libc::TUN_F_TSO4), (tso6, libc::TUN_F_TSO6), (ecn, libc::TUN_F_TSO_ECN)]
        .into_iter()
        .fold(0, |bits, (on, bit)| if on { bits | bit } else { bits })
}
