//! userfaultfd (Linux admin-guide mm/userfaultfd.rst): a mapping whose faults somebody else finishes.
//!
//! `unsafe`: ioctls and the descriptor they make. Each wrapper passes a structure of the type that the request's number names; the structures
//! are those of include/uapi/linux/userfaultfd.h.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::libc;

/// A userfaultfd of this process, which tells of faults in shared memory: of pages that the file has, but the mapping has not, and of pages
/// that neither has.
#[derive(Debug)]
pub(crate) struct Userfault(File);

/// Part of a mapping whose faults are told of, until this is dropped: then whoever waits for one goes on with what the memory has.
#[derive(Debug)]
pub(crate) struct Watched {
    userfault: Arc<Userfault>,
    start: u64,
    len: u64,
}

/// UFFD_API: the only version there is.
const API: u64 = 0xaa;
/// UFFD_FEATURE_MISSING_HUGETLBFS, _MISSING_SHMEM, _MINOR_HUGETLBFS and _MINOR_SHMEM (Linux 5.14).
const FEATURES: u64 = 1 << 4 | 1 << 5 | 1 << 9 | 1 << 10;
/// UFFDIO_REGISTER_MODE_MISSING and _MINOR.
const MODES: u64 = 1 | 1 << 2;
/// UFFD_EVENT_PAGEFAULT.
const PAGEFAULT: u8 = 0x12;
/// Bytes of a message, and the most that are read at a time.
const MESSAGE: usize = 32;
const MESSAGES: usize = 32;

impl Userfault {
    /// Opens one that tells of the kernel's own accesses too, which KVM's are: that takes privileges.
    pub(crate) fn open() -> Result<Self, Errno> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match File::open("/dev/userfaultfd") {
            // SAFETY: the request takes flags, and gives a new descriptor.
            Ok(device) => unsafe { raw::new(device.as_raw_fd(), flags) }?,
            // The device came with Linux 6.1. The call wants CAP_SYS_PTRACE.
            // SAFETY: flags alone.
            Err(_) => Errno::result(unsafe { libc::syscall(libc::SYS_userfaultfd, flags) })? as i32,
        };
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
        let mut api = raw::Api { api: API, features: FEATURES, ioctls: 0 };
        // SAFETY: the request names this structure, which outlives the call.
        unsafe { raw::api(file.as_raw_fd(), &raw mut api) }?;
        Ok(Self(file))
    }

    /// From here on tells of faults in `len` bytes from `start`, a mapping of this process's.
    pub(crate) fn watch(self: &Arc<Self>, start: u64, len: u64) -> Result<Watched, Errno> {
        let mut register = raw::Register { range: raw::Range { start, len }, mode: MODES, ioctls: 0 };
        // SAFETY: as above; the kernel checks the range against this process's mappings.
        unsafe { raw::register(self.0.as_raw_fd(), &raw mut register) }?;
        Ok(Watched { userfault: self.clone(), start, len })
    }

    /// The addresses of faults that wait, at most so many at a time; none: none does.
    pub(crate) fn faults(&self) -> Vec<u64> {
        let mut bytes = [0; MESSAGE * MESSAGES];
        // A fault whose thread was woken meanwhile is no fault any more: there is nothing to read.
        let count = (&self.0).read(&mut bytes).unwrap_or(0);
        let address = |message: &[u8]| {
            let at = message.get(16..24)?.try_into().ok()?;
            (message[0] == PAGEFAULT).then(|| u64::from_le_bytes(at))
        };
        bytes[..count].chunks(MESSAGE).filter_map(address).collect()
    }

    /// Shows these bytes, of a watched mapping, to whoever waits for them: those of the file, or zeros where it has none. What is shown already stays.
    pub(crate) fn show(&self, start: u64, len: u64, page: u64) -> Result<(), Errno> {
        let (mut at, end) = (start, start + len);
        while at < end {
            match self.resume(at, end - at) {
                Ok(done) => at += done,
                // The file has no such page: it is zeros, as it is to whoever maps it elsewhere.
                Err(Errno::EFAULT) => {
                    match self.zero(at, page) {
                        Ok(()) | Err(Errno::EEXIST) => {}
                        Err(errno) => return Err(errno),
                    }
                    at += page;
                }
                Err(Errno::EEXIST) => at += page,
                Err(errno) => return Err(errno),
            }
        }
        self.wake(start, len)
    }

    /// UFFDIO_CONTINUE; how many bytes were done, at least one page's.
    fn resume(&self, start: u64, len: u64) -> Result<u64, Errno> {
        let mut request = raw::Filled { range: raw::Range { start, len }, mode: 0, done: 0 };
        // SAFETY: the request names this structure, which outlives the call.
        match unsafe { raw::resume(self.0.as_raw_fd(), &raw mut request) } {
            Ok(_) => Ok(len),
            Err(_) if request.done > 0 => Ok(request.done as u64),
            // The address space changes: once more.
            Err(Errno::EAGAIN) => Ok(0),
            Err(errno) => Err(errno),
        }
    }

    /// UFFDIO_ZEROPAGE.
    fn zero(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut request = raw::Filled { range: raw::Range { start, len }, mode: 0, done: 0 };
        loop {
            // SAFETY: as above.
            match unsafe { raw::zero(self.0.as_raw_fd(), &raw mut request) } {
                Err(Errno::EAGAIN) => request.done = 0,
                done => return done.map(drop),
            }
        }
    }

    fn wake(&self, start: u64, len: u64) -> Result<(), Errno> {
        let mut range = raw::Range { start, len };
        // SAFETY: as above.
        unsafe { raw::wake(self.0.as_raw_fd(), &raw mut range) }.map(drop)
    }
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        let Self { userfault, start, len } = self;
        let mut range = raw::Range { start: *start, len: *len };
        // SAFETY: the range was registered, and the structure outlives the call.
        let _ = unsafe { raw::unregister(userfault.0.as_raw_fd(), &raw mut range) };
        let _ = userfault.wake(*start, *len);
    }
}

mod raw {
    /// `struct uffdio_api`.
    #[repr(C)]
    pub(super) struct Api {
        pub(super) api: u64,
        pub(super) features: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_range`.
    #[repr(C)]
    pub(super) struct Range {
        pub(super) start: u64,
        pub(super) len: u64,
    }

    /// `struct uffdio_register`.
    #[repr(C)]
    pub(super) struct Register {
        pub(super) range: Range,
        pub(super) mode: u64,
        pub(super) ioctls: u64,
    }

    /// `struct uffdio_continue` and `struct uffdio_zeropage`, which are alike.
    #[repr(C)]
    pub(super) struct Filled {
        pub(super) range: Range,
        pub(super) mode: u64,
        /// Bytes that were done, or a negative error.
        pub(super) done: i64,
    }

    const UFFDIO: u8 = 0xaa;
    nix::ioctl_write_int_bad!(new, nix::request_code_none!(UFFDIO, 0x00));
    nix::ioctl_readwrite!(api, UFFDIO, 0x3f, Api);
    nix::ioctl_readwrite!(register, UFFDIO, 0x00, Register);
    nix::ioctl_read!(unregister, UFFDIO, 0x01, Range);
    nix::ioctl_read!(wake, UFFDIO, 0x02, Range);
    nix::ioctl_readwrite!(zero, UFFDIO, 0x04, Filled);
    nix::ioctl_readwrite!(resume, UFFDIO, 0x07, Filled);
}
