//! Two hosts in one network, of which the first's domains move to the second.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tempfile::TempDir;
use testbed::certificates::of_localhost;
use testbed::libvirt::Libvirt;
use testbed::process::Child;

use super::Host;
use crate::{kvm, test_name};

/// The second host, as the first reaches it.
const THERE: &str = "qemu+unix:///system?socket=/srv/there/libvirt-sock";

/// Where libvirt has emulators' certificates.
const CERTIFICATES: &str = "/etc/pki/qemu";

/// Two hosts.
#[derive(Debug)]
pub struct Pair {
    /// Where domains start.
    pub here: Host,
    /// Where they move.
    pub there: Host,
}

impl Pair {
    /// Where guests go, for all but what is tunnelled.
    pub const TCP: [&str; 2] = ["--migrateuri", "tcp://127.0.0.1"];

    /// Starts them, with the stock configuration. Where that can't be, says that the running test is skipped and why.
    ///
    /// # Panics
    /// They should start here and don't.
    pub fn start() -> Option<Self> {
        if kvm(&test_name()) { Self::of([&[], &[]]) } else { None }
    }

    /// The same with directories of this machine, those of the first host and of the second, and the names that they have inside.
    ///
    /// # Panics
    /// As there.
    pub fn of(shared: [&[(&Path, &str)]; 2]) -> Option<Self> {
        let there = Host::start(true, shared[1])?;
        let socket = there.libvirt.path("/run/libvirt");
        let here = Host::start_beside(Some(&there), true, &[shared[0], &[(&socket, "there")]].concat())?;
        Some(Self { here, there })
    }

    /// Gives both an image; its path for them.
    ///
    /// # Panics
    /// It can't be written.
    pub fn give(&self, name: &str, bytes: impl AsRef<[u8]>) -> String {
        let path = image(name);
        for host in [&self.here, &self.there] {
            host.libvirt.write(&path, bytes.as_ref()).expect("an image is written");
        }
        path
    }

    /// Has a domain move by `virsh migrate --live --p2p` with more words.
    ///
    /// # Panics
    /// It doesn't.
    pub fn move_by(&self, domain: &str, more: &[&str]) {
        let output = self.here.libvirt.virsh(&words(domain, more)).expect("virsh");
        assert_eq!(output.status, 0, "{more:?}: {}{}", output.stderr, self.stories());
        self.has_moved(domain);
    }

    /// Waits until it is where it moves.
    ///
    /// # Panics
    /// It isn't.
    pub fn has_moved(&self, domain: &str) {
        self.here.becomes(domain, "shut off (migrated)");
        self.there.becomes(domain, "running (migrated)");
    }

    /// The same, for who watches it meanwhile.
    ///
    /// # Panics
    /// virsh doesn't start.
    pub fn begin_to_move(&self, domain: &str, more: &[&str]) -> Child {
        self.here.libvirt.spawn("virsh", &words(domain, more), Stdio::null()).expect("virsh starts")
    }

    /// Waits for the end of what [`Pair::begin_to_move`] began; whether the guest has moved.
    ///
    /// # Panics
    /// It has none.
    pub fn ends_to_move(&self, mut mover: Child) -> bool {
        let ended = mover.wait(Duration::from_secs(120)).expect("virsh can be waited for");
        ended.unwrap_or_else(|| panic!("virsh doesn't end{}", self.stories())).success()
    }

    /// Has it move where that is refused; why.
    ///
    /// # Panics
    /// It isn't refused.
    pub fn refuses_to_move(&self, domain: &str, more: &[&str]) -> String {
        self.here.virsh_fails(&words(domain, more))
    }

    /// Waits until libvirt tells of memory that moves.
    ///
    /// # Panics
    /// It takes too long.
    pub fn moves_memory(&self, domain: &str) {
        self.here.waits("memory moves", || {
            let info = self.here.libvirt.virsh(&["domjobinfo", domain]).expect("virsh").stdout;
            info.contains("Memory processed:") && info.contains("Job type:         Unbounded")
        });
    }

    /// Waits until the second host knows of no domain.
    ///
    /// # Panics
    /// It takes too long.
    pub fn leaves_nothing_there(&self) {
        self.there.waits("nothing is left there", || self.there.virsh(&["list", "--all", "--name"]).trim().is_empty());
    }

    /// [`Host::check_messages`] of both.
    ///
    /// # Panics
    /// As there.
    pub fn check_messages(&self) {
        self.here.check_messages();
        self.there.check_messages();
    }

    /// What everybody said, for a test that fails.
    fn stories(&self) -> String {
        format!("\nhere:{}\nthere:{}", self.here.story(), self.there.story())
    }

    /// Lets both speak TLS, as hosts that can be reached as localhost.
    ///
    /// # Panics
    /// Certificates can't be made, or written.
    pub fn trusts(&self) {
        let dir = TempDir::new().expect("a temporary directory");
        of_localhost(dir.path()).expect("certificates");
        for host in [&self.here, &self.there] {
            std::fs::create_dir_all(host.libvirt.path(CERTIFICATES)).expect("a directory of our own");
            for file in std::fs::read_dir(dir.path()).expect("a directory of our own") {
                let file = file.expect("a file of our own");
                let inside = format!("{CERTIFICATES}/{}", file.file_name().display());
                let bytes = std::fs::read(file.path()).expect("a file of our own");
                host.libvirt.write(&inside, bytes).expect("a certificate is written");
            }
        }
    }
}

/// An image's path for a host's domains.
pub fn image(name: &str) -> String {
    format!("{}/{name}", Libvirt::IMAGES)
}

fn words<'a>(domain: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["migrate", domain, THERE, "--live", "--p2p", "--verbose"], more].concat()
}
