//! A long command as one line on the terminal: what runs, for how long, how it ended.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::paths;
use testbed::process::Child;

/// How often progress is shown where there is no terminal that could be overwritten.
const STILL_AT_IT: Duration = Duration::from_secs(30);
/// How long a command has to end when it is asked to.
const GRACE: Duration = Duration::from_secs(10);
/// Lines of a failed command's output that are shown.
const SHOWN: usize = 60;

/// How a step ended.
pub(crate) struct Outcome {
    pub(crate) ok: bool,
    /// What the command printed, to both of its streams.
    pub(crate) output: String,
}

/// Runs `command`, at most for `limit`, with its output in a file; shows the end of it where it fails.
pub(crate) fn run(title: &str, command: Command, limit: Duration) -> Result<Outcome, String> {
    follow(Progress::new(title), command, limit)
}

/// [`run`] as one of several at once: it shows only how it ended.
pub(crate) fn run_beside(title: &str, command: Command, limit: Duration) -> Result<Outcome, String> {
    follow(Progress { title, shown_as: Shown::End, shown: Duration::ZERO }, command, limit)
}

fn follow(mut progress: Progress<'_>, mut command: Command, limit: Duration) -> Result<Outcome, String> {
    let title = progress.title;
    let log = log_file(title)?;
    let output = File::create(&log).map_err(|e| format!("{}: {e}", log.display()))?;
    let errors = output.try_clone().map_err(|e| format!("{}: {e}", log.display()))?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors);

    let began = Instant::now();
    let mut child = Child::spawn(command).map_err(|e| with_sources(&e))?;
    let status = loop {
        let waited = child.wait(Duration::from_millis(200));
        match waited.map_err(|e| format!("{title}: {e}"))? {
            Some(status) => break Some(status),
            None if began.elapsed() > limit => break None,
            None => progress.show(began.elapsed()),
        }
    };
    if status.is_none() {
        // Asked to end, a test runner ends its tests; killed, it would leave them.
        let pid = Pid::from_raw(child.id().cast_signed());
        let _ = kill(pid, Signal::SIGTERM);
        let _ = child.wait(GRACE);
    }

    let text = String::from_utf8_lossy(&fs::read(&log).unwrap_or_default()).into_owned();
    let ok = status.is_some_and(|status| status.success());
    progress.end(ok, began.elapsed());
    if !ok {
        let why = match status {
            Some(status) => status.to_string(),
            None => format!("took longer than {} s", limit.as_secs()),
        };
        let lines: Vec<&str> = text.lines().collect();
        println!("{}", lines[lines.len().saturating_sub(SHOWN)..].join("\n"));
        println!("{title}: {why}; all of its output is in {}", log.display());
    }
    Ok(Outcome { ok, output: text })
}

/// `command` with a niceness of its own; 0 is everybody's.
pub(crate) fn nice(niceness: &str, command: &Command) -> Command {
    let mut nice = Command::new("nice");
    nice.args(["-n", niceness]).arg(command.get_program()).args(command.get_args());
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

/// An error and what caused it, on one line.
pub(crate) fn with_sources(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line.push_str(": ");
        line.push_str(&error.to_string());
        cause = error.source();
    }
    line
}

fn log_file(title: &str) -> Result<PathBuf, String> {
    let dir = paths::target().join("xtask");
    fs::create_dir_all(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
    let name: String = title.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    Ok(dir.join(format!("{name}.log")))
}

struct Progress<'a> {
    title: &'a str,
    shown_as: Shown,
    shown: Duration,
}

/// What of a step is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Shown {
    /// One line that is written over.
    Line,
    /// A line every now and then.
    Lines,
    /// How it ended.
    End,
}

impl<'a> Progress<'a> {
    fn new(title: &'a str) -> Self {
        let shown_as = if io::stdout().is_terminal() { Shown::Line } else { Shown::Lines };
        if shown_as == Shown::Lines {
            println!("{title} …");
        }
        Self { title, shown_as, shown: Duration::ZERO }
    }

    fn show(&mut self, elapsed: Duration) {
        let every = match self.shown_as {
            Shown::Line => Duration::from_secs(1),
            Shown::Lines => STILL_AT_IT,
            Shown::End => return,
        };
        if elapsed < self.shown + every {
            return;
        }
        self.shown = elapsed;
        let line = format!("{} … {} s", self.title, elapsed.as_secs());
        if self.shown_as == Shown::Line {
            print!("\r{line}");
            let _ = io::stdout().flush();
        } else {
            println!("{line}");
        }
    }

    fn end(&self, ok: bool, elapsed: Duration) {
        let start = if self.shown_as == Shown::Line { "\r\x1b[K" } else { "" };
        let word = if ok { "ok" } else { "FAILED" };
        println!("{start}{:<44} {word:<6} {:>6.1} s", self.title, elapsed.as_secs_f64());
    }
}
