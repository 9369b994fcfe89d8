//! One mapping of host memory as the SoC's end uses it: revoking it is the fence that an IOMMU's unmap is.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use nix::errno::Errno;
use nix::sys::uio::pread;

use crate::{BusMemory, MemoryFile, Window};

/// Copies out from this length on go by the memory's file, where nobody had all pages taken before: they need no page table of this process,
/// whose faults cost more than the copying, and take no page that nobody has written.
const BY_FILE: usize = 32 << 10;

/// A mapping that the host announced, until it is revoked.
///
/// Whoever accesses it counts itself in, then looks whether it is revoked; [`Entry::revoke`] says that it is, then waits until all
/// have counted themselves out. Of the two at least one sees the other's store, both being sequentially consistent: so once
/// `revoke` returns no access is under way and none will begin. An access takes no lock; it costs two atomic additions to a word
/// that no other mapping's users touch.
#[derive(Debug)]
pub(super) struct Entry {
    window: Window,
    file: Arc<OwnedFd>,
    offset: u64,
    device_writes: bool,
    /// This process's page table has all of it, but for what was given back since.
    is_taken: AtomicBool,
    revoked: AtomicBool,
    users: AtomicU32,
}

/// Counts a user out, also where its access panics.
struct User<'a>(&'a AtomicU32);

impl Drop for User<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

impl Entry {
    /// Of memory of `file` from `offset` on.
    pub(super) fn new(window: Window, file: OwnedFd, offset: u64, device_writes: bool) -> Self {
        let (is_taken, revoked, users) = (AtomicBool::new(false), AtomicBool::new(false), AtomicU32::new(0));
        Self { window, file: Arc::new(file), offset, device_writes, is_taken, revoked, users }
    }

    /// Bytes.
    pub(super) fn len(&self) -> usize {
        self.window.len()
    }

    /// Whether the SoC may write.
    pub(super) fn device_writes(&self) -> bool {
        self.device_writes
    }

    /// The file from byte `from` of the mapping on. Revoking doesn't take it back from who has it.
    pub(super) fn file(&self, from: usize) -> MemoryFile {
        let (offset, len) = (self.offset + from as u64, (self.len() - from) as u64);
        MemoryFile { file: self.file.clone(), offset, len }
    }

    /// Accesses the memory; `None` if it is revoked, or the host took the pages behind it away: what was read is nothing then.
    pub(super) fn access<T>(&self, access: impl FnOnce(&Window) -> T) -> Option<T> {
        self.users.fetch_add(1, Ordering::SeqCst);
        let _user = User(&self.users);
        if self.revoked.load(Ordering::SeqCst) {
            return None;
        }
        let done = access(&self.window);
        (!self.window.is_lost()).then_some(done)
    }

    /// Copies out; `None` if it is revoked, or the host took the pages away.
    pub(super) fn read(&self, offset: usize, data: &mut [u8]) -> Option<()> {
        self.access(|window| {
            // What is given back between the look and the copy is taken again, and is zeros either way.
            let is_mapped = || self.is_taken.load(Ordering::Relaxed) && window.has_pages(offset, data.len());
            // What the file refuses, the mapping tells of.
            if data.len() < BY_FILE || is_mapped() || self.read_file(offset, data).is_err() {
                window.read_bytes(offset, data);
            }
        })
    }

    /// Has the system give pages now; `None` if it is revoked, or the host took them away.
    pub(super) fn take_pages(&self, offset: usize, len: usize) -> Option<Result<(), Errno>> {
        self.access(|window| {
            window.take_pages(offset, len)?;
            if len == self.len() {
                self.is_taken.store(true, Ordering::Relaxed);
            }
            Ok(())
        })
    }

    /// Copies in; `None` if it is revoked, or the host took the pages away. Never by the file: one writer of a file waits for the other.
    pub(super) fn write(&self, offset: usize, data: &[u8]) -> Option<()> {
        self.access(|window| window.write_bytes(offset, data))
    }

    fn read_file(&self, offset: usize, data: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < data.len() {
            match pread(&self.file, &mut data[done..], self.place(offset + done)?) {
                Ok(0) => return Err(Errno::EIO),
                Ok(count) => done += count,
                Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn place(&self, offset: usize) -> Result<i64, Errno> {
        i64::try_from(self.offset + offset as u64).map_err(|_| Errno::EFBIG)
    }

    /// Lets nobody in any more, and waits for those who are: the longest access copies a few megabytes.
    pub(super) fn revoke(&self) {
        self.revoked.store(true, Ordering::SeqCst);
        while self.users.load(Ordering::SeqCst) != 0 {
            std::thread::yield_now();
        }
    }
}
