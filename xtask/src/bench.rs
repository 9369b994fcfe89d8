//! `cargo xtask bench`: builds both programs as users get them, and the benchmark beside them; the rest is the benchmark's.

use std::process::{Command, ExitCode};
use std::time::Duration;

use testbed::paths;

use crate::step;

/// How long a build may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(30 * 60);

/// Passes `arguments` on: names, `--json FILE`, `--record`.
pub(crate) fn run(arguments: &[String]) -> Result<ExitCode, String> {
    let mut build = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    build.args(["build", "--release", "--package", "soc-vmm", "--package", "host-kvm-shim", "--package", "bench"]);
    build.current_dir(paths::workspace());
    if !step::run("build", build, LIMIT)?.ok {
        return Ok(ExitCode::FAILURE);
    }
    let program = paths::target().join("release/bench");
    let status = Command::new(&program).args(arguments).status().map_err(|e| format!("{}: {e}", program.display()))?;
    Ok(if status.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
