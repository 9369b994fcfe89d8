//! What the threads of a process do.

use std::collections::BTreeMap;
use std::fs;
use std::thread;
use std::time::Duration;

/// Each thread of a process: its name, its state, and the clock ticks that it ran for within `time`.
pub(crate) fn threads(pid: u32, time: Duration) -> Vec<String> {
    let before = read(pid);
    thread::sleep(time);
    let after = read(pid).into_iter();
    let shown = |(thread, (name, state, ticks)): (String, (String, String, u64))| {
        let ran = ticks - before.get(&thread).map_or(ticks, |(.., ticks)| *ticks);
        format!("{name} {state} {ran}")
    };
    after.map(shown).collect()
}

/// By thread: name, state, clock ticks (proc(5), `/proc/PID/task/TID/stat`).
fn read(pid: u32) -> BTreeMap<String, (String, String, u64)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return BTreeMap::new() };
    let thread = |entry: fs::DirEntry| {
        let stat = fs::read_to_string(entry.path().join("stat")).ok()?;
        let (head, tail) = stat.rsplit_once(')')?;
        let name = head.split_once('(')?.1.to_owned();
        // From the third field on.
        let fields: Vec<&str> = tail.split_whitespace().collect();
        let ticks = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
        let state = (*fields.first()?).to_owned();
        Some((entry.file_name().to_string_lossy().into_owned(), (name, state, ticks(14)? + ticks(15)?)))
    };
    threads.filter_map(Result::ok).filter_map(thread).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_sleeps_did_not_run() {
        let shown = threads(std::process::id(), Duration::from_millis(1));
        assert!(shown.iter().any(|thread| thread.ends_with(" 0")), "{shown:?}");
    }
}
