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
    let (of_fuzz, of_tests): (Vec<&String>, Vec<&String>) = names.iter().partition(|name| name.starts_with("fuzz"));
    let listed: Vec<_> = REPEATED.iter().map(|test| format!("test.{test}")).chain(["fuzz.TARGET".to_owned()]).collect();
    all_begin_one(&of_tests, &listed)?;
    let chosen = |name: &str| names.is_empty() || names.iter().any(|start| name.starts_with(start.as_str()));
    let tests: Vec<_> = REPEATED.into_iter().filter(|test| chosen(&format!("test.{test}"))).collect();
    let mut fuzzed = Vec::new();
    if names.is_empty() || !of_fuzz.is_empty() {
        let Some(targets) = fuzz::build(step::run)? else { return Ok(ExitCode::FAILURE) };
        all_begin_one(&of_fuzz, &targets.iter().map(|target| format!("fuzz.{target}")).collect::<Vec<_>>())?;
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

/// Nothing, if each of `starts` is the beginning of one of `things`.
fn all_begin_one(starts: &[&String], things: &[String]) -> Result<(), String> {
    match starts.iter().find(|start| !things.iter().any(|thing| thing.starts_with(start.as_str()))) {
        Some(start) => Err(format!("nothing is called {start}; there are: {}", things.join(", "))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_nothing_is_refused_beside_names_of_something() {
        let [begins, nothing] = ["test.mach", "test.nothing"].map(String::from);
        let things = ["test.hostile", "test.machine_debian_moves"].map(String::from);
        assert_eq!(all_begin_one(&[&begins], &things), Ok(()));
        let why = all_begin_one(&[&begins, &nothing], &things).unwrap_err();
        assert_eq!(why, "nothing is called test.nothing; there are: test.hostile, test.machine_debian_moves");
    }
}
