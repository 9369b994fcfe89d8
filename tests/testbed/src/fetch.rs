//! What the testbed is made of, fetched from Debian once and kept under `target/testbed/`.
//!
//! | part | from | for |
//! | --- | --- | --- |
//! | [`qemu`] | Debian 13 and its backports | QEMU 11.1, SeaBIOS, busybox-static, xz |
//! | [`kernel`] | Debian 13's cloud kernels | the server, its guests, the Arm SoC |
//! | [`cross`] | Debian 12 | rustc and the standard library for aarch64, a cross linker, qemu-user |
//! | [`debian::image`] | Debian 12 | a disk with a Debian on it, and what boots it |
//! | [`debian::soc_programs`] | Debian 13 | passt and busybox for the Arm SoC |
//! | [`libvirt::tree`] | Debian 12 | libvirtd, virtlogd, virsh, passt |
//! | [`libvirt::soc_disk`] | Debian 12 | the same for the Arm SoC |
//! | [`qmp_client::qmp_client`] | Debian 12 and PyPI | QEMU's QMP client, a Python |
//!
//! Packages come through apt with its state in a directory of its own (its mirror, proxy and keys are the machine's) and are
//! only unpacked: nothing is installed and no root is needed. Programs of another Debian release run by that release's own
//! loader. Each function returns at once when its part is there; several processes may call them at once.

pub(crate) mod apt;

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::process::{CommandError, run};
use crate::{debian, libvirt, paths, qmp_client};
use apt::Apt;

/// Why a part of the testbed isn't there.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Debian's archive, apt itself, or PyPI can't be used here.
    #[error("packages can't be fetched")]
    Unreachable(#[source] CommandError),
    /// A command failed on what had been fetched.
    #[error("unpacking failed")]
    Command(#[from] CommandError),
    /// A file of the cache can't be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The archive doesn't hold what this crate expects.
    #[error("unexpected archive: {0}")]
    Recipe(String),
}

impl Error {
    fn unreachable(source: CommandError) -> Self {
        Self::Unreachable(source)
    }

    pub(crate) fn file(path: &Path, source: io::Error) -> Self {
        Self::File { path: path.to_path_buf(), source }
    }
}

/// Processor architecture of an emulated machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Arch {
    /// x86-64: the host server and its guests.
    Amd64,
    /// aarch64: the DPU's SoC.
    Arm64,
}

impl Arch {
    /// Debian's name of it.
    #[must_use]
    pub fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }
}

/// Fetches every part.
///
/// # Errors
/// [`Error`].
pub fn everything() -> Result<(), Error> {
    qemu()?;
    kernel(Arch::Amd64)?;
    kernel(Arch::Arm64)?;
    cross()?;
    debian::image()?;
    debian::soc_programs()?;
    debian::instruments()?;
    debian::virtiofsd()?;
    libvirt::tree()?;
    libvirt::soc_disk()?;
    qmp_client::qmp_client()?;
    Ok(())
}

const BOOKWORM: [&str; 2] = ["bookworm", "bookworm-security"];
const TRIXIE: [&str; 2] = ["trixie", "trixie-backports"];

/// Packages of Debian 12.
pub(crate) fn bookworm() -> Result<Apt, Error> {
    Apt::open(&paths::cache().join("apt/bookworm"), &BOOKWORM)
}

/// Packages of Debian 13 and its backports.
pub(crate) fn trixie() -> Result<Apt, Error> {
    Apt::open(&paths::cache().join("apt/trixie"), &TRIXIE)
}

/// Where a root's libraries are.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";

/// Programs and firmware of a newer Debian than the machine's.
#[derive(Clone, Debug)]
pub struct QemuRoot {
    dir: PathBuf,
}

/// Fetches QEMU 11.1 with its firmware, busybox-static and xz.
///
/// # Errors
/// [`Error`].
pub fn qemu() -> Result<QemuRoot, Error> {
    const PACKAGES: [&str; 4] = ["qemu-system-x86", "qemu-system-arm", "busybox-static", "xz-utils"];
    let recipe = format!("1 {TRIXIE:?} {PACKAGES:?}");
    let dir = part("root", &recipe, "QEMU 11.1 of Debian 13 (50 MB)", |into| {
        trixie()?.unpack_closure(Some("trixie-backports"), &PACKAGES, &[], into)?;
        // Debian's merged /usr, which no package but base-files brings: by it the root can be entered by chroot too.
        for name in ["bin", "lib", "lib64", "sbin"] {
            let link = into.join(name);
            if !link.exists() {
                symlink(format!("usr/{name}"), &link).map_err(|e| Error::file(&link, e))?;
            }
        }
        Ok(())
    })?;
    Ok(QemuRoot { dir })
}

impl QemuRoot {
    /// The one that lies in `dir`, as [`QemuRoot::for_guests`] has put it there.
    #[must_use]
    pub fn at(dir: &Path) -> Self {
        Self { dir: dir.to_path_buf() }
    }

    /// What qemu-system-x86_64 takes to run guests by KVM on another machine: the path below the root, and the file here.
    ///
    /// # Errors
    /// Its libraries aren't all there.
    pub fn for_guests(&self) -> Result<Vec<(PathBuf, PathBuf)>, Error> {
        const LOADER: &str = "usr/lib64/ld-linux-x86-64.so.2";
        const PROGRAM: &str = "usr/bin/qemu-system-x86_64";
        const FIRMWARE: [&str; 4] = [
            "usr/share/seabios/bios-256k.bin",
            "usr/share/qemu/kvmvapic.bin",
            "usr/share/qemu/linuxboot_dma.bin",
            "usr/share/qemu/pvh.bin",
        ];
        let mut list = Command::new(self.dir.join(LOADER));
        list.arg("--library-path").arg(self.dir.join(LIBRARIES)).arg("--list").arg(self.dir.join(PROGRAM));
        let list = run(&mut list)?;
        // `libz.so.1 => /…/libz.so.1 (0x…)`; the loader itself may be named without an arrow.
        let libraries = list.lines().filter_map(|line| line.split_once(" => ")?.1.split(' ').next());
        let below = libraries.filter_map(|path| Path::new(path).strip_prefix(&self.dir).ok());
        let parts = below.chain([LOADER, PROGRAM].iter().chain(&FIRMWARE).map(Path::new));
        Ok(parts.map(|part| (part.to_path_buf(), self.dir.join(part))).collect())
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A command that runs `program` of this root's `/usr/bin` by the root's own loader and libraries.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        let libraries = self.dir.join(LIBRARIES);
        let mut command = Command::new(self.dir.join("usr/lib64/ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(&libraries).arg(self.dir.join("usr/bin").join(program));
        if program.starts_with("qemu-system-") {
            command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
            for firmware in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
                command.arg("-L").arg(self.dir.join(firmware));
            }
        }
        command
    }

    /// SeaBIOS as QEMU's pc and q35 use it, 256 KiB.
    #[must_use]
    pub fn seabios(&self) -> PathBuf {
        self.dir.join("usr/share/seabios/bios-256k.bin")
    }

    /// A static busybox for x86-64.
    #[must_use]
    pub fn busybox(&self) -> PathBuf {
        self.dir.join("usr/bin/busybox")
    }
}

/// A Debian kernel and its modules.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The image: a bzImage on x86-64, an EFI-stub Image on aarch64.
    pub image: PathBuf,
    /// The module tree, `…/lib/modules/VERSION`.
    pub modules: PathBuf,
    /// `uname -r` of it.
    pub version: String,
}

/// Fetches Debian 13's cloud kernel for `arch`.
///
/// # Errors
/// [`Error`].
pub fn kernel(arch: Arch) -> Result<Kernel, Error> {
    let name = arch.debian();
    let meta = format!("linux-image-cloud-{name}");
    let what = format!("Debian 13's cloud kernel for {name} (35 MB)");
    let dir = part(&format!("kernel-{name}"), "1 trixie", &what, |into| {
        let apt = Apt::open(&paths::cache().join("apt/kernel"), &["trixie"])?;
        let package = apt.behind_metapackage(&format!("{meta}:{name}"), "linux-image-")?;
        let package = package.split(':').next().unwrap_or(&package);
        apt.unpack_only(&[&format!("{package}:{name}")], into)
    })?;
    // Debian 13 keeps /lib in /usr/lib.
    let tree = ["usr/lib/modules", "lib/modules"]
        .map(|path| dir.join(path))
        .into_iter()
        .find(|path| path.is_dir())
        .ok_or_else(|| Error::Recipe(format!("{meta} has no module tree")))?;
    let version = fs::read_dir(&tree)
        .map_err(|e| Error::file(&tree, e))?
        .find_map(|entry| entry.ok()?.file_name().into_string().ok())
        .ok_or_else(|| Error::Recipe(format!("{meta} has no modules")))?;
    Ok(Kernel { image: dir.join(format!("boot/vmlinuz-{version}")), modules: tree.join(&version), version })
}

/// A toolchain that builds for aarch64, and an emulator for single Arm programs.
#[derive(Clone, Debug)]
pub struct Cross {
    /// A `rustc` whose standard libraries are x86-64's and aarch64's.
    pub rustc: PathBuf,
    /// The linker driver and C compiler.
    pub gcc: PathBuf,
    /// The archiver.
    pub ar: PathBuf,
    /// Runs a static aarch64 program on this machine.
    pub qemu_user: PathBuf,
}

/// Fetches the aarch64 toolchain.
///
/// # Errors
/// [`Error`].
pub fn cross() -> Result<Cross, Error> {
    const TOOLS: [&str; 4] = ["rustc-web", "gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross", "qemu-user-static"];
    const TARGET: &str = "libstd-rust-web-dev:arm64";
    // The tools run on the machine's own C library, which is never older than theirs. The rest is not used for cross builds.
    const UNWANTED: [&str; 4] = ["libc6", "libc6-dev", "libc-dev-bin", "cpp-12"];
    let recipe = format!("2 {BOOKWORM:?} {TOOLS:?} {TARGET}");
    let dir = part("cross", &recipe, "the aarch64 toolchain of Debian 12 (300 MB)", |into| {
        let apt = bookworm()?;
        apt.unpack_closure(None, &TOOLS, &UNWANTED, into)?;
        apt.unpack_only(&[TARGET], into)?;
        keep_one_emulator(&into.join("usr/bin"))?;
        wrap_tools(into)
    })?;
    let tool = |name: &str| dir.join("bin").join(name);
    Ok(Cross {
        rustc: tool("rustc"),
        gcc: tool("aarch64-linux-gnu-gcc"),
        ar: tool("aarch64-linux-gnu-ar"),
        qemu_user: dir.join("usr/bin/qemu-aarch64-static"),
    })
}

/// qemu-user-static brings an emulator for each of 30 architectures.
fn keep_one_emulator(bin: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(bin).map_err(|e| Error::file(bin, e))? {
        let path = entry.map_err(|e| Error::file(bin, e))?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let emulator = name.starts_with("qemu-") && name.ends_with("-static");
        if emulator && name != "qemu-aarch64-static" {
            fs::remove_file(&path).map_err(|e| Error::file(&path, e))?;
        }
    }
    Ok(())
}

/// The tools find their libraries by a variable that must not reach anything else that a build starts, so each gets a
/// wrapper. It locates itself by its own path, since the directory is renamed when complete.
fn wrap_tools(root: &Path) -> Result<(), Error> {
    let bin = root.join("bin");
    fs::create_dir_all(&bin).map_err(|e| Error::file(&bin, e))?;
    for tool in ["rustc", "aarch64-linux-gnu-gcc", "aarch64-linux-gnu-ar"] {
        let wrapper = bin.join(tool);
        let mut script = String::from("#!/bin/sh\nroot=$(dirname \"$(dirname \"$0\")\")\n");
        let _ = writeln!(script, "LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu exec \"$root/usr/bin/{tool}\" \"$@\"");
        fs::write(&wrapper, script).map_err(|e| Error::file(&wrapper, e))?;
        fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).map_err(|e| Error::file(&wrapper, e))?;
    }
    Ok(())
}

/// Makes sure that the directory `name` of the cache was made by `recipe`, by running `make` on an empty directory
/// where it wasn't. Whole or absent: it gets its name when complete.
pub(crate) fn part(
    name: &str,
    recipe: &str,
    what: &str,
    make: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<PathBuf, Error> {
    let dir = paths::cache().join(name);
    let stamp = paths::cache().join(format!("{name}.stamp"));
    let made = || dir.is_dir() && fs::read_to_string(&stamp).is_ok_and(|text| text == recipe);
    if made() {
        return Ok(dir);
    }
    let cache = paths::cache();
    fs::create_dir_all(&cache).map_err(|e| Error::file(&cache, e))?;
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).map_err(|e| Error::file(&lock_path, e))?;
    lock.lock().map_err(|e| Error::file(&lock_path, e))?;
    if made() {
        return Ok(dir);
    }

    eprintln!("testbed: fetching {what} …");
    let began = Instant::now();
    let partial = cache.join(format!("{name}.partial"));
    remove_tree(&partial)?;
    fs::create_dir_all(&partial).map_err(|e| Error::file(&partial, e))?;
    make(&partial)?;
    // A machine may still be running from the old one: it is moved away first, and its open files live on.
    let old = cache.join(format!("{name}.old"));
    remove_tree(&old)?;
    if dir.exists() {
        fs::rename(&dir, &old).map_err(|e| Error::file(&dir, e))?;
    }
    fs::rename(&partial, &dir).map_err(|e| Error::file(&partial, e))?;
    fs::write(&stamp, recipe).map_err(|e| Error::file(&stamp, e))?;
    remove_tree(&old)?;
    eprintln!("testbed: fetched in {:.0} s", began.elapsed().as_secs_f64());
    Ok(dir)
}

pub(crate) fn remove_tree(dir: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::file(dir, e)),
        _ => Ok(()),
    }
}
