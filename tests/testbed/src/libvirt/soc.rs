//! Debian's libvirtd and virtlogd of the Arm SoC's own, as a DPU has them: its packages are on a drive, which is the daemons' root.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use crate::bed::SOC_VMM;
use crate::debian::{SOC_BUSYBOX, busybox_for_soc};
use crate::fetch;
use crate::machine::{Error, Machine};
use crate::protocol::{Ended, Status};
use crate::soc::SocConfig;

use super::console::{BEGINS, Console, at_the_console};
use super::tree::soc_disk;
use super::{LOG, Libvirt, PATH};

/// How long a program may take: the SoC is slow.
const LIMIT: Duration = Duration::from_secs(90);
/// The drive with the packages.
const DRIVE: &str = "/dev/vda";
/// What the SoC has here is in [`Libvirt::SHARED`] inside.
const IMAGES: &str = "/guest";
/// The virtio-serial port for `virsh console`.
const CONSOLE: &str = "virsh";

/// Makes the place, as the process that holds it: `SOC_VMM EMULATOR DRIVE IMAGES`. It is a namespace of mounts, since libvirtd goes by the root of that one where
/// it makes a `/dev` for an emulator.
const SCRIPT: &str = r"
mkdir -p /libvirt
mount -t ext4 $3 /libvirt
for part in dev proc run sys tmp; do mount -o rbind /$part /libvirt/$part; done
cd /libvirt
mkdir -p run/lock dev/shm
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t cgroup2 cgroup2 sys/fs/cgroup
for controller in $(cat sys/fs/cgroup/cgroup.controllers); do
    echo +$controller >sys/fs/cgroup/cgroup.subtree_control || :
done
mount -o bind $1 ./$2
mount -o bind $4 srv
ip link set lo up
pivot_root . mnt
cd /
umount -l mnt
echo made
exec sleep 2147483647
";

/// Running daemons on a SoC.
#[derive(Debug)]
pub struct SocLibvirt<'a> {
    soc: &'a Machine,
    /// Who holds the place.
    holder: i32,
}

impl<'a> SocLibvirt<'a> {
    /// Gives a SoC that is to be started what it takes, and files of this machine by the names that they have in [`Libvirt::SHARED`].
    ///
    /// # Errors
    /// [`fetch::Error`].
    pub fn equip(soc: &mut SocConfig, shared: &[(&Path, &str)]) -> Result<(), fetch::Error> {
        soc.basics.files.extend(shared.iter().map(|(path, name)| (format!("{IMAGES}/{name}"), path.to_path_buf())));
        soc.drives.insert(0, soc_disk()?);
        soc.basics.files.push((SOC_BUSYBOX.to_owned(), busybox_for_soc()?));
        soc.basics.channels.push(CONSOLE.to_owned());
        Ok(())
    }

    /// Starts both daemons on an equipped SoC, with its soc-vmm as [`Libvirt::EMULATOR`], and waits until libvirtd answers.
    ///
    /// # Errors
    /// [`Error`].
    pub fn start(soc: &'a Machine) -> Result<Self, Error> {
        let make =
            ["unshare", "-m", SOC_BUSYBOX, "sh", "-e", "-c", SCRIPT, "sh", SOC_VMM, Libvirt::EMULATOR, DRIVE, IMAGES];
        let holder = soc.run(SOC_BUSYBOX, &make, None)?;
        if soc.control().wait_for_output(holder, "made", LIMIT).is_none() {
            return Err(failed(&soc.control().output(holder).join("\n")));
        }
        let libvirt = Self { soc, holder };
        libvirt.write("/etc/libvirt/libvirtd.conf", super::LIBVIRTD_CONF)?;
        for daemon in ["virtlogd", "libvirtd"] {
            succeeded(libvirt.output(daemon, &["--daemon"])?)?;
        }
        let answers = "until virsh --quiet uri; do sleep 0.1; done";
        succeeded(libvirt.output("sh", &["-c", answers])?)?;
        Ok(libvirt)
    }

    /// Runs `virsh` with `args`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn virsh(&self, args: &[&str]) -> Result<Ended, Error> {
        self.output("virsh", &[&["--quiet"], args].concat())
    }

    /// Runs a program of the root to its end.
    ///
    /// # Errors
    /// It can't be started.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<Ended, Error> {
        self.soc.exec(SOC_BUSYBOX, &words(&self.inside(program, args)), LIMIT)
    }

    /// Starts a program of the root; its process there.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(&self, program: &str, args: &[&str]) -> Result<i32, Error> {
        self.soc.run(SOC_BUSYBOX, &words(&self.inside(program, args)), None)
    }

    /// Uses a domain's console by `virsh console`, on a terminal that script makes. One at a time: the one before has been dropped.
    ///
    /// # Errors
    /// virsh doesn't come to the console.
    pub fn console(&self, domain: &str) -> Result<Console, Error> {
        const TERMINAL: &str = "/run/virsh-console";
        let port = self.soc.channel(CONSOLE)?;
        let virsh = format!("tty >{TERMINAL}; exec virsh console {domain} --force");
        self.soc.run(SOC_BUSYBOX, &words(&self.inside("script", &["-q", "-c", &virsh, "/dev/null"])), Some(CONSOLE))?;
        let mut console = Console::on(OwnedFd::from(port).into(), None).map_err(at_the_console)?;
        console.expect(BEGINS, LIMIT).map_err(at_the_console)?;
        // What is typed before virsh has taken the terminal over is lost.
        let is_taken = format!("until stty -F $(cat {TERMINAL}) | grep -q -e -icanon; do sleep 0.1; done");
        succeeded(self.output("sh", &["-c", &is_taken])?)?;
        Ok(console)
    }

    /// Every message between libvirtd and its emulators, of what libvirtd has logged.
    ///
    /// # Errors
    /// It can't be read.
    pub fn libvirtd_log(&self) -> Result<String, Error> {
        succeeded(self.output("grep", &["QEMU_MONITOR_\\(SEND\\|RECV\\)", LOG])?)
    }

    /// Writes a file of the root.
    ///
    /// # Errors
    /// It can't be written.
    pub fn write(&self, path: &str, text: &str) -> Result<(), Error> {
        self.soc.write(&self.path(path), text)
    }

    /// A file of the root.
    ///
    /// # Errors
    /// It can't be read.
    pub fn read(&self, path: &str) -> Result<String, Error> {
        self.soc.read(&self.path(path))
    }

    /// Where the SoC's first process finds a file of the root.
    fn path(&self, path: &str) -> String {
        format!("/proc/{}/root{path}", self.holder)
    }

    /// The words for busybox that run a program of the root.
    fn inside(&self, program: &str, args: &[&str]) -> Vec<String> {
        let holder = self.holder.to_string();
        let enter = ["nsenter", "-t", &holder, "-m", "/bin/busybox", "env", "-i", PATH, "HOME=/root", "LC_ALL=C"];
        enter.iter().chain(&[program]).chain(args).map(|&word| word.to_owned()).collect()
    }
}

fn succeeded(ended: Ended) -> Result<String, Error> {
    match ended.status {
        Status::Code(0) => Ok(ended.stdout),
        _ => Err(failed(&(ended.stdout + &ended.stderr))),
    }
}

fn failed(said: &str) -> Error {
    Error::file("libvirt on the SoC")(io::Error::other(said))
}

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}
