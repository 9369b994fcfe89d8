//! An emulated server whose VMs are served from this machine, by soc-vmm or by a SoC side of the test's own.

use std::path::PathBuf;
use std::time::Duration;

use payloads::Payload;
use pcie_function_card::CardFunction;
use serde_json::Value;
use testbed::bed::{Bed, BedConfig, SHIM};
use testbed::card::{HOST_HOST, HOST_VM};
use testbed::protocol::Status;

use super::Counters;
use crate::hostile::{Running, Trial, wait_until};
use crate::soc::Soc;

/// Longer than anything may take on an emulated server but what is meant to take long.
pub const MOST: Duration = Duration::from_secs(90);

const SIGKILL: i32 = 9;

/// The server, its card, and the programs of this machine that serve its VMs.
#[derive(Debug)]
pub struct Server {
    // Dropped in this order: the programs before the card that they are clients of.
    /// The programs of this machine.
    pub trial: Trial,
    /// The machines.
    pub bed: Bed,
    /// The shims' processes in the server, by function.
    shims: Vec<i32>,
    /// The functions' PCI addresses in the server.
    addresses: Vec<String>,
}

impl Server {
    /// Starts a server with that many vm functions, each with a shim.
    ///
    /// # Panics
    /// It doesn't come up.
    pub fn start(name: &str, functions: u32) -> Self {
        let bed = BedConfig::new(name, functions).start().expect("the server comes up");
        let pci = bed.server.inventory().expect("an inventory").pci;
        let is_ours = |id| [HOST_VM, HOST_HOST].contains(&id);
        let addresses: Vec<_> = pci.into_iter().filter(|f| is_ours(f.id)).map(|f| f.address).collect();
        let programs = bed.server.programs().expect("programs");
        let shim_of = |address: &String| {
            let spec = format!("pci:{address}");
            let shim = programs.iter().find(|program| program.command.contains(&spec));
            shim.unwrap_or_else(|| panic!("no shim serves {spec} of {programs:?}")).pid
        };
        let shims = addresses.iter().map(shim_of).collect();
        Self { trial: Trial::default(), bed, shims, addresses }
    }

    /// `--function` for the SoC side of a function.
    pub fn spec(&self, function: u32) -> String {
        format!("card:{}", self.bed.card.soc_socket(function).display())
    }

    /// Starts soc-vmm with a VM of `payload` on a function; it is known by its number (see [`Server::name`]).
    pub fn vm(&self, function: u32, payload: &Payload, more: &[&str]) -> Running {
        let name = Self::name(function);
        let (option, bytes) = payload.file();
        let image = self.trial.file(&format!("{name}.image"), &bytes);
        let cpus = payload.vcpus.to_string();
        let qmp = format!("unix:{}", self.trial.at(&format!("{name}.qmp")));
        let debugcon = format!("file:{}", self.trial.at(&format!("{name}.debugcon")));
        let spec = self.spec(function);
        let machine = ["run", option, &image, "--cpus", &cpus, "--memory", "64M,hugepages=2M"];
        let ends = ["--serial", "null", "--debug-exit", "--function", &spec, "--qmp", &qmp, "--debugcon", &debugcon];
        self.trial.soc_vmm(&[&machine[..], &ends, more].concat())
    }

    /// The name of the VM on a function.
    pub fn name(function: u32) -> String {
        format!("vm{function}")
    }

    /// What the guest on a function wrote to the debug console.
    pub fn console(&self, function: u32) -> String {
        std::fs::read_to_string(self.console_file(function)).unwrap_or_default()
    }

    /// The file of [`Server::console`].
    pub fn console_file(&self, function: u32) -> PathBuf {
        self.trial.path(&format!("{}.debugcon", Self::name(function)))
    }

    /// Runs a soc-vmm command on the VM of a function; what it printed.
    ///
    /// # Panics
    /// It fails.
    pub fn command(&self, function: u32, verb: &[&str]) -> String {
        let qmp = self.trial.at(&format!("{}.qmp", Self::name(function)));
        let output = std::process::Command::new(crate::program("soc-vmm"))
            .args(verb)
            .args(["--qmp", &qmp])
            .output()
            .expect("soc-vmm starts");
        assert!(output.status.success(), "{verb:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Counters of the paused VM on a function; it goes on afterwards.
    pub fn counters(&self, function: u32) -> Counters {
        self.command(function, &["pause"]);
        let counters = Counters::of_status(&self.command(function, &["status", "--json"]));
        self.command(function, &["resume"]);
        counters
    }

    /// A SoC side of the test's own on a function.
    pub fn soc(&self, function: u32) -> Soc<CardFunction> {
        Soc::on(self.card_function(function))
    }

    /// The SoC's end of a function.
    ///
    /// # Panics
    /// It can't be opened within seconds: the card serves one SoC at a time.
    pub fn card_function(&self, function: u32) -> CardFunction {
        pcie_function_card::open(&self.bed.card.soc_socket(function)).expect("the function opens")
    }

    /// Gives the card an order.
    ///
    /// # Panics
    /// It refuses.
    pub fn card(&self, order: &str) {
        assert_eq!(self.bed.card.control(order).expect("the card answers"), "ok", "{order}");
    }

    /// One of the card's counts of a function.
    ///
    /// # Panics
    /// There is no such count.
    pub fn stat(&self, function: u32, name: &str) -> u64 {
        let stats = self.bed.card.control(&format!("stats {function}")).expect("the card answers");
        let stats: Value = serde_json::from_str(&stats).expect("counts in JSON");
        stats[name].as_u64().unwrap_or_else(|| panic!("no {name} in {stats}"))
    }

    /// The process of a function's shim.
    pub fn shim(&self, function: u32) -> i32 {
        self.shims[function as usize]
    }

    /// What a function's shim wrote to its standard error so far.
    pub fn shim_said(&self, function: u32) -> String {
        self.bed.server.control().output(self.shim(function)).join("\n")
    }

    /// Waits until a function's shim has said `text`.
    ///
    /// # Panics
    /// It takes too long.
    pub fn shim_says(&self, function: u32, text: &str) {
        let line = self.bed.server.control().wait_for_output(self.shim(function), text, MOST);
        assert!(line.is_some(), "shim {function} never said {text:?}: {}", self.shim_said(function));
    }

    /// Waits for the end of a function's shim.
    ///
    /// # Panics
    /// It takes too long.
    pub fn shim_ends(&self, function: u32) -> Status {
        let ended = self.bed.server.control().wait_for_exit(self.shim(function), MOST);
        ended.unwrap_or_else(|| panic!("shim {function} runs on: {}", self.shim_said(function)))
    }

    /// Whether a function's shim runs.
    pub fn shim_runs(&self, function: u32) -> bool {
        let programs = self.bed.server.programs().expect("programs");
        programs.iter().any(|program| program.pid == self.shim(function))
    }

    /// Kills a function's shim.
    pub fn kill_shim(&self, function: u32) {
        self.bed.server.signal(self.shim(function), SIGKILL).expect("the shim is there");
        assert_eq!(self.shim_ends(function), Status::Signal(SIGKILL));
    }

    /// Starts a shim for a function whose shim has ended; `more` are more arguments.
    pub fn start_shim(&mut self, function: u32, more: &[&str]) {
        let spec = format!("pci:{}", self.addresses[function as usize]);
        let pid = self.bed.server.run(SHIM, &[&["--function", &spec], more].concat(), None);
        self.shims[function as usize] = pid.expect("a shim starts");
    }

    /// What everybody has said so far, for a test that fails.
    pub fn story(&self) -> String {
        let functions = 0..self.shims.len() as u32;
        let shims: String = functions.map(|function| format!("{function}: {}\n", self.shim_said(function))).collect();
        let kernel = self.bed.server.console().tail(60);
        let silent = self.bed.server.last_words().unwrap_or_default();
        format!(
            "programs of this machine:\n{}shims:\n{shims}the server's kernel:\n{kernel}\n{silent}",
            self.trial.said()
        )
    }

    /// Waits until the VM of a function is in a state.
    pub fn becomes(&self, function: u32, state: &str) {
        self.trial.becomes(&Self::name(function), state);
    }

    /// Waits until `condition` holds.
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        wait_until(what, MOST, condition);
    }
}
