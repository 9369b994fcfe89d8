//! `cargo xtask test`: what CI runs, step by step, with every skip and its reason at the end.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs};

use testbed::fetch::{self, Arch};
use testbed::{QUICK_VARIABLE, SKIPS_VARIABLE, build, paths};

use crate::counts::{Counts, left_out};
use crate::fuzz;
use crate::step::{self, with_sources};

const MINUTE: Duration = Duration::from_secs(60);
/// How long each fuzz target runs on top of replaying its corpus.
const FUZZ_TIME: Duration = Duration::from_secs(5);
/// What has unit tests that mean something on an Arm SoC: everything that runs there.
const ON_ARM: [&str; 5] = ["ioreq-ring", "api-channel", "pcie-function", "pcie-function-card", "soc-vmm"];

/// Runs everything; `quick` leaves out emulated machines.
pub(crate) fn run(quick: bool) -> Result<ExitCode, String> {
    let skips = tempfile::NamedTempFile::new().map_err(|e| format!("temporary file: {e}"))?;
    let mut suite = Suite {
        quick,
        skips: skips.path().to_path_buf(),
        counts: Counts::default(),
        failed: Vec::new(),
        skipped: Vec::new(),
    };
    let began = Instant::now();
    // The network is slow, and what follows doesn't need it.
    let fetching = std::thread::spawn(move || fetch_missing(quick));
    suite.check("format", cargo(["fmt", "--all", "--check"]), 2 * MINUTE)?;
    let fuzz = ["fmt", "--manifest-path", "tests/fuzz/Cargo.toml", "--check"];
    suite.check("format of the fuzz targets", cargo(fuzz), 2 * MINUTE)?;
    let lints = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    suite.check("lints", cargo(lints), 15 * MINUTE)?;
    fetching.join().expect("fetching doesn't panic");
    // Machines run one at a time and leave a core half idle: what is built for later steps takes that.
    let targets = std::thread::scope(|scope| {
        let built = scope.spawn(build_ahead);
        suite.workspace_tests()?;
        built.join().expect("building doesn't panic")
    })?;
    suite.models()?;
    suite.arm()?;
    suite.fuzz(targets)?;
    Ok(suite.summary(began.elapsed()))
}

struct Suite {
    quick: bool,
    /// Where tests say that they can't run.
    skips: PathBuf,
    counts: Counts,
    failed: Vec<String>,
    skipped: Vec<String>,
}

impl Suite {
    /// A step that isn't made of tests.
    fn check(&mut self, title: &str, command: Command, limit: Duration) -> Result<(), String> {
        if !step::run(title, command, limit)?.ok {
            self.failed.push(title.to_owned());
        }
        Ok(())
    }

    /// A step that is made of tests.
    fn tests(&mut self, title: &str, mut command: Command, limit: Duration) -> Result<(), String> {
        command.env(SKIPS_VARIABLE, &self.skips);
        if self.quick {
            command.env(QUICK_VARIABLE, "1");
        }
        let outcome = step::run(title, command, limit)?;
        let said = fs::read_to_string(&self.skips).unwrap_or_default();
        // Read: the next step starts with none.
        fs::write(&self.skips, "").map_err(|e| format!("{}: {e}", self.skips.display()))?;
        self.skipped.extend(said.lines().map(str::to_owned));
        self.skipped.extend(left_out(&outcome.output));
        let skipped = u64::try_from(said.lines().count()).unwrap_or(u64::MAX);
        let mut counts = Counts::of(&outcome.output).without(skipped);
        if !outcome.ok {
            self.failed.push(title.to_owned());
            // It may have failed before it came to its tests.
            counts.failed = counts.failed.max(1);
        }
        self.counts += counts;
        Ok(())
    }

    fn workspace_tests(&mut self) -> Result<(), String> {
        let nextest = Command::new(cargo_program())
            .args(["nextest", "--version"])
            .output()
            .is_ok_and(|output| output.status.success());
        let limit = 30 * MINUTE;
        if nextest {
            // nextest leaves out examples in documentation.
            self.tests(
                "tests",
                cargo([
                    "nextest",
                    "run",
                    "--workspace",
                    "--status-level",
                    "pass",
                    "--final-status-level",
                    "skip",
                    "--failure-output",
                    "final",
                ]),
                limit,
            )?;
            let docs = cargo(["test", "--workspace", "--doc"]);
            self.tests("documentation's examples", docs, limit)
        } else {
            self.tests("tests", cargo(["test", "--workspace", "--no-fail-fast"]), limit)
        }
    }

    fn models(&mut self) -> Result<(), String> {
        self.tests("models (loom)", models(), 15 * MINUTE)
    }

    /// Replays the kept inputs of every fuzz target, then lets it look for more.
    fn fuzz(&mut self, targets: Option<Vec<String>>) -> Result<(), String> {
        let Some(targets) = targets else {
            self.failed.push("fuzz targets: build".to_owned());
            self.counts.failed += 1;
            return Ok(());
        };
        let found = fuzz::run_all(&targets, FUZZ_TIME)?;
        self.counts.passed += (targets.len() - found.len()) as u64;
        self.counts.failed += found.len() as u64;
        self.failed.extend(found.iter().map(|target| format!("fuzz {target}")));
        Ok(())
    }

    fn arm(&mut self) -> Result<(), String> {
        match arm() {
            Ok(command) => self.tests("Arm build and its tests", command, 20 * MINUTE),
            Err(error) => {
                self.counts.skipped += 1;
                self.skipped.push(format!("Arm build and its tests: {}", with_sources(&error)));
                Ok(())
            }
        }
    }

    fn summary(&self, elapsed: Duration) -> ExitCode {
        println!();
        for skipped in &self.skipped {
            println!("skipped  {skipped}");
        }
        for failed in &self.failed {
            println!("failed   {failed}");
        }
        let seconds = elapsed.as_secs();
        println!("took {} min {} s", seconds / 60, seconds % 60);
        let Counts { passed, failed, skipped } = self.counts;
        // A step that isn't a test may have failed alone.
        let others = u64::try_from(self.failed.len()).unwrap_or(u64::MAX);
        let failed = if failed == 0 { others } else { failed };
        println!("{passed} passed, {failed} failed, {skipped} skipped");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Builds what steps after the workspace's tests run, with what those leave of the processors; the fuzz targets, unless that fails. What
/// else fails here is said by the step that runs it.
fn build_ahead() -> Result<Option<Vec<String>>, String> {
    let targets = fuzz::build(|title, command, limit| step::run_beside(title, patient(&command), limit))?;
    let ahead = [("models (loom): build", Some(models())), ("Arm tests: build", arm().ok())];
    for (title, command) in ahead {
        if let Some(mut command) = command {
            command.arg("--no-run");
            step::run_beside(title, patient(&command), 20 * MINUTE)?;
        }
    }
    Ok(targets)
}

/// The same command, which lets everybody else have the processors first.
fn patient(command: &Command) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", "19"]).arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => nice.env(name, value),
            None => nice.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        nice.current_dir(dir);
    }
    nice
}

fn models() -> Command {
    let mut command = cargo(["test", "--release", "--package", "ioreq-ring", "--test", "loom"]);
    command.env("RUSTFLAGS", "--cfg loom").env("CARGO_TARGET_DIR", paths::target().join("loom"));
    command
}

/// The unit tests of what runs on an Arm SoC, under emulation.
fn arm() -> Result<Command, testbed::fetch::Error> {
    let mut command = build::cargo(Arch::Arm64)?;
    // Not where tests build programs for the emulated SoC meanwhile: they would wait for each other.
    command.env("CARGO_TARGET_DIR", paths::target().join("arm")).env("CARGO_PROFILE_DEV_DEBUG", "false");
    command.args(["test", "--no-fail-fast", "--lib", "--bins"]);
    for package in ON_ARM {
        command.args(["--package", package]);
    }
    Ok(command)
}

/// Fetches what is missing. Without it the tests that need it skip themselves.
fn fetch_missing(quick: bool) {
    let fetched = if quick { fetch::cross().map(|_| ()) } else { fetch::everything() };
    if let Err(error) = fetched {
        println!("testbed: {}", with_sources(&error));
    }
}

pub(crate) fn cargo<const N: usize>(args: [&str; N]) -> Command {
    let mut command = Command::new(cargo_program());
    command.args(args).current_dir(paths::workspace());
    command
}

fn cargo_program() -> std::ffi::OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}
