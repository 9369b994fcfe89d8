//! The fuzz targets: building them, and letting one run.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use std::{env, fs};

use serde_json::Value;
use testbed::paths;

use crate::step::{self, with_sources};
use crate::suite::cargo;

const BUILD_LIMIT: Duration = Duration::from_secs(45 * 60);
/// What a run may take beyond what it was given: replaying what is kept, on a busy machine.
const REPLAY_LIMIT: Duration = Duration::from_secs(3 * 60);

/// Builds every target by `run`, alone or beside other steps; `None` if that fails.
pub(crate) fn build(
    run: impl Fn(&str, Command, Duration) -> Result<step::Outcome, String>,
) -> Result<Option<Vec<String>>, String> {
    let dir = paths::workspace().join("tests/fuzz");
    // The flags stand in .cargo/config.toml, which cargo looks for from where it is started, and which this variable overrides.
    let mut command = cargo(["build", "--release", "--bins"]);
    command.current_dir(&dir).env_remove("RUSTFLAGS").env("CARGO_TARGET_DIR", paths::target().join("fuzz"));
    if !run("fuzz targets: build", command, BUILD_LIMIT)?.ok {
        return Ok(None);
    }
    programs_of(&dir.join("Cargo.toml")).map(Some)
}

/// [`run`]s every target with that niceness, as many at once as there are CPUs; those that found something.
pub(crate) fn run_all(targets: &[String], time: Duration, niceness: &str) -> Result<Vec<String>, String> {
    let next = AtomicUsize::new(0);
    let take_turns = || {
        let mut found = Vec::new();
        while let Some(target) = targets.get(next.fetch_add(1, Ordering::Relaxed)) {
            if !run(target, time, niceness)? {
                found.push(target.clone());
            }
        }
        Ok(found)
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let runners: Vec<_> = (0..threads).map(|_| scope.spawn(take_turns)).collect();
        let found = runners.into_iter().map(|runner| runner.join().expect("a runner doesn't panic"));
        found.collect::<Result<Vec<_>, String>>().map(|found| found.concat())
    })
}

/// Replays the kept inputs of `target`, then lets it look for more for `time`; whether it found nothing. What it finds stays out of
/// the tree.
pub(crate) fn run(target: &str, time: Duration, niceness: &str) -> Result<bool, String> {
    let target_dir = paths::target().join("fuzz");
    let triple = format!("{}-unknown-linux-gnu", env::consts::ARCH);
    let found = target_dir.join("found").join(target);
    fs::create_dir_all(&found).map_err(|e| format!("{}: {e}", found.display()))?;
    let mut command = Command::new(target_dir.join(&triple).join("release").join(target));
    command
        .arg(format!("-max_total_time={}", time.as_secs().max(1)))
        .args(["-timeout=10", "-rss_limit_mb=2048", "-print_final_stats=1"])
        .arg(format!("-artifact_prefix={}/crash-", found.display()))
        .arg(&found);
    // Kept inputs of this target, if it has any.
    let corpus = paths::workspace().join("tests/fuzz/corpus").join(target);
    if corpus.is_dir() {
        command.arg(corpus);
    }
    Ok(step::run_beside(&format!("fuzz {target}"), step::nice(niceness, &command), time + REPLAY_LIMIT)?.ok)
}

/// The names of a package's programs.
fn programs_of(manifest: &Path) -> Result<Vec<String>, String> {
    let mut command = cargo(["metadata", "--no-deps", "--format-version", "1"]);
    command.arg("--manifest-path").arg(manifest);
    let text = testbed::process::run(&mut command).map_err(|e| with_sources(&e))?;
    let metadata: Value = serde_json::from_str(&text).map_err(|e| format!("cargo metadata: {e}"))?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let targets = packages.flat_map(|package| package["targets"].as_array().into_iter().flatten());
    let names = targets
        .filter(|target| target["kind"][0] == "bin")
        .filter_map(|target| Some(target["name"].as_str()?.to_owned()));
    Ok(names.collect())
}
