//! What the tests with Debian's libvirtd share: the daemons with soc-vmm as their emulator, and `virsh` as a user types it.

mod domain;
mod messages;
mod operated;
mod pair;

use std::fs::File;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use testbed::libvirt::{Config, Error, Libvirt};
use testbed::process::Child;

use crate::{program, test_name};

pub use domain::{Boot, Domain, cdrom, disk, tap, user};
pub use messages::{Message, check_messages, messages};
pub use operated::Operated;
pub use pair::{Pair, image};

/// How long a domain may take to come to a state.
const LIMIT: Duration = Duration::from_secs(120);

/// Running daemons, and what they say of their domains.
#[derive(Debug)]
pub struct Host {
    /// The daemons.
    pub libvirt: Libvirt,
    _events: Child,
}

impl Host {
    /// Where events are written, as seen inside.
    const EVENTS: &str = "/var/log/libvirt/events.log";

    /// Starts them with soc-vmm as emulator. Where that can't be, says that the running test is skipped and why.
    ///
    /// # Panics
    /// They should start here and don't.
    pub fn start(stock: bool, shared: &[(&std::path::Path, &str)]) -> Option<Self> {
        Self::start_beside(None, stock, shared)
    }

    /// The same, in the network of another one.
    ///
    /// # Panics
    /// They should start here and don't.
    pub fn start_beside(other: Option<&Self>, stock: bool, shared: &[(&std::path::Path, &str)]) -> Option<Self> {
        if let Some(why) = Libvirt::lacks().expect("libvirt's packages") {
            testbed::skip(&test_name(), &why);
            return None;
        }
        let shared = shared.iter().map(|(path, name)| (path.to_path_buf(), (*name).to_owned())).collect();
        let beside = other.map(|host| host.libvirt.network());
        let (emulator, shim) = (Some(program("soc-vmm")), Some(program("host-kvm-shim")));
        let libvirt = Libvirt::start(&Config { stock, emulator, shim, beside, shared }).expect("libvirt starts");
        let events = Self::listen(&libvirt).expect("events are listened to");
        Some(Self { libvirt, _events: events })
    }

    /// Starts a pool of `functions` for the daemons' emulators, with the `host` function that tells of the host's processor, and waits until it
    /// answers.
    ///
    /// # Panics
    /// It doesn't.
    pub fn serve_pool(&self, functions: &[String], host: Option<&str>) -> Child {
        let users = "users = [\"libvirt-qemu\"]\ngroup = \"libvirt-qemu\"";
        let host = host.map(|host| format!("host = {host:?}\n")).unwrap_or_default();
        let config = format!("[pool]\nfunctions = {functions:?}\n{host}{users}\n");
        for dir in ["/etc/outboard", "/run/outboard-pool"] {
            std::fs::create_dir(self.libvirt.path(dir)).expect("a directory of our own");
        }
        self.libvirt.write("/etc/outboard/soc-vmm.toml", config).expect("the pool is configured");
        let pool = self.libvirt.spawn(Libvirt::EMULATOR, &["pool", "serve"], Stdio::null()).expect("the pool starts");
        self.waits("all of the pool's functions are free", || {
            let list = self.pool();
            list.len() == functions.len() && list.iter().all(|one| one["state"] == "free")
        });
        pool
    }

    /// The functions of the pool; none where it doesn't answer.
    pub fn pool(&self) -> Vec<Value> {
        let list = self.libvirt.output(Libvirt::EMULATOR, &["pool", "list", "--json"]).expect("soc-vmm runs");
        serde_json::from_str(&list.stdout).unwrap_or_default()
    }

    fn listen(libvirt: &Libvirt) -> Result<Child, Error> {
        let file =
            File::options().create(true).append(true).open(libvirt.path(Self::EVENTS)).expect("a file of our own");
        libvirt.spawn("virsh", &["event", "--all", "--loop"], Stdio::from(file))
    }

    /// Restarts libvirtd, under domains that run on.
    ///
    /// # Panics
    /// It doesn't come back.
    pub fn restart_libvirtd(&mut self) {
        self.libvirt.restart_libvirtd().expect("libvirtd comes back");
        self._events = Self::listen(&self.libvirt).expect("events are listened to");
    }

    /// Runs a `virsh` that succeeds; what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn virsh(&self, args: &[&str]) -> String {
        let output = self.libvirt.virsh(args).expect("virsh");
        assert_eq!(output.status, 0, "virsh {args:?}: {}{}", output.stderr, self.story());
        output.stdout.trim_end().to_owned()
    }

    /// Runs a `virsh` that fails; why.
    ///
    /// # Panics
    /// It succeeds.
    pub fn virsh_fails(&self, args: &[&str]) -> String {
        let output = self.libvirt.virsh(args).expect("virsh");
        assert_ne!(output.status, 0, "virsh {args:?} should fail: {}", output.stdout);
        output.stderr.trim_end().to_owned()
    }

    /// A line `NAME VALUE` or `NAME: VALUE` of what a `virsh` prints.
    ///
    /// # Panics
    /// There is none.
    pub fn field(&self, args: &[&str], name: &str) -> String {
        let text = self.virsh(args);
        let value = text.lines().find_map(|line| {
            let rest = line.trim().strip_prefix(name)?;
            rest.starts_with([' ', ':', '=']).then(|| rest.trim_start_matches([' ', ':', '=']).to_owned())
        });
        value.unwrap_or_else(|| panic!("no {name:?} in virsh {args:?}: {text}"))
    }

    /// Gives a `virsh` command the XML of a device or domain, as a file.
    ///
    /// # Panics
    /// It fails.
    pub fn with_xml(&self, before: &[&str], xml: &str, after: &[&str]) -> String {
        const FILE: &str = "/tmp/given.xml";
        self.libvirt.write(FILE, xml).expect("the XML is written");
        self.virsh(&[before, &[FILE], after].concat())
    }

    /// Defines a domain.
    ///
    /// # Panics
    /// libvirt refuses it.
    pub fn define(&self, domain: &Domain) {
        self.with_xml(&["define"], &domain.xml(), &[]);
    }

    /// Waits until a domain is in a state for a reason: `running (booted)`.
    ///
    /// # Panics
    /// It takes too long.
    pub fn becomes(&self, domain: &str, state: &str) {
        self.waits(&format!("{domain} becomes {state}"), || {
            self.virsh(&["domstate", "--reason", domain]).starts_with(state)
        });
    }

    /// Waits until libvirt has told of an event, behind the first `from` bytes of those it told of.
    ///
    /// # Panics
    /// It takes too long.
    pub fn told(&self, from: usize, words: &str) {
        self.waits(&format!("libvirt tells of {words:?}"), || self.events()[from..].contains(words));
    }

    /// The events that libvirt told of.
    pub fn events(&self) -> String {
        std::fs::read_to_string(self.libvirt.path(Self::EVENTS)).unwrap_or_default()
    }

    /// Waits until `condition` holds.
    ///
    /// # Panics
    /// It takes too long.
    pub fn waits(&self, what: &str, condition: impl Fn() -> bool) {
        let end = Instant::now() + LIMIT;
        while !condition() {
            assert!(Instant::now() < end, "{what}: it did not come about{}", self.story());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Executes a command of a domain's monitor, past libvirt; what it returns.
    ///
    /// # Panics
    /// It fails.
    #[expect(clippy::needless_pass_by_value, reason = "arguments are written where they are passed")]
    pub fn qmp(&self, domain: &str, command: &str, arguments: Value) -> Value {
        let line = json!({ "execute": command, "arguments": arguments }).to_string();
        let said = self.virsh(&["qemu-monitor-command", domain, &line]);
        let mut answer: Value = serde_json::from_str(&said).expect("QMP answers in JSON");
        answer["return"].take()
    }

    /// Checks every message between libvirtd and its emulators so far against the schema that soc-vmm reports.
    ///
    /// # Panics
    /// One isn't as reported.
    pub fn check_messages(&self) {
        check_messages(&self.libvirt.libvirtd_log());
    }

    /// What everybody said, for a test that fails.
    pub fn story(&self) -> String {
        const LINES: usize = 30;
        const WIDTH: usize = 500;
        let logs = self.libvirt.path("/var/log/libvirt/qemu");
        let mut story = format!("\nevents:\n{}", self.events());
        for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
            let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
            story.push_str(&format!("\n{}:\n{text}", entry.file_name().display()));
        }
        story.push_str("\nlibvirtd:\n");
        let log = self.libvirt.libvirtd_log();
        const TOLD: [&str; 4] = [": error :", "MONITOR_SEND_MSG", "MONITOR_RECV_REPLY", "MONITOR_RECV_EVENT"];
        let lines: Vec<&str> = log.lines().filter(|line| TOLD.iter().any(|words| line.contains(words))).collect();
        for line in &lines[lines.len().saturating_sub(LINES)..] {
            story.extend(line.chars().take(WIDTH));
            story.push('\n');
        }
        story
    }
}
