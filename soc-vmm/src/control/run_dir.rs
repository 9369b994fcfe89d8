//! Where running VMs are found: `NAME.qmp` (control socket) and `NAME.state/` (what must outlive the process) in one
//! private directory, `/run/outboard` for root, `$XDG_RUNTIME_DIR/outboard` for everybody else.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use nix::fcntl::OFlag;

use super::{ListenError, ListeningSocket};
use crate::own::Identity;

/// How long a name may be locked by one who is about to let it go.
const HANDOVER: Duration = Duration::from_millis(200);

/// The directory of one user's running VMs.
#[derive(Clone, Debug)]
pub struct RunDir {
    path: PathBuf,
}

/// Why a name can't be had.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// Not root, and nowhere to go.
    #[error("XDG_RUNTIME_DIR is not set, so there is no place for control sockets; set it, or run as root")]
    NoRuntimeDir,
    /// The directory is somebody else's.
    #[error("{0} belongs to another user; remove it")]
    NotOurs(PathBuf),
    /// There is something else in its place.
    #[error("{0} is {1}, where soc-vmm keeps its directory; remove it")]
    NoDirectory(PathBuf, &'static str),
    /// A living VM has the name.
    #[error("a VM named {0} is running; choose another --name, or end it with soc-vmm quit {0}")]
    NameInUse(VmName),
    /// The control socket's path is taken by something that is no VM of ours.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refused.
    #[error("can't use {0}")]
    Io(PathBuf, #[source] io::Error),
}

impl RunDir {
    /// This user's directory. It need not exist yet.
    ///
    /// # Errors
    /// [`RunDirError::NoRuntimeDir`].
    pub fn of_user() -> Result<Self, RunDirError> {
        if nix::unistd::geteuid().is_root() {
            return Ok(Self::at("/run/outboard"));
        }
        match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(dir) if Path::new(&dir).is_absolute() => Ok(Self::at(Path::new(&dir).join("outboard"))),
            _ => Err(RunDirError::NoRuntimeDir),
        }
    }

    /// The directory of a process that stands in for QEMU, whose user may have no run directory: libvirt gives it caches of its own.
    ///
    /// # Errors
    /// As [`RunDir::of_user`].
    pub fn of_emulator() -> Result<Self, RunDirError> {
        let cache = || std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        Self::of_user().or_else(|e| {
            let path = cache().ok_or(e)?;
            let failed = |e| RunDirError::Io(path.clone(), e);
            // It is this VM's alone, and not there yet.
            DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed)?;
            Ok(Self::at(path.join("outboard")))
        })
    }

    /// A directory of the caller's choice.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The control socket of a VM.
    pub fn socket(&self, name: &VmName) -> PathBuf {
        self.path.join(format!("{name}.qmp"))
    }

    /// The names that have a control socket, sorted; its VM may be dead. [Sweeps](RunDir::sweep) first.
    ///
    /// # Errors
    /// The directory can't be read; one that doesn't exist has no VMs.
    pub fn names(&self) -> Result<Vec<VmName>, RunDirError> {
        self.sweep();
        let failed = |e| RunDirError::Io(self.path.clone(), e);
        let entries = match fs::read_dir(&self.path) {
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let file = entry.map_err(failed)?.file_name();
            names.extend(file.to_str().and_then(|f| f.strip_suffix(".qmp")).and_then(|name| name.parse().ok()));
        }
        names.sort();
        Ok(names)
    }

    /// Takes a name: its lock, its empty state directory, its listening control socket. What a process that died has left
    /// under the name is cleared away.
    ///
    /// # Errors
    /// See [`RunDirError`].
    pub fn claim(&self, name: &VmName) -> Result<Claim, RunDirError> {
        self.make_private()?;
        self.sweep();
        let state = self.path.join(format!("{name}.state"));
        let deadline = Instant::now() + HANDOVER;
        let lock = loop {
            match lock_directory(&state).map_err(|e| RunDirError::Io(state.clone(), e))? {
                Some(lock) => break lock,
                // Who has no socket (yet, or any more) may be about to end, or just sweep.
                None if !self.socket(name).exists() && Instant::now() < deadline => std::thread::sleep(HANDOVER / 20),
                None => return Err(RunDirError::NameInUse(name.clone())),
            }
        };
        let mut claim = Claim { socket: None, state, lock };
        clear(&claim.state).map_err(|e| RunDirError::Io(claim.state.clone(), e))?;
        claim.socket = Some(ListeningSocket::bind(&self.socket(name))?);
        Ok(claim)
    }

    /// Removes what VMs that died have left and nobody will ask for: state directories that no process has locked and that have no
    /// control socket beside them. What can't be removed stays.
    pub fn sweep(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let file = entry.file_name();
            let name = file.to_str().and_then(|f| f.strip_suffix(".state")).and_then(|name| name.parse().ok());
            let abandoned = |name: &VmName| fs::symlink_metadata(self.socket(name)).is_err();
            if name.as_ref().is_some_and(abandoned)
                && let Ok(Some(lock)) = lock_existing(&entry.path())
            {
                // Its end removes the directory.
                drop(Claim { socket: None, state: entry.path(), lock });
            }
        }
    }

    fn make_private(&self) -> Result<(), RunDirError> {
        let failed = |e| RunDirError::Io(self.path.clone(), e);
        make_directory(&self.path).map_err(failed)?;
        let found = fs::symlink_metadata(&self.path).map_err(failed)?;
        if !found.is_dir() {
            let kind = match found.file_type() {
                kind if kind.is_symlink() => "a symbolic link",
                kind if kind.is_file() => "a file",
                _ => "no directory",
            };
            return Err(RunDirError::NoDirectory(self.path.clone(), kind));
        }
        if found.uid() != nix::unistd::geteuid().as_raw() {
            return Err(RunDirError::NotOurs(self.path.clone()));
        }
        if found.mode() & 0o077 != 0 {
            fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        }
        Ok(())
    }
}

/// A name that this process holds. Dropped, it removes the state directory and frees the name; killed, the kernel frees the
/// name and the directory stays.
#[derive(Debug)]
pub struct Claim {
    socket: Option<ListeningSocket>,
    state: PathBuf,
    /// The state directory itself, locked.
    lock: File,
}

impl Claim {
    /// The control socket, once; dropping it removes it.
    pub fn take_socket(&mut self) -> Option<ListeningSocket> {
        self.socket.take()
    }

    /// Where this VM keeps what must outlive its process. Mode 0700, empty at first.
    pub fn state_dir(&self) -> &Path {
        &self.state
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        drop(self.socket.take());
        // Still locked here, and looked at, so that nobody else's directory goes. A failure leaves a stale directory, which the next
        // claim of the name clears.
        if is_at(&self.lock, &self.state).unwrap_or(false) {
            let _ = fs::remove_dir_all(&self.state);
        }
    }
}

/// Makes the directory if need be and locks it; `None`: another process has it.
fn lock_directory(path: &Path) -> io::Result<Option<File>> {
    loop {
        make_directory(path)?;
        match lock_existing(path) {
            // The holder before us removed the directory.
            Err(e) if e.kind() == ErrorKind::NotFound => {}
            locked => return locked,
        }
    }
}

/// Locks a directory; `None`: another process has it.
fn lock_existing(path: &Path) -> io::Result<Option<File>> {
    // No link: what it leads to is not ours.
    let flags = OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
    let dir = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path)?;
    match dir.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(e)) => return Err(e),
    }
    // Perhaps between our open and our lock.
    if is_at(&dir, path)? { Ok(Some(dir)) } else { Err(ErrorKind::NotFound.into()) }
}

/// Whether `path` is this very directory's.
fn is_at(dir: &File, path: &Path) -> io::Result<bool> {
    let (opened, named) = (dir.metadata()?, fs::symlink_metadata(path)?);
    Ok(Identity::of(&opened) == Identity::of(&named))
}

fn make_directory(path: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(path) {
        Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

fn clear(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(entry.path())?;
        } else {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// A VM's name: 1 to 64 of `A–Z a–z 0–9 . _ -`, a letter or digit first, so that it is a file name everywhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VmName(String);

/// Not a [`VmName`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a name has 1 to 64 letters, digits, '.', '_' or '-', and starts with a letter or digit")]
pub struct NameError;

impl VmName {
    /// `vm-PID`, of this process: no other VM has it.
    pub fn of_process() -> Self {
        Self(format!("vm-{}", std::process::id()))
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VmName {
    type Err = NameError;

    fn from_str(s: &str) -> Result<Self, NameError> {
        let starts_well = s.starts_with(|c: char| c.is_ascii_alphanumeric());
        let all_well = s.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
        if starts_well && all_well && s.len() <= 64 { Ok(Self(s.to_owned())) } else { Err(NameError) }
    }
}

impl std::fmt::Display for VmName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    fn name(s: &str) -> VmName {
        s.parse().unwrap()
    }

    #[test]
    fn a_claim_is_exclusive_private_and_leaves_nothing() {
        let outer = tempfile::tempdir().unwrap();
        let dir = RunDir::at(outer.path().join("outboard"));
        assert_eq!(dir.names().unwrap(), []);
        let claim = dir.claim(&name("a")).unwrap();
        assert!(matches!(dir.claim(&name("a")), Err(RunDirError::NameInUse(n)) if n == name("a")));
        let other = dir.claim(&name("b.1")).unwrap();
        assert_eq!(dir.names().unwrap(), [name("a"), name("b.1")]);
        for (path, mode) in [(outer.path().join("outboard"), 0o700), (claim.state_dir().to_owned(), 0o700)] {
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, mode);
        }
        fs::write(claim.state_dir().join("lanes"), "1").unwrap();
        drop((claim, other));
        assert_eq!(fs::read_dir(outer.path().join("outboard")).unwrap().count(), 0);
    }

    #[test]
    fn a_dead_vms_leavings_are_cleared() {
        let outer = tempfile::tempdir().unwrap();
        let dir = RunDir::at(outer.path());
        fs::set_permissions(outer.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(outer.path().join("a.state/deep")).unwrap();
        fs::write(outer.path().join("a.state/lanes"), "stale").unwrap();
        drop(UnixListener::bind(outer.path().join("a.qmp")).unwrap());
        let claim = dir.claim(&name("a")).unwrap();
        assert_eq!(fs::read_dir(claim.state_dir()).unwrap().count(), 0);
        assert_eq!(fs::metadata(outer.path()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn a_link_is_no_state_directory() {
        let outer = tempfile::tempdir().unwrap();
        let dir = RunDir::at(outer.path());
        fs::create_dir(outer.path().join("precious")).unwrap();
        fs::write(outer.path().join("precious/file"), "kept").unwrap();
        std::os::unix::fs::symlink("precious", outer.path().join("a.state")).unwrap();
        assert!(matches!(dir.claim(&name("a")), Err(RunDirError::Io(path, _)) if path.ends_with("a.state")));
        dir.sweep();
        assert_eq!(fs::read(outer.path().join("precious/file")).unwrap(), b"kept");
    }

    #[test]
    fn a_directory_that_took_the_place_of_ours_is_kept() {
        let outer = tempfile::tempdir().unwrap();
        let claim = RunDir::at(outer.path()).claim(&name("a")).unwrap();
        fs::rename(claim.state_dir(), outer.path().join("away")).unwrap();
        fs::create_dir(claim.state_dir()).unwrap();
        fs::write(claim.state_dir().join("file"), "somebody's").unwrap();
        drop(claim);
        assert_eq!(fs::read(outer.path().join("a.state/file")).unwrap(), b"somebody's");
    }

    #[test]
    fn what_nobody_will_ask_for_is_swept() {
        let outer = tempfile::tempdir().unwrap();
        let dir = RunDir::at(outer.path());
        let mut running = dir.claim(&name("running")).unwrap();
        drop(running.take_socket());
        // Of a VM that died: its host may still hold it.
        fs::create_dir(outer.path().join("held.state")).unwrap();
        let _dead = UnixListener::bind(outer.path().join("held.qmp")).unwrap();
        for other in ["dead.state", "no name!.state", "other"] {
            fs::create_dir_all(outer.path().join(other).join("deep")).unwrap();
        }
        assert_eq!(dir.names().unwrap(), [name("held")]);
        let mut left: Vec<_> = fs::read_dir(outer.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["held.qmp", "held.state", "no name!.state", "other", "running.state"]);
    }

    #[test]
    fn what_is_in_the_directory_s_place_is_said() {
        let outer = tempfile::tempdir().unwrap();
        let at = |name: &str| outer.path().join(name);
        fs::write(at("file"), "").unwrap();
        fs::create_dir(at("real")).unwrap();
        std::os::unix::fs::symlink("real", at("link")).unwrap();
        std::os::unix::fs::symlink("nowhere", at("dangling")).unwrap();
        drop(UnixListener::bind(at("socket")).unwrap());
        for (place, what) in [
            ("file", "is a file"),
            ("link", "is a symbolic link"),
            ("dangling", "is a symbolic link"),
            ("socket", "is no directory"),
        ] {
            let why = RunDir::at(at(place)).claim(&name("a")).unwrap_err().to_string();
            assert!(why.contains(place) && why.contains(what) && !why.contains("another user"), "{why}");
        }
    }

    #[test]
    fn a_foreign_listener_is_not_evicted() {
        let outer = tempfile::tempdir().unwrap();
        let dir = RunDir::at(outer.path());
        let _foreign = UnixListener::bind(outer.path().join("a.qmp")).unwrap();
        assert!(matches!(dir.claim(&name("a")), Err(RunDirError::Listen(ListenError::InUse(_)))));
        assert!(!outer.path().join("a.state").exists());
    }

    #[test]
    fn claims_race_without_two_winners() {
        let outer = tempfile::tempdir().unwrap();
        let held = std::sync::atomic::AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        match RunDir::at(outer.path()).claim(&name("a")) {
                            Ok(claim) => {
                                assert_eq!(held.fetch_add(1, std::sync::atomic::Ordering::SeqCst), 0);
                                held.fetch_sub(1, std::sync::atomic::Ordering::SeqCst);
                                drop(claim);
                            }
                            Err(RunDirError::NameInUse(_)) => {}
                            Err(e) => panic!("{e:?}"),
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn names_are_file_names() {
        for bad in ["", ".", "..", "a/b", "-a", "a b", "ä", "a\n", &"x".repeat(65)] {
            assert_eq!(bad.parse::<VmName>(), Err(NameError), "{bad:?}");
        }
        assert_eq!(name("web-1.Prod_2").as_str(), "web-1.Prod_2");
    }
}
