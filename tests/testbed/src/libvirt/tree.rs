//! libvirt's packages, and the little that their maintainer scripts would have set up.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use crate::debian;
use crate::fetch::{self, Arch, Error};

/// With all that they depend on. seabios: what a domain without a kernel of its own starts by.
const PACKAGES: [&str; 8] = [
    "base-files",
    "busybox-static",
    "iproute2",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    "passt",
    "seabios",
];
/// Of this one, the configuration alone: what it depends on is for daemons that systemd starts.
const CONFIGURATION: &str = "libvirt-daemon-system";
/// What only maintainer scripts and dialogs use.
const UNWANTED: [&str; 9] =
    ["bsdextrautils", "debconf", "dpkg", "libdb5.3", "libperl5.36", "perl", "perl-base", "perl-modules-5.36", "tar"];
const REMOVED: [&str; 5] =
    ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/bash-completion"];

/// As Debian's maintainer scripts add them: libvirt-qemu has `kvm` as its first group.
const PASSWD: &str = "\
root:x:0:0:root:/root:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
libvirt-qemu:x:64055:106:Libvirt Qemu:/var/lib/libvirt:/usr/sbin/nologin
";
const GROUP: &str = "\
root:x:0:
tty:x:5:
kvm:x:106:
libvirt:x:107:
nogroup:x:65534:
libvirt-qemu:x:64055:libvirt-qemu
";
/// `kvm` of [`GROUP`].
pub(super) const KVM_GROUP: u32 = 106;

/// Fetches what both daemons, virsh and passt are made of, all of it Debian 12's.
///
/// # Errors
/// [`Error`].
pub fn tree() -> Result<PathBuf, Error> {
    fetch::part("libvirt", &recipe(), "libvirt 9.0 of Debian 12 (35 MB)", |into| make(Arch::Amd64, &PACKAGES, into))
}

/// Makes a disk of [`tree`] for an Arm SoC: an ext4, with bsdutils' script, by which a program has a terminal, and without SeaBIOS.
///
/// # Errors
/// [`Error`].
pub fn soc_disk() -> Result<PathBuf, Error> {
    let tools = debian::tools()?;
    let packages: Vec<&str> = PACKAGES.into_iter().filter(|name| *name != "seabios").chain(["bsdutils"]).collect();
    let recipe = format!("{} {packages:?} {SOC_DISK_KIB}", recipe());
    let what = "libvirt 9.0 of Debian 12 for the Arm SoC (35 MB)";
    let dir = fetch::part("libvirt-arm64", &recipe, what, |into| {
        let tree = into.join("tree");
        make(Arch::Arm64, &packages, &tree)?;
        debian::file_system(&tools, &tree, &into.join(DISK), "libvirt", SOC_DISK_KIB)?;
        fetch::remove_tree(&tree)
    })?;
    Ok(dir.join(DISK))
}

/// The file of [`soc_disk`].
const DISK: &str = "disk";
/// The packages take a third of it.
const SOC_DISK_KIB: u64 = 256 << 10;

fn recipe() -> String {
    format!("1 {PACKAGES:?} {CONFIGURATION} {UNWANTED:?} {REMOVED:?} {PASSWD} {GROUP}")
}

fn make(arch: Arch, packages: &[&str], into: &Path) -> Result<(), Error> {
    let apt = fetch::bookworm()?.of(arch);
    apt.unpack_closure(None, packages, &UNWANTED, into)?;
    apt.unpack_only(&[CONFIGURATION], into)?;
    for path in REMOVED {
        fetch::remove_tree(&into.join(path))?;
    }
    set_up(into)
}

fn set_up(tree: &Path) -> Result<(), Error> {
    let write = |name: &str, text: &str| {
        let path = tree.join(name);
        fs::write(&path, text).map_err(|e| Error::file(&path, e))
    };
    write("etc/passwd", PASSWD)?;
    write("etc/group", GROUP)?;
    // What a test's own programs are mounted over, since the tree is seen read-only.
    write("usr/bin/soc-vmm", "")?;
    write("usr/bin/host-kvm-shim", "")?;
    // The package base-files makes links of these two when it is set up.
    for (link, target) in [("var/run", "/run"), ("var/lock", "/run/lock"), ("bin/sh", "busybox")] {
        let link = tree.join(link);
        fetch::remove_tree(&link)?;
        symlink(target, &link).map_err(|e| Error::file(&link, e))?;
    }
    for dir in ["dev", "mnt", "proc", "srv", "sys", "var/lib/libvirt/images"] {
        let dir = tree.join(dir);
        fs::create_dir_all(&dir).map_err(|e| Error::file(&dir, e))?;
    }
    Ok(())
}
