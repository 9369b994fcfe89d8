//! The place in which the daemons run: mounts, processes, network and names of its own.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::process::Child;

use super::cgroups::Cgroups;
use super::tree::KVM_GROUP;
use super::{Config, Error, LIMIT, Libvirt};

/// Makes the place, as its first process: `TREE DIR KVM_GROUP ADDRESS CGROUPS`; no address where the network is another's. Then it says so and waits, reaping whom nobody else
/// does: libvirtd polls until an emulator's process is gone for good.
///
/// Device nodes are made, not bound, so that libvirtd may change whose they are. An interface with a default route is what passt
/// needs to start at all; nothing is at its other end.
const SCRIPT: &str = r#"
tree=$1 dir=$2 kvm=$3 address=$4 cgroups=$5
shift 5
mount --make-rprivate /
root=$dir/root
mkdir $root $dir/run $dir/run/lock $dir/tmp $dir/srv
chmod 1777 $dir/tmp $dir/run/lock
cp -a $tree/etc $tree/var $dir
mount --bind $tree $root
mount -o remount,bind,ro $root
for part in etc run srv tmp var; do mount --bind $dir/$part $root/$part; done
while [ $# -gt 0 ]; do
    if [ -d $1 ]; then mkdir $root$2; fi
    mount --bind $1 $root$2
    shift 2
done
mount -t proc proc $root/proc
mount -t sysfs sysfs $root/sys
case $cgroups in
    none) ;;
    v2)
        mount -t cgroup2 cgroup2 $root/sys/fs/cgroup
        mkdir $root/sys/fs/cgroup/daemons
        echo $$ >$root/sys/fs/cgroup/daemons/cgroup.procs
        for controller in $(cat $root/sys/fs/cgroup/cgroup.controllers); do
            echo +$controller >$root/sys/fs/cgroup/cgroup.subtree_control || :
        done ;;
    *)
        mount -t tmpfs -o mode=755 cgroup $root/sys/fs/cgroup
        for controllers in $cgroups; do
            mkdir $root/sys/fs/cgroup/$controllers
            mount -t cgroup -o $controllers cgroup $root/sys/fs/cgroup/$controllers
        done ;;
esac
mount -t tmpfs -o mode=755 dev $root/dev
mkdir $root/dev/pts $root/dev/shm $root/dev/net
mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts $root/dev/pts
mount -t tmpfs -o mode=1777 shm $root/dev/shm
ln -s pts/ptmx $root/dev/ptmx
ln -s /proc/self/fd $root/dev/fd
node() { mknod -m 666 $root/dev/$1 c $2 $3; }
node null 1 3
node zero 1 5
node full 1 7
node random 1 8
node urandom 1 9
node tty 5 0
node net/tun 10 200
if [ -e /dev/kvm ]; then
    node kvm 10 232
    chown 0:$kvm $root/dev/kvm
    chmod 660 $root/dev/kvm
fi
cd $root
pivot_root . mnt
cd /
exec /bin/sh -e -c '
    busybox umount -l /mnt
    busybox hostname $2
    if [ $1 != none ]; then
        /bin/ip link set lo up
        /bin/ip tuntap add mode tap name uplink
        /bin/ip addr add $1/24 dev uplink
        /bin/ip link set uplink up
        /bin/ip route add default via ${1%.*}.254 dev uplink
    fi
    echo made
    exec >/dev/null
    busybox sleep 2147483647 &
    wait
' sh $address ${dir##*/}
"#;

/// Enters cgroups by their doors, which end with a `--`, and goes on as the command behind it.
const ENTER: &str = r#"while [ $1 != -- ]; do echo $$ >$1; shift; done; shift; exec "$@""#;

/// The place. Who is in it ends with it.
#[derive(Debug)]
pub(super) struct Namespace {
    unshare: Child,
    init: i32,
    /// Of the cgroups that it is in, or nothing.
    doors: Vec<PathBuf>,
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // unshare waits for it, and it ends after all others: nobody is in the cgroups then.
        if kill(Pid::from_raw(self.init), Signal::SIGKILL).is_ok() {
            let _ = self.unshare.wait(LIMIT);
        }
    }
}

impl Namespace {
    pub(super) fn make(tree: &Path, dir: &Path, config: &Config, cgroups: Option<&Cgroups>) -> Result<Self, Error> {
        // It goes to its cgroups first: they are the roots of those that it sees.
        let mut command = entering(&cgroups.map(Cgroups::doors).unwrap_or_default());
        if let Some(other) = config.beside {
            command.args(["nsenter", "--target", &other.to_string(), "--net"]);
        }
        command.arg("unshare").args(KINDS.iter().filter(|kind| **kind != "--net" || config.beside.is_none()));
        command.args(cgroups.map(|_| "--cgroup"));
        command.args(["--fork", "--kill-child", "sh", "-e", "-c", SCRIPT, "sh"]);
        let address = if config.beside.is_some() { "none" } else { Libvirt::ADDRESS };
        command.arg(tree).arg(dir).arg(KVM_GROUP.to_string()).arg(address);
        command.arg(cgroups.map_or_else(|| "none".to_owned(), Cgroups::mounts));
        let programs = [(&config.emulator, Libvirt::EMULATOR), (&config.shim, Libvirt::SHIM)];
        for (program, inside) in programs {
            if let Some(program) = program {
                command.arg(program).arg(inside);
            }
        }
        for (shared, name) in &config.shared {
            command.arg(shared).arg(format!("{}/{name}", Libvirt::SHARED));
        }
        command.env_clear().env("PATH", PATH).env("LC_ALL", "C");
        let complaints = dir.join("complaints");
        let file = File::create(&complaints).map_err(Error::file(&complaints))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(file);
        let mut unshare = Child::spawn(command)?;
        let said = unshare.stdout().map(|stdout| BufReader::new(stdout).lines().next());
        let made = matches!(said, Some(Some(Ok(line))) if line == "made");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let first = fs::read_to_string(&children).unwrap_or_default();
        match first.split_whitespace().next().and_then(|pid| pid.parse().ok()) {
            Some(init) if made => {
                Ok(Self { unshare, init, doors: cgroups.map(Cgroups::inner_doors).unwrap_or_default() })
            }
            _ => Err(Error::file(dir)(io::Error::other(fs::read_to_string(complaints).unwrap_or_default()))),
        }
    }

    /// Its first process, as this machine numbers it.
    pub(super) fn init(&self) -> i32 {
        self.init
    }

    pub(super) fn command(&self, program: &str) -> Command {
        let mut command = entering(&self.doors);
        command.args(["nsenter", "--target", &self.init.to_string()]).args(KINDS);
        if !self.doors.is_empty() {
            command.arg("--cgroup");
        }
        command.args(["--root", "--wd", program]);
        command.env_clear().env("PATH", PATH).env("HOME", "/root").env("LC_ALL", "C");
        command
    }
}

/// A command that succeeds where such a place can be made.
pub(super) fn probe() -> Command {
    let mut command = Command::new("unshare");
    command.args(KINDS).args([
        "--fork",
        "sh",
        "-e",
        "-c",
        "mount -t tmpfs tmpfs /mnt; mknod /mnt/null c 1 3; : >/mnt/null",
    ]);
    command
}

/// What is added to it is a command that is run in these cgroups.
fn entering(doors: &[PathBuf]) -> Command {
    let mut command = Command::new("sh");
    command.args(["-e", "-c", ENTER, "sh"]).args(doors).arg("--");
    command
}

/// The namespaces, as unshare and nsenter name them; that of cgroups is another matter.
const KINDS: [&str; 5] = ["--mount", "--pid", "--net", "--uts", "--ipc"];
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
