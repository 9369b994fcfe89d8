//! The variable store's file (`--nvram`): read once, then replaced whole whenever the guest has programmed something.
//!
//! A thread of its own writes, so that no vCPU waits for a disk: a new file beside the old one, synced, renamed over it. What is
//! programmed meanwhile goes into the next one. The file in force is locked, so that no two VMs write one store.
//!
//! A guest that moves may find the same file on the other side. So the source writes what there is and lets the file go
//! ([`VariableStore::release`]) before the destination takes it ([`VariableStore::hold`]) and writes what the guest brought
//! ([`VariableStore::replace`]).

use std::fs::{File, Metadata, OpenOptions, Permissions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::unistd::{AccessFlags, eaccess};

use super::SECTOR;
use crate::bus::Wake;
use crate::layout::FIRMWARE_MAX;
use crate::own::Identity;

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
    /// What becomes the image once the file is wanted.
    brought: Option<Vec<u8>>,
    /// The file is this VM's to write, and locked as soon as it can be.
    wanted: bool,
    /// It is to be locked, which was not tried yet.
    to_lock: bool,
    /// It is locked, or just being locked.
    locked: bool,
    /// Who waits until it isn't.
    waiter: Option<Arc<dyn Wake>>,
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
    /// There is no such file, or it is no variable store, or not all of one, or another VM's.
    pub fn open(path: &Path) -> Result<(Self, Vec<u8>), StoreError> {
        Self::start(path, true)
    }

    /// The same for a guest that is elsewhere as yet, where this very file may be in use: it is locked by [`VariableStore::hold`].
    ///
    /// # Errors
    /// As [`VariableStore::open`], but for other VMs.
    pub fn open_for_arrival(path: &Path) -> Result<(Self, Vec<u8>), StoreError> {
        Self::start(path, false)
    }

    fn start(path: &Path, wanted: bool) -> Result<(Self, Vec<u8>), StoreError> {
        let (path, file, image) = read(path, wanted)?;
        let state = State {
            image: image.clone(),
            dirty: false,
            brought: None,
            wanted,
            to_lock: false,
            locked: wanted,
            waiter: None,
            ending: false,
            ended: false,
        };
        let shared = Arc::new(Shared { path, state: Mutex::new(state), changed: Condvar::new() });
        let (writer, file) = (shared.clone(), wanted.then_some(file));
        std::thread::Builder::new().name("nvram".into()).spawn(move || writer.run(file)).map_err(StoreError::Thread)?;
        Ok((Self { shared }, image))
    }

    /// Has the file written, where it isn't, and let go. Returns at once: [`VariableStore::is_released`] tells, and `waiter` is woken.
    pub fn release(&self, waiter: Arc<dyn Wake>) {
        self.change(|state| (state.wanted, state.waiter) = (false, Some(waiter)));
    }

    /// Whether the file is let go.
    pub fn is_released(&self) -> bool {
        let state = self.shared.lock();
        !state.wanted && !state.locked && !state.dirty
    }

    /// Has the file locked, if it isn't, and what was brought written; returns at once.
    pub fn hold(&self) {
        self.change(|state| {
            (state.wanted, state.to_lock) = (true, !state.locked);
            if let Some(image) = state.brought.take() {
                (state.image, state.dirty) = (image, true);
            }
        });
    }

    /// Makes `image`, which has the store's length, what the file is to have from the next [`VariableStore::hold`] on.
    pub fn replace(&self, image: Vec<u8>) {
        self.change(|state| state.brought = Some(image));
    }

    /// Whether that is the store's file, as it is now.
    pub fn is(&self, file: &Metadata) -> bool {
        std::fs::metadata(&self.shared.path).is_ok_and(|own| Identity::of(&own) == Identity::of(file))
    }

    /// Has the file written with `bytes` at `offset`; returns at once. What lies behind the store's end vanishes.
    pub fn save(&self, offset: usize, bytes: &[u8]) {
        self.change(|state| {
            for (old, new) in state.image.iter_mut().skip(offset).zip(bytes) {
                *old = *new;
            }
            state.dirty = true;
        });
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.shared.lock());
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

    /// The thread: writes what is new, until the end. `file` is the one in force, locked; none: it is another VM's, as yet.
    fn run(&self, mut file: Option<File>) {
        let mut failing = false;
        let mut state = self.lock();
        loop {
            // Before the file is let go, it is made what it should be.
            if state.dirty {
                (state.dirty, state.to_lock, state.locked) = (false, false, true);
                let image = state.image.clone();
                drop(state);
                let written = self.write(&mut file, &image);
                self.tell(&written, &mut failing);
                state = self.pause(file.is_some());
            } else if state.ending {
                drop(file);
                state.ended = true;
                self.changed.notify_all();
                return;
            } else if !state.wanted && (state.locked || state.waiter.is_some()) {
                (file, state.locked, state.to_lock) = (None, false, false);
                state.waiter.take().iter().for_each(|waiter| waiter.wake());
            } else if state.to_lock {
                (state.to_lock, state.locked) = (false, true);
                drop(state);
                let locked = self.claim(&mut file);
                self.tell(&locked, &mut failing);
                state = self.lock();
                state.locked = file.is_some();
            } else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    /// Puts `image` into the file.
    fn write(&self, file: &mut Option<File>, image: &[u8]) -> io::Result<()> {
        self.claim(file)?;
        *file = Some(replace(&self.path, image)?);
        Ok(())
    }

    /// Locks the file, if it isn't.
    fn claim(&self, file: &mut Option<File>) -> io::Result<()> {
        if file.is_none() {
            let found = open(&self.path)?;
            if !lock(&found)? || is_another(&self.path, &found)? {
                return Err(io::Error::other("another VM has it"));
            }
            *file = Some(found);
        }
        Ok(())
    }

    fn tell(&self, outcome: &io::Result<()>, failing: &mut bool) {
        let path = self.path.display();
        match outcome {
            Ok(()) if *failing => tracing::info!("the variable store {path} is written again"),
            Ok(()) => {}
            Err(error) if !*failing => {
                tracing::warn!("the variable store {path} can't be written: {error}; the guest goes on");
            }
            Err(_) => {}
        }
        *failing = outcome.is_err();
    }

    /// Lets time pass, unless the end has come, or somebody waits for the file.
    fn pause(&self, locked: bool) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.locked = locked;
        let waiting = self.changed.wait_timeout_while(state, PAUSE, |state| state.wanted && !state.ending);
        waiting.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// The file behind `path`, locked where it is to be, and its contents if they are a variable store's.
fn read(path: &Path, locked: bool) -> Result<(PathBuf, File, Vec<u8>), StoreError> {
    let unreadable = |source| StoreError::Unreadable { path: path.to_owned(), source };
    let damaged = |what: String| StoreError::Damaged { path: path.to_owned(), what };
    let real = path.canonicalize().map_err(unreadable)?;
    let file = open(&real).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(damaged("is no regular file".into()));
    }
    // A new file in its place would be of no use to who protects it. Nothing keeps root from writing, but its mode tells.
    if metadata.mode() & 0o222 == 0 || matches!(eaccess(&real, AccessFlags::W_OK), Err(Errno::EACCES | Errno::EROFS)) {
        return Err(StoreError::ReadOnly { path: path.to_owned() });
    }
    // Who replaced it meanwhile has the one in its place.
    let is_ours = || Ok::<_, io::Error>(lock(&file)? && !is_another(&real, &file)?);
    if locked && !is_ours().map_err(unreadable)? {
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

fn open(path: &Path) -> io::Result<File> {
    // A pipe must not make anybody wait.
    OpenOptions::new().read(true).custom_flags(nix::libc::O_NONBLOCK).open(path)
}

/// Whether another file is at `path`.
fn is_another(path: &Path, file: &File) -> io::Result<bool> {
    Ok(std::fs::metadata(path)?.ino() != file.metadata()?.ino())
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
