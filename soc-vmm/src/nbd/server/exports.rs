//! A VM's NBD server: its door, its exports, its connections.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{Builder, JoinHandle};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::broadcast::WeakSender;

use super::{Gallery, serve};
use crate::block::{BlockBackend, BlockError};
use crate::cli::with_causes;
use crate::control::{Event, EventKind};
use crate::nbd::socket::Listener;
use crate::nbd::wire::flag;
use crate::nbd::{Address, NAME_MOST, Socket};

/// Connections at once; one more is closed.
const CONNECTIONS: usize = 32;

/// A disk that is shown.
#[derive(Clone)]
pub struct Export {
    /// By which it is known here.
    pub id: String,
    /// By which clients ask for it.
    pub name: String,
    /// The block node.
    pub node: String,
    /// Clients may write it.
    pub writable: bool,
    /// What holds its bytes.
    pub image: Arc<dyn BlockBackend>,
    /// It was told that it fails.
    complained: Arc<AtomicBool>,
}

impl Export {
    /// Shows that node's image.
    pub fn new(id: String, name: String, node: String, writable: bool, image: Arc<dyn BlockBackend>) -> Self {
        Self { id, name, node, writable, image, complained: Arc::default() }
    }

    /// What clients are told that it can do.
    pub(super) fn flags(&self) -> u16 {
        // A flush is for the writes of all connections.
        let always = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::CAN_MULTI_CONN;
        always | if self.writable { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES } else { flag::READ_ONLY }
    }

    /// Tells of an error of the image, once: clients can bring it about without end.
    pub(super) fn complain(&self, verb: &str, error: &BlockError) {
        if !self.complained.swap(true, Ordering::Relaxed) {
            tracing::warn!(export = self.id, "can't {verb}: {}", with_causes(error));
        }
    }
}

/// An export, as monitors see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its id.
    pub id: String,
    /// The block node.
    pub node: String,
}

/// Why something can't be shown, or can't be done to the server.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// It has one.
    #[error("NBD server already running")]
    Running,
    /// It has none.
    #[error("NBD server not running")]
    NotRunning,
    /// The door can't be opened.
    #[error("can't listen at {0}")]
    Listen(String, #[source] io::Error),
    /// Another export has that id, or that name.
    #[error("export '{0}' is there already: give another id and name")]
    Taken(String),
    /// A name longer than a client could say.
    #[error("an export's name has at most {NAME_MOST} bytes")]
    Name,
    /// There is no such export.
    #[error("Export '{0}' is not found")]
    NotFound(String),
    /// Clients are at it.
    #[error("export '{0}' has clients: say mode=hard to end them")]
    InUse(String),
    /// The image can't be had for it.
    #[error("node '{0}'")]
    Image(String, #[source] BlockError),
    /// The VM has ended.
    #[error("the VM has ended")]
    Ended,
}

/// The exports of one VM. It keeps no image past [`Exports::end`].
pub struct Exports {
    events: WeakSender<Event>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    door: Option<Door>,
    shown: BTreeMap<String, Export>,
    peers: Vec<Arc<Peer>>,
    ended: bool,
}

struct Door {
    stop: Arc<EventFd>,
    thread: JoinHandle<()>,
    /// Clients at once.
    most: usize,
}

/// A connection.
struct Peer {
    socket: Socket,
    /// The id of the export that it has.
    export: Mutex<Option<String>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    gone: AtomicBool,
}

impl Exports {
    /// None yet, and no server; `events` are the monitors'.
    pub fn new(events: WeakSender<Event>) -> Self {
        Self { events, state: Mutex::default() }
    }

    /// Opens the door: from now on clients come in, `most` at once at most (none: 32). The port that it has, over TCP.
    ///
    /// # Errors
    /// It is open, or can't be.
    pub fn open(self: &Arc<Self>, address: &Address, most: Option<u32>) -> Result<Option<u16>, ExportError> {
        let mut state = self.state();
        if state.ended {
            return Err(ExportError::Ended);
        }
        if state.door.is_some() {
            return Err(ExportError::Running);
        }
        let failed = |e: io::Error| ExportError::Listen(address.to_string(), e);
        let listener = Listener::bind(address).map_err(failed)?;
        let port = listener.port();
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let stop = Arc::new(EventFd::from_value_and_flags(0, flags).map_err(|e| failed(e.into()))?);
        let (this, ring) = (Arc::downgrade(self), stop.clone());
        let thread = Builder::new().name("nbd".into()).spawn(move || listen(&listener, &ring, &this));
        let most = most.filter(|most| *most > 0).map_or(CONNECTIONS, |most| CONNECTIONS.min(most as usize));
        state.door = Some(Door { stop, thread: thread.map_err(failed)?, most });
        Ok(port)
    }

    /// Closes the door, and ends all clients and exports.
    ///
    /// # Errors
    /// There is no server.
    pub fn close(&self) -> Result<(), ExportError> {
        let (door, shown, peers) = {
            let mut state = self.state();
            let door = state.door.take().ok_or(ExportError::NotRunning)?;
            (door, std::mem::take(&mut state.shown), std::mem::take(&mut state.peers))
        };
        door.close();
        peers.iter().for_each(|peer| peer.end());
        shown.into_values().for_each(|export| self.tell_gone(export.id));
        Ok(())
    }

    /// Shows an image.
    ///
    /// # Errors
    /// There is no server, or its id or name is taken.
    pub fn add(&self, export: Export) -> Result<(), ExportError> {
        let mut state = self.state();
        if state.door.is_none() {
            return Err(ExportError::NotRunning);
        }
        if export.name.len() > NAME_MOST {
            return Err(ExportError::Name);
        }
        if state.shown.contains_key(&export.id) || state.shown.values().any(|other| other.name == export.name) {
            return Err(ExportError::Taken(export.id));
        }
        if export.writable {
            // It may be another process's until now.
            export.image.claim().map_err(|e| ExportError::Image(export.node.clone(), e))?;
        }
        state.shown.insert(export.id.clone(), export);
        Ok(())
    }

    /// Shows it no longer. With `hard` its clients are ended, else there must be none.
    ///
    /// # Errors
    /// There is none of that id, or it has clients.
    pub fn remove(&self, id: &str, hard: bool) -> Result<(), ExportError> {
        let peers = {
            let mut state = self.state();
            if !state.shown.contains_key(id) {
                return Err(ExportError::NotFound(id.into()));
            }
            let of_it = |peer: &&Arc<Peer>| peer.has(id) && !peer.gone.load(Ordering::Acquire);
            let peers: Vec<_> = state.peers.iter().filter(of_it).cloned().collect();
            if !hard && !peers.is_empty() {
                return Err(ExportError::InUse(id.into()));
            }
            state.shown.remove(id);
            peers
        };
        peers.iter().for_each(|peer| peer.end());
        self.tell_gone(id.into());
        Ok(())
    }

    /// A guest has come to the disks: from now on it alone writes them. Returns when nobody else does.
    pub fn guest_arrives(&self) {
        let ids: Vec<_> = self.state().shown.values().filter(|it| it.writable).map(|it| it.id.clone()).collect();
        for id in ids {
            // It may just have been removed.
            let _ = self.remove(&id, true);
        }
    }

    /// The VM ends: nothing is shown any more, and no image is held.
    pub fn end(&self) {
        self.state().ended = true;
        // An error says that there is no server.
        let _ = self.close();
    }

    /// All that are shown.
    pub fn list(&self) -> Vec<ExportInfo> {
        let info = |export: &Export| ExportInfo { id: export.id.clone(), node: export.node.clone() };
        self.state().shown.values().map(info).collect()
    }

    /// The export of that node; only one that is written, if that is what matters.
    pub fn of_node(&self, node: &str, written: bool) -> Option<String> {
        let state = self.state();
        let mut shown = state.shown.values();
        shown.find(|it| it.node == node && (it.writable || !written)).map(|it| it.id.clone())
    }

    fn tell_gone(&self, id: String) {
        if let Some(events) = self.events.upgrade() {
            // An error says that no monitor listens.
            let _ = events.send(Event::now(EventKind::BlockExportDeleted { id }));
        }
    }

    /// Takes a client in, who has a thread from now on.
    fn admit(self: &Arc<Self>, socket: Socket) {
        let mut state = self.state();
        state.peers.retain(|peer| !peer.gone.load(Ordering::Acquire));
        let most = state.door.as_ref().map_or(0, |door| door.most);
        if state.peers.len() >= most {
            return;
        }
        let Ok(again) = socket.again() else { return };
        let peer = Peer { socket: again, export: Mutex::default(), thread: Mutex::default(), gone: false.into() };
        let peer = Arc::new(peer);
        let (this, own) = (Arc::downgrade(self), peer.clone());
        let thread = Builder::new().name("nbd-client".into()).spawn(move || {
            let served = serve(socket, &Visit { exports: this, peer: own.clone() });
            if let Err(why) = served {
                tracing::debug!("an NBD client was dropped: {why}");
            }
            own.socket.cut();
            own.gone.store(true, Ordering::Release);
        });
        // Without a thread the connection is closed.
        if let Ok(thread) = thread {
            *lock(&peer.thread) = Some(thread);
            state.peers.push(peer);
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl Door {
    fn close(self) {
        // A full counter is a signalled one.
        let _ = self.stop.write(1);
        // It doesn't panic.
        let _ = self.thread.join();
    }
}

impl Peer {
    fn has(&self, id: &str) -> bool {
        lock(&self.export).as_deref() == Some(id)
    }

    /// Ends the connection; what it is at is done when this returns.
    fn end(&self) {
        self.socket.cut();
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}

/// What one client sees.
struct Visit {
    exports: Weak<Exports>,
    peer: Arc<Peer>,
}

impl Gallery for Visit {
    fn find(&self, name: &str) -> Option<Export> {
        let exports = self.exports.upgrade()?;
        let state = exports.state();
        let export = state.shown.values().find(|export| export.name == name)?.clone();
        // Under the lock: who removes it then finds this client.
        *lock(&self.peer.export) = Some(export.id.clone());
        Some(export)
    }

    fn names(&self) -> Vec<String> {
        let exports = self.exports.upgrade();
        exports.iter().flat_map(|it| it.state().shown.values().map(|it| it.name.clone()).collect::<Vec<_>>()).collect()
    }
}

/// Takes clients in until the door is closed.
fn listen(listener: &Listener, stop: &EventFd, exports: &Weak<Exports>) {
    loop {
        let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(stop.as_fd(), PollFlags::POLLIN)];
        // An error is a signal's.
        let _ = poll(&mut fds, PollTimeout::NONE);
        if fds[1].any() == Some(true) {
            return;
        }
        match (listener.accept(), exports.upgrade()) {
            (Ok(socket), Some(exports)) => exports.admit(socket),
            (_, None) => return,
            // A lack of descriptors passes, and is not to spin meanwhile.
            (Err(e), _) if e.kind() != io::ErrorKind::WouldBlock => {
                let _ = poll(&mut fds[1..], PollTimeout::from(100u8));
            }
            (Err(_), _) => {}
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl std::fmt::Debug for Exports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exports").field("shown", &self.list()).finish_non_exhaustive()
    }
}
