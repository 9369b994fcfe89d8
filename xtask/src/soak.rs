//! `cargo xtask soak`: the same code as the tests, for long.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::fuzz;
use crate::step;
use crate::suite::cargo;

/// Test binaries whose every run is another one: peers that lie, sides that die, VMs stopped or moved at random moments.
const REPEATED: [&str; 11] = [
    "hostile",
    "hostile_soc",
    "faults",
    "state",
    "order",
    "dirty",
    "interrupts",
    "control",
    "libvirt_random",
    "machine_debian_moves",
    "migration",
];
/// No single run of one takes longer.
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// Shares `minutes` between the fuzz targets and the tests whose names begin with one of `names`, or all of them.
pub(crate) fn run(names: &[String], minutes: u32) -> Result<ExitCode, String> {
    let is_test = |start: &str| REPEATED.into_iter().any(|test| format!("test.{test}").starts_with(start));
    if let Some(name) = names.iter().find(|name| !name.starts_with("fuzz") && !is_test(name)) {
        return Err(nothing_called(name));
    }
    let chosen = |name: &str| names.is_empty() || names.iter().any(|start| name.starts_with(start.as_str()));
    let tests: Vec<_> = REPEATED.into_iter().filter(|test| chosen(&format!("test.{test}"))).collect();
    let mut fuzzed = Vec::new();
    if names.is_empty() || names.iter().any(|name| name.starts_with("fuzz")) {
        let Some(targets) = fuzz::build(step::run)? else { return Ok(ExitCode::FAILURE) };
        let is_target = |start: &str| targets.iter().any(|target| format!("fuzz.{target}").starts_with(start));
        if let Some(name) = names.iter().find(|name| name.starts_with("fuzz") && !is_target(name)) {
            return Err(nothing_called(name));
        }
        fuzzed.extend(targets.into_iter().filter(|target| chosen(&format!("fuzz.{target}"))));
    }
    let parts = u32::try_from(tests.len() + fuzzed.len()).unwrap_or(u32::MAX);
    if !tests.is_empty() {
        let mut build = cargo(["test", "--no-run", "--package", "integration"]);
        build.args(tests.iter().flat_map(|test| ["--test", test]));
        if !step::run("tests: build", build, LIMIT)?.ok {
            return Ok(ExitCode::FAILURE);
        }
    }
    let share = Duration::from_secs(u64::from(minutes) * 60) / parts;
    let (mut passed, mut failed) = (0, Vec::new());
    for target in fuzzed {
        if fuzz::run(&target, share, "0")? { passed += 1 } else { failed.push(format!("fuzz.{target}")) }
    }
    for test in tests {
        let began = Instant::now();
        let mut rounds = 0;
        while rounds == 0 || began.elapsed() < share {
            rounds += 1;
            let command =
                cargo(["test", "--quiet", "--package", "integration", "--test", test, "--", "--include-ignored"]);
            if step::run(&format!("test {test}, round {rounds}"), command, LIMIT)?.ok {
                passed += 1;
            } else {
                failed.push(format!("test.{test}, round {rounds}"));
                break;
            }
        }
    }
    for name in &failed {
        println!("failed   {name}");
    }
    println!("{passed} passed, {} failed", failed.len());
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn nothing_called(name: &str) -> String {
    let all = REPEATED.map(|test| format!("test.{test}")).join(", ");
    format!("nothing is called {name}; there are: fuzz.TARGET, {all}")
}
