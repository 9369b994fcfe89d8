//! A file that was made for a guest to go into.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use migration::MigrationError;

use crate::own::Identity;

/// It, and where it is. Somebody may put another one in its place meanwhile.
#[derive(Clone, Debug)]
pub(super) struct Made {
    path: PathBuf,
    identity: Identity,
}

impl Made {
    /// `file` was just made at that path.
    pub(super) fn new(path: PathBuf, file: &File) -> io::Result<Self> {
        let identity = Identity::of(&file.metadata()?);
        Ok(Self { path, identity })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it after the guest didn't leave, unless it may be all that there is of that.
    pub(super) fn remove_after(&self, error: &MigrationError) {
        if !matches!(error, MigrationError::StandsStill { .. }) {
            self.remove();
        }
    }

    /// Removes it: it has no whole guest.
    pub(super) fn remove(&self) {
        let path = self.path.display();
        match self.identity.remove(&self.path) {
            Ok(true) => {}
            Ok(false) => tracing::warn!("{path}: it is another file by now, and stays; what was written has no guest"),
            // Somebody was first.
            Err(e) if e.kind() == io::ErrorKind::NotFound => (),
            Err(e) => tracing::warn!("{path}: it has no guest, and stays: {e}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn another_file_of_its_name_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("saved");
        let made = Made::new(path.clone(), &File::create_new(&path).unwrap()).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "precious").unwrap();
        made.remove();
        assert_eq!(fs::read(&path).unwrap(), b"precious");
        fs::rename(dir.path().join("moved"), &path).unwrap();
        made.remove_after(&MigrationError::Cancelled);
        assert!(!path.exists());
        // Nobody minds if somebody else was first.
        made.remove();
    }
}
