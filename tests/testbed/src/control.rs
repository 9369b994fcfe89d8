//! The caller's end of a machine's control channel.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use testbed_init::{Answer, Call, Line, Request, Status};

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The machine said no; its own words.
    #[error("{0}")]
    Refused(String),
    /// Nothing came back in time.
    #[error("no answer within {0:?}")]
    Silent(Duration),
    /// The channel is closed: the machine has ended.
    #[error("the machine is gone")]
    Gone,
    /// The answer is of another kind than the question.
    #[error("unexpected answer: {0:?}")]
    Unexpected(Box<Answer>),
}

/// A connection to a machine's first process.
#[derive(Debug)]
pub struct Control {
    stream: Mutex<UnixStream>,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    ready: bool,
    gone: bool,
    last_id: u64,
    waiting: HashMap<u64, Sender<Result<Answer, String>>>,
    programs: HashMap<i32, Seen>,
}

/// What was heard of a program.
#[derive(Debug, Default)]
struct Seen {
    output: Vec<String>,
    status: Option<Status>,
}

impl Control {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// connect(2)'s.
    pub(crate) fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        let lines = BufReader::new(stream.try_clone()?);
        let shared = Arc::new(Shared::default());
        let listener = Arc::clone(&shared);
        thread::Builder::new().name("testbed-control".to_owned()).spawn(move || listener.listen(lines))?;
        Ok(Self { stream: Mutex::new(stream), shared })
    }

    /// Waits until the machine takes calls; false after `limit` or when it is gone.
    pub(crate) fn wait_ready(&self, limit: Duration) -> bool {
        self.shared.wait(limit, |state| state.ready.then_some(())).is_some()
    }

    /// Asks, and waits for the answer at most for `limit`.
    ///
    /// # Errors
    /// [`CallError`].
    pub fn call(&self, request: Request, limit: Duration) -> Result<Answer, CallError> {
        let (answer, answered) = channel();
        let id = {
            let mut state = self.shared.lock();
            if state.gone {
                return Err(CallError::Gone);
            }
            state.last_id += 1;
            let id = state.last_id;
            state.waiting.insert(id, answer);
            id
        };
        let mut line = serde_json::to_string(&Call { id, request }).expect("requests are plain data");
        line.push('\n');
        let sent = self.stream.lock().unwrap_or_else(PoisonError::into_inner).write_all(line.as_bytes());
        if sent.is_err() {
            return Err(CallError::Gone);
        }
        match answered.recv_timeout(limit) {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(words)) => Err(CallError::Refused(words)),
            Err(RecvTimeoutError::Disconnected) => Err(CallError::Gone),
            Err(RecvTimeoutError::Timeout) => {
                self.shared.lock().waiting.remove(&id);
                Err(CallError::Silent(limit))
            }
        }
    }

    /// Everything that program `pid` wrote so far, by lines.
    #[must_use]
    pub fn output(&self, pid: i32) -> Vec<String> {
        self.shared.lock().programs.get(&pid).map(|program| program.output.clone()).unwrap_or_default()
    }

    /// Waits until program `pid` has written a line that holds `needle`, and returns it; `None` after `limit`.
    #[must_use]
    pub fn wait_for_output(&self, pid: i32, needle: &str, limit: Duration) -> Option<String> {
        self.shared.wait(limit, |state| {
            let output = &state.programs.get(&pid)?.output;
            output.iter().find(|line| line.contains(needle)).cloned()
        })
    }

    /// Waits for the end of program `pid`; `None` after `limit`.
    #[must_use]
    pub fn wait_for_exit(&self, pid: i32, limit: Duration) -> Option<Status> {
        self.shared.wait(limit, |state| state.programs.get(&pid)?.status)
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `look` finds something, the machine is gone, or `limit` is over.
    fn wait<T>(&self, limit: Duration, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if state.gone || left.is_zero() {
                return None;
            }
            let (woken, _) = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner);
            state = woken;
        }
    }

    fn listen(&self, lines: impl BufRead) {
        for line in lines.lines() {
            let Ok(line) = line else { break };
            // Anything else on this channel is a line that was cut off when its sender died.
            if let Ok(line) = serde_json::from_str(&line) {
                self.take(line);
            }
        }
        let mut state = self.lock();
        state.gone = true;
        state.waiting.clear();
        self.changed.notify_all();
    }

    fn take(&self, line: Line) {
        let mut state = self.lock();
        match line {
            Line::Ready => state.ready = true,
            Line::Reply { id, result } => {
                if let Some(waiting) = state.waiting.remove(&id) {
                    // Whoever asked may have given up.
                    let _ = waiting.send(result);
                }
            }
            Line::Output { pid, text } => state.programs.entry(pid).or_default().output.push(text),
            Line::Exited { pid, status } => {
                state.programs.entry(pid).or_default().status = Some(status);
            }
        }
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// Longer than an answer takes on a busy machine.
    const LIMIT: Duration = Duration::from_secs(60);

    /// A machine's end, played by hand.
    fn pair() -> (Control, UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let control = Control::connect(&path).unwrap();
        (control, listener.accept().unwrap().0)
    }

    fn say(machine: &mut UnixStream, line: &Line) {
        let text = serde_json::to_string(line).unwrap();
        writeln!(machine, "{text}").unwrap();
    }

    #[test]
    fn an_answer_finds_its_question() {
        let (control, mut machine) = pair();
        let answers = thread::spawn(move || {
            let mut call = String::new();
            BufReader::new(machine.try_clone().unwrap()).read_line(&mut call).unwrap();
            let call: Call = serde_json::from_str(&call).unwrap();
            let reply = |id, pid| Line::Reply { id, result: Ok(Answer::Pid(pid)) };
            say(&mut machine, &reply(call.id + 1, 1));
            say(&mut machine, &reply(call.id, 2));
            machine
        });
        let answer = control.call(Request::List, LIMIT).unwrap();
        assert_eq!(answer, Answer::Pid(2));
        drop(answers.join());
    }

    #[test]
    fn a_lost_machine_answers_at_once() {
        let (control, machine) = pair();
        drop(machine);
        // Who waits for all of that time is ended before.
        let limit = Duration::from_secs(3600);
        let error = control.call(Request::List, limit).unwrap_err();
        assert!(matches!(error, CallError::Gone));
        assert!(!control.wait_ready(limit));
    }

    #[test]
    fn a_silent_machine_is_waited_for_no_longer_than_said() {
        let (control, _machine) = pair();
        let limit = Duration::from_millis(20);
        let error = control.call(Request::List, limit).unwrap_err();
        assert!(matches!(error, CallError::Silent(_)));
    }

    #[test]
    fn programs_are_followed() {
        let (control, mut machine) = pair();
        let pid = 9;
        for text in ["one", "two"] {
            let text = text.to_owned();
            say(&mut machine, &Line::Output { pid, text });
        }
        let status = Status::Code(3);
        say(&mut machine, &Line::Exited { pid, status });
        assert_eq!(control.wait_for_exit(pid, LIMIT), Some(status));
        assert_eq!(control.output(pid), ["one", "two"]);
        assert_eq!(control.wait_for_output(pid, "tw", LIMIT).as_deref(), Some("two"));
    }
}
