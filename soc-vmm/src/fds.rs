//! Descriptors that others opened for this process: inherited ones, known by their numbers; named ones (QMP `getfd`), which one command
//! takes; and sets (QMP `add-fd`, `-add-fd`), which are opened as `/dev/fdset/N` any number of times.
//!
//! Taking over an inherited descriptor is `unsafe`.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::libc;

/// Where sets are opened.
const FDSET: &str = "/dev/fdset/";
/// Descriptors that may be kept for commands to come, named ones and those of sets together: a client must not use up the process's.
const KEPT_MAX: usize = 128;

/// Why a descriptor can't be had.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FdError {
    /// Not left open for this process, or taken before.
    #[error(
        "descriptor {0} was not passed to this process, or is used twice: pass it open, without close-on-exec, and name it once"
    )]
    NotPassed(RawFd),
    /// A name that could be a number.
    #[error("'{0}' is no name of a descriptor: it begins with no digit and is not empty")]
    Name(String),
    /// No such name.
    #[error("there is no descriptor named '{0}': pass it by getfd first, and once for each use")]
    NotNamed(String),
    /// No such set.
    #[error("there is no set {0} of descriptors: make it by add-fd first")]
    NoSet(i64),
    /// A number that no set has.
    #[error("fdset-id {0} is negative: sets are numbered from 0 on")]
    Negative(i64),
    /// Not in that set.
    #[error("set {0} has no descriptor {1}")]
    NotInSet(i64, RawFd),
    /// None of its descriptors was opened as it is needed.
    #[error("no descriptor of set {0} is open for {1}: pass one that is")]
    Mode(i64, &'static str),
    /// Too many wait for their use.
    #[error("{KEPT_MAX} descriptors wait for their use already: close some (closefd, remove-fd)")]
    Full,
    /// The process is at its limits.
    #[error("can't duplicate a descriptor: {0}")]
    System(Errno),
}

/// The store.
#[derive(Debug, Default)]
pub struct Fds(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    named: BTreeMap<String, OwnedFd>,
    sets: BTreeMap<i64, Vec<Member>>,
}

#[derive(Debug)]
struct Member {
    fd: OwnedFd,
    opaque: Option<String>,
}

/// A set, as `query-fdsets` tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdSet {
    /// Its number.
    pub id: i64,
    /// Its descriptors: their numbers, and what whoever passed them calls them.
    pub fds: Vec<(RawFd, Option<String>)>,
}

impl Fds {
    /// Takes over a descriptor that whoever started this process left open for it: each once.
    ///
    /// # Errors
    /// [`FdError::NotPassed`].
    pub fn inherit(&self, number: RawFd) -> Result<OwnedFd, FdError> {
        // Two threads that take the same number must not both find it untaken.
        let _one_at_a_time = self.kept();
        inherit(number).map_err(|_| FdError::NotPassed(number))
    }

    /// QMP `getfd`: keeps a descriptor under a name; one that had the name is closed.
    ///
    /// # Errors
    /// The name is none, or too many are kept.
    pub fn add_named(&self, name: &str, fd: OwnedFd) -> Result<(), FdError> {
        if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err(FdError::Name(name.to_owned()));
        }
        let mut kept = self.kept();
        if !kept.named.contains_key(name) {
            kept.room()?;
        }
        let before = kept.named.insert(name.to_owned(), fd);
        drop(kept);
        // Closing may take its time.
        drop(before);
        Ok(())
    }

    /// The descriptor of that name, which is the caller's from now on.
    ///
    /// # Errors
    /// [`FdError::NotNamed`].
    pub fn take_named(&self, name: &str) -> Result<OwnedFd, FdError> {
        self.kept().named.remove(name).ok_or_else(|| FdError::NotNamed(name.to_owned()))
    }

    /// QMP `closefd`.
    ///
    /// # Errors
    /// [`FdError::NotNamed`].
    pub fn remove_named(&self, name: &str) -> Result<(), FdError> {
        self.take_named(name).map(drop)
    }

    /// What a command calls a descriptor: the number of an inherited one, or a name.
    ///
    /// # Errors
    /// There is none.
    pub fn take(&self, text: &str) -> Result<OwnedFd, FdError> {
        match text.parse::<RawFd>() {
            Ok(number) => self.inherit(number),
            Err(_) => self.take_named(text),
        }
    }

    /// QMP `add-fd`: puts a descriptor into a set, or into a new one; the set's number, and the descriptor's.
    ///
    /// # Errors
    /// The set's number is negative, or too many are kept.
    pub fn add_to_set(&self, set: Option<i64>, fd: OwnedFd, opaque: Option<String>) -> Result<(i64, RawFd), FdError> {
        if let Some(set) = set.filter(|set| *set < 0) {
            return Err(FdError::Negative(set));
        }
        let mut kept = self.kept();
        kept.room()?;
        let id = set.or_else(|| (0..).find(|id| !kept.sets.contains_key(id))).unwrap_or_default();
        let number = fd.as_raw_fd();
        kept.sets.entry(id).or_default().push(Member { fd, opaque });
        Ok((id, number))
    }

    /// QMP `query-fdsets`.
    pub fn list_sets(&self) -> Vec<FdSet> {
        let of = |member: &Member| (member.fd.as_raw_fd(), member.opaque.clone());
        let kept = self.kept();
        kept.sets.iter().map(|(id, members)| FdSet { id: *id, fds: members.iter().map(of).collect() }).collect()
    }

    /// QMP `remove-fd`: closes a descriptor of a set, or all of them and the set. What was opened by it stays open.
    ///
    /// # Errors
    /// There is no such set, or it has no such descriptor.
    pub fn remove(&self, set: i64, fd: Option<RawFd>) -> Result<(), FdError> {
        let mut kept = self.kept();
        let members = kept.sets.get_mut(&set).ok_or(FdError::NoSet(set))?;
        if let Some(fd) = fd {
            let at = members.iter().position(|member| member.fd.as_raw_fd() == fd);
            members.remove(at.ok_or(FdError::NotInSet(set, fd))?);
        } else {
            members.clear();
        }
        if members.is_empty() {
            kept.sets.remove(&set);
        }
        Ok(())
    }

    /// What opening `path` with `flags` (of which the access mode counts) gives, if it is `/dev/fdset/N`: a duplicate of one of the set's
    /// descriptors, which the set keeps. None: it is another path.
    ///
    /// # Errors
    /// There is no such set, or it has none that is open in that mode.
    pub fn open_path(&self, path: &Path, flags: OFlag) -> Option<Result<OwnedFd, FdError>> {
        let number = path.to_str()?.strip_prefix(FDSET)?;
        let number = number.parse::<i64>().ok()?;
        Some(self.open_set(number, flags))
    }

    fn open_set(&self, set: i64, flags: OFlag) -> Result<OwnedFd, FdError> {
        let kept = self.kept();
        let members = kept.sets.get(&set).ok_or(FdError::NoSet(set))?;
        let wanted = flags & OFlag::O_ACCMODE;
        let mode = |member: &&Member| {
            let flags = fcntl(&member.fd, FcntlArg::F_GETFL).map_or(OFlag::empty(), OFlag::from_bits_retain);
            flags & OFlag::O_ACCMODE
        };
        // One that is open for both does for either.
        let found = members.iter().find(|member| mode(member) == wanted);
        let found = found.or_else(|| members.iter().find(|member| mode(member) == OFlag::O_RDWR));
        let name = match wanted {
            OFlag::O_WRONLY => "writing",
            OFlag::O_RDWR => "reading and writing",
            _ => "reading",
        };
        found
            .ok_or(FdError::Mode(set, name))?
            .fd
            .try_clone()
            .map_err(|e| FdError::System(e.raw_os_error().map_or(Errno::EMFILE, Errno::from_raw)))
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// `Ok` if there is room for one more.
    fn room(&self) -> Result<(), FdError> {
        let count = self.named.len() + self.sets.values().map(Vec::len).sum::<usize>();
        if count < KEPT_MAX { Ok(()) } else { Err(FdError::Full) }
    }
}

/// Takes over a descriptor that whoever started this process left open for it. What this process opens is close-on-exec, and what it was
/// started with can't be: so a number never hits a descriptor that has an owner here, nor one that was taken over before.
pub(crate) fn inherit(number: RawFd) -> nix::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        return Err(Errno::EBADF);
    }
    // SAFETY: it is borrowed for this one question, and fcntl(2) answers for any number.
    let flags = fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_GETFD)?;
    if FdFlag::from_bits_retain(flags).contains(FdFlag::FD_CLOEXEC) {
        return Err(Errno::EBADF);
    }
    // SAFETY: it is open, and nobody here owns it: above.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::IntoRawFd;

    use super::*;

    fn file() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    #[test]
    fn an_inherited_descriptor_is_taken_once_and_is_not_inherited_further() {
        let fds = Fds::default();
        let number = file().into_raw_fd();
        assert_eq!(fds.inherit(number).unwrap_err(), FdError::NotPassed(number), "this process opened it");
        // SAFETY: it is open, and nobody owns it.
        fcntl(unsafe { BorrowedFd::borrow_raw(number) }, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
        let taken = fds.take(&number.to_string()).unwrap();
        assert!(fds.inherit(number).is_err());
        assert_eq!(fcntl(&taken, FcntlArg::F_GETFD).unwrap(), FdFlag::FD_CLOEXEC.bits());
        for none in [-1, 0, 2, 100_000] {
            assert!(fds.inherit(none).is_err(), "{none}");
        }
    }

    #[test]
    fn a_named_descriptor_is_taken_once() {
        let fds = Fds::default();
        assert!(matches!(fds.add_named("3", file()), Err(FdError::Name(_))));
        assert!(matches!(fds.add_named("", file()), Err(FdError::Name(_))));
        fds.add_named("migrate", file()).unwrap();
        fds.add_named("migrate", file()).unwrap();
        fds.take("migrate").unwrap();
        assert!(matches!(fds.take_named("migrate"), Err(FdError::NotNamed(_))));
        fds.add_named("a", file()).unwrap();
        fds.remove_named("a").unwrap();
        assert!(fds.remove_named("a").is_err());
    }

    #[test]
    fn a_set_is_opened_as_often_as_one_likes_in_the_mode_that_it_has() {
        let fds = Fds::default();
        let path = Path::new("/dev/fdset/7");
        assert!(fds.open_path(Path::new("/dev/fdset/x"), OFlag::O_RDONLY).is_none());
        assert!(fds.open_path(Path::new("/dev/null"), OFlag::O_RDONLY).is_none());
        assert_eq!(fds.open_path(path, OFlag::O_RDONLY).unwrap().unwrap_err(), FdError::NoSet(7));
        let read_only: OwnedFd = File::open("/dev/null").unwrap().into();
        let (set, _) = fds.add_to_set(Some(7), read_only, None).unwrap();
        assert_eq!(set, 7);
        assert_eq!(fds.open_path(path, OFlag::O_WRONLY).unwrap().unwrap_err(), FdError::Mode(7, "writing"));
        let mut original = tempfile::tempfile().unwrap();
        let (_, number) =
            fds.add_to_set(Some(7), original.try_clone().unwrap().into(), Some("serial0".into())).unwrap();
        for _ in 0..2 {
            let mut opened = File::from(fds.open_path(path, OFlag::O_WRONLY | OFlag::O_APPEND).unwrap().unwrap());
            opened.write_all(b"x").unwrap();
        }
        let mut text = String::new();
        original.rewind().unwrap();
        original.read_to_string(&mut text).unwrap();
        assert_eq!(text, "xx");
        assert_eq!(fds.add_to_set(None, file(), None).unwrap().0, 0, "the first that is free");
        assert_eq!(fds.list_sets()[1].fds[1], (number, Some("serial0".into())));
        assert_eq!(fds.remove(7, Some(-5)), Err(FdError::NotInSet(7, -5)));
        fds.remove(7, Some(number)).unwrap();
        fds.remove(7, None).unwrap();
        assert_eq!(fds.remove(7, None), Err(FdError::NoSet(7)));
        assert_eq!(fds.add_to_set(Some(-1), file(), None), Err(FdError::Negative(-1)));
    }

    #[test]
    fn a_client_can_t_use_up_the_process_s_descriptors() {
        let fds = Fds::default();
        for n in 0..KEPT_MAX {
            if n % 2 == 0 {
                fds.add_named(&format!("n{n}"), file())
            } else {
                fds.add_to_set(None, file(), None).map(drop)
            }
            .unwrap();
        }
        assert_eq!(fds.add_named("more", file()), Err(FdError::Full));
        assert_eq!(fds.add_to_set(None, file(), None), Err(FdError::Full));
        fds.add_named("n0", file()).unwrap();
    }
}
