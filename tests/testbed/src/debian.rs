//! A Debian 12 on a disk of its own: what a user would bring to be booted unchanged.
//!
//! Made of Debian's packages alone, without root and without asking anyone, and kept under `target/testbed/`:
//!
//! | part | what |
//! | --- | --- |
//! | `debian-tools` | what makes the disk (GRUB, e2fsprogs, mtools, sfdisk), the firmware that boots it (SeaBIOS, OVMF), and what a test sets beside it (passt, xorriso) |
//! | `virtiofsd` | virtiofsd, for a VM that shares a directory of this machine |
//! | `debian-instruments` | fio, iperf3, QEMU's guest agent and qemu-img: a second disk for the guest, and a tree for this machine |
//! | `soc-programs` | passt and busybox for an Arm SoC whose soc-vmm boots the disk |
//! | `debian` | `disk.raw` (GPT: BIOS boot, ESP, ext4), and beside it `vmlinuz` and `initrd`, the same as on the disk, for direct boot |
//!
//! One disk boots through a BIOS (GRUB in the BIOS boot partition), through UEFI (GRUB on the ESP), and by its kernel alone.
//! Everything it says goes to its first serial line, where [`USER`] logs in with [`PASSWORD`].
//!
//! Its init is sysvinit with Debian's own udev: under emulation that reaches the login prompt in about half the time that
//! systemd takes (10 to 13 s against 24 s on an emulated q35).

mod disk;
mod instruments;
mod passt;
mod root;
mod shell;
mod site;
mod soc;
mod virtiofsd;
pub mod worker;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fetch::{self, Error};
use crate::process::run;

pub(crate) use disk::file_system;
pub use instruments::{Instruments, instruments};
pub use passt::Passt;
pub use shell::{Answer, Seat, Shell, Terminal};
pub use site::Site;
pub(crate) use soc::{SOC_BUSYBOX, busybox_for_soc};
pub use soc::{SOC_CD, equip, serve_page, soc_programs};
pub use virtiofsd::{Virtiofsd, virtiofsd};

/// Who logs in.
pub const USER: &str = "root";
/// The password of [`USER`].
pub const PASSWORD: &str = "outboard";
/// Partition of the disk that holds the file system's root, counted from 1.
pub const ROOT_PARTITION: u32 = 3;
/// Partition of the disk that is UEFI's, counted from 1.
pub const EFI_PARTITION: u32 = 2;
/// GRUB on the ESP, where Debian's installer puts it. A copy of it is at the path that UEFI takes by default.
pub const EFI_LOADER: &str = r"\EFI\debian\grubx64.efi";
/// What GRUB says, before where it was loaded from: `(hd0,gpt2)/EFI/debian` by the boot entry of [`EFI_LOADER`].
pub const GRUB_SAYS: &str = "GRUB of ";
/// What the kernel is told when it is booted without GRUB, which says the same.
pub const COMMAND_LINE: &str = "root=/dev/vda3 ro console=ttyS0 quiet";

/// Everything a disk and a machine for it are made with.
const TOOLS: [&str; 10] = [
    "grub-common",
    "grub-pc-bin",
    "grub-efi-amd64-bin",
    "e2fsprogs",
    "mtools",
    "dosfstools",
    "fdisk",
    "xorriso",
    "seabios",
    "ovmf",
];
/// What only maintainer scripts and configuration dialogs of [`TOOLS`] use.
const UNUSED_BY_TOOLS: [&str; 3] = ["gettext-base", "ucf", "debconf"];
/// Of Debian 13: the one of Debian 12 gives up on a machine that has no route to the outside.
const PASST: &str = "passt";

/// Counted up when what is made changes while the packages don't.
const REVISION: u32 = 2;

/// The disk and what is beside it. Tests write to copies, never to the disk itself.
#[derive(Clone, Debug)]
pub struct Image {
    /// The disk, raw.
    pub disk: PathBuf,
    /// Its kernel.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initrd: PathBuf,
}

impl Image {
    /// Copies the disk to `to`, without its holes.
    ///
    /// # Errors
    /// It can't be written.
    pub fn copy_disk(&self, to: &Path) -> Result<(), Error> {
        run(Command::new("cp").args(["--sparse=always", "--reflink=auto"]).arg(&self.disk).arg(to))?;
        Ok(())
    }
}

/// Debian's firmware.
#[derive(Clone, Debug)]
pub struct Firmware {
    /// SeaBIOS.
    pub seabios: PathBuf,
    /// OVMF's code.
    pub ovmf_code: PathBuf,
    /// A fresh store of OVMF's variables, to be copied.
    pub ovmf_vars: PathBuf,
}

/// Programs and firmware of Debian 12, unpacked.
#[derive(Clone, Debug)]
pub struct Tools {
    dir: PathBuf,
}

/// Fetches what makes and boots the disk.
///
/// # Errors
/// [`Error`].
pub fn tools() -> Result<Tools, Error> {
    let recipe = format!("1 {TOOLS:?} {PASST}");
    let dir = fetch::part("debian-tools", &recipe, "GRUB, OVMF and passt of Debian (25 MB)", |into| {
        fetch::bookworm()?.unpack_closure(None, &TOOLS, &UNUSED_BY_TOOLS, into)?;
        fetch::trixie()?.unpack_closure(None, &[PASST], &[], &into.join(PASST))
    })?;
    Ok(Tools { dir })
}

impl Tools {
    /// The firmware that boots the disk.
    #[must_use]
    pub fn firmware(&self) -> Firmware {
        Firmware {
            seabios: self.dir.join("usr/share/seabios/bios-256k.bin"),
            ovmf_code: self.dir.join("usr/share/OVMF/OVMF_CODE_4M.fd"),
            ovmf_vars: self.dir.join("usr/share/OVMF/OVMF_VARS_4M.fd"),
        }
    }

    /// Makes an ISO 9660 image (with Rock Ridge) of the directory `from`.
    ///
    /// # Errors
    /// xorriso's.
    pub fn iso(&self, label: &str, from: &Path, to: &Path) -> Result<(), Error> {
        run(self
            .command("usr/bin/xorriso")
            .args(["-as", "mkisofs", "-quiet", "-R", "-V", label, "-o"])
            .arg(to)
            .arg(from))?;
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        command(&self.dir, program)
    }
}

/// Makes the disk, if it isn't there.
///
/// # Errors
/// [`Error`].
pub fn image() -> Result<Image, Error> {
    // Each takes the cache's lock, so they come before the part that needs them.
    let (tools, qemu) = (tools()?, fetch::qemu()?);
    let recipe = format!("{REVISION} {} {}", root::recipe(), disk::recipe());
    let dir = fetch::part("debian", &recipe, "a Debian 12 on a disk (120 MB)", |into| {
        let tree = into.join("tree");
        let kernel = root::make(&tree, &qemu)?;
        let disk = into.join("disk.raw");
        disk::make(&tools, &tree, &kernel, &disk)?;
        for (from, to) in [(&kernel.image, "vmlinuz"), (&kernel.initrd, "initrd")] {
            fs::rename(from, into.join(to)).map_err(|e| Error::file(from, e))?;
        }
        fs::remove_dir_all(&tree).map_err(|e| Error::file(&tree, e))
    })?;
    Ok(Image { disk: dir.join("disk.raw"), kernel: dir.join("vmlinuz"), initrd: dir.join("initrd") })
}

/// A command that runs `program` of the tree `root` by the tree's own loader and libraries.
pub(crate) fn command(root: &Path, program: &str) -> Command {
    command_as(root, program, program)
}

/// [`command`] of a program that does what its name says.
fn command_as(root: &Path, name: &str, program: &str) -> Command {
    let loader = ["lib64", "usr/lib64"].map(|dir| root.join(dir).join("ld-linux-x86-64.so.2"));
    let loader = loader.iter().find(|path| path.exists()).unwrap_or(&loader[0]);
    let libraries =
        ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"].map(|dir| root.join(dir).display().to_string());
    let mut command = Command::new(loader);
    command.args(["--library-path", &libraries.join(":"), "--argv0", name]).arg(root.join(program));
    command
}
