//! The disk: GPT, GRUB for both kinds of firmware, the file system.
//!
//! No loop device and no mount: every part is made as a file and copied to its place.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use nix::unistd::geteuid;

use crate::fetch::Error;
use crate::process::{Child, run};

use super::root::DebianKernel;
use super::{COMMAND_LINE, GRUB_SAYS, Tools};

const SECTOR: u64 = 512;
const MIB: u64 = 1 << 20;

/// Partitions, in sectors: GRUB's own for a BIOS, UEFI's, and the file system up to the backup of the table.
const DISK: u64 = 512 * MIB / SECTOR;
const BIOS_BOOT: (u64, u64) = (2048, 2048);
const ESP: (u64, u64) = (4096, 8192);
const ROOT: (u64, u64) = (12288, DISK - 12288 - 2048);

/// The file system's name, by which GRUB finds it.
const LABEL: &str = "outboard";

/// What GRUB can do without loading anything: read the table and the file system, and start Linux.
const GRUB_MODULES: [&str; 11] = [
    "part_gpt",
    "ext2",
    "normal",
    "linux",
    "boot",
    "search",
    "search_label",
    "configfile",
    "serial",
    "terminal",
    "echo",
];

/// What the disk is made of, as text: where it differs, the disk does.
pub(super) fn recipe() -> String {
    format!("{DISK} {BIOS_BOOT:?} {ESP:?} {ROOT:?} {GRUB_MODULES:?} {}", grub_configuration(""))
}

/// Makes the disk `to` with the file system `tree`, to which it adds GRUB's configuration.
pub(super) fn make(tools: &Tools, tree: &Path, kernel: &DebianKernel, to: &Path) -> Result<(), Error> {
    let disk = File::create(to).map_err(|e| Error::file(to, e))?;
    disk.set_len(DISK * SECTOR).map_err(|e| Error::file(to, e))?;
    drop(disk);
    table(tools, to)?;

    let work = to.with_extension("work");
    fs::create_dir_all(&work).map_err(|e| Error::file(&work, e))?;
    let early = work.join("early.cfg");
    let search = format!("search.fs_label {LABEL} root\nset prefix=($root)/boot/grub\n");
    fs::write(&early, search).map_err(|e| Error::file(&early, e))?;
    let grub = |format: &str, more: &[&str], out: &Path| {
        let modules = tools.dir.join("usr/lib/grub").join(format);
        run(tools
            .command("usr/bin/grub-mkimage")
            .arg("-d")
            .arg(modules)
            .args(["-O", format, "-p", "/boot/grub", "-c"])
            .arg(&early)
            .arg("-o")
            .arg(out)
            .args(GRUB_MODULES)
            .args(more))
    };

    let core = work.join("core.img");
    grub("i386-pc", &["biosdisk"], &core)?;
    embed(&tools.dir.join("usr/lib/grub/i386-pc/boot.img"), &core, to)?;

    let loader = work.join("grubx64.efi");
    grub("x86_64-efi", &[], &loader)?;
    let esp = work.join("esp");
    efi_partition(tools, &loader, &esp)?;
    place(&esp, to, ESP.0)?;

    configure_grub(tree, &kernel.version)?;
    let root = work.join("root");
    file_system(tools, tree, &root, LABEL, ROOT.1 * SECTOR / 1024)?;
    place(&root, to, ROOT.0)?;
    fs::remove_dir_all(&work).map_err(|e| Error::file(&work, e))
}

fn table(tools: &Tools, disk: &Path) -> Result<(), Error> {
    let mut script = String::from("label: gpt\n");
    for (part, kind) in [
        (BIOS_BOOT, "21686148-6449-6E6F-744E-656564454649"),
        (ESP, "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
        (ROOT, "0FC63DAF-8483-4772-8E79-3D69D8477DE4"),
    ] {
        script += &format!("start={},size={},type={kind}\n", part.0, part.1);
    }
    let mut sfdisk = tools.command("sbin/sfdisk");
    sfdisk.arg("--quiet").arg(disk).stdin(Stdio::piped());
    let mut child = Child::spawn(sfdisk)?;
    let failed = |source| Error::file(disk, source);
    let mut input = child.stdin().ok_or_else(|| failed(io::ErrorKind::BrokenPipe.into()))?;
    input.write_all(script.as_bytes()).map_err(failed)?;
    drop(input);
    match child.wait(std::time::Duration::from_secs(60)).map_err(failed)? {
        Some(status) if status.success() => Ok(()),
        other => Err(Error::Recipe(format!("sfdisk: {other:?}"))),
    }
}

/// Puts GRUB where a BIOS starts it: `boot` in the first sector, which loads the first sector of `core`, which loads the rest.
/// Both are told where that is (the header files grub/i386/pc/boot.h and grub/offsets.h name the places).
fn embed(boot: &Path, core: &Path, disk: &Path) -> Result<(), Error> {
    /// In `boot`: the sector that it loads, 8 bytes.
    const KERNEL_SECTOR: usize = 0x5c;
    /// In `boot`: a jump past the code that takes the BIOS' word for the drive's number; without it the number of a hard disk
    /// is set.
    const DRIVE_CHECK: usize = 0x66;
    /// In the first sector of `core`: where the rest begins, 8 bytes, and its length in sectors, 2 bytes.
    const BLOCK_LIST: usize = 0x1f4;
    /// What of the first sector is GRUB's; behind it are the disk's signature and the protective table.
    const CODE: usize = 440;
    const NOPS: [u8; 2] = [0x90; 2];

    let mut boot = fs::read(boot).map_err(|e| Error::file(boot, e))?;
    let mut core = fs::read(core).map_err(|e| Error::file(core, e))?;
    let (start, room) = BIOS_BOOT;
    let sectors = (core.len() as u64).div_ceil(SECTOR);
    let rest = u16::try_from(sectors - 1).ok().filter(|_| sectors <= room);
    let Some(rest) = rest.filter(|_| boot.len() == SECTOR as usize) else {
        return Err(Error::Recipe(format!("GRUB's core takes {sectors} sectors")));
    };
    boot[KERNEL_SECTOR..][..8].copy_from_slice(&start.to_le_bytes());
    boot[DRIVE_CHECK..][..2].copy_from_slice(&NOPS);
    core[BLOCK_LIST..][..8].copy_from_slice(&(start + 1).to_le_bytes());
    core[BLOCK_LIST + 8..][..2].copy_from_slice(&rest.to_le_bytes());

    let failed = |source| Error::file(disk, source);
    let disk = OpenOptions::new().write(true).open(disk).map_err(failed)?;
    disk.write_all_at(&boot[..CODE], 0).map_err(failed)?;
    disk.write_all_at(&core, start * SECTOR).map_err(failed)
}

fn efi_partition(tools: &Tools, loader: &Path, to: &Path) -> Result<(), Error> {
    let file = File::create(to).map_err(|e| Error::file(to, e))?;
    file.set_len(ESP.1 * SECTOR).map_err(|e| Error::file(to, e))?;
    run(tools.command("sbin/mkfs.vfat").args(["-n", "ESP"]).arg(to))?;
    let mtools = |tool: &str| {
        let mut command = tools.command("usr/bin/mtools");
        command.args(["-c", tool, "-i"]).arg(to);
        command
    };
    run(mtools("mmd").args(["::EFI", "::EFI/BOOT", "::EFI/debian"]))?;
    for name in ["::EFI/BOOT/BOOTX64.EFI", "::EFI/debian/grubx64.efi"] {
        run(mtools("mcopy").arg(loader).arg(name))?;
    }
    Ok(())
}

fn configure_grub(tree: &Path, version: &str) -> Result<(), Error> {
    let dir = tree.join("boot/grub");
    fs::create_dir_all(&dir).map_err(|e| Error::file(&dir, e))?;
    let text = grub_configuration(version);
    let file = dir.join("grub.cfg");
    fs::write(&file, text).map_err(|e| Error::file(&file, e))
}

fn grub_configuration(version: &str) -> String {
    format!(
        "serial --unit=0 --speed=115200\n\
         terminal_input serial\n\
         terminal_output serial\n\
         echo \"{GRUB_SAYS}$cmdpath\"\n\
         set timeout=0\n\
         menuentry Debian {{\n    \
             linux /boot/vmlinuz-{version} {COMMAND_LINE}\n    \
             initrd /boot/initrd.img-{version}\n\
         }}\n"
    )
}

/// Makes `to` an ext4 of that size and name with the files of `tree`, without a journal: a test's copy of it is never used twice.
pub(crate) fn file_system(tools: &Tools, tree: &Path, to: &Path, label: &str, kib: u64) -> Result<(), Error> {
    let mut mke2fs = tools.command("sbin/mke2fs");
    mke2fs.env("MKE2FS_CONFIG", tools.dir.join("etc/mke2fs.conf"));
    mke2fs.args(["-q", "-t", "ext4", "-O", "^has_journal", "-L", label, "-d"]).arg(tree).arg(to);
    mke2fs.arg(format!("{kib}k"));
    if geteuid().is_root() {
        run(&mut mke2fs)?;
    } else {
        // In a user namespace of its own the files that this user unpacked are root's.
        let mut unshare = Command::new("unshare");
        unshare.arg("--map-root-user").arg(mke2fs.get_program()).args(mke2fs.get_args());
        run(unshare.envs(mke2fs.get_envs().filter_map(|(name, value)| Some((name, value?)))))?;
    }
    Ok(())
}

/// Copies `part` to `disk` from `sector` on, leaving holes where it has nothing but zeroes.
fn place(part: &Path, disk: &Path, sector: u64) -> Result<(), Error> {
    let mut from = File::open(part).map_err(|e| Error::file(part, e))?;
    let mut to = OpenOptions::new().write(true).open(disk).map_err(|e| Error::file(disk, e))?;
    to.seek(SeekFrom::Start(sector * SECTOR)).map_err(|e| Error::file(disk, e))?;
    let mut buffer = vec![0; 64 << 10];
    loop {
        let count = from.read(&mut buffer).map_err(|e| Error::file(part, e))?;
        let chunk = &buffer[..count];
        let done = match chunk {
            [] => return Ok(()),
            _ if chunk.iter().all(|&byte| byte == 0) => to.seek(SeekFrom::Current(count as i64)).map(drop),
            _ => to.write_all(chunk),
        };
        done.map_err(|e| Error::file(disk, e))?;
    }
}
