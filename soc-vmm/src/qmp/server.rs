//! Monitors over UNIX sockets.
//!
//! Each monitor is one task that owns everything it uses, so a bad client harms nobody: it can hold one command of
//! [`super::MAX_COMMAND`] bytes and one read's worth of the next, waits for its own commands only, and is dropped when it
//! doesn't take its replies and events.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::unix::WriteHalf;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{Semaphore, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::types::{Greeting, Response, Timestamp};
use super::{QmpError, Session, Step};
use crate::control::{Event, EventKind, ListeningSocket, VmHandle};
use crate::rights::{self, Received};

/// Monitors of one socket at a time: who fills one has not filled another. A connection more is told so and closed.
pub const MAX_MONITORS: usize = 32;

/// Bytes read at once.
const READ: usize = 16 << 10;
/// How long a client may take to make room for a reply or an event.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long monitors may take to hear the last words of a VM that ended.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long whoever passed a listening descriptor may take to connect to it.
const MEETING: Duration = Duration::from_secs(2);
/// Pause after a failed accept, so that a lack of descriptors doesn't spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The monitors of one VM.
#[derive(Debug)]
pub struct Server {
    sockets: Vec<(oneshot::Sender<()>, JoinHandle<()>)>,
    /// Of the sockets that were passed to this process: whether anybody has connected.
    met: Vec<watch::Receiver<bool>>,
}

/// When a monitor is greeted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Greet {
    /// At once: a VM that is being built can be ended by it.
    AtOnce,
    /// When the machine is built: clients of QEMU's count on that.
    WhenBuilt,
}

impl Server {
    /// Serves `vm` on each of `sockets`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A socket can't be watched.
    pub fn start(vm: &VmHandle, sockets: Vec<ListeningSocket>, greet: Greet) -> io::Result<Self> {
        let mut started = Vec::with_capacity(sockets.len());
        let mut met = Vec::new();
        for socket in sockets {
            let listener = UnixListener::from_std(socket.listener().try_clone()?)?;
            let (close, closing) = oneshot::channel();
            let (meet, meeting) = watch::channel(false);
            met.extend(socket.is_inherited().then_some(meeting));
            let task = tokio::spawn(listen(listener, socket, vm.clone(), greet, meet, closing));
            started.push((close, task));
        }
        Ok(Self { sockets: started, met })
    }

    /// Waits until somebody has connected to each socket that was passed to this process, 2 s at most. Who passes a socket connects next,
    /// and takes one that nobody listens on any more for an error of its own: libvirtd then doesn't look for what this process said.
    pub async fn until_met(&mut self) {
        let all = async {
            for met in &mut self.met {
                // An error: it is not listened on any more.
                let _ = met.wait_for(|met| *met).await;
            }
        };
        let _ = tokio::time::timeout(MEETING, all).await;
    }

    /// Removes the sockets and lets the monitors hear what the VM said last. Its [`crate::control::VmControl`] should be gone
    /// by now: that ends the monitors. Those that don't end within 2 s are cut off.
    pub async fn close(self) {
        let (closes, tasks): (Vec<_>, Vec<_>) = self.sockets.into_iter().unzip();
        // An error says that a task ended already; the same below.
        for close in closes {
            let _ = close.send(());
        }
        for task in tasks {
            let _ = task.await;
        }
    }
}

async fn listen(
    listener: UnixListener,
    socket: ListeningSocket,
    vm: VmHandle,
    greet: Greet,
    meet: watch::Sender<bool>,
    mut closing: oneshot::Receiver<()>,
) {
    let room = Arc::new(Semaphore::new(MAX_MONITORS));
    let (over_in, over) = watch::channel(false);
    let mut monitors = JoinSet::new();
    let mut told_full = false;
    let mut failing = false;
    loop {
        tokio::select! {
            _ = &mut closing => break,
            Some(_) = monitors.join_next() => {}
            accepted = listener.accept() => {
                // Once, however long it lasts: a log must not grow with it.
                let failed = accepted.is_err();
                meet.send_if_modified(|met| !failed && !std::mem::replace(met, true));
                if std::mem::replace(&mut failing, failed) != failed {
                    let path = socket.path().display();
                    match &accepted {
                        Ok(_) => tracing::info!("QMP: monitors of {path} are accepted again"),
                        Err(e) => tracing::warn!("QMP: can't accept on {path}: {e}; tries on"),
                    }
                }
                match accepted {
                Ok((stream, _)) => match room.clone().try_acquire_owned() {
                    Ok(place) => {
                        told_full = false;
                        let (vm, over) = (vm.clone(), over.clone());
                        monitors.spawn(async move {
                            if let Err(why) = monitor(stream, vm, greet, over).await {
                                tracing::debug!("QMP: a monitor was dropped: {why}");
                            }
                            drop(place);
                        });
                    }
                    Err(_) => {
                        turn_away(stream);
                        if !std::mem::replace(&mut told_full, true) {
                            let path = socket.path().display();
                            tracing::warn!("QMP: {MAX_MONITORS} monitors are connected to {path}; more are turned away");
                        }
                    }
                },
                Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
                }
            },
        }
    }
    over_in.send_replace(true);
    drop(socket);
    let rest = async { while monitors.join_next().await.is_some() {} };
    // What is left after that is cut off when the set is dropped.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, rest).await;
}

/// Tells a client that there is no room, and waits for nothing: a new connection has room for a line.
fn turn_away(stream: UnixStream) {
    let why = format!("{MAX_MONITORS} monitors are connected here already: close one, or use another socket");
    let refusal = Response::to(None, Err(QmpError::generic(why)));
    if let (Ok(mut stream), Ok(line)) = (stream.into_std(), line(&refusal)) {
        let _ = stream.write(&line);
    }
}

/// Serves one client until it goes, misbehaves, or the VM has ended.
async fn monitor(
    mut stream: UnixStream,
    vm: VmHandle,
    greet: Greet,
    mut over: watch::Receiver<bool>,
) -> io::Result<()> {
    if greet == Greet::WhenBuilt && !vm.built().await {
        // Why not is said elsewhere: who waits here shall not see the end of it before.
        let _ = over.wait_for(|over| *over).await;
        return Ok(());
    }
    let (reader, mut writer) = stream.split();
    let Some(mut events) = vm.events() else { return Ok(()) };
    send(&mut writer, &Greeting::ours()).await?;

    let mut session = Session::new(vm);
    let mut buffer = vec![0; READ];
    let mut unread = 0..0;
    let mut running = None;
    loop {
        while running.is_none() {
            let mut input = &buffer[unread.clone()];
            let step = session.next(&mut input);
            unread.start = unread.end - input.len();
            match step {
                None => break,
                Some(Step::Reply(response)) => send(&mut writer, &response).await?,
                Some(Step::Close(response)) => return send(&mut writer, &response).await,
                Some(Step::Run(call)) => running = Some(Box::pin(call.run())),
            }
        }
        tokio::select! {
            // Events first: who hears `stop` return has heard STOP.
            biased;
            event = events.recv() => match event {
                Ok(event) if session.is_negotiated() => send(&mut writer, &WireEvent::from(&event)).await?,
                Ok(_) => {}
                Err(RecvError::Lagged(_)) => return Err(behind()),
                Err(RecvError::Closed) => {
                    // The VM has ended, so this answers at once.
                    if let Some(call) = running {
                        send(&mut writer, &call.await).await?;
                    }
                    return Ok(());
                }
            },
            response = finished(&mut running) => {
                // What came since this turn asked for events came before the response.
                loop {
                    match events.try_recv() {
                        Ok(event) => send(&mut writer, &WireEvent::from(&event)).await?,
                        Err(TryRecvError::Lagged(_)) => return Err(behind()),
                        Err(TryRecvError::Empty | TryRecvError::Closed) => break,
                    }
                }
                send(&mut writer, &response).await?;
            }
            read = receive(reader.as_ref(), &mut buffer), if running.is_none() => {
                let Received { bytes, fds, lost } = read?;
                // Where some were lost none is kept: an earlier one would be taken in their place.
                if lost || !fds.is_empty() {
                    session.passed(fds);
                }
                match bytes {
                    0 => return Ok(()),
                    n => unread = 0..n,
                }
            }
        }
    }
}

/// A client that is too slow for its VM.
fn behind() -> io::Error {
    io::Error::other("it doesn't take its events")
}

/// Bytes and what descriptors came with them. Safe to cancel.
async fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<Received> {
    loop {
        stream.readable().await?;
        match stream.try_io(Interest::READABLE, || Ok(rights::receive(&stream, buffer)?)) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            received => return received,
        }
    }
}

/// The response of the running call, which is then none any more; never ready without one. Safe to cancel.
async fn finished<F: Future<Output = Response> + Unpin>(running: &mut Option<F>) -> Response {
    match running {
        None => std::future::pending().await,
        Some(call) => {
            let response = call.await;
            *running = None;
            response
        }
    }
}

async fn send<T: Serialize>(writer: &mut WriteHalf<'_>, message: &T) -> io::Result<()> {
    let line = line(message)?;
    tokio::time::timeout(WRITE_TIMEOUT, writer.write_all(&line)).await.map_err(|_| io::ErrorKind::TimedOut)?
}

fn line<T: Serialize>(message: &T) -> serde_json::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.extend_from_slice(b"\r\n");
    Ok(line)
}

/// An event as it goes over the wire.
#[derive(Serialize)]
struct WireEvent {
    timestamp: Timestamp,
    #[serde(flatten)]
    kind: EventKind,
}

impl From<&Event> for WireEvent {
    fn from(event: &Event) -> Self {
        let since = event.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = Timestamp { seconds: since.as_secs(), microseconds: since.subsec_micros() };
        Self { timestamp, kind: event.kind.clone() }
    }
}
