//! Who waits for the other side, and for how long: nobody waits for ever.

use std::io::{self, IoSlice, Read, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use crate::MigrationError;
use crate::connection::Cut;
use crate::ending::{Ending, lock};
use crate::stream::{Receiver, Record, Sender, StreamError};

/// How often somebody looks.
const TICK: Duration = Duration::from_millis(250);
/// How long a connection is silent before it says that it is there, or a quarter of this side's limit: the other side's is hardly shorter.
const PULSE: Duration = Duration::from_secs(1);

pub(crate) type LineSender = Sender<Watched<Box<dyn Write + Send>>>;
pub(crate) type LineReceiver = Receiver<Watched<Box<dyn Read + Send>>>;

/// A connection past its preamble.
pub(crate) struct Line {
    pub(crate) number: u16,
    pub(crate) sender: Mutex<LineSender>,
}

impl Line {
    /// Sends records and has them leave.
    pub(crate) fn send(&self, records: &[Record<'_>]) -> Result<u64, MigrationError> {
        let mut sender = lock(&self.sender);
        let before = sender.sent();
        sender.send_all(records).and_then(|()| sender.flush()).map_err(MigrationError::stream(self.number))?;
        Ok(sender.sent() - before)
    }
}

/// Watches over the connections of a migration.
pub(crate) struct Watchman {
    limit: Duration,
    state: Mutex<Watching>,
    stops: Condvar,
}

#[derive(Default)]
struct Watching {
    calls: Vec<Watched<()>>,
    lines: Vec<Arc<Line>>,
    stop: bool,
}

impl Watchman {
    /// Who lets a call take so long.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, state: Mutex::default(), stops: Condvar::new() }
    }

    /// What reads from a connection. Calls are watched where the other side has to say something at all.
    pub(crate) fn receiver(&self, number: u16, reader: Box<dyn Read + Send>, is_watched: bool) -> LineReceiver {
        Receiver::new(self.watched(number, "has said nothing", reader, is_watched))
    }

    /// What writes to a connection, and says that it is there each second if `has_pulse`.
    pub(crate) fn line(&self, number: u16, writer: Box<dyn Write + Send>, has_pulse: bool) -> Arc<Line> {
        let writer = self.watched(number, "has taken nothing", writer, has_pulse);
        let line = Arc::new(Line { number, sender: Mutex::new(Sender::new(writer)) });
        if has_pulse {
            lock(&self.state).lines.push(Arc::clone(&line));
        }
        line
    }

    fn watched<T>(&self, connection: u16, what: &'static str, inner: T, is_watched: bool) -> Watched<T> {
        let calls = Arc::new(AtomicU64::new(0));
        if is_watched {
            let call = Watched { inner: (), calls: Arc::clone(&calls), connection, what };
            lock(&self.state).calls.push(call);
        }
        Watched { inner, calls, connection, what }
    }

    /// Until [`Self::stop`]: looks for calls that take too long, and calls `tick` each time.
    pub(crate) fn watch(&self, ending: &Ending, mut tick: impl FnMut()) {
        let mut seen: Vec<(u64, Instant)> = Vec::new();
        while !self.stops_within(TICK) {
            tick();
            let now = Instant::now();
            let state = lock(&self.state);
            for (index, call) in state.calls.iter().enumerate() {
                let count = call.calls.load(Ordering::Relaxed);
                match seen.get(index) {
                    Some((before, since)) if *before == count && count % 2 == 1 => {
                        if now.duration_since(*since) > self.limit {
                            let (connection, what, limit) = (call.connection, call.what, self.limit);
                            ending.fail(MigrationError::Stalled { connection, what, limit });
                        }
                    }
                    Some(_) => seen[index] = (count, now),
                    None => seen.push((count, now)),
                }
            }
        }
    }

    /// Until [`Self::stop`]: has silent connections say that they are there.
    pub(crate) fn pulse(&self) {
        let mut sent: Vec<u64> = Vec::new();
        while !self.stops_within(PULSE.min(self.limit / 4)) {
            let lines = lock(&self.state).lines.clone();
            sent.resize(lines.len(), u64::MAX);
            for (line, sent) in lines.iter().zip(&mut sent) {
                // Somebody else has it: it isn't silent.
                let Ok(mut sender) = line.sender.try_lock() else { continue };
                if sender.sent() == *sent {
                    // Whoever needs the connection next finds that it is broken.
                    _ = sender.send(&Record::Alive).and_then(|()| sender.flush());
                }
                *sent = sender.sent();
            }
        }
    }

    /// Ends the other two.
    pub(crate) fn stop(&self) {
        lock(&self.state).stop = true;
        self.stops.notify_all();
    }

    fn stops_within(&self, time: Duration) -> bool {
        let state = lock(&self.state);
        let waited = self.stops.wait_timeout_while(state, time, |state| !state.stop);
        waited.unwrap_or_else(PoisonError::into_inner).0.stop
    }
}

/// Something whose calls are counted as they begin and end: an odd count is a call under way.
pub(crate) struct Watched<T> {
    inner: T,
    calls: Arc<AtomicU64>,
    connection: u16,
    what: &'static str,
}

impl<T> Watched<T> {
    fn call<R>(&mut self, call: impl FnOnce(&mut T) -> R) -> R {
        self.calls.fetch_add(1, Ordering::Relaxed);
        let result = call(&mut self.inner);
        self.calls.fetch_add(1, Ordering::Relaxed);
        result
    }
}

impl<T: Read> Read for Watched<T> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        self.call(|inner| inner.read(to))
    }
}

impl<T: Write> Write for Watched<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.call(|inner| inner.write(bytes))
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.call(|inner| inner.write_vectored(slices))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.call(Write::flush)
    }
}

/// Does something with a connection that is cut if it takes longer than `limit`.
///
/// # Errors
/// [`StreamError::Late`] if it was; [`StreamError::Io`] if there is no thread for that.
pub(crate) fn within<T>(
    limit: Duration,
    cut: &Cut,
    act: impl FnOnce() -> Result<T, StreamError>,
) -> Result<T, StreamError> {
    let (done, waits) = mpsc::channel::<()>();
    thread::scope(|scope| {
        let watch = move || {
            let is_late = waits.recv_timeout(limit) == Err(mpsc::RecvTimeoutError::Timeout);
            if is_late {
                cut();
            }
            is_late
        };
        let watches = thread::Builder::new().spawn_scoped(scope, watch)?;
        let result = act();
        drop(done);
        let is_late = watches.join().unwrap_or(false);
        result.map_err(|error| if is_late { StreamError::Late { limit } } else { error })
    })
}
