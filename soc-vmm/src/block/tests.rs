//! Images on a real file system.

mod growth;
mod locks;
mod opening;
mod qcow2;
mod raw;
mod shrunk;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder, StorageCreateOptions};

use super::*;
use crate::cli::{one_line, with_causes};

/// A directory for images.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A raw file.
    fn raw(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// A qcow2 file with clusters of 4 KiB, in place of what had that name.
    fn qcow2(&self, name: &str, size: u64, backing: Option<(&str, &str)>) -> PathBuf {
        use imago::Storage;
        let path = self.path(name);
        let _ = std::fs::remove_file(&path);
        let file = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
        let mut builder = Qcow2::<File, FormatAccess<File>>::create_builder(file).size(size).cluster_size(4096);
        if let Some((name, format)) = backing {
            builder = builder.backing(name.into(), format.into());
        }
        builder.create().unwrap();
        path
    }
}

fn opened(path: &Path) -> Arc<dyn BlockBackend> {
    open_anew(&ImageSpec::new(path))
}

/// Opens an image that was closed before. It may be locked for a moment more: a process that another test has just started holds all that
/// was open then, until it executes its program.
pub(super) fn open_anew(spec: &ImageSpec) -> Arc<dyn BlockBackend> {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match open(spec) {
            Ok(image) => return image,
            Err(BlockError::Image { source: ImageProblem::InUse { .. }, .. }) if Instant::now() < end => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => panic!("{}", with_causes(&error)),
        }
    }
}

fn bytes(image: &dyn BlockBackend, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read_at(&mut bytes, offset).unwrap_or_else(|error| panic!("{}", with_causes(&error)));
    bytes
}

/// What a person gets to see.
fn refusal(spec: &ImageSpec) -> String {
    let Err(error) = open(spec) else { panic!("{spec:?} was opened") };
    let text = with_causes(&error);
    assert_eq!(text, one_line(&text));
    text
}
