//! What a test tries a guest's devices with: programs on a disk of their own, and the same ones for this machine.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::fetch::{self, Error};

use super::command;

/// For the guest, and for its peers here.
const PACKAGES: [&str; 4] = ["fio", "iperf3", "qemu-guest-agent", "qemu-utils"];
/// What only maintainer scripts, statistics and dialogs use.
const UNWANTED: [&str; 21] = [
    "adduser",
    "debconf",
    "dmsetup",
    "dpkg",
    "libdb5.3",
    "libperl5.36",
    "libpython3-stdlib",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libsqlite3-0",
    "media-types",
    "passwd",
    "perl",
    "perl-base",
    "perl-modules-5.36",
    "python3",
    "python3-minimal",
    "python3.11",
    "python3.11-minimal",
    "tar",
    "usrmerge",
];
/// Documents, and character sets of other systems.
const REMOVED: [&str; 4] = ["usr/share", "usr/lib/x86_64-linux-gnu/gconv", "usr/lib/x86_64-linux-gnu/perl-base", "var"];

/// Where the programs' libraries are, in the tree.
const LIBRARIES: [&str; 3] = ["lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu/ceph"];

/// Programs of Debian 12, the disk's own release.
#[derive(Clone, Debug)]
pub struct Instruments {
    dir: PathBuf,
}

/// Makes them, if they aren't there.
///
/// # Errors
/// [`Error`].
pub fn instruments() -> Result<Instruments, Error> {
    let tools = super::tools()?;
    let recipe = format!("1 {PACKAGES:?} {UNWANTED:?} {REMOVED:?}");
    let dir = fetch::part("debian-instruments", &recipe, "fio, iperf3 and QEMU's guest agent (60 MB)", |into| {
        let tree = into.join("tree");
        fetch::bookworm()?.unpack_closure(None, &PACKAGES, &UNWANTED, &tree)?;
        for path in REMOVED {
            fetch::remove_tree(&tree.join(path))?;
        }
        tools.iso(Instruments::LABEL, &tree, &into.join("disk"))
    })?;
    Ok(Instruments { dir })
}

impl Instruments {
    /// The volume that a guest mounts, ISO 9660.
    pub const LABEL: &str = "INSTRUMENTS";

    /// Their disk, raw: any number of guests read it.
    #[must_use]
    pub fn disk(&self) -> PathBuf {
        self.dir.join("disk")
    }

    /// The words that run `program` (`usr/bin/fio`) in a guest that has mounted the disk at `mounted`.
    #[must_use]
    pub fn run_at(mounted: &str, program: &str) -> String {
        let libraries = LIBRARIES.map(|path| format!("{mounted}/{path}")).join(":");
        format!("{mounted}/{}/ld-linux-x86-64.so.2 --library-path {libraries} {mounted}/{program}", LIBRARIES[0])
    }

    /// A command that runs `program` on this machine.
    #[must_use]
    pub fn command(&self, program: &str) -> Command {
        command(&self.dir.join("tree"), program)
    }

    /// Makes a qcow2 image of the size of its backing file, a raw one beside it with that name.
    ///
    /// # Errors
    /// qemu-img's.
    pub fn make_overlay(&self, backing: &str, to: &Path) -> Result<(), Error> {
        let mut create = self.command("usr/bin/qemu-img");
        crate::process::run(create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b", backing]).arg(to))?;
        Ok(())
    }

    /// Looks at every cluster of the qcow2 image at `path`.
    ///
    /// # Errors
    /// qemu-img's: one is lost, or there twice.
    pub fn check(&self, path: &Path) -> Result<(), Error> {
        crate::process::run(self.command("usr/bin/qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(path))?;
        Ok(())
    }
}
