//! `cargo xtask test`: what CI runs, step by step, with every skip and its reason at the end.

use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};
use std::{env, fs};

use tempfile::NamedTempFile;
use testbed::fetch::{self, Arch};
use testbed::{QUICK_VARIABLE, SKIPS_VARIABLE, build, paths};

use crate::counts::{Counts, failures, flaky, left_out};
use crate::fuzz;
use crate::step::{self, with_sources};

const MINUTE: Duration = Duration::from_secs(60);
/// How long each fuzz target runs on top of replaying its corpus.
const FUZZ_TIME: Duration = Duration::from_secs(5);
/// What has unit tests that mean something on an Arm SoC: everything that runs there.
const ON_ARM: [&str; 5] = ["ioreq-ring", "api-channel", "pcie-function", "pcie-function-card", "soc-vmm"];

/// How much the processors are left to others: what only compiles, and what has time limits of its own.
const PATIENT: &str = "19";
const LESS_PATIENT: &str = "5";

/// Runs everything; `quick` leaves out emulated machines.
pub(crate) fn run(quick: bool) -> Result<ExitCode, String> {
    let mut suite = Suite::new(quick)?;
    let began = Instant::now();
    // The network is slow, and what follows doesn't need it.
    let fetching = std::thread::spawn(move || fetch_missing(quick));
    suite.check("format", cargo(["fmt", "--all", "--check"]), 2 * MINUTE)?;
    let fuzz = ["fmt", "--manifest-path", "tests/fuzz/Cargo.toml", "--check"];
    suite.check("format of the fuzz targets", cargo(fuzz), 2 * MINUTE)?;
    let lints = ["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"];
    suite.check("lints", cargo(lints), 15 * MINUTE)?;
    fetching.join().expect("fetching doesn't panic");
    if !quick {
        suite.programs()?;
    }
    // Machines run one at a time and leave a core half idle: what needs none of them takes that.
    let beside = std::thread::scope(|scope| {
        let beside = scope.spawn(|| run_beside(quick));
        suite.workspace_tests()?;
        beside.join().expect("a step doesn't panic")
    })?;
    suite.add(beside);
    Ok(suite.summary(began.elapsed()))
}

/// The steps that run beside the workspace's tests.
fn run_beside(quick: bool) -> Result<Suite, String> {
    let mut suite = Suite::new(quick)?;
    suite.models()?;
    suite.arm()?;
    suite.fuzz()?;
    Ok(suite)
}

/// [`step::run`] or [`step::run_beside`].
type Runner = fn(&str, Command, Duration) -> Result<step::Outcome, String>;

struct Suite {
    quick: bool,
    /// Where tests say that they can't run.
    skips: NamedTempFile,
    counts: Counts,
    failed: Vec<String>,
    skipped: Vec<String>,
    /// Tests that passed when they ran again.
    flaky: Vec<String>,
}

impl Suite {
    fn new(quick: bool) -> Result<Self, String> {
        let skips = NamedTempFile::new().map_err(|e| format!("temporary file: {e}"))?;
        Ok(Self { quick, skips, counts: Counts::default(), failed: Vec::new(), skipped: Vec::new(), flaky: Vec::new() })
    }

    /// Takes over what other steps came to.
    fn add(&mut self, other: Self) {
        self.counts += other.counts;
        self.failed.extend(other.failed);
        self.skipped.extend(other.skipped);
        self.flaky.extend(other.flaky);
    }

    /// A step that isn't made of tests.
    fn check(&mut self, title: &str, command: Command, limit: Duration) -> Result<(), String> {
        if !step::run(title, command, limit)?.ok {
            self.failed.push(title.to_owned());
        }
        Ok(())
    }

    /// A step that is made of tests.
    fn tests(&mut self, title: &str, command: Command, limit: Duration) -> Result<(), String> {
        self.tests_by(step::run, title, command, limit)
    }

    /// [`Self::tests`] beside other steps, with what those leave of the processors.
    fn tests_beside(&mut self, title: &str, command: &Command, limit: Duration) -> Result<(), String> {
        let mut build = step::nice(PATIENT, command);
        build.arg("--no-run");
        // What fails here fails again below, where it counts.
        step::run_beside(&format!("{title}: build"), build, limit)?;
        self.tests_by(step::run_beside, title, step::nice(LESS_PATIENT, command), limit)
    }

    fn tests_by(&mut self, run: Runner, title: &str, mut command: Command, limit: Duration) -> Result<(), String> {
        let skips = self.skips.path();
        command.env(SKIPS_VARIABLE, skips);
        if self.quick {
            command.env(QUICK_VARIABLE, "1");
        }
        let outcome = run(title, command, limit)?;
        let said = fs::read_to_string(skips).unwrap_or_default();
        // Read: the next step starts with none.
        fs::write(skips, "").map_err(|e| format!("{}: {e}", skips.display()))?;
        self.skipped.extend(said.lines().map(str::to_owned));
        self.skipped.extend(left_out(&outcome.output));
        self.flaky.extend(flaky(&outcome.output));
        let skipped = u64::try_from(said.lines().count()).unwrap_or(u64::MAX);
        let mut counts = Counts::of(&outcome.output).without(skipped);
        if !outcome.ok {
            let names = failures(&outcome.output);
            self.failed.extend(names.iter().map(|name| format!("{title}: {name}")));
            if names.is_empty() {
                // It failed before it came to its tests.
                self.failed.push(title.to_owned());
            }
            counts.failed = counts.failed.max(1);
        }
        self.counts += counts;
        Ok(())
    }

    /// What emulated machines are made of, before the first test that starts one: a test's time is its own.
    fn programs(&mut self) -> Result<(), String> {
        for (arch, name) in [(Arch::Amd64, "amd64"), (Arch::Arm64, "arm64")] {
            // Where the toolchain is missing, its tests say so.
            if let Ok(command) = build::beforehand(arch) {
                self.check(&format!("programs for {name}"), command, 20 * MINUTE)?;
            }
        }
        Ok(())
    }

    fn workspace_tests(&mut self) -> Result<(), String> {
        let nextest = Command::new(cargo_program())
            .args(["nextest", "--version"])
            .output()
            .is_ok_and(|output| output.status.success());
        // Cold, most of it on one core: what CI has less what comes before.
        let limit = 75 * MINUTE;
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
                    // Of one that passes when it runs again, too.
                    "--failure-output",
                    "immediate-final",
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
        self.tests_beside("models (loom)", &models(), 30 * MINUTE)
    }

    /// The unit tests of what runs on an Arm SoC, under emulation.
    fn arm(&mut self) -> Result<(), String> {
        match arm() {
            Ok(command) => self.tests_beside("Arm build and its tests", &command, 45 * MINUTE),
            Err(error) => {
                self.counts.skipped += 1;
                self.skipped.push(format!("Arm build and its tests: {}", with_sources(&error)));
                Ok(())
            }
        }
    }

    /// Replays the kept inputs of every fuzz target, then lets it look for more.
    fn fuzz(&mut self) -> Result<(), String> {
        let Some(targets) =
            fuzz::build(|title, command, limit| step::run_beside(title, step::nice(PATIENT, &command), limit))?
        else {
            self.failed.push("fuzz targets: build".to_owned());
            self.counts.failed += 1;
            return Ok(());
        };
        let found = fuzz::run_all(&targets, FUZZ_TIME, LESS_PATIENT)?;
        self.counts.passed += (targets.len() - found.len()) as u64;
        self.counts.failed += found.len() as u64;
        self.failed.extend(found.iter().map(|target| format!("fuzz {target}")));
        Ok(())
    }

    fn summary(&self, elapsed: Duration) -> ExitCode {
        println!();
        for skipped in &self.skipped {
            println!("skipped  {skipped}");
        }
        for flaky in &self.flaky {
            println!(
                "flaky    {flaky}: it failed, and passed when it ran again; why it failed is in the tests' output"
            );
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
