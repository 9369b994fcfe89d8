//! A pool of functions: shims on /dev/kvm behind `soc-vmm pool serve`, and VMs that have a function by it.

use std::io::{Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use integration::hostile::{Running, Trial, one_line, wait_until};
use integration::{kvm, program, test_name};
use nix::sys::signal::Signal;
use payloads::counter::{Each, counter};
use payloads::{PASSED, Payload, Privilege};
use serde_json::Value;

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(120);
/// User and group nobody.
const NOBODY: u32 = 65_534;

/// A pool over shims, and what it takes to use it.
struct Pool {
    trial: Trial,
    served: Option<Running>,
}

impl Pool {
    /// Over these functions, with more lines of its table; not served yet.
    fn new(functions: &[&str], more: &str) -> Self {
        let trial = Trial::default();
        let functions: Vec<_> = functions.iter().map(|name| format!("\"unix:{}\"", trial.at(name))).collect();
        let socket = trial.at("pool/socket");
        let text = format!("[pool]\nsocket = \"{socket}\"\nfunctions = [{}]\n{more}\n", functions.join(", "));
        trial.file("soc-vmm.toml", text.as_bytes());
        Self { trial, served: None }
    }

    /// Starts `soc-vmm pool serve`, and waits until it answers.
    fn serve(&mut self) {
        self.served = Some(self.trial.start(self.soc_vmm().args(["pool", "serve"])));
        wait_until("the pool answers", MOST, || self.try_list().is_some());
    }

    fn served(&mut self) -> &mut Running {
        self.served.as_mut().expect("it is served")
    }

    fn soc_vmm(&self) -> Command {
        let mut command = Command::new(program("soc-vmm"));
        command.env("OUTBOARD_CONFIG", self.trial.path("soc-vmm.toml"));
        command
    }

    /// A VM that has its function by the pool.
    fn vm(&self, name: &str, payload: &Payload) -> Running {
        let mut command = self.soc_vmm();
        let (option, bytes) = payload.file();
        let image = self.trial.file(&format!("{name}.image"), &bytes);
        command.args(["run", option, &image, "--memory", "64M", "--serial", "null", "--debug-exit"]);
        command.args(["--name", &self.trial.name(name), "--function", "pool"]);
        command.args(["--qmp", &format!("unix:{}", self.trial.at(&format!("{name}.qmp")))]);
        command.args(["--debugcon", &format!("file:{}", self.trial.at(&format!("{name}.debugcon")))]);
        self.trial.start(&mut command)
    }

    fn running(&self, name: &str) -> Running {
        let vm = self.vm(name, &endless());
        self.trial.becomes(name, "running");
        vm
    }

    /// A VM runs to its end.
    fn serves(&self, name: &str) {
        let ended = self.vm(name, &short()).wait(MOST);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(PASSED), ""));
    }

    fn try_list(&self) -> Option<Vec<Value>> {
        let output = self.soc_vmm().args(["pool", "list", "--json"]).output().expect("soc-vmm starts");
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Who had a function is gone, and the pool knows: on a busy machine a process that is killed takes a moment to go.
    fn is_given_back(&self, function: usize) {
        let used = || self.try_list().is_none_or(|list| list[function]["state"] == "used");
        wait_until(&format!("function {function} is given back"), MOST, || !used());
    }

    /// A function's state comes about.
    fn becomes(&self, function: usize, state: &str) -> Value {
        let listed = || self.try_list().map(|list| list[function].clone()).unwrap_or_default();
        wait_until(&format!("function {function} is {state}"), MOST, || listed()["state"] == state);
        listed()
    }
}

/// Ends by itself.
fn short() -> Payload {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles")
}

/// Runs until it is ended.
fn endless() -> Payload {
    counter(Privilege::Cpl0, Each::Nothing).expect("the payload assembles")
}

#[test]
fn a_third_vm_is_refused_and_has_the_function_of_one_that_was_killed() {
    if !kvm(&test_name()) {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], "");
    let shims = ["a", "b"].map(|name| pool.trial.listening_shim(name, &["--lease", "0"]));
    pool.serve();
    let (first, mut second) = (pool.running("first"), pool.running("second"));
    let used = pool.becomes(0, "used");
    assert_eq!(used["vm"], pool.trial.name("first"));
    assert_eq!((used["pid"].as_u64(), used["uid"].as_u64()), (Some(first.pid().into()), Some(0)));

    let refused = pool.vm("third", &short()).wait(MOST);
    let second_name = format!("{} (pid {}, uid 0)", pool.trial.name("second"), second.pid());
    one_line("a pool with nothing left", &refused, 4, &["none of 2 functions is free", &second_name]);
    let text = pool.soc_vmm().args(["pool", "list"]).output().expect("soc-vmm starts").stdout;
    let text = String::from_utf8_lossy(&text).into_owned();
    assert_eq!(text.lines().filter(|line| line.contains(" used ") && line.contains(" uid 0")).count(), 2, "{text}");

    first.signal(Signal::SIGKILL);
    pool.is_given_back(0);
    pool.serves("fourth");
    second.signal(Signal::SIGTERM);
    assert_eq!(second.wait(MOST).status.code(), Some(0));
    (0..2).for_each(|function| drop(pool.becomes(function, "free")));
    assert_eq!(pool.served().stderr(), "");
    assert_eq!(shims[1].stderr(), "", "its VM ended in order, and the pool has looked after it");
    pool.served().signal(Signal::SIGTERM);
    assert_eq!(pool.served().wait(MOST).status.code(), Some(0));
    assert!(!pool.trial.path("pool/socket").exists());
}

/// The VM resets its guest and goes on: its function is its own for life.
#[test]
fn a_pool_that_is_killed_ends_no_vm_and_the_next_one_gives_its_function_out_when_it_is_back() {
    if !kvm(&test_name()) {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], "");
    let _shims = ["a", "b"].map(|name| pool.trial.listening_shim(name, &["--lease", "0"]));
    pool.serve();
    let mut first = pool.running("first");
    pool.served().signal(Signal::SIGKILL);
    pool.served().wait(MOST);
    let refused = pool.vm("second", &short()).wait(MOST);
    one_line("a pool that is gone", &refused, 4, &["no pool serves at", "soc-vmm pool serve"]);

    pool.serve();
    pool.becomes(1, "free");
    for name in ["third", "fourth"] {
        pool.serves(name);
    }
    let other = pool.running("fifth");
    assert_eq!(pool.becomes(1, "used")["pid"].as_u64(), Some(other.pid().into()));
    // Nobody knows whose it is; that it isn't free is seen.
    let refused = pool.vm("sixth", &short()).wait(MOST);
    one_line("a function of another pool's VM", &refused, 4, &["another program uses it", &pool.trial.name("fifth")]);
    pool.becomes(0, "broken");
    let reset = pool.soc_vmm().args(["reset", "--qmp", &pool.trial.at("first.qmp")]).status().expect("soc-vmm starts");
    assert!(reset.success());
    let exits = pool.trial.exits("first");
    wait_until("the first VM goes on", MOST, || pool.trial.exits("first") > exits);

    first.signal(Signal::SIGTERM);
    assert_eq!(first.wait(MOST).status.code(), Some(0));
    pool.becomes(0, "free");
    pool.serves("seventh");
}

#[test]
fn a_process_without_rights_has_a_function_by_the_pool_alone() {
    if !kvm(&test_name()) {
        return;
    }
    if !nix::unistd::geteuid().is_root() {
        return testbed::skip(&test_name(), "only root can start a program as another user");
    }
    let mut pool = Pool::new(&["a", "b"], "mode = 0o666\nusers = [\"nobody\"]\nlimit = 1");
    let _shims = ["a", "b"].map(|name| pool.trial.listening_shim(name, &["--lease", "0"]));
    pool.serve();
    // Files that it may read, and a directory of its own.
    std::fs::set_permissions(pool.trial.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    chown(pool.trial.path("run"), Some(NOBODY), Some(NOBODY)).unwrap();
    std::fs::copy(program("soc-vmm"), pool.trial.path("soc-vmm")).unwrap();
    let start = |uid: u32, name: &str, function: &str, payload: &Payload| {
        let mut command = Command::new(pool.trial.path("soc-vmm"));
        command.env("OUTBOARD_CONFIG", pool.trial.path("soc-vmm.toml")).uid(uid).gid(uid);
        let (option, bytes) = payload.file();
        let image = pool.trial.file(&format!("{name}.image"), &bytes);
        command.args(["run", option, &image, "--memory", "64M", "--serial", "null", "--debug-exit"]);
        command.args(["--name", name, "--function", function]);
        command.args(["--qmp", &format!("unix:{}", pool.trial.at(&format!("run/{name}.qmp")))]);
        command.args(["--debugcon", &format!("file:{}", pool.trial.at(&format!("run/{name}.debugcon")))]);
        pool.trial.start(&mut command)
    };
    let direct = start(NOBODY, "direct", &format!("unix:{}", pool.trial.at("a")), &short()).wait(MOST);
    one_line("a shim of root's", &direct, 4, &["--function unix:", "Permission denied"]);
    let ended = start(NOBODY, "ends", "pool", &short()).wait(MOST);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(PASSED), ""));

    let lives = start(NOBODY, "lives", "pool", &endless());
    // The first one may be on its way back: it has whichever is free.
    wait_until("a function is used by nobody", MOST, || {
        pool.try_list().is_some_and(|list| list.iter().any(|function| function["uid"] == NOBODY))
    });
    let limited = start(NOBODY, "limited", "pool", &short()).wait(MOST);
    one_line("a user's limit", &limited, 4, &["user 65534 has 1 functions already"]);
    lives.signal(Signal::SIGKILL);
    (0..2).for_each(|function| drop(pool.becomes(function, "free")));
    pool.serves("of-root");

    // What the first user left there is no stranger's.
    std::fs::remove_dir_all(pool.trial.path("run")).unwrap();
    std::fs::create_dir(pool.trial.path("run")).unwrap();
    chown(pool.trial.path("run"), Some(1), Some(1)).unwrap();
    let stranger = start(1, "stranger", "pool", &short()).wait(MOST);
    one_line("a user that isn't named", &stranger, 4, &["user 1 is not among the pool's users"]);
}

#[test]
fn a_function_that_breaks_is_not_given_out_until_it_is_back() {
    if !kvm(&test_name()) {
        return;
    }
    let mut pool = Pool::new(&["a", "b"], "");
    let mut shim = pool.trial.listening_shim("b", &[]);
    pool.serve();
    // The first one isn't there at all.
    pool.serves("first");
    let why = pool.becomes(0, "broken")["why"].clone();
    assert!(why.as_str().is_some_and(|why| why.contains("no host-kvm-shim listens there")), "{why}");
    let name = format!("unix:{} is broken, tries on", pool.trial.at("a"));
    pool.served().says(&name, MOST);

    // A VM that asks for more than the host has is no reason to put it aside: no processor is Intel's and AMD's.
    let mut wishes = pool.soc_vmm();
    let (option, bytes) = short().file();
    let image = pool.trial.file("wishes.image", &bytes);
    wishes.args(["run", option, &image, "--cpu", "host,+amx-tile,+sse4a", "--function", "pool"]);
    wishes.args(["--serial", "null", "--name", &pool.trial.name("wishes")]);
    let refused = pool.trial.start(&mut wishes).wait(MOST);
    one_line("a processor that the host lacks", &refused, 4, &["--cpu host: this host lacks"]);
    pool.serves("modest");

    // It holds the VM of a soc-vmm that was killed, which the next one finds out, and the one after that doesn't.
    let killed = pool.running("killed");
    killed.signal(Signal::SIGKILL);
    pool.is_given_back(1);
    let held = pool.vm("held", &short()).wait(MOST);
    one_line("a function that holds a VM", &held, 4, &["is held here", "restart this function's host-kvm-shim"]);
    let why = pool.becomes(1, "broken")["why"].clone();
    assert!(why.as_str().is_some_and(|why| why.contains("is held here")), "{why}");
    let _other = pool.trial.listening_shim("a", &["--lease", "0"]);
    pool.becomes(0, "free");
    pool.serves("second");

    shim.signal(Signal::SIGTERM);
    shim.wait(MOST);
    let _again = pool.trial.listening_shim("b", &["--lease", "0"]);
    let (_first, _second) = (pool.running("third"), pool.becomes(1, "free"));
    pool.serves("fourth");
}

#[test]
fn a_pool_outlives_whatever_its_clients_say() {
    if !kvm(&test_name()) {
        return;
    }
    let mut pool = Pool::new(&["a"], "");
    let _shim = pool.trial.listening_shim("a", &["--lease", "0"]);
    pool.serve();
    pool.becomes(0, "free");
    let rest = pool.served().holds_at_rest();
    let connect = || UnixStream::connect(pool.trial.path("pool/socket")).expect("the pool listens");
    let answer = |bytes: &[u8]| {
        let mut client = connect();
        client.set_read_timeout(Some(MOST)).unwrap();
        // It may hang up before it has read all.
        let _ = client.write_all(bytes);
        let mut said = String::new();
        let _ = client.read_to_string(&mut said);
        said
    };
    for (bytes, why) in [
        (&b"\n"[..], "no record"),
        (b"GET / HTTP/1.1\n", "no record"),
        (b"{\"ask\":\"list\",\"version\":7}\n", "version 7"),
        (b"{\"ask\":\"function\",\"version\":1,\"vm\":\"\"}\n", "a VM's name"),
        (b"{\"ask\":\"function\",\"version\":1,\"vm\":[[[[\n", "no record"),
    ] {
        let said = answer(bytes);
        assert!(said.starts_with("{\"answer\":\"refused\"") && said.contains(why), "{said}");
    }
    assert_eq!(answer(&vec![b'x'; 1 << 20]), "", "no line");
    assert_eq!(answer(b"{\"ask\":\"list\",\"version\":1}\n{\"ask\":\"list\",\"version\":1}\n"), "", "two at once");

    // Who has the function and says something strange has had it.
    let mut client = connect();
    client.write_all(b"{\"ask\":\"function\",\"version\":1,\"vm\":\"mine\"}\n").unwrap();
    assert_eq!(pool.becomes(0, "used")["vm"], "mine");
    client.write_all(b"more, more\n").unwrap();
    pool.becomes(0, "free");
    // One that has it and never reads has it; so has nobody who came later.
    client = connect();
    client.write_all(b"{\"ask\":\"function\",\"version\":1,\"vm\":\"deaf\"}\n").unwrap();
    pool.becomes(0, "used");

    // More than there is room for, who say nothing; and many who say half a line.
    let mut crowd: Vec<_> = (0..1100).map_while(|_| UnixStream::connect(pool.trial.path("pool/socket")).ok()).collect();
    crowd.iter_mut().for_each(|client| drop(client.write_all(b"{\"ask\"")));
    drop(crowd);
    wait_until("the pool answers again", MOST, || pool.try_list().is_some());
    drop(client);
    pool.becomes(0, "free");
    pool.serves("vm");
    pool.becomes(0, "free");
    pool.served().holds_again(rest);
    assert_eq!(pool.served().stderr(), "");
}

#[test]
fn a_configuration_that_is_wrong_is_told_in_one_line() {
    let trial = Trial::default();
    let run = |text: Option<&str>, words: &[&str]| {
        let path = text.map_or(trial.at("nothing"), |text| trial.file("soc-vmm.toml", text.as_bytes()));
        let mut command = Command::new(program("soc-vmm"));
        trial.start(command.env("OUTBOARD_CONFIG", path).args(words)).wait(MOST)
    };
    let (serve, list) = (["pool", "serve"], ["pool", "list"]);
    one_line("no file", &run(None, &serve), 2, &["nothing: ", "No such file"]);
    one_line("no pool", &run(Some(""), &serve), 2, &["the configuration has no [pool]"]);
    one_line("no pool", &run(Some(""), &list), 4, &["the configuration has no [pool]"]);
    one_line("no functions", &run(Some("[pool]"), &serve), 2, &["no functions"]);
    let wrong = "[pool]\nfunctions = [\"unix:/a\"]\n";
    one_line("a key", &run(Some("[pool]\nfunction = []"), &serve), 2, &["soc-vmm.toml: line 2: unknown field"]);
    one_line("a user", &run(Some(&format!("{wrong}users = [\"no-such-user\"]")), &serve), 2, &["no user no-such-user"]);
    let socket = trial.at("pool");
    let elsewhere = format!("{wrong}socket = \"{socket}\"\ngroup = \"no-such-group\"");
    one_line("a group", &run(Some(&elsewhere), &serve), 2, &["no group no-such-group"]);
    let path = format!("[pool]\nsocket = \"{}\"", trial.at("nowhere"));
    one_line("nobody", &run(Some(&path), &list), 4, &["no pool serves at"]);
    let host = ["host", "--function", "pool"];
    one_line("the host function", &run(Some(&path), &host), 2, &["name the host function"]);
}
