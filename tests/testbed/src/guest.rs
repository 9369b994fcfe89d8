//! The guest that shows the whole path: Debian's unmodified cloud kernel and an initramfs with a shell on its serial line.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::fetch::{self, Arch};
use crate::initramfs::Initramfs;
use crate::modules;
use crate::paths;
use crate::process::{CommandError, run};

/// The guest's first words, once it is up: this, and the number of its processors.
pub const UP_MARK: &str = "OUTBOARD-GUEST-UP cpus=";

/// How the guest's first process begins.
const START: &str = "\
#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
[ ! -d /modules ] || for module in /modules/*; do insmod $module; done
";
/// How it goes on: a shell, so that what is typed on the console answers.
const SHELL: &str = "\
echo
echo \"OUTBOARD-GUEST-UP cpus=$(grep -c ^processor /proc/cpuinfo)\"
while :; do setsid cttyhack sh; done
";

/// What a VMM is given to boot.
#[derive(Clone, Debug)]
pub struct GuestImage {
    /// The kernel, a bzImage.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

/// Why the guest's image couldn't be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A part isn't there.
    #[error(transparent)]
    Fetch(#[from] fetch::Error),
    /// A kernel module isn't there.
    #[error(transparent)]
    Modules(#[from] modules::Error),
    /// busybox doesn't run.
    #[error(transparent)]
    Busybox(#[from] CommandError),
    /// The image can't be written.
    #[error("{path}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Makes the guest's image.
///
/// # Errors
/// [`Error`].
pub fn image() -> Result<GuestImage, Error> {
    made("guest.cpio", &[], SHELL)
}

/// Makes one that loads the balloon's driver, too.
///
/// # Errors
/// [`Error`].
pub fn image_with_balloon() -> Result<GuestImage, Error> {
    made("guest-balloon.cpio", &["virtio_pci", "virtio_balloon"], SHELL)
}

/// Makes one that knows virtio disks and ISO 9660, does what the lines of `script` say, and switches itself off; it is kept by that name.
///
/// # Errors
/// [`Error`].
pub fn image_that_does(name: &str, script: &str) -> Result<GuestImage, Error> {
    let name = format!("guest-{name}.cpio");
    made(&name, &["virtio_pci", "virtio_blk", "isofs"], &format!("{script}\npoweroff -f\n"))
}

fn made(name: &str, modules: &[&str], rest: &str) -> Result<GuestImage, Error> {
    let root = fetch::qemu()?;
    let kernel = fetch::kernel(Arch::Amd64)?;
    let busybox = root.busybox();
    let file_error = |path: &PathBuf| {
        let path = path.clone();
        move |source| Error::File { path, source }
    };

    let mut image = Initramfs::new();
    image.program("/bin/busybox", &busybox).map_err(file_error(&busybox))?;
    let applets = run(root.command("busybox").arg("--list"))?;
    for applet in applets.lines().filter(|&applet| applet != "busybox") {
        image.link(&format!("/bin/{applet}"), "busybox");
    }
    for mount_point in ["/proc", "/sys", "/tmp", "/mnt"] {
        image.directory(mount_point);
    }
    for (place, module) in modules::gather(&kernel, &root, modules)?.into_iter().enumerate() {
        image.file(&format!("/modules/{place:02}-{}.ko", module.name), 0o644, &module.content);
    }
    image.file("/init", 0o755, [START, rest].concat().as_bytes());

    // Whole or absent, for others may read it while it is made again.
    let initrd = paths::cache().join(name);
    let partial = paths::cache().join(format!("{name}.{}", std::process::id()));
    image.write(partial.clone()).map_err(file_error(&partial))?;
    fs::rename(&partial, &initrd).map_err(file_error(&initrd))?;
    Ok(GuestImage { kernel: kernel.image, initrd })
}
