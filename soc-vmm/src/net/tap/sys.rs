//! The ioctls of `/dev/net/tun` (Linux, `if_tun.h`).
//!
//! They are `unsafe`.
#![allow(unsafe_code)]

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd};

use nix::errno::Errno;
use nix::libc::{self, Ioctl, c_int, c_short, c_uint, c_ulong, ifreq};

/// Bytes of an interface's name, without the zero behind it.
pub(super) const NAME_LEN: usize = libc::IFNAMSIZ - 1;

/// Makes `fd` a queue of the interface of that name.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, flags: c_int) -> nix::Result<()> {
    let mut request = request(flags);
    if name.len() > NAME_LEN {
        return Err(Errno::ENAMETOOLONG);
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    on_request(fd, libc::TUNSETIFF, &mut request)
}

/// Name and flags of the interface that `fd` is a queue of.
pub(super) fn describe(fd: BorrowedFd<'_>) -> nix::Result<(String, c_int)> {
    let mut request = request(0);
    on_request(fd, libc::TUNGETIFF, &mut request)?;
    let bytes = request.ifr_name.map(|c| c as u8);
    let name = CStr::from_bytes_until_nul(&bytes).map_err(|_| Errno::EINVAL)?;
    // SAFETY: of this union the kernel has filled the flags, and any bytes are flags.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name.to_string_lossy().into_owned(), c_int::from(flags as u16)))
}

/// Lets the interface spread frames over this queue, or not.
pub(super) fn set_queue(fd: BorrowedFd<'_>, active: bool) -> nix::Result<()> {
    let flags = if active { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    on_request(fd, libc::TUNSETQUEUE, &mut request(flags))
}

/// Sets how many bytes stand before each frame.
pub(super) fn set_header_size(fd: BorrowedFd<'_>, size: usize) -> nix::Result<()> {
    let size = size as c_int;
    // SAFETY: this request reads one int, which outlives the call.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) }).map(drop)
}

/// Says what may come unfinished: bits `TUN_F_*`.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: c_uint) -> nix::Result<()> {
    // SAFETY: this request takes a number, and reads no memory.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(offloads)) }).map(drop)
}

fn request(flags: c_int) -> ifreq {
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as c_short };
    ifreq { ifr_name: [0; libc::IFNAMSIZ], ifr_ifru }
}

fn on_request(fd: BorrowedFd<'_>, request: Ioctl, argument: &mut ifreq) -> nix::Result<()> {
    // SAFETY: the three requests above read and write one ifreq, which is the caller's alone.
    Errno::result(unsafe { libc::ioctl(fd.as_raw_fd(), request, &raw mut *argument) }).map(drop)
}
