//! The machine's programs: started here, supervised, reaped.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;
use testbed_init::{Ended, Line, Status};

use crate::in_background;
use crate::port::{self, Port};

/// How long a program's end waits for its output.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Every program that init started and that hasn't ended.
///
/// One thread reaps all of them, and orphans of theirs: the first process has to, and a second waiter for a single program
/// would race with it. So nobody calls [`Child::wait`]; a child's end is looked up here under the lock that was held
/// while it was started.
#[derive(Clone)]
pub(crate) struct Programs {
    shared: Arc<Shared>,
    control: Arc<Port>,
}

struct Shared {
    /// By process: who is told of its end.
    running: Mutex<HashMap<i32, Sender<Status>>>,
    started: Condvar,
}

impl Programs {
    /// Starts to reap.
    pub(crate) fn new(control: Arc<Port>) -> Self {
        let shared = Arc::new(Shared { running: Mutex::default(), started: Condvar::new() });
        let reaper = Arc::clone(&shared);
        in_background("reaper", move || reaper.reap());
        Self { shared, control }
    }

    /// Starts a program. Its output and its end are sent as lines; with a `channel` its standard streams are that port.
    pub(crate) fn run(&self, program: &str, args: &[String], channel_name: Option<&str>) -> Result<i32, String> {
        let mut command = Command::new(program);
        command.args(args);
        match channel_name {
            Some(name) => {
                let port = port::open_file(name)?;
                let copy = || port.try_clone().map_err(|e| format!("port {name}: {e}"));
                command.stdin(copy()?).stdout(copy()?);
                // Errors go to the events, where a caller finds them apart from the program's own stream.
                command.stderr(Stdio::piped());
            }
            None => {
                command.stdin(Stdio::null());
                command.stdout(Stdio::piped()).stderr(Stdio::piped());
            }
        }
        let (ended, end) = channel();
        let mut child = self.start(&mut command, ended)?;
        let pid = pid_of(&child);
        // Each relay holds a copy of the sender until its pipe is at its end.
        let (relaying, relayed) = channel::<()>();
        if let Some(pipe) = child.stdout.take() {
            self.relay(pid, pipe, relaying.clone());
        }
        if let Some(pipe) = child.stderr.take() {
            self.relay(pid, pipe, relaying);
        }
        let control = Arc::clone(&self.control);
        in_background("end", move || {
            if let Ok(status) = end.recv() {
                // Its last words come before its end; but a child of its own may hold the pipe for longer.
                let _ = relayed.recv_timeout(LAST_WORDS);
                control.send(&Line::Exited { pid, status });
            }
        });
        Ok(pid)
    }

    /// Runs a program to its end, at most for `limit`.
    pub(crate) fn exec(&self, program: &str, args: &[String], limit: Duration) -> Result<Ended, String> {
        let mut command = Command::new(program);
        command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let (ended, end) = channel();
        let mut child = self.start(&mut command, ended)?;
        let pid = pid_of(&child);
        let stdout = child.stdout.take().map(read_all);
        let stderr = child.stderr.take().map(read_all);
        let status = match end.recv_timeout(limit) {
            Ok(status) => status,
            Err(_) => {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                end.recv().map_err(|e| format!("{program}: {e}"))?
            }
        };
        let text = |reader: Option<thread::JoinHandle<String>>| {
            reader.and_then(|thread| thread.join().ok()).unwrap_or_default()
        };
        Ok(Ended { status, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Runs a program on the console to its end.
    pub(crate) fn foreground(&self, program: &str, args: &[&str]) -> Result<Status, String> {
        let (ended, end) = channel();
        self.start(Command::new(program).args(args), ended)?;
        end.recv().map_err(|e| format!("{program}: {e}"))
    }

    fn start(&self, command: &mut Command, ended: Sender<Status>) -> Result<Child, String> {
        let mut running = self.shared.lock();
        let child = command.spawn().map_err(|e| format!("{}: {e}", command.get_program().display()))?;
        running.insert(pid_of(&child), ended);
        drop(running);
        self.shared.started.notify_one();
        Ok(child)
    }

    fn relay(&self, pid: i32, pipe: impl Read + Send + 'static, until_done: Sender<()>) {
        let control = Arc::clone(&self.control);
        in_background("relay", move || {
            let _until_done = until_done;
            for line in BufReader::new(pipe).split(b'\n') {
                let Ok(bytes) = line else { return };
                let text = String::from_utf8_lossy(&bytes).into_owned();
                println!("[{pid}] {text}");
                control.send(&Line::Output { pid, text });
            }
        });
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, HashMap<i32, Sender<Status>>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn reap(&self) -> ! {
        let peek = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
        loop {
            match waitid(Id::All, peek) {
                Err(Errno::ECHILD) => {
                    let running = self.lock();
                    if running.is_empty() {
                        drop(self.started.wait(running));
                    }
                }
                Ok(_) | Err(_) => self.reap_one(),
            }
        }
    }

    /// Takes an ended child, unless it was one that never got to run its program: such a one is reaped by who started it,
    /// who holds the lock.
    fn reap_one(&self) {
        let mut running = self.lock();
        let (pid, status) = match waitpid(None::<Pid>, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, Status::Code(code)),
            Ok(WaitStatus::Signaled(pid, signal, _)) => (pid, Status::Signal(signal as i32)),
            Ok(_) | Err(_) => return,
        };
        // Nobody asks for an orphan's status.
        if let Some(ended) = running.remove(&pid.as_raw()) {
            let _ = ended.send(status);
        }
    }
}

fn pid_of(child: &Child) -> i32 {
    // Linux's process ids are below 2^22.
    child.id().cast_signed()
}

fn read_all(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
