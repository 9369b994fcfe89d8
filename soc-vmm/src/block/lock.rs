//! Locks of images, of the kind that QEMU and qemu-img take ("Disk image file locking" in QEMU's documentation): they heed ours, and
//! we heed theirs.
//!
//! Nobody's data is locked but single bytes, each of which says something; they need not be within the file. Who holds byte 100 + p
//! does p, who holds byte 200 + p lets nobody else do it. All locks are shared ones, so whether someone holds a byte is asked of the
//! system as if for an exclusive lock. They belong to the open file description: they go when its last descriptor is closed, and two
//! disks of one VM keep each other out as two programs do.

use std::fs::File;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc::{F_RDLCK, F_UNLCK, F_WRLCK, SEEK_SET, flock, off_t};

use super::error::ImageProblem;

// What is done with an image: it is read, and expected to stay a disk as it once was; its data and its length are changed.
const CONSISTENT_READ: off_t = 0;
const WRITE: off_t = 1;
const RESIZE: off_t = 3;

/// Who changes an image wants nobody else to, and neither does who reads it.
const ALONE: [off_t; 2] = [WRITE, RESIZE];

const DOES: off_t = 100;
const FORBIDS: off_t = 200;

const LOCK: &str = "lock it (check the file system that it is on)";

/// Locks an image for as long as the file is open, where its file system can.
///
/// # Errors
/// Somebody else uses it in a way that doesn't go with this one.
pub(super) fn lock(file: &File, read_only: bool) -> Result<(), ImageProblem> {
    match lock_bytes(file, read_only) {
        Ok(None) => Ok(()),
        Ok(Some(written)) => Err(ImageProblem::InUse { written }),
        Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(ImageProblem::Io { action: LOCK, source: errno.into() }),
    }
}

/// The same; who is in the way, if anybody is: one who writes the image, or one who reads it and wants it unchanged.
fn lock_bytes(file: &File, read_only: bool) -> nix::Result<Option<bool>> {
    let does = does(read_only);
    for byte in all(read_only) {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_RDLCK, byte))) {
            // Someone has the file for himself, which isn't QEMU's way.
            Err(Errno::EAGAIN | Errno::EACCES) => return Ok(Some(true)),
            done => done?,
        };
    }
    // Who comes at the same time either sees the locks above or has shown his own before: never do both go on.
    for (bytes, written) in [(at(DOES, &ALONE), true), (at(FORBIDS, does), read_only)] {
        for byte in bytes {
            let mut found = range(F_WRLCK, byte);
            fcntl(file, FcntlArg::F_OFD_GETLK(&mut found))?;
            if i32::from(found.l_type) != F_UNLCK {
                return Ok(Some(written));
            }
        }
    }
    Ok(None)
}

/// Gives an image back that this open file has locked.
///
/// # Errors
/// Its file system can't.
pub(super) fn unlock(file: &File, read_only: bool) -> Result<(), ImageProblem> {
    let each = |byte| fcntl(file, FcntlArg::F_OFD_SETLK(&range(F_UNLCK, byte))).map(drop);
    match all(read_only).into_iter().try_for_each(each) {
        Ok(()) | Err(Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ENOSYS) => Ok(()),
        Err(errno) => Err(ImageProblem::Io { action: LOCK, source: errno.into() }),
    }
}

fn does(read_only: bool) -> &'static [off_t] {
    if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] }
}

fn at(base: off_t, what: &[off_t]) -> Vec<off_t> {
    what.iter().map(|p| base + p).collect()
}

/// The bytes that who has an image locks.
fn all(read_only: bool) -> Vec<off_t> {
    [at(DOES, does(read_only)), at(FORBIDS, &ALONE)].concat()
}

/// One byte of a file, and the lock meant.
fn range(kind: i32, byte: off_t) -> flock {
    // The system's constants are small, and typed otherwise than its field.
    flock { l_type: kind as i16, l_whence: SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}
