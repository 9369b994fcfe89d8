//! A cut at every phase of a move, on real VMs: whatever breaks, the guest runs on in exactly one place, or is lost with its host and reported so.
//! A proxy between the two sides reads the stream (`docs/migration.md`), and at a record closes the network or kills one of the four
//! processes. Other machines are refused in `migration.rs`; cuts within records, and networks that don't come back, are the protocol's own tests'.

use std::fs;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use integration::hostile::is_listened_on;
use integration::monitor::Monitor;
use integration::moving::unique;
use integration::{Vm, kvm, test_name};
use migration::stream::{Kind, Preamble};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use payloads::Payload;
use payloads::scribe::Scribe;
use serde_json::json;
use tempfile::TempDir;

/// As little memory as will do.
const MEMORY: [&str; 2] = ["--memory", "16M"];
/// How long a process may take to be gone.
const PATIENCE: Duration = Duration::from_secs(120);

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// The network is closed; what comes later by other connections comes through.
    Cut,
    /// Processes die: at the source or the destination.
    Vmm(Side),
    Shim(Side),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

/// Where the guest is then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    There,
    /// It was with its host, and who is left says so.
    Lost,
    /// It stands still at the source, which asks a destination that is no more.
    Asks,
    /// One of [`Self::Lost`] and [`Self::There`]: all of its state may have been the SoC's already.
    LostOrThere,
    /// One of [`Self::Here`] and [`Self::Asks`]: the destination may have got so far as to say that it doesn't run.
    HereOrAsks,
    /// It was lost at the destination, where it had begun to run; the source heard of that beginning, or asks still.
    LostOrAsks,
}

/// What becomes of the record at which it happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Record {
    /// It arrives.
    Passes,
    /// It gets lost, and the connection with it.
    Dropped,
}

use Place::{Asks, Here, HereOrAsks, Lost, LostOrAsks, LostOrThere, There};
use Record::{Dropped, Passes};

#[test]
fn the_network_is_closed() {
    if !kvm(&test_name()) {
        return;
    }
    for (kind, record, place) in [
        (Kind::Description, Dropped, Here),
        (Kind::Ready, Dropped, Here),
        (Kind::Pages, Dropped, Here),
        (Kind::RoundEnds, Passes, Here),
        (Kind::LastPage, Passes, Here),
        (Kind::Device, Dropped, Here),
        (Kind::StateEnds, Dropped, Here),
        (Kind::Loaded, Dropped, Here),
        // From here on the source asks. (A cut right behind `Go` has two right ends: the question may be there before it.)
        (Kind::Loaded, Passes, Here),
        (Kind::Go, Dropped, Here),
        (Kind::Runs, Dropped, There),
        (Kind::Runs, Passes, There),
        (Kind::Gone, Dropped, There),
    ] {
        journey(kind, record, Act::Cut, place);
    }
}

#[test]
fn the_source_dies() {
    if !kvm(&test_name()) {
        return;
    }
    for (kind, record, act, place) in [
        (Kind::Description, Dropped, Act::Vmm(Side::Source), Lost),
        (Kind::Ready, Passes, Act::Vmm(Side::Source), Lost),
        (Kind::Pages, Passes, Act::Vmm(Side::Source), Lost),
        (Kind::Device, Dropped, Act::Vmm(Side::Source), Lost),
        (Kind::Loaded, Dropped, Act::Vmm(Side::Source), Lost),
        (Kind::Go, Passes, Act::Vmm(Side::Source), There),
        (Kind::Runs, Dropped, Act::Vmm(Side::Source), There),
        (Kind::Gone, Dropped, Act::Vmm(Side::Source), There),
        (Kind::Description, Passes, Act::Shim(Side::Source), Lost),
        (Kind::Pages, Passes, Act::Shim(Side::Source), Lost),
        (Kind::RoundEnds, Passes, Act::Shim(Side::Source), Lost),
        (Kind::LastPage, Passes, Act::Shim(Side::Source), LostOrThere),
        (Kind::Go, Passes, Act::Shim(Side::Source), There),
        (Kind::Runs, Passes, Act::Shim(Side::Source), There),
    ] {
        journey(kind, record, act, place);
    }
}

#[test]
fn the_destination_dies() {
    if !kvm(&test_name()) {
        return;
    }
    for (kind, record, act, place) in [
        (Kind::Description, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::Ready, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::Pages, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::LastPage, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::StateEnds, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::Loaded, Dropped, Act::Vmm(Side::Destination), Here),
        (Kind::Go, Passes, Act::Vmm(Side::Destination), Asks),
        (Kind::Runs, Dropped, Act::Vmm(Side::Destination), Asks),
        (Kind::Gone, Passes, Act::Vmm(Side::Destination), Lost),
        (Kind::Description, Passes, Act::Shim(Side::Destination), Here),
        (Kind::Pages, Passes, Act::Shim(Side::Destination), Here),
        (Kind::Device, Passes, Act::Shim(Side::Destination), Here),
        (Kind::StateEnds, Passes, Act::Shim(Side::Destination), Here),
        (Kind::Loaded, Dropped, Act::Shim(Side::Destination), Here),
        (Kind::Go, Passes, Act::Shim(Side::Destination), HereOrAsks),
        (Kind::Runs, Dropped, Act::Shim(Side::Destination), LostOrAsks),
        (Kind::Gone, Passes, Act::Shim(Side::Destination), Lost),
    ] {
        journey(kind, record, act, place);
    }
}

#[test]
fn one_of_two_connections_is_closed_or_dies_with_its_process() {
    if !kvm(&test_name()) {
        return;
    }
    for (kind, record, act, place) in [
        (Kind::Pages, Dropped, Act::Cut, Here),
        (Kind::Pages, Passes, Act::Cut, Here),
        // One that is closed behind it has done its work.
        (Kind::LastPage, Dropped, Act::Cut, Here),
        (Kind::Pages, Passes, Act::Vmm(Side::Source), Lost),
        (Kind::Pages, Passes, Act::Shim(Side::Source), Lost),
        (Kind::Pages, Passes, Act::Vmm(Side::Destination), Here),
        (Kind::Pages, Passes, Act::Shim(Side::Destination), Here),
    ] {
        journey_by(Ways::SECOND, kind, record, act, place);
    }
}

#[test]
fn the_other_side_is_of_another_version() {
    if !kvm(&test_name()) {
        return;
    }
    // Of the source's, and of the destination's. Who knows this one too is welcome.
    for (side, versions, why) in [
        (Side::Source, 2..=3, Some("the source writes versions 2 to 3 of the stream, the destination reads 1 to 1")),
        (
            Side::Destination,
            2..=3,
            Some("the source writes versions 1 to 1 of the stream, the destination reads 2 to 3"),
        ),
        (
            Side::Destination,
            2..=2,
            Some("the source writes versions 1 to 1 of the stream, the destination reads 2 to 2"),
        ),
        (Side::Source, 1..=2, None),
    ] {
        let what = format!("{side:?} {versions:?}");
        let change = move |at: Side, preamble: &mut Preamble| {
            if at == side {
                preamble.versions = versions.clone();
            }
        };
        let pair = Pair::new(|_| {
            let change = Some(Box::new(change) as _);
            Script { ways: Ways::ONE, moment: None, victim: None, change, is_over: AtomicBool::new(false) }
        });
        let mut qmp = pair.migrate(Ways::ONE);
        match why {
            None => pair.goes_there(&what, Some(0)),
            Some(why) => {
                let mut pair = pair;
                pair.here.wait_until("it is refused", |vm| vm.migration()["status"] == "failed");
                let said = qmp.does("query-migrate", json!({}))["error-desc"].to_string();
                let ended = pair.stays_here(&what, false);
                // The one whose peer is changed on the way hears nothing of the sort.
                let told = if side == Side::Source { ended } else { said };
                assert!(told.contains(why), "{what}: {told}");
            }
        }
    }
}

#[test]
fn a_file_system_without_room_keeps_the_guest_where_it_is() {
    if !kvm(&test_name()) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return testbed::skip(&test_name(), "only root can mount");
    }
    let rooms = ["4k", "1m"].map(Mounted::new);
    // Full from the first byte on, and in the middle.
    fs::write(rooms[0].0.path().join("all"), [0; 4096]).unwrap();
    let mut here = running();
    for file in rooms.each_ref().map(|room| room.0.path().join("saved")) {
        let uri = format!("file:{}", file.display());
        let name = here.file("qmp").display().to_string();
        let refused = here.soc_vmm(&["migrate", &uri, "--qmp", &name]).unwrap_err();
        assert!(refused.contains("No space left on device"), "{refused}");
        here.wait_until("it goes on", |vm| vm.command(&["status"]).contains("running"));
        // Nothing else would be in the way of the next one.
        here.wait_until("no half of a guest is left", |_| !file.is_file());
    }
    here.passes("no room");
}

/// A guest goes from one VM to another one; at the first record of that kind something happens.
fn journey(kind: Kind, record: Record, act: Act, place: Place) {
    journey_by(Ways::ONE, kind, record, act, place);
}

fn journey_by(ways: Ways, kind: Kind, record: Record, act: Act, place: Place) {
    let what = format!("{act:?} at {kind:?}, which is {record:?}, {ways:?}");
    let mut pair = Pair::new(|[here, there]| {
        let victim = match act {
            Act::Cut => None,
            Act::Vmm(Side::Source) => Some(here.pid()),
            Act::Vmm(Side::Destination) => Some(there.pid()),
            Act::Shim(Side::Source) => Some(here.shim()),
            Act::Shim(Side::Destination) => Some(there.shim()),
        };
        Script { ways, moment: Some((kind, record)), victim, change: None, is_over: AtomicBool::new(false) }
    });
    let dead = match act {
        Act::Cut => None,
        Act::Vmm(side) | Act::Shim(side) => Some(side),
    };
    // Shown if the test fails: not all that may fail here knows which journey it belongs to.
    println!("{what}");
    let mut qmp = pair.migrate(ways);
    match place {
        // It was told nothing, so it would wait a minute to be asked.
        Here => drop(pair.stays_here(&what, kind == Kind::Loaded && record == Dropped && act == Act::Cut)),
        There => pair.goes_there(&what, (dead != Some(Side::Source)).then_some(0)),
        Lost => pair.ends_lost(&what, kind == Kind::Loaded, act, kind == Kind::Gone),
        Asks => pair.asks(&what, &mut qmp, kind == Kind::Go),
        LostOrThere if pair.arrives() => pair.goes_there(&what, None),
        LostOrThere => pair.ends_lost(&what, false, act, false),
        LostOrAsks => pair.ends_lost_there(&what),
        HereOrAsks => pair.never_starts_there(&what),
    }
}

/// Two VMs and what is between them.
struct Pair {
    here: Vm,
    there: Vm,
    /// Of both, soc-vmm's process and the shim's.
    pids: [u32; 4],
    proxy: PathBuf,
    _dir: TempDir,
}

impl Pair {
    fn new(script: impl FnOnce([&Vm; 2]) -> Script) -> Self {
        let dir = TempDir::new().unwrap();
        let (door, proxy) = (dir.path().join("there"), dir.path().join("proxy"));
        let uri = format!("unix:{}", door.display());
        let mut there = Vm::payload(&payload(), &[&["--name", &unique("c"), "--incoming", &uri], &MEMORY[..]].concat());
        let here = running();
        there.wait_until("it waits", |_| is_listened_on(&door));
        let pids = [here.pid(), here.shim(), there.pid(), there.shim()];
        let script = Arc::new(script([&here, &there]));
        let listener = UnixListener::bind(&proxy).unwrap();
        thread::spawn(move || relay(&listener, &door, &script));
        Self { here, there, pids, proxy, _dir: dir }
    }

    /// Begins.
    fn migrate(&self, ways: Ways) -> Monitor {
        let mut qmp = Monitor::connect(&self.here.file("qmp"));
        let set = |capability: &str, state: bool| json!({ "capability": capability, "state": state });
        let both = [set("return-path", true), set("multifd", ways.count > 1)];
        qmp.does("migrate-set-capabilities", json!({ "capabilities": both }));
        qmp.does("migrate-set-parameters", json!({ "multifd-channels": ways.count }));
        qmp.does("migrate", json!({ "uri": format!("unix:{}", self.proxy.display()) }));
        qmp
    }

    /// The guest runs at the source, and nowhere else; what the destination said at its end. One that waits to be asked is told to end.
    fn stays_here(mut self, what: &str, waits: bool) -> String {
        self.here.wait_until(&format!("{what}: it fails"), |vm| vm.migration()["status"] == "failed");
        if waits {
            assert!(self.there.command(&["status"]).contains("inmigrate"), "{what}");
            self.there.command(&["quit"]);
        }
        let ended = self.there.wait();
        assert!(waits || ended.status.code() != Some(0), "{what}: {}", ended.stderr);
        has_not_run(what, &ended.debugcon);
        self.here.passes(what);
        are_gone(what, &self.pids);
        ended.stderr
    }

    /// It runs at the destination, and nowhere else; the source ends with that status, if it is its own to choose.
    fn goes_there(self, what: &str, status: Option<i32>) {
        let ended = self.here.wait();
        assert!(status.is_none() || ended.status.code() == status, "{what}: {:?} {}", ended.status, ended.stderr);
        assert!(!ended.debugcon.contains("passes") && !ended.debugcon.contains("fail"), "{what}: {}", ended.debugcon);
        let mut there = self.there;
        there.wait_until(&format!("{what}: it runs"), |vm| {
            vm.try_command(&["status"]).is_ok_and(|said| said.contains("running"))
        });
        there.passes(what);
        are_gone(what, &self.pids);
    }

    /// Whether it comes to run at the destination, or that ends without it.
    fn arrives(&mut self) -> bool {
        let runs = |vm: &Vm| vm.try_command(&["status"]).is_ok_and(|said| said.contains("running"));
        self.there.wait_until("it runs, or no guest came", |vm| runs(vm) || is_gone(vm.pid()));
        runs(&self.there)
    }

    /// It runs nowhere, and those who are left know. A destination that waits to be asked is told to end.
    fn ends_lost(self, what: &str, waits: bool, act: Act, has_left: bool) {
        let here = self.here.wait();
        if waits {
            assert!(self.there.command(&["status"]).contains("inmigrate"), "{what}");
            self.there.command(&["quit"]);
        }
        let there = self.there.wait();
        for (side, ended, why) in
            [(Side::Source, &here, "the VM is lost"), (Side::Destination, &there, "no guest came")]
        {
            let is_dead = act == Act::Vmm(side) || side == Side::Destination && waits;
            let why = if act == Act::Shim(side) { "the VM is lost" } else { why };
            match (side, has_left) {
                // It had said goodbye.
                (Side::Source, true) => assert_eq!(ended.status.code(), Some(0), "{what}: {}", ended.stderr),
                _ if is_dead => {}
                _ => {
                    // Of a source whose shim dies the log may have a line of the migration's too.
                    let is_said = ended.stderr.contains(why);
                    assert!(ended.status.code() == Some(6) && is_said, "{what}: {:?} {}", ended.status, ended.stderr);
                }
            }
            assert!(!ended.debugcon.contains("passes"), "{what}: {}", ended.debugcon);
        }
        are_gone(what, &self.pids);
    }

    /// It runs nowhere: the destination says so, and the source never ran it again.
    fn ends_lost_there(self, what: &str) {
        let there = self.there.wait();
        let is_said = there.stderr.contains("the VM is lost");
        assert!(there.status.code() == Some(6) && is_said, "{what}: {:?} {}", there.status, there.stderr);
        // One that asks is told to end; another one ends by itself.
        let _ = self.here.try_command(&["quit"]);
        let here = self.here.wait();
        assert_eq!(here.status.code(), Some(0), "{what}: {}", here.stderr);
        assert!(!here.debugcon.contains("passes"), "{what}: {}", here.debugcon);
        are_gone(what, &self.pids);
    }

    /// It never runs at the destination, and is the source's, whether that has heard of it yet or not.
    fn never_starts_there(self, what: &str) {
        let there = self.there.wait();
        assert!(there.status.code() == Some(6) && there.stderr.contains("the VM is lost"), "{what}: {}", there.stderr);
        has_not_run(what, &there.debugcon);
        self.here.command(&["quit"]);
        let here = self.here.wait();
        assert_eq!(here.status.code(), Some(0), "{what}: {}", here.stderr);
        are_gone(what, &self.pids);
    }

    /// It stands still at the source, and nobody can have it run there who doesn't end the question first, or `outlasts` it.
    fn asks(mut self, what: &str, qmp: &mut Monitor, outlasts: bool) {
        assert_ne!(self.there.wait().status.code(), Some(0), "{what}");
        assert_eq!(qmp.does("query-status", json!({}))["status"], "finish-migrate", "{what}");
        let refused = qmp.refuses("cont", json!({}));
        assert!(refused.contains("is just being moved"), "{what}: {refused}");
        if outlasts {
            self.here.wait_until("the question is over", |vm| vm.migration()["status"] == "failed");
            assert_eq!(qmp.does("query-status", json!({}))["status"], "postmigrate", "{what}");
            qmp.does("cont", json!({}));
            self.here.passes(what);
            are_gone(what, &self.pids);
            return;
        }
        qmp.does("quit", json!({}));
        let ended = self.here.wait();
        has_not_run(what, &ended.debugcon.replacen("scribe", "", 1));
        are_gone(what, &self.pids);
    }
}

/// By how many connections a guest goes.
#[derive(Clone, Copy, Debug)]
struct Ways {
    count: usize,
    /// Which of them is read, in the order in which they are made.
    read: usize,
}

impl Ways {
    const ONE: Self = Self { count: 1, read: 0 };
    const SECOND: Self = Self { count: 2, read: 1 };
}

/// What the proxy does.
struct Script {
    ways: Ways,
    /// At which record, and what becomes of that.
    moment: Option<(Kind, Record)>,
    /// Who dies then; none: the network does.
    victim: Option<u32>,
    /// What becomes of the preambles, by who has sent them.
    #[expect(clippy::type_complexity, reason = "said once")]
    change: Option<Box<dyn Fn(Side, &mut Preamble) + Send + Sync>>,
    is_over: AtomicBool,
}

impl Script {
    /// That record is about to be passed on: whether it, and all after it, get lost.
    fn loses(&self, kind: Kind) -> bool {
        let Some((_, record)) = self.moment.filter(|(at, _)| *at == kind) else { return false };
        if self.is_over.swap(true, Ordering::Relaxed) {
            return false;
        }
        if let Some(pid) = self.victim {
            kill(Pid::from_raw(pid as i32), Signal::SIGKILL).unwrap();
            are_gone("the victim", &[pid]);
        }
        record == Dropped
    }

    /// Whether nothing passes any more, in either direction: what is answered to the last record gets lost.
    fn is_cut(&self) -> bool {
        self.victim.is_none() && self.moment.is_some() && self.is_over.load(Ordering::Relaxed)
    }

    /// That record was passed on: whether it was the last.
    fn cuts(&self, kind: Kind) -> bool {
        self.victim.is_none() && self.moment.is_some_and(|(at, _)| at == kind)
    }
}

/// Passes on what comes, by one connection record by record, until the test is over.
fn relay(listener: &UnixListener, there: &Path, script: &Arc<Script>) {
    for (number, from) in listener.incoming().enumerate() {
        let from = from.unwrap();
        // It may be gone for good.
        let Ok(to) = UnixStream::connect(there) else { continue };
        for (side, from, to) in [(Side::Source, &from, &to), (Side::Destination, &to, &from)] {
            let (mut from, mut to, script) = (from.try_clone().unwrap(), to.try_clone().unwrap(), script.clone());
            thread::spawn(move || {
                // An end is an end, whatever its reason.
                let _ = if number == script.ways.read {
                    pass_records(&mut from, &mut to, side, &script)
                } else {
                    io::copy(&mut from, &mut to).map(drop)
                };
                for end in [from, to] {
                    let _ = end.shutdown(Shutdown::Both);
                }
            });
        }
    }
}

fn pass_records(from: &mut UnixStream, to: &mut UnixStream, side: Side, script: &Script) -> io::Result<()> {
    let mut preamble = Preamble::read_from(from).map_err(io::Error::other)?;
    if let Some(change) = &script.change {
        change(side, &mut preamble);
    }
    preamble.write_to(to).map_err(io::Error::other)?;
    let mut header = [0; 16];
    let mut payload = Vec::new();
    loop {
        from.read_exact(&mut header)?;
        let kind = u16::from_le_bytes([header[0], header[1]]);
        let len = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
        payload.resize(len as usize, 0);
        from.read_exact(&mut payload)?;
        let kind = Kind::of(kind).ok_or(io::ErrorKind::InvalidData)?;
        if script.is_cut() {
            // Whoever cuts closes both.
            continue;
        }
        if script.loses(kind) {
            return Ok(());
        }
        to.write_all(&header)?;
        to.write_all(&payload)?;
        if script.cuts(kind) {
            return Ok(());
        }
    }
}

fn payload() -> Payload {
    Scribe { vcpus: 2, pages: 256, pace: 0 }.payload().unwrap()
}

fn running() -> Vm {
    let mut vm = Vm::payload(&payload(), &[&["--name", &unique("c")], &MEMORY[..]].concat());
    vm.debugcon_has("scribe");
    vm
}

fn has_not_run(what: &str, debugcon: &str) {
    assert_eq!(debugcon.trim(), "", "{what}");
}

/// None of these processes is left.
fn are_gone(what: &str, pids: &[u32]) {
    let end = Instant::now() + PATIENCE;
    while let Some(pid) = pids.iter().find(|pid| !is_gone(**pid)) {
        assert!(Instant::now() < end, "{what}: process {pid} is left of {pids:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Whether a process has ended; nobody may have asked yet how.
fn is_gone(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else { return true };
    stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with(['Z', 'X']))
}

/// A file system of its own, until this is dropped.
struct Mounted(TempDir);

impl Mounted {
    fn new(size: &str) -> Self {
        let dir = TempDir::new().unwrap();
        let options = format!("size={size}");
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(dir.path()).status();
        assert!(done.unwrap().success());
        Self(dir)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0.path()).status();
    }
}
