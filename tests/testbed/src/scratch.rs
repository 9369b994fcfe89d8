//! Directories for sockets: with short paths, since a socket's path is limited to 108 bytes, and gone when their owner is.

use std::io;
use std::path::{Path, PathBuf};

use nix::sys::signal::kill;
use nix::unistd::Pid;
use tempfile::TempDir;

const PREFIX: &str = "outboard-testbed-";

/// A new directory for this process, removed with its handle. Those of processes that were killed are removed now.
///
/// # Errors
/// The system's directory for temporary files can't be used.
pub fn dir() -> io::Result<TempDir> {
    let parent = std::env::temp_dir();
    sweep(&parent)?;
    tempfile::Builder::new().prefix(&format!("{PREFIX}{}-", std::process::id())).tempdir_in(parent)
}

/// Whether process `pid` still runs.
pub(crate) fn is_alive(pid: i32) -> bool {
    // No permission to signal it is a sign of life, too.
    kill(Pid::from_raw(pid), None) != Err(nix::errno::Errno::ESRCH)
}

fn sweep(parent: &Path) -> io::Result<()> {
    for dir in left_behind(parent)? {
        // Another process may be removing it too, or it may be another user's.
        let _ = std::fs::remove_dir_all(dir);
    }
    Ok(())
}

/// Directories in `parent` with names of processes that have ended.
///
/// # Errors
/// `parent` can't be read.
pub(crate) fn left_behind(parent: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = parent.read_dir()?.collect::<io::Result<Vec<_>>>()?;
    let of_the_dead = |name: &str| owner(name).is_some_and(|pid| !is_alive(pid));
    Ok(entries
        .iter()
        .filter(|entry| of_the_dead(&entry.file_name().to_string_lossy()))
        .map(|entry| entry.path())
        .collect())
}

fn owner(name: &str) -> Option<i32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn what_the_dead_left_is_swept_and_what_the_living_use_is_kept() {
        let parent = tempfile::tempdir().unwrap();
        let mut dead = Command::new("true").spawn().unwrap();
        dead.wait().unwrap();
        let place = |pid: u32| parent.path().join(format!("{PREFIX}{pid}-x"));
        let (old, own) = (place(dead.id()), place(std::process::id()));
        let other = parent.path().join("somebody-elses");
        for dir in [&old, &own, &other] {
            std::fs::create_dir(dir).unwrap();
        }
        sweep(parent.path()).unwrap();
        assert_eq!([&old, &own, &other].map(|dir| dir.exists()), [false, true, true]);
    }
}
