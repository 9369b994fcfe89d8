//! Who runs in a place of its own.

use std::fs;
use std::path::Path;

/// A process inside, as this machine sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// This machine's number of it.
    pub pid: i32,
    /// Its number inside: the one that libvirtd and a pidfile know.
    pub inside: i32,
    /// What it was started with.
    pub arguments: Vec<String>,
}

impl Process {
    /// The program's name.
    #[must_use]
    pub fn name(&self) -> &str {
        self.arguments[0].rsplit('/').next().unwrap_or_default()
    }

    /// A field of its `/proc/PID/status`, or nothing if it has ended.
    #[must_use]
    pub fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let value = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
        value.unwrap_or_default().trim().to_owned()
    }
}

/// Those in the PID namespace of `init`, without it and without what has ended but for its parent's knowledge.
pub(super) fn of(init: i32) -> Vec<Process> {
    let place = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let Some(here) = place(init) else { return Vec::new() };
    let numbers = fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = numbers.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let mut processes: Vec<Process> = pids
        .filter(|&pid: &i32| pid != init && place(pid).as_ref() == Some(&here))
        .filter_map(|pid| {
            let command = fs::read(Path::new("/proc").join(pid.to_string()).join("cmdline")).ok()?;
            let words = command.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
            let mut arguments: Vec<String> = words.collect();
            arguments.pop();
            let mut process = Process { pid, inside: 0, arguments };
            let inside = process.status("NSpid");
            process.inside = inside.split_whitespace().last()?.parse().ok()?;
            // A zombie has no command line any more.
            (!process.arguments.is_empty()).then_some(process)
        })
        .collect();
    processes.sort_by_key(|process| process.inside);
    processes
}
