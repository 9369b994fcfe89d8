//! CPU time of processes, the guest's apart.

use std::fs;

/// Hundredths of a second (proc(5), USER_HZ).
const TICK_MS: f64 = 10.0;

/// Milliseconds that a process and its children that run have had so far.
pub(super) fn cpu(pid: u32) -> f64 {
    own(pid) + children(pid).into_iter().map(cpu).sum::<f64>()
}

/// The same of this process alone.
pub(super) fn own_cpu() -> f64 {
    own(std::process::id())
}

/// What this process's children have had that it has waited for, and theirs that they have.
pub(super) fn cpu_of_ended() -> f64 {
    // cutime (with the guests'), cstime, cguest_time.
    of(std::process::id(), [16, 17, 44])
}

fn own(pid: u32) -> f64 {
    // utime (with the guest's), stime, guest_time.
    of(pid, [14, 15, 43])
}

/// The sum of two fields of proc(5)'s stat less a third.
fn of(pid: u32, [user, system, guest]: [usize; 3]) -> f64 {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // The name may hold blanks; behind it field 3 comes first.
    let fields: Vec<f64> =
        text.rsplit(')').next().unwrap_or_default().split_whitespace().map(|n| n.parse().unwrap_or(0.0)).collect();
    let field = |number: usize| fields.get(number - 3).copied().unwrap_or_default();
    (field(user) + field(system) - field(guest)) * TICK_MS
}

fn children(pid: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let texts = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    texts.flat_map(|text| text.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>()).collect()
}
