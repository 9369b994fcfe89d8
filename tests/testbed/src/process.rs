//! Child processes that can't outlive this one.
//!
//! A machine under emulation takes a whole core for as long as it runs, so no path, not even a killed test, may leave one
//! behind: children are told by the kernel to die with their parent, and a [`Child`] is killed when it is dropped.
#![allow(unsafe_code)] // pre_exec, for PR_SET_PDEATHSIG

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getppid};

/// A command that couldn't be started or didn't succeed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// It couldn't be started.
    #[error("{program} can't be started")]
    Start {
        /// The program's name.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{command} failed ({status}){output}")]
    Failed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: ExitStatus,
        /// The last lines of its standard error after a colon, if they were captured.
        output: String,
    },
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// It can't be started or ends with another status than 0.
pub fn run(command: &mut Command) -> Result<String, CommandError> {
    run_bytes(command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// Runs `command` to its end and returns its standard output, which needn't be text.
///
/// # Errors
/// It can't be started or ends with another status than 0.
pub fn run_bytes(command: &mut Command) -> Result<Vec<u8>, CommandError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().map_err(|source| CommandError::Start { program, source })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = text.trim().lines().collect();
    let last = lines[lines.len().saturating_sub(8)..].join("; ");
    Err(CommandError::Failed {
        command: line_of(command),
        status: output.status,
        output: if last.is_empty() { last } else { format!(": {last}") },
    })
}

/// `command` as one line, to be shown.
pub(crate) fn line_of(command: &Command) -> String {
    let mut line = command.get_program().to_string_lossy().into_owned();
    for arg in command.get_args() {
        line.push(' ');
        line.push_str(&arg.to_string_lossy());
    }
    line
}

/// A child process that is killed and reaped when this handle is dropped, and by the kernel when this process ends.
#[derive(Debug)]
pub struct Child {
    inner: std::process::Child,
}

impl Child {
    /// Starts `command`.
    ///
    /// # Errors
    /// It can't be started.
    pub fn spawn(command: Command) -> Result<Self, CommandError> {
        let program = command.get_program().to_string_lossy().into_owned();
        spawn_on_lasting_thread(command)
            .map(|inner| Self { inner })
            .map_err(|source| CommandError::Start { program, source })
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.inner.id()
    }

    /// Its standard input, if it was started with a pipe there and nobody took it.
    pub fn stdin(&mut self) -> Option<ChildStdin> {
        self.inner.stdin.take()
    }

    /// Its standard output, if it was started with a pipe there and nobody took it.
    pub fn stdout(&mut self) -> Option<ChildStdout> {
        self.inner.stdout.take()
    }

    /// Kills it.
    ///
    /// # Errors
    /// It was reaped already.
    pub fn kill(&mut self) -> io::Result<()> {
        self.inner.kill()
    }

    /// Its exit status if it has ended.
    ///
    /// # Errors
    /// waitpid(2)'s.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.inner.try_wait()
    }

    /// Waits for its end, at most for `limit`; `None` if it still runs then.
    ///
    /// # Errors
    /// waitpid(2)'s.
    pub fn wait(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.inner.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // Both fail only if it was reaped already.
        let _ = self.inner.kill();
        let _ = self.inner.wait();
    }
}

/// PR_SET_PDEATHSIG counts from the *thread* that forked, and a test's thread ends before its process. So one thread, which
/// lasts as long as the process, starts every child.
fn spawn_on_lasting_thread(mut command: Command) -> io::Result<std::process::Child> {
    type Job = (Command, Sender<io::Result<std::process::Child>>);
    static SPAWNER: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();

    let parent = Pid::this();
    // SAFETY: between fork and exec only prctl(2) and getppid(2) are called, both async-signal-safe, and nothing is allocated:
    // io::Error from an errno or from a kind holds no heap memory.
    unsafe {
        command.pre_exec(move || {
            prctl::set_pdeathsig(Signal::SIGKILL)?;
            // The parent may have ended before the line above.
            if getppid() == parent { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
        });
    }
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = channel::<Job>();
        thread::spawn(move || {
            for (mut command, answer) in queue {
                // A caller that is gone needs no child: dropping the answer's receiver is its choice.
                if let Err(unsent) = answer.send(command.spawn())
                    && let Ok(mut child) = unsent.0
                {
                    let _ = child.kill();
                    let _ = child.wait();
                }
            }
        });
        Mutex::new(jobs)
    });
    let (answer, result) = channel();
    spawner
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .send((command, answer))
        .map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
    result.recv().map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::kill;
    use std::io::{BufRead, BufReader};
    use std::process::Stdio;

    #[test]
    fn a_dropped_child_is_gone() {
        let mut sleep = Command::new("sleep");
        sleep.arg("60");
        let child = Child::spawn(sleep).unwrap();
        let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
        assert!(kill(pid, None).is_ok());
        drop(child);
        assert!(kill(pid, None).is_err());
    }

    #[test]
    fn a_child_outlives_the_thread_that_asked_for_it() {
        let mut child = thread::spawn(|| {
            let mut sleep = Command::new("sleep");
            sleep.arg("60");
            Child::spawn(sleep).unwrap()
        })
        .join()
        .unwrap();
        assert!(child.wait(Duration::from_millis(200)).unwrap().is_none());
    }

    #[test]
    fn a_killed_parent_leaves_no_child() {
        // This test is run twice: by the harness, and by itself as the parent that is killed.
        const TO_BE_KILLED: &str = "TESTBED_TO_BE_KILLED";
        if std::env::var_os(TO_BE_KILLED).is_some() {
            let mut sleep = Command::new("sleep");
            sleep.arg("60");
            let child = Child::spawn(sleep).unwrap();
            println!("child {}", child.id());
            thread::sleep(Duration::from_secs(60));
        }
        let mut this = Command::new(std::env::current_exe().unwrap());
        this.args(["--exact", "process::tests::a_killed_parent_leaves_no_child", "--nocapture"])
            .env(TO_BE_KILLED, "1")
            .stdout(Stdio::piped());
        let mut parent = Child::spawn(this).unwrap();
        let mut lines = BufReader::new(parent.stdout().unwrap()).lines();
        let pid = lines.find_map(|line| line.unwrap().split_once("child ")?.1.trim().parse().ok());
        let grandchild = Pid::from_raw(pid.unwrap());
        assert!(kill(grandchild, None).is_ok());

        parent.kill().unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        // Whoever adopted it may take a moment to reap it: a zombie is as good as gone.
        while alive(grandchild) {
            assert!(Instant::now() < end, "process {grandchild} lives on");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn alive(pid: Pid) -> bool {
        std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn a_failure_carries_the_commands_own_words() {
        let error = run(Command::new("sh").args(["-c", "echo because >&2; exit 3"])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("because") && text.contains('3'), "{text}");
    }
}
