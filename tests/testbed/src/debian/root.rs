//! The file system's tree: packages unpacked, and the little that their maintainer scripts would have set up.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fetch::{self, Error, Kernel, QemuRoot};
use crate::initramfs::Initramfs;
use crate::modules;
use crate::process::run;

use super::command_as;

/// What a person at the prompt and the tests use, and what brings them there.
const PACKAGES: [&str; 29] = [
    "acpica-tools",
    "base-files",
    "base-passwd",
    "bash",
    "bsdutils",
    "busybox-static",
    "coreutils",
    "dash",
    "efibootmgr",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "iproute2",
    "kmod",
    "libc-bin",
    "libpam-modules",
    "login",
    "mawk",
    "mount",
    "passwd",
    "pciutils",
    "procps",
    "sed",
    "sysvinit-core",
    "udev",
    "udhcpc",
    "util-linux",
    "wget",
];

/// What only maintainer scripts use: none runs here, and none will.
const UNWANTED: [&str; 11] = [
    "adduser",
    "debconf",
    "dpkg",
    "libfile-find-rule-perl",
    "libnumber-compare-perl",
    "libperl5.36",
    "libtext-glob-perl",
    "perl",
    "perl-base",
    "perl-modules-5.36",
    "usrmerge",
];

/// The generic kernel: the cloud one lacks AHCI.
const KERNEL: &str = "linux-image-amd64";

/// Left out: what is for people, and drivers of what no such machine has. It makes the disk a third as large.
const REMOVED: [&str; 5] =
    ["usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/bash-completion"];
/// As above, of the kernel's modules.
const REMOVED_MODULES: [&str; 8] = [
    "sound",
    "drivers/gpu",
    "drivers/infiniband",
    "drivers/media",
    "drivers/staging",
    "drivers/iio",
    "drivers/isdn",
    "drivers/net/wireless",
];

/// What the initramfs loads, in this order: the disk's driver, and the file system with the checksum that it asks for by name.
const INITRAMFS_MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "crc32c_generic", "ext4"];

/// Mounts the root file system and goes there. `root=` and `init=` are those of the command line.
const INITRAMFS_INIT: &str = r"#!/bin/sh
busybox=/bin/busybox
fail() { echo initramfs: $1; exec $busybox sleep 3600; }
$busybox mount -t devtmpfs dev /dev
$busybox mount -t proc proc /proc
for module in $($busybox cat /modules/order); do
    $busybox insmod /modules/$module || fail $module
done
init=/sbin/init
for word in $($busybox cat /proc/cmdline); do
    case $word in
        root=*) root=${word#root=} ;;
        init=*) init=${word#init=} ;;
    esac
done
tries=0
until [ -b $root ]; do
    tries=$((tries + 1))
    [ $tries -lt 300 ] || fail no.$root
    $busybox sleep 0.1
done
$busybox mount -t ext4 -o ro $root /root || fail $root
$busybox mount -o move /dev /root/dev
$busybox umount /proc
exec $busybox switch_root /root $init
";

const INITTAB: &str = "\
id:2:initdefault:
si::sysinit:/etc/init.d/start
l0:0:wait:/etc/init.d/stop
l6:6:wait:/etc/init.d/stop
h0:0:wait:/sbin/halt -d -f -p
r6:6:wait:/sbin/reboot -d -f
T0:2:respawn:/sbin/agetty -L ttyS0 115200 vt220
";

/// Devices come by udev, as on any Debian: modules are loaded by what the machine's devices say they are. Those of the
/// kernel's own making (memory, terminals, processors) are most of them, and need nothing.
const START: &str = "\
#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mountpoint -q /sys || mount -t sysfs sysfs /sys
mount -t tmpfs tmpfs /run
mkdir -p /dev/pts && mount -t devpts devpts /dev/pts
mount -o remount,rw /
[ ! -d /sys/firmware/efi/efivars ] || mount -t efivarfs efivarfs /sys/firmware/efi/efivars
hostname -F /etc/hostname
ip link set lo up
/lib/systemd/systemd-udevd --daemon
others='--subsystem-nomatch=tty --subsystem-nomatch=mem --subsystem-nomatch=cpu --subsystem-nomatch=vc --subsystem-nomatch=memory'
udevadm trigger --action=add --type=devices $others
udevadm settle --timeout=120
";

const STOP: &str = "\
#!/bin/sh
PATH=/usr/sbin:/usr/bin:/sbin:/bin
udevadm control --exit
sync
mount -o remount,ro /
";

const SHADOW: &str = "root:$6$outboard$cC6RmeVN.rbUhgFAYcMtxCenQgI.x1NHE1UfJt7SLPkAZuV/9gXLFhYtxhOw8EoWgwFHhkjFzQ4qik791HEbm1:19000:0:99999:7:::\n";

/// What the kernel's package left in the tree.
pub(super) struct DebianKernel {
    /// `uname -r` of it.
    pub(super) version: String,
    /// The kernel.
    pub(super) image: PathBuf,
    /// The initramfs that was made for it.
    pub(super) initrd: PathBuf,
}

/// What the tree is made of, as text: where it differs, the tree does.
pub(super) fn recipe() -> String {
    format!(
        "{PACKAGES:?} {UNWANTED:?} {KERNEL} {REMOVED:?} {REMOVED_MODULES:?} {INITRAMFS_MODULES:?} \
         {INITRAMFS_INIT} {INITTAB} {START} {STOP}"
    )
}

/// Makes the tree.
pub(super) fn make(tree: &Path, qemu: &QemuRoot) -> Result<DebianKernel, Error> {
    let apt = fetch::bookworm()?;
    apt.unpack_closure(None, &PACKAGES, &UNWANTED, tree)?;
    let package = apt.behind_metapackage(KERNEL, "linux-image-")?;
    apt.unpack_only(&[&package], tree)?;
    for path in REMOVED {
        fetch::remove_tree(&tree.join(path))?;
    }
    configure(tree)?;

    let version = package.strip_prefix("linux-image-").unwrap_or(&package).to_owned();
    let modules = tree.join("lib/modules").join(&version);
    for path in REMOVED_MODULES {
        fetch::remove_tree(&modules.join("kernel").join(path))?;
    }
    run(command_as(tree, "depmod", "bin/kmod").arg("-b").arg(tree).arg(&version))?;
    run(Command::new(tree.join("sbin/ldconfig")).arg("-r").arg(tree))?;

    let image = tree.join(format!("boot/vmlinuz-{version}"));
    let initrd = tree.join(format!("boot/initrd.img-{version}"));
    let kernel = Kernel { image: image.clone(), modules, version: version.clone() };
    let content = initramfs(tree, &kernel, qemu)?;
    fs::write(&initrd, content).map_err(|e| Error::file(&initrd, e))?;
    Ok(DebianKernel { version, image, initrd })
}

fn configure(tree: &Path) -> Result<(), Error> {
    for (from, to) in [("passwd.master", "passwd"), ("group.master", "group")] {
        let from = tree.join("usr/share/base-passwd").join(from);
        let text = fs::read_to_string(&from).map_err(|e| Error::file(&from, e))?;
        // Passwords are in /etc/shadow.
        write(tree, &format!("etc/{to}"), 0o644, &text.replace(":*:", ":x:"))?;
    }
    write(tree, "etc/shadow", 0o600, SHADOW)?;
    for kind in ["auth", "account", "password", "session"] {
        write(tree, &format!("etc/pam.d/common-{kind}"), 0o644, &format!("{kind} required pam_unix.so\n"))?;
    }
    write(tree, "etc/hostname", 0o644, "outboard\n")?;
    write(tree, "etc/hosts", 0o644, "127.0.0.1 localhost outboard\n")?;
    write(tree, "etc/fstab", 0o644, "/dev/vda3 / ext4 rw,noatime 0 0\n")?;
    write(tree, "etc/inittab", 0o644, INITTAB)?;
    write(tree, "etc/init.d/start", 0o755, START)?;
    write(tree, "etc/init.d/stop", 0o755, STOP)?;
    // What update-alternatives and a first start would have made.
    for (link, target) in [("etc/mtab", "../proc/self/mounts"), ("usr/bin/awk", "mawk")] {
        let link = tree.join(link);
        symlink(target, &link).map_err(|e| Error::file(&link, e))?;
    }
    for dir in ["etc/inittab.d", "mnt"] {
        fs::create_dir_all(tree.join(dir)).map_err(|e| Error::file(tree, e))?;
    }
    Ok(())
}

fn initramfs(tree: &Path, kernel: &Kernel, qemu: &QemuRoot) -> Result<Vec<u8>, Error> {
    let mut image = Initramfs::new();
    let busybox = tree.join("bin/busybox");
    image.program("/bin/busybox", &busybox).map_err(|e| Error::file(&busybox, e))?;
    image.link("/bin/sh", "busybox");
    let mut order = String::new();
    let gathered = modules::gather(kernel, qemu, &INITRAMFS_MODULES).map_err(|e| Error::Recipe(e.to_string()))?;
    for module in gathered {
        let file = format!("{}.ko", module.name);
        image.file(&format!("/modules/{file}"), 0o644, &module.content);
        order = order + &file + "\n";
    }
    image.file("/modules/order", 0o644, order.as_bytes());
    image.directory("/proc").directory("/root");
    image.file("/init", 0o755, INITRAMFS_INIT.as_bytes());
    Ok(image.finish())
}

fn write(tree: &Path, path: &str, mode: u32, text: &str) -> Result<(), Error> {
    let file = tree.join(path);
    fs::write(&file, text)
        .and_then(|()| fs::set_permissions(&file, fs::Permissions::from_mode(mode)))
        .map_err(|e| Error::file(&file, e))
}
