//! The variable store's file (`--nvram`): read once, then replaced whole whenever the guest has programmed something.
//!
//! A thread of its own writes, so that no vCPU waits for a disk: a new file beside the old one, synced, renamed over it. What is
//! programmed meanwhile goes into the next one. The file in force is locked, so that no two VMs write one store.

use std::fs::{File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};

use super::SECTOR;
use crate::layout::FIRMWARE_MAX;

/// Between two writes: a guest that programs without end keeps no disk busy.
const PAUSE: Duration = Duration::from_millis(200);
/// So long the end waits for a disk.
const PATIENCE: Duration = Duration::from_secs(20);

/// A firmware volume's header (UEFI PI 1.7 volume 3 §3.2.1): where its length (8 bytes) and its signature are.
const VOLUME_LENGTH: usize = 32;
const VOLUME_SIGNATURE: usize = 40;
const SIGNATURE: [u8; 4] = *b"_FVH";

/// The store's file. Dropping it waits until everything is written.
#[derive(Debug)]
pub struct VariableStore {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// Where the file is, symbolic links followed.
    path: PathBuf,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    image: Vec<u8>,
    /// The image is newer than the file.
    dirty: bool,
    ending: bool,
    ended: bool,
}

/// Why a file is no variable store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// It can't be read.
    #[error("the variable store {} can't be read (copy the firmware's template, OVMF_VARS, there)", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It may not be written.
    #[error("the variable store {} is read-only: make it writable (chmod u+w), or give a copy", path.display())]
    ReadOnly {
        /// The file.
        path: PathBuf,
    },
    /// Empty, torn, or something else.
    #[error("the variable store {} {what}: copy the firmware's template (OVMF_VARS) over it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Another VM has it.
    #[error("the variable store {} is another VM's: give each a copy of its own", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// No thread.
    #[error("no thread for the variable store can be started")]
    Thread(#[source] io::Error),
}

impl VariableStore {
    /// Reads the store at `path`, and starts the thread that writes it.
    ///
    /// # Errors
    /// There is no such file, or it is no variable store, or not all of one.
    pub fn open(path: &Path) -> Result<(Self, Vec<u8>), StoreError> {
        let (path, file, image) = read(path)?;
        let state = State { image: image.clone(), dirty: false, ending: false, ended: false };
        let shared = Arc::new(Shared { path, state: Mutex::new(state), changed: Condvar::new() });
        let writer = shared.clone();
        std::thread::Builder::new().name("nvram".into()).spawn(move || writer.run(file)).map_err(StoreError::Thread)?;
        Ok((Self { shared }, image))
    }

    /// Whether that is the store's file, as it is now.
    pub fn is(&self, file: &Metadata) -> bool {
        std::fs::metadata(&self.shared.path).is_ok_and(|own| (own.dev(), own.ino()) == (file.dev(), file.ino()))
    }

    /// Has the file written with `bytes` at `offset`; returns at once. What lies behind the store's end vanishes.
    pub fn save(&self, offset: usize, bytes: &[u8]) {
        let mut state = self.shared.lock();
        for (old, new) in state.image.iter_mut().skip(offset).zip(bytes) {
            *old = *new;
        }
        state.dirty = true;
        self.shared.changed.notify_all();
    }
}

impl Drop for VariableStore {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.ending = true;
        self.shared.changed.notify_all();
        let end = Instant::now() + PATIENCE;
        while !state.ended {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("the variable store {} was not written in time", self.shared.path.display());
                return;
            }
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The thread: writes what is new, until the end. `file` is the one in force, locked.
    fn run(&self, mut file: File) {
        let mut failing = false;
        let mut state = self.lock();
        loop {
            if state.dirty {
                state.dirty = false;
                let image = state.image.clone();
                drop(state);
                let path = self.path.display();
                match replace(&self.path, &image) {
                    Ok(new) => {
                        if failing {
                            tracing::info!("the variable store {path} is written again");
                        }
                        (file, failing) = (new, false);
                    }
                    Err(error) => {
                        if !failing {
                            tracing::warn!("the variable store {path} can't be written: {error}; the guest goes on");
                        }
                        failing = true;
                    }
                }
                state = self.pause();
            } else if state.ending {
                drop(file);
                state.ended = true;
                self.changed.notify_all();
                return;
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Lets time pass, unless the end has come.
    fn pause(&self) -> MutexGuard<'_, State> {
        let waiting = self.changed.wait_timeout_while(self.lock(), PAUSE, |state| !state.ending);
        waiting.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The file behind `path`, locked, and its contents if they are a variable store's.
fn read(path: &Path) -> Result<(PathBuf, File, Vec<u8>), StoreError> {
    let unreadable = |source| StoreError::Unreadable { path: path.to_owned(), source };
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let real = path.canonicalize().map_err(unreadable)?;
    // A pipe must not make anybody wait.
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&real).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(damaged("is no regular file".into()));
    }
    // A new file in its place would be of no use to who protects it. Nothing keeps root from writing, but its mode tells.
    if metadata.mode() & 0o222 == 0 || matches!(eaccess(&real, AccessFlags::W_OK), Err(Errno::EACCES | Errno::EROFS)) {
        return Err(StoreError::ReadOnly { path: path.to_owned() });
    }
    // Who replaced it meanwhile has the one in its place.
    let replaced = || Ok::<_, io::Error>(std::fs::metadata(&real)?.ino() != metadata.ino());
    if !lock(&file).map_err(unreadable)? || replaced().map_err(unreadable)? {
        return Err(StoreError::InUse { path: path.to_owned() });
    }
    let mut image = Vec::new();
    (&file).take(FIRMWARE_MAX + 1).read_to_end(&mut image).map_err(unreadable)?;
    let len = image.len() as u64;
    if len == 0 {
        return Err(damaged("is empty".into()));
    }
    if len > FIRMWARE_MAX {
        return Err(damaged(format!("has {} bytes, more than any flash chip here", metadata.len())));
    }
    let Some(told) = volume_len(&image) else {
        return Err(damaged("is none: a firmware volume's header is missing".into()));
    };
    if told != len || !len.is_multiple_of(SECTOR) {
        let how = if len < told { "is truncated" } else { "is too long" };
        return Err(damaged(format!("{how}: it has {len} bytes, and its header tells of {told}")));
    }
    Ok((real, file, image))
}

/// How long a firmware volume says it is.
fn volume_len(image: &[u8]) -> Option<u64> {
    let signature = image.get(VOLUME_SIGNATURE..)?.get(..SIGNATURE.len())?;
    let len = image.get(VOLUME_LENGTH..)?.first_chunk()?;
    (signature == SIGNATURE).then(|| u64::from_le_bytes(*len))
}

/// Locks a file, where its file system can; false: somebody else has.
fn lock(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => Ok(true),
        Err(TryLockError::Error(error)) => Err(error),
    }
}

/// Puts a file with `image` in the place of `path`, as a whole or not at all, and gives it, locked; its mode and its owner stay.
fn replace(path: &Path, image: &[u8]) -> io::Result<File> {
    let old = std::fs::metadata(path)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    let written = write_new(&new, image, &old).and_then(|file| std::fs::rename(&new, path).map(|()| file));
    if written.is_err() {
        // It may not be there.
        let _ = std::fs::remove_file(&new);
    }
    let file = written?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // The new file is in place; whether it still is after a power failure is up to its file system, if that can't sync a directory.
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
    Ok(file)
}

fn write_new(path: &Path, image: &[u8], old: &Metadata) -> io::Result<File> {
    // What a process of this number left when it was killed.
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let new = file.metadata()?;
    if (new.uid(), new.gid()) != (old.uid(), old.gid()) {
        fchown(&file, Some(old.uid()), Some(old.gid()))?;
    }
    file.set_permissions(Permissions::from_mode(old.mode() & 0o7777))?;
    lock(&file)?;
    file.write_all(image)?;
    file.sync_all()?;
    Ok(file)
}
