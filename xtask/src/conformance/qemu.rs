//! QEMU as a peer: where it is, what it takes along to another place, and an entry as it is told it.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;
use testbed::fetch;
use testbed::process::run;

use super::entries::Entry;
use crate::step::with_sources;

/// Which QEMU.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// This machine's: 7.2 on a Debian 12.
    System,
    /// The emulated machines': 11.1.
    Testbed,
}

/// What a machine with `-kernel` and no further device loads; the last two are as new and as old versions have it.
const FIRMWARE: [&str; 4] = ["bios-256k.bin", "kvmvapic.bin", "multiboot_dma.bin", "multiboot.bin"];
/// Where they lie in the file system of a Debian.
const FIRMWARE_DIRS: [&str; 2] = ["usr/share/seabios", "usr/share/qemu"];

/// A QEMU for x86-64, run by a loader with libraries of its own.
#[derive(Clone, Debug)]
pub(crate) struct Qemu {
    /// What starts it: its first words.
    start: Vec<String>,
    firmware: Vec<PathBuf>,
    /// Shared libraries.
    libraries: Vec<PathBuf>,
    loader: PathBuf,
    program: PathBuf,
}

impl Qemu {
    pub(crate) fn find(which: Which) -> Result<Self, String> {
        match which {
            Which::System => Self::of(Path::new("/"), "lib64/ld-linux-x86-64.so.2", None),
            Which::Testbed => {
                let root = fetch::qemu().map_err(|e| with_sources(&e))?;
                let root = root.dir();
                Self::of(root, "usr/lib64/ld-linux-x86-64.so.2", Some(&root.join("usr/lib/x86_64-linux-gnu")))
            }
        }
    }

    fn of(root: &Path, loader: &str, libraries: Option<&Path>) -> Result<Self, String> {
        let (loader, program) = (root.join(loader), root.join("usr/bin/qemu-system-x86_64"));
        if !program.exists() {
            return Err(format!("{}: not there; install qemu-system-x86, or use --qemu testbed", program.display()));
        }
        let mut start = vec![text(&loader)];
        if let Some(libraries) = libraries {
            start.extend(["--library-path".to_owned(), text(libraries)]);
        }
        // "	libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f…)"
        let listed = run(Command::new(&start[0]).args(&start[1..]).arg("--list").arg(&program));
        let listed = listed.map_err(|e| with_sources(&e))?;
        let found = |line: &str| Some(PathBuf::from(line.split_once(" => ")?.1.split_once(" (")?.0));
        let libraries = listed.lines().filter_map(found).collect();
        let firmware = FIRMWARE
            .iter()
            .filter_map(|name| FIRMWARE_DIRS.iter().map(|dir| root.join(dir).join(name)).find(|path| path.exists()));
        let firmware: Vec<PathBuf> = firmware.collect();
        start.push(text(&program));
        for dir in FIRMWARE_DIRS {
            start.extend(["-L".to_owned(), text(&root.join(dir))]);
        }
        Ok(Self { start, firmware, libraries, loader, program })
    }

    /// Its version, as it says it.
    pub(crate) fn version(&self) -> Result<String, String> {
        let said = run(Command::new(&self.start[0]).args(&self.start[1..]).arg("--version"));
        Ok(said.map_err(|e| with_sources(&e))?.lines().next().unwrap_or_default().to_owned())
    }

    /// The words of a command that runs it here.
    pub(crate) fn here(&self) -> Vec<String> {
        self.start.clone()
    }

    /// The files that it needs in a machine where there is nothing, by the path they are to have there; and the words of a
    /// command that runs it there.
    pub(crate) fn elsewhere(&self) -> (Vec<(String, PathBuf)>, Vec<String>) {
        const DIR: &str = "/qemu";
        let mut files = Vec::new();
        let mut take = |path: &PathBuf| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let there = format!("{DIR}/{name}");
            files.push((there.clone(), path.clone()));
            there
        };
        let (loader, program) = (take(&self.loader), take(&self.program));
        for path in self.libraries.iter().chain(&self.firmware) {
            take(path);
        }
        (files, [&loader, "--library-path", DIR, &program, "-L", DIR].map(str::to_owned).to_vec())
    }
}

/// The further words for `entry`, whose image is `image`: a machine with nothing but the test's own devices.
pub(crate) fn arguments(entry: &Entry, image: &str) -> Vec<String> {
    const MACHINE: [&str; 15] = [
        "-no-reboot",
        "-nodefaults",
        "-display",
        "none",
        "-serial",
        "stdio",
        "-machine",
        "accel=kvm",
        "-device",
        "pc-testdev",
        "-device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "-device",
        "pci-testdev",
        // Lost ticks that are delivered later keep KVM from accelerating the APIC.
        "-global",
    ];
    let mut words = MACHINE.map(str::to_owned).to_vec();
    words.push("kvm-pit.lost_tick_policy=discard".to_owned());
    words.extend(["-kernel".to_owned(), image.to_owned(), "-smp".to_owned(), entry.cpus.to_string()]);
    if !entry.arguments.is_empty() {
        words.extend(["-append".to_owned(), entry.arguments.clone()]);
    }
    words.extend(entry.qemu.iter().cloned());
    words
}

/// Whether QEMU said why it can't go on: with a status of 1 a passed test and a failed QEMU look the same.
pub(crate) fn has_failed(output: &str) -> bool {
    output.lines().any(|line| line.contains("qemu-system-x86_64: ") && !line.contains("warning: "))
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_no_failure() {
        assert!(!has_failed("PASS: a\nqemu-system-x86_64: warning: host doesn't support requested feature: svm\n"));
        assert!(has_failed("qemu-system-x86_64: -device edu: no such device\n"));
    }
}
