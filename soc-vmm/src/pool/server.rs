//! `soc-vmm pool serve`: a task for each client, and one for each function that sees to it that it becomes free.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Permissions};
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::unistd::{Group, User, chown};
use tokio::net::{UnixListener, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use super::door;
use super::session;
use super::table::{PATIENCE, Table};
use crate::cli::{ExitStatus, Failure, FunctionSpec};
use crate::config::{Config, PoolConfig, PoolFunction};
use crate::control::ListeningSocket;
use crate::runtime::runtime;
use crate::say::say;

/// Most connections at a time, and most of one user other than root.
const MOST_CONNECTIONS: usize = 1024;
const MOST_OF_A_USER: usize = 512;
/// Pause after a failed accept, so that a lack of descriptors doesn't spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What the tasks share.
#[derive(Debug)]
pub(super) struct Shared {
    table: Mutex<Table>,
    /// A function became something else.
    pub(super) changed: Notify,
    pub(super) functions: Vec<PoolFunction>,
    /// By what the server tells of itself.
    pub(super) host: Option<FunctionSpec>,
    /// Who may have functions beside root; `None`: everybody who could connect.
    users: Option<BTreeSet<u32>>,
    /// Connections of each user.
    connections: Mutex<BTreeMap<u32, usize>>,
}

/// Serves the pool of the configuration until a signal ends it. Who has a function keeps it: the next pool doesn't give it out before it is back.
///
/// # Errors
/// The configuration is wrong or has no pool ([`ExitStatus::Usage`]); it can't listen ([`ExitStatus::Unavailable`]).
pub fn serve() -> Result<(), Failure> {
    let usage = |why: &str| Failure::new(ExitStatus::Usage, format!("pool serve: {why}"));
    let config = Config::load()?.pool.ok_or_else(|| usage("the configuration has no [pool]"))?;
    if config.functions.is_empty() {
        return Err(usage("the configuration's pool has no functions"));
    }
    let shared = Arc::new(Shared::new(&config)?);
    let runtime = runtime(2)?;
    let served = runtime.block_on(async {
        let socket = listen(&config)?;
        let unavailable = |e: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, "pool serve", e);
        let listener = socket.listener().try_clone().and_then(UnixListener::from_std).map_err(|e| unavailable(&e))?;
        let mut ends = [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::hangup()]
            .into_iter()
            .map(signal)
            .collect::<Result<Vec<_>, _>>()
            .map_err(|e| unavailable(&e))?;
        for index in 0..shared.functions.len() {
            tokio::spawn(keep(shared.clone(), index));
        }
        let [terminate, interrupt, hangup] = &mut ends[..] else { return Ok(()) };
        tokio::select! {
            () = accept(&listener, &shared) => {}
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = hangup.recv() => {}
        }
        Ok(())
    });
    // A function that is just being opened may take its time.
    runtime.shutdown_background();
    served
}

impl Shared {
    fn new(config: &PoolConfig) -> Result<Self, Failure> {
        let wrong = |why: String| Failure::new(ExitStatus::Usage, format!("pool.users: {why}"));
        let users = config.users.iter().map(|name| match User::from_name(name) {
            Ok(Some(user)) => Ok(user.uid.as_raw()),
            Ok(None) => Err(wrong(format!("there is no user {name}"))),
            Err(e) => Err(wrong(format!("can't look for user {name}: {}", e.desc()))),
        });
        let users = users.collect::<Result<BTreeSet<_>, _>>()?;
        let names = config.functions.iter().map(ToString::to_string).collect();
        Ok(Self {
            table: Mutex::new(Table::new(names, config.limit, Instant::now())),
            changed: Notify::new(),
            functions: config.functions.clone(),
            host: config.host(),
            users: Some(users).filter(|users| !users.is_empty()),
            connections: Mutex::default(),
        })
    }

    pub(super) fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this user may have functions.
    pub(super) fn admits(&self, uid: u32) -> bool {
        uid == 0 || self.users.as_ref().is_none_or(|users| users.contains(&uid))
    }

    fn connections(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection's place among those that there may be.
#[derive(Debug)]
pub(super) struct Place {
    shared: Arc<Shared>,
    uid: u32,
}

impl Place {
    fn take(shared: &Arc<Shared>, uid: u32) -> Option<Self> {
        let mut connections = shared.connections();
        let all: usize = connections.values().sum();
        let own = connections.entry(uid).or_default();
        if all >= MOST_CONNECTIONS || (uid != 0 && *own >= MOST_OF_A_USER) {
            return None;
        }
        *own += 1;
        Some(Self { shared: shared.clone(), uid })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut connections = self.shared.connections();
        if let Some(own) = connections.get_mut(&self.uid) {
            *own -= 1;
            if *own == 0 {
                connections.remove(&self.uid);
            }
        }
    }
}

/// Listens for whom the configuration says.
fn listen(config: &PoolConfig) -> Result<ListeningSocket, Failure> {
    let path = &config.socket;
    let failed =
        |e: &dyn std::error::Error| Failure::of(ExitStatus::Unavailable, &format!("pool.socket {}", path.display()), e);
    if let Some(directory) = path.parent().filter(|directory| !directory.exists()) {
        // Who may enter it may try the socket, whose mode says who may more.
        fs::DirBuilder::new().mode(0o755).create(directory).map_err(|e| failed(&e))?;
    }
    let socket = ListeningSocket::bind(path).map_err(|e| failed(&e))?;
    if let Some(group) = &config.group {
        give_to_group(path, group)?;
    }
    let mode = config.mode.unwrap_or(if config.group.is_some() { 0o660 } else { 0o600 });
    // Last: until now it was this user's alone.
    fs::set_permissions(path, Permissions::from_mode(mode)).map_err(|e| failed(&e))?;
    Ok(socket)
}

fn give_to_group(path: &Path, name: &str) -> Result<(), Failure> {
    let wrong = |why: String| Failure::new(ExitStatus::Usage, format!("pool.group: {why}"));
    let group = Group::from_name(name).map_err(|e| wrong(format!("can't look for group {name}: {}", e.desc())))?;
    let group = group.ok_or_else(|| wrong(format!("there is no group {name}")))?;
    chown(path, None, Some(group.gid)).map_err(|e| {
        let why = format!("can't give {} to group {name}: {}", path.display(), e.desc());
        Failure::new(ExitStatus::Unavailable, why)
    })
}

async fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    let mut told = false;
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                told = false;
                // Nobody is told apart from nobody: who can't be named is hung up on.
                let Ok(peer) = stream.peer_cred() else { continue };
                if let Some(place) = Place::take(shared, peer.uid()) {
                    tokio::spawn(attend(stream, shared.clone(), peer, place));
                }
            }
            Err(e) => {
                if !std::mem::replace(&mut told, true) {
                    say(format_args!("soc-vmm: pool: can't take a connection, tries on: {e}"));
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn attend(stream: UnixStream, shared: Arc<Shared>, peer: tokio::net::unix::UCred, _place: Place) {
    session::attend(&stream, &shared, &peer).await;
}

/// Sees to it that a function becomes free whenever it isn't and nobody has it.
async fn keep(shared: Arc<Shared>, index: usize) {
    let function = &shared.functions[index];
    let mut told = false;
    loop {
        let changed = shared.changed.notified();
        tokio::pin!(changed);
        changed.as_mut().enable();
        let Some(pause) = shared.table().next_try(index) else {
            changed.await;
            continue;
        };
        tokio::time::sleep(pause).await;
        let opened = watched(&shared, index, door::open(function)).await;
        // It was for nobody: it is closed again.
        let opened = opened.map(|opened| opened.hold.revoke());
        shared.table().tried(index, opened, Instant::now());
        shared.changed.notify_waiters();
        tell(&shared, index, &mut told);
    }
}

/// Waits for a function to be opened, and says that it is broken where that takes long.
async fn watched<T>(shared: &Shared, index: usize, opening: impl Future<Output = T>) -> T {
    tokio::pin!(opening);
    loop {
        let late = shared.table().late(index, Instant::now());
        let Some(left) = late else {
            shared.changed.notify_waiters();
            return opening.await;
        };
        tokio::select! {
            opened = &mut opening => return opened,
            // It counts from when the function was given back, not from now.
            () = tokio::time::sleep(left.min(PATIENCE)) => {}
        }
    }
}

/// Says in one line that a function is broken, and that it no longer is.
fn tell(shared: &Shared, index: usize, told: &mut bool) {
    let name = &shared.functions[index];
    let why = shared.table().broken(index).map(str::to_owned);
    match why {
        Some(why) if !*told => {
            *told = true;
            say(format_args!("soc-vmm: pool: {name} is broken, tries on: {why}"));
        }
        None if std::mem::take(told) => say(format_args!("soc-vmm: pool: {name} is free again")),
        _ => {}
    }
}
