//! qcow2 images, by the `imago` crate.
//!
//! The files are opened here, and the header is looked at here first: so that a FIFO blocks nothing, a backing file is opened by the
//! same rules as any image, and what imago doesn't know (encryption) or names in its own words (features) is refused in ours.

mod guard;
mod header;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, ShallowMapping, qcow2, raw};

use super::error::{BlockError, ImageProblem};
use super::file::{self, FileId, Opened};
use super::lock::{lock, unlock};
use super::spec::ImageFormat;
use super::{BlockBackend, Extent, check_growth, check_range, write_zeros};
use crate::cli::with_causes;
use guard::{Guarded, Shrunk};
use header::Header;

/// Files of a chain: more than anyone has, few enough to open.
const DEPTH: usize = 64;

const OPEN: &str = "open it as qcow2 (look at it with qemu-img check)";
const READ: &str = "read it (check the disk that it is on, and the image with qemu-img check)";
const GROW: &str = "grow it (check the room on its file system, and the image with qemu-img check)";
const WRITE: &str = "write it (check the disk that it is on, and the image with qemu-img check)";

/// A qcow2 image with its backing files.
#[derive(Debug)]
pub(super) struct Qcow2 {
    /// Locked to write where clusters are taken away, since no other call may be using them then.
    image: RwLock<FormatAccess<Guarded>>,
    /// The chain from the top.
    files: Vec<FileId>,
    path: PathBuf,
    size: AtomicU64,
    /// Bytes of the disk that it stands on; 0 without one.
    backing_size: u64,
    read_only: bool,
    /// It is this process's, and locked.
    claimed: AtomicBool,
    /// The top of the chain once more: what is locked, and opened anew.
    opened: Opened,
}

impl Qcow2 {
    pub(super) fn new(opened: Opened, claimed: bool) -> Result<Self, ImageProblem> {
        let (path, read_only) = (opened.path.clone(), opened.read_only);
        let mut files = Vec::new();
        let (image, backing_size) = open_qcow2(opened.again()?, &mut files)?;
        let size = image.size().into();
        Ok(Self {
            image: RwLock::new(image),
            files,
            path,
            size,
            backing_size,
            read_only,
            claimed: claimed.into(),
            opened,
        })
    }

    fn image(&self) -> RwLockReadGuard<'_, FormatAccess<Guarded>> {
        self.image.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn image_alone(&self) -> RwLockWriteGuard<'_, FormatAccess<Guarded>> {
        self.image.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_write(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        if self.read_only {
            return Err(BlockError::ReadOnly);
        }
        check_range(offset, len, self.size())
    }

    fn failed(&self, action: &'static str) -> impl Fn(std::io::Error) -> BlockError {
        move |source| {
            let path = self.path.clone();
            let source = match source.downcast::<Shrunk>() {
                Ok(file) if file.path == path => ImageProblem::Shrunk,
                Ok(file) => ImageProblem::Backing { path: file.path, source: Box::new(ImageProblem::Shrunk) },
                Err(source) => ImageProblem::Io { action, source },
            };
            BlockError::Image { path, source }
        }
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        if self.read_only {
            return;
        }
        // What its tables have in memory: it has nowhere else to go, and nobody else to tell.
        if let Err(e) = self.image_alone().flush().map_err(self.failed(WRITE)) {
            let why = with_causes(&e);
            tracing::error!("{why}: what was written last is lost; repair it (qemu-img check -r all)");
        }
    }
}

impl BlockBackend for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn files(&self) -> &[FileId] {
        &self.files
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<(), BlockError> {
        check_range(offset, buf.len() as u64, self.size())?;
        self.image().read(buf, offset).map_err(self.failed(READ))
    }

    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), BlockError> {
        check_range(offset, len, self.size())?;
        let image = self.image();
        let (mapping, held) = image.get_shallow_mapping(offset, len).map_err(self.failed(READ))?;
        let extent = match mapping {
            ShallowMapping::Zero { explicit: true, .. } => Extent::Zero,
            ShallowMapping::Zero { .. } if self.files.len() == 1 => Extent::Zero,
            ShallowMapping::Zero { .. } | ShallowMapping::Indirect { .. } => Extent::Below,
            _ => Extent::Data,
        };
        // A length of none is no answer.
        Ok(if held == 0 { (Extent::Data, len) } else { (extent, held.min(len)) })
    }

    fn write_at(&self, data: &[u8], offset: u64) -> Result<(), BlockError> {
        self.check_write(offset, data.len() as u64)?;
        self.image().write(data, offset).map_err(self.failed(WRITE))
    }

    fn flush(&self) -> Result<(), BlockError> {
        if self.read_only {
            return Ok(());
        }
        let image = self.image();
        image.flush().and_then(|()| image.sync()).map_err(self.failed(WRITE))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        let mut image = self.image_alone();
        match image.discard_to_any(offset, len) {
            // Version 2 has no clusters that are known to be zeros.
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => Ok(()),
            done => done.map_err(self.failed(WRITE)),
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> Result<(), BlockError> {
        self.check_write(offset, len)?;
        if may_unmap {
            let mut image = self.image_alone();
            match image.discard_to_zero(offset, len) {
                Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
                done => return done.map_err(self.failed(WRITE)),
            }
        }
        let done = self.image().write_zeroes(offset, len);
        match done {
            // Version 2 again.
            Err(error) if error.kind() == std::io::ErrorKind::Unsupported => write_zeros(self, offset, len),
            done => done.map_err(self.failed(WRITE)),
        }
    }

    fn release(&self) -> Result<(), BlockError> {
        if self.read_only || !self.claimed.load(Ordering::Acquire) {
            return Ok(());
        }
        self.flush()?;
        unlock(&self.opened.file, false).map_err(|source| BlockError::Image { path: self.path.clone(), source })?;
        self.claimed.store(false, Ordering::Release);
        Ok(())
    }

    fn claim(&self) -> Result<(), BlockError> {
        if self.read_only || self.claimed.load(Ordering::Acquire) {
            return Ok(());
        }
        let anew = || {
            lock(&self.opened.file, false)?;
            self.opened.forget();
            // What its tables say may be something else by now.
            let (image, _) = open_qcow2(self.opened.again()?, &mut Vec::new())?;
            let (now, len) = (image.size(), self.size());
            if now == len { Ok(image) } else { Err(ImageProblem::OtherSize { now, len }) }
        };
        let image = anew().map_err(|source| BlockError::Image { path: self.path.clone(), source })?;
        *self.image_alone() = image;
        self.claimed.store(true, Ordering::Release);
        Ok(())
    }

    fn grow(&self, size: u64) -> Result<(), BlockError> {
        check_growth(self, size)?;
        let image = self.image_alone();
        let old = self.size();
        // What the disk that it stands on has there was never this one's.
        let how = if self.backing_size > old { PreallocateMode::Zero } else { PreallocateMode::None };
        let grown = if size > old { image.resize_grow(size, how) } else { Ok(()) };
        // The header that says so is there before the guest relies on it.
        grown.and_then(|()| image.flush()).and_then(|()| image.sync()).map_err(self.failed(GROW))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }
}

/// Opens the image and all that it stands on, and says how large the disk is that it stands on; `above` are the files that stand on it, and gets all of these.
fn open_qcow2(opened: Opened, above: &mut Vec<FileId>) -> Result<(FormatAccess<Guarded>, u64), ImageProblem> {
    let header = Header::read(&opened)?;
    above.push(opened.id);
    let backing = match header.backing {
        None => None,
        Some(backing) => {
            let path = backing_path(&opened.path, &backing.name)?;
            let format = match backing.format.as_deref() {
                None | Some("") => None,
                Some("raw" | "file" | "host_device") => Some(ImageFormat::Raw),
                Some("qcow2") => Some(ImageFormat::Qcow2),
                Some(other) => return Err(ImageProblem::BackingFormat(other.into())),
            };
            let image = open_backing(&path, format, opened.direct.is_some(), above);
            Some(image.map_err(|source| match source {
                // Of a long chain the first file and the one at fault are enough.
                ImageProblem::Backing { .. } => source,
                _ => ImageProblem::Backing { path, source: Box::new(source) },
            })?)
        }
    };
    let writable = !opened.read_only;
    let backing_size = backing.as_ref().map_or(0, FormatAccess::size);
    let image = Guarded::new(opened, header.cluster).and_then(|file| {
        qcow2::Qcow2::<Guarded>::builder(file).write(writable).backing(backing).open(DenyImplicitOpenGate::default())
    });
    let image = image.map_err(|source| ImageProblem::Io { action: OPEN, source })?;
    Ok((FormatAccess::new(image), backing_size))
}

/// Opens a backing file, which is only read.
fn open_backing(
    path: &Path,
    format: Option<ImageFormat>,
    direct: bool,
    above: &mut Vec<FileId>,
) -> Result<FormatAccess<Guarded>, ImageProblem> {
    if above.len() == DEPTH {
        return Err(ImageProblem::BackingDepth(DEPTH + 1));
    }
    let opened = Opened::new(path, true)?;
    if above.contains(&opened.id) {
        return Err(ImageProblem::BackingLoop);
    }
    lock(&opened.file, true)?;
    let format = file::format_of(&opened, format)?;
    let opened = if direct { opened.past_cache()? } else { opened };
    match format {
        ImageFormat::Qcow2 => open_qcow2(opened, above).map(|(image, _)| image),
        ImageFormat::Raw => {
            above.push(opened.id);
            let image =
                Guarded::new(opened, 0).and_then(|file| raw::Raw::builder(file).open(DenyImplicitOpenGate::default()));
            image.map(FormatAccess::new).map_err(|source| ImageProblem::Io { action: file::READ, source })
        }
    }
}

/// Where a backing file lies: its name is meant from where the image lies that names it.
fn backing_path(image: &Path, name: &str) -> Result<PathBuf, ImageProblem> {
    let path = name.strip_prefix("file:").unwrap_or(name);
    // QEMU takes what stands before a colon for a protocol, unless there is a slash first.
    let protocol = path.split('/').next().is_some_and(|first| first.contains(':'));
    if path.is_empty() || protocol || path.contains('\0') {
        return Err(ImageProblem::BackingName(name.into()));
    }
    Ok(image.parent().unwrap_or(Path::new("")).join(path))
}
