//! A guest goes on wherever there is room: in a VM of this machine's own, on a function of a pool's and on another one, under a soc-vmm for x86
//! and under one for Arm.

use std::process::Command;
use std::time::Duration;

use integration::hostile::{Running, Trial, is_listened_on, wait_until};
use integration::{kvm, program, test_name};
use payloads::scribe::{Scribe, told};
use payloads::{PASSED, Payload};
use serde_json::Value;
use testbed::build;
use testbed::fetch::{self, Arch};

/// Longer than anything here may take on a busy machine.
const MOST: Duration = Duration::from_secs(120);

/// Where a guest can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Under the soc-vmm of this machine's kind, on a function of its own.
    Local,
    /// The same, for Arm.
    LocalOfArm,
    /// On one of the pool's functions.
    Pool,
    /// The same, under a soc-vmm for Arm.
    PoolOfArm,
}

/// A pool of two functions, and what Arm programs run by.
struct Site {
    trial: Trial,
    arm: Option<[String; 2]>,
    _pool: [Running; 3],
}

impl Site {
    fn new() -> Self {
        let trial = Trial::default();
        let functions = ["a", "b"].map(|name| format!("unix:{}", trial.at(name)));
        let socket = trial.at("pool/socket");
        trial.file("soc-vmm.toml", format!("[pool]\nsocket = {socket:?}\nfunctions = {functions:?}\n").as_bytes());
        let [a, b] = ["a", "b"].map(|name| trial.listening_shim(name, &["--lease", "0"]));
        let mut serve = Command::new(program("soc-vmm"));
        let serve = trial.start(serve.env("OUTBOARD_CONFIG", trial.at("soc-vmm.toml")).args(["pool", "serve"]));
        let site = Self { trial, arm: None, _pool: [a, b, serve] };
        wait_until("the pool answers", MOST, || site.pool().len() == 2);
        site
    }

    /// With soc-vmm for Arm, whose emulator is one of a processor alone.
    fn with_arm() -> Self {
        let emulator = fetch::cross().unwrap().qemu_user;
        let program = build::programs(Arch::Arm64, &["soc-vmm"]).unwrap().remove(0);
        Self { arm: Some([emulator, program].map(|path| path.display().to_string())), ..Self::new() }
    }

    /// What the pool's functions are used for.
    fn pool(&self) -> Vec<Value> {
        let mut list = Command::new(program("soc-vmm"));
        let list = list.env("OUTBOARD_CONFIG", self.trial.at("soc-vmm.toml")).args(["pool", "list", "--json"]);
        serde_json::from_slice(&list.output().expect("soc-vmm starts").stdout).unwrap_or_default()
    }

    fn used(&self) -> usize {
        self.pool().iter().filter(|function| function["state"] == "used").count()
    }

    /// A VM at a place, which waits for the guest of another one where `incoming` says so.
    fn vm(&self, place: Place, name: &str, payload: &Payload, incoming: Option<&str>) -> Running {
        let native = program("soc-vmm");
        let mut command = match place {
            Place::Local | Place::Pool => Command::new(&native),
            Place::LocalOfArm | Place::PoolOfArm => {
                let [emulator, program] = self.arm.as_ref().expect("Arm was asked for");
                let mut command = Command::new(emulator);
                command.arg(program);
                command
            }
        };
        // The shim is the host's kind in any case.
        let beside = native.parent().expect("a program's directory").display().to_string();
        let path = format!("{beside}:{}", std::env::var("PATH").unwrap_or_default());
        command.env("OUTBOARD_CONFIG", self.trial.at("soc-vmm.toml")).env("PATH", path);
        let (option, bytes) = payload.file();
        let image = self.trial.file(&format!("{name}.image"), &bytes);
        command.args(["run", option, &image, "--memory", "64M", "--serial", "null", "--debug-exit"]);
        command.args(["--cpus", &payload.vcpus.to_string(), "--name", &self.trial.name(name)]);
        command.args(["--qmp", &format!("unix:{}", self.trial.at(&format!("{name}.qmp")))]);
        command.args(["--debugcon", &format!("file:{}", self.trial.at(&format!("{name}.debugcon")))]);
        if matches!(place, Place::Pool | Place::PoolOfArm) {
            command.args(["--function", "pool"]);
        }
        command.args(incoming.map(|uri| ["--incoming", uri]).into_iter().flatten());
        self.trial.start(&mut command)
    }

    fn console(&self, name: &str) -> String {
        std::fs::read_to_string(self.trial.path(&format!("{name}.debugcon"))).unwrap_or_default()
    }

    fn monitor(&self, name: &str, words: &[&str]) {
        let mut command = Command::new(program("soc-vmm"));
        let qmp = self.trial.at(&format!("{name}.qmp"));
        let output = command.args(words).args(["--qmp", &qmp]).output().expect("soc-vmm starts");
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// A guest that looks whether its memory is what it wrote goes from each place to the next.
    fn passes(&self, places: &[Place]) {
        let payload = Scribe { vcpus: 2, pages: 2048, pace: 0 }.payload().unwrap();
        let name = |number: usize| format!("vm{number}");
        let mut vm = self.vm(places[0], &name(0), &payload, None);
        wait_until("the guest runs", MOST, || self.console(&name(0)).contains("scribe"));
        for (number, pair) in places.windows(2).enumerate() {
            let (here, there) = (name(number), name(number + 1));
            let uri = format!("unix:{}", self.trial.at(&format!("{there}.door")));
            let next = self.vm(pair[1], &there, &payload, Some(&uri));
            wait_until("it waits for the guest", MOST, || is_listened_on(&self.trial.path(&format!("{there}.door"))));
            self.monitor(&here, &["migrate", &uri]);
            let ended = vm.wait(MOST);
            assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{pair:?}, {number}");
            self.trial.becomes(&there, "running");
            let is_of_pool = usize::from(matches!(pair[1], Place::Pool | Place::PoolOfArm));
            wait_until("only where the guest is a function is used", MOST, || self.used() == is_of_pool);
            vm = next;
        }
        let last = name(places.len() - 1);
        self.monitor(&last, &["powerdown"]);
        let ended = vm.wait(MOST);
        let console = self.console(&last);
        assert_eq!(ended.status.code(), Some(PASSED), "{console} {}", ended.stderr);
        assert!(told(&console, "passes").unwrap() > 0);
    }
}

#[test]
fn from_a_vm_of_its_own_to_a_function_to_another_and_back() {
    if !kvm(&test_name()) {
        return;
    }
    Site::new().passes(&[Place::Local, Place::Pool, Place::Pool, Place::Local]);
}

#[test]
fn from_x86_to_arm_and_back() {
    if !kvm(&test_name()) || !testbed::machines_or_skip(&test_name()) {
        return;
    }
    use Place::{Local, LocalOfArm, Pool, PoolOfArm};
    Site::with_arm().passes(&[Local, LocalOfArm, Pool, PoolOfArm, PoolOfArm, LocalOfArm, Local]);
}
