//! What such a device does: its queues' shadows in turn, and its back end, which comes and goes.

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use super::control;
use super::direct::{self, Way};
use super::events::{Events, Heard};
use super::kind::VhostKind;
use super::running::{Memory, Running};
use super::shadow::{Filled, Shadow, Trouble};
use super::terms::Terms;
use crate::memory::Borrower;
use crate::persist::{StateError, States};
use crate::vhost_user::{Frontend, Record, VhostUserError};
use crate::virtio::net::NetLink;
use crate::virtio::session::Control;
use crate::virtio::{Chain, Config, Engine, QueueError, Session, Wait};

/// How long a conversation with the back end may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How long until a back end that went is looked for, and how long at most, after some looks in vain.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(3);
/// Offset of the link's status in a network interface's configuration (virtio 1.2 §5.1.4).
pub(super) const STATUS: usize = 6;

/// A device's engine.
pub(super) struct VhostEngine {
    /// For the log: the device, and the socket.
    name: String,
    socket: PathBuf,
    pub(super) kind: VhostKind,
    pub(super) terms: Terms,
    /// In whose name guest memory is lent to the back end.
    borrower: Arc<Borrower>,
    peer: Peer,
    /// How long until the next look for it, should it go.
    pause: Duration,
    /// What the log said last of a back end that is gone.
    said: Option<String>,
    pub(super) running: Option<Running>,
    /// None where it works on the guest's own queues.
    pub(super) shadows: Vec<Shadow>,
    /// What a disk's back end knows that the next one is to know.
    record: Option<Record>,
    /// How often shadow queues were started.
    starts: usize,
    /// No back end has had this session's queues.
    pub(super) fresh: bool,
    /// One that worked on the guest's queues may have chains that it took and didn't use, of which its record alone knows.
    pub(super) indebted: bool,
    /// The session came from another process: its configuration is to be compared, and its network told of its address.
    pub(super) moved: Option<[u8; 6]>,
    /// The file system's session went with its back end.
    fuse_lost: bool,
    /// Pairs that the driver uses.
    pub(super) pairs: usize,
    events: Events,
    pub(super) session: Weak<Control>,
    /// A network interface's cable, and its link as the guest knows it.
    pub(super) link: Option<Arc<NetLink>>,
    pub(super) shown_up: bool,
    chain: Chain,
}

/// The back end.
enum Peer {
    There(Frontend),
    /// Gone; it is looked for then.
    Away(Instant),
}

impl VhostEngine {
    /// For a device of that kind, with a cable if it is a network interface.
    ///
    /// # Errors
    /// The system has no more descriptors.
    pub(super) fn new(
        borrower: Arc<Borrower>,
        name: String,
        socket: PathBuf,
        kind: VhostKind,
        terms: Terms,
        frontend: Frontend,
        link: Option<Arc<NetLink>>,
    ) -> nix::Result<Self> {
        let events = Events::new()?;
        watch(&events, &frontend)?;
        borrower.set_logs(terms.logs(&frontend));
        events.watch_rings(borrower.bell())?;
        if let Some(link) = &link {
            events.watch_bell(link.bell())?;
        }
        let shadows = match terms.way {
            Way::Shadow => kind.shadows(terms.queues, terms.manners.indirect),
            Way::Direct => Vec::new(),
        };
        Ok(Self {
            shadows,
            record: None,
            starts: 0,
            fresh: true,
            indebted: false,
            moved: None,
            name,
            socket,
            kind,
            terms,
            borrower,
            peer: Peer::There(frontend),
            pause: FIRST_PAUSE,
            said: None,
            running: None,
            fuse_lost: false,
            pairs: 1,
            events,
            session: Weak::new(),
            link,
            shown_up: true,
            chain: Chain::default(),
        })
    }

    /// A driver is there that has made nothing available yet.
    pub(super) fn begin(&mut self, session: &Session) {
        self.session = Arc::downgrade(&session.control);
        self.stop();
        self.shadows.iter_mut().for_each(Shadow::reset);
        (self.fuse_lost, self.pairs) = (false, 1);
        (self.record, self.fresh) = (None, true);
        (self.indebted, self.moved) = (false, None);
    }

    /// Stops the back end. What it still does on shadow queues goes to memory that is nobody's; of the guest's queues it has let go then, or
    /// it is cut off. For each queue that it let go of, the entry of the available ring that it would have taken next.
    pub(super) fn stop(&mut self) -> Vec<(usize, u16)> {
        let Some(running) = self.running.take() else { return Vec::new() };
        running.forget(&self.events);
        self.owe();
        let Peer::There(frontend) = &mut self.peer else { return Vec::new() };
        // The connection is only as good as its word.
        frontend.stop(running.queues()).unwrap_or_else(|error| {
            self.go_away(&error);
            Vec::new()
        })
    }

    /// Somebody may have to finish what a back end had of the guest's queues.
    fn owe(&mut self) {
        self.indebted = self.terms.way == Way::Direct && self.kind.needs_record();
    }

    /// What the back end has to say.
    pub(super) fn hear(&mut self, session: &mut Session) -> Result<(), QueueError> {
        let Heard { word, calls } = self.events.take().map_err(QueueError::NoRoom)?;
        if self.terms.way == Way::Direct {
            self.pass_on(calls, session);
        }
        if let Peer::There(frontend) = &mut self.peer
            && word
        {
            match frontend.look() {
                Ok(false) => {}
                Ok(true) => self.refresh(session)?,
                Err(error) => self.lose(&error, session)?,
            }
        }
        Ok(())
    }

    /// The back end as it should be: there, and its queues started.
    fn tend(&mut self, session: &mut Session) -> Result<(), QueueError> {
        self.hear(session)?;
        if matches!(self.peer, Peer::Away(time) if time <= Instant::now()) {
            match self.find() {
                Ok(()) => self.refresh(session)?,
                Err(error) => self.go_away(&error),
            }
        }
        if self.running.as_ref().is_some_and(Running::is_stale) {
            self.stop();
        }
        let used = self.kind.used(session.features, self.terms.queues);
        let turned_on = self.turned_on(used);
        if let (Peer::There(frontend), None) = (&mut self.peer, &self.running) {
            let queues = session.queues[..used].iter().enumerate().filter(|(_, queue)| queue.is_some());
            let queues: Vec<usize> = queues.map(|(index, _)| index).collect();
            let start = match self.terms.way {
                Way::Shadow => {
                    // Who has it is known here, and needs no record of more than one start.
                    self.record = None;
                    self.starts += 1;
                    Memory::of_shadows(&self.shadows, &queues, self.starts)
                }
                Way::Direct => {
                    let (files, places) = direct::places(session, &self.borrower, &queues, self.fresh)?;
                    self.fresh = false;
                    Ok((Memory::Guest(files), places))
                }
            };
            let features = self.terms.accepted(session.features);
            let (record, events) = (&mut self.record, &self.events);
            let running = start.and_then(|start| Running::start(frontend, features, start, turned_on, record, events));
            match running {
                Ok(running) => {
                    for queue in queues {
                        if let Some(share) = running.share(queue) {
                            self.shadows[queue].attach(share, self.terms.manners);
                        }
                    }
                    self.running = Some(running);
                    self.indebted = false;
                    if self.said.take().is_some() {
                        tracing::info!("{}: {}: the back end is there again", self.name, self.socket.display());
                    }
                }
                Err(error) => self.lose(&error, session)?,
            }
            self.arrive(session)?;
        }
        Ok(())
    }

    /// The first back end of a session that came from another process: shows the guest its configuration, and its network the guest.
    fn arrive(&mut self, session: &mut Session) -> Result<(), QueueError> {
        let (Peer::There(frontend), Some(_)) = (&mut self.peer, &self.running) else { return Ok(()) };
        let Some(mac) = self.moved.take() else { return Ok(()) };
        if self.link.is_some()
            && let Err(error) = frontend.announce(mac)
        {
            return self.lose(&error, session);
        }
        self.refresh(session)
    }

    /// Connects to a back end that went.
    fn find(&mut self) -> Result<(), VhostUserError> {
        let frontend = Frontend::connect(&self.socket, PATIENCE, self.kind.needs_record())?;
        self.terms.check(&self.kind, &frontend)?;
        watch(&self.events, &frontend).map_err(VhostUserError::waiting)?;
        self.borrower.set_logs(self.terms.logs(&frontend));
        self.peer = Peer::There(frontend);
        Ok(())
    }

    /// Shows the guest the configuration as the back end has it now.
    fn refresh(&mut self, session: &mut Session) -> Result<(), QueueError> {
        let Peer::There(frontend) = &mut self.peer else { return Ok(()) };
        let asked = self.kind.asked();
        if asked == 0 {
            return Ok(());
        }
        match frontend.config(asked) {
            Ok(part) => {
                // Only disks have a part in it.
                let config = self.kind.config(part, [0; 6], self.terms.queues, self.terms.way);
                let mut shown = vec![0; config.len()];
                session.config.read(0, &mut shown);
                if shown != config {
                    session.config.change(0, &config);
                }
            }
            Err(error) => self.lose(&error, session)?,
        }
        Ok(())
    }

    /// The back end is gone, or is to go.
    pub(super) fn lose(&mut self, error: &VhostUserError, session: &mut Session) -> Result<(), QueueError> {
        self.go_away(error);
        if let Some(running) = self.running.take() {
            self.owe();
            running.forget(&self.events);
            for index in running.queues() {
                let Some(queue) = &mut session.queues[index] else { continue };
                match self.shadows.get_mut(index) {
                    Some(shadow) => shadow.detach(queue, &mut self.fuse_lost)?,
                    // It may have used something without a call.
                    None => queue.interrupt(),
                }
            }
        }
        Ok(())
    }

    fn go_away(&mut self, error: &VhostUserError) {
        let text = error.to_string();
        // One line a loss; that it isn't there yet is no news then, unless it is there and no good.
        let is_news = match &self.said {
            None => true,
            Some(said) => *said != text && !matches!(error, VhostUserError::Connect(_)),
        };
        if is_news {
            let until = if self.link.is_some() { "the link is down" } else { "the guest waits" };
            tracing::warn!("{}: {}: {text}; {until} until it is there again", self.name, self.socket.display());
        } else {
            tracing::debug!("{}: {}: {text}", self.name, self.socket.display());
        }
        self.said = Some(text);
        self.peer = Peer::Away(Instant::now() + self.pause);
        self.pause = (2 * self.pause).min(LAST_PAUSE);
    }

    /// Calls of a back end that works on the guest's queues, and the kicks for it that came here.
    fn pass_on(&mut self, calls: u64, session: &mut Session) {
        for (index, queue) in session.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            if calls >> index & 1 != 0 {
                // It works.
                self.pause = FIRST_PAUSE;
                queue.interrupt();
            }
            if queue.take_kicked()
                && let Some(running) = &self.running
            {
                running.kick(index);
            }
        }
    }

    /// Shadow queues, in both directions; whether there is more to do.
    fn carry(&mut self, session: &mut Session) -> Result<bool, QueueError> {
        let mut more = false;
        let used = self.kind.used(session.features, self.terms.queues).min(self.shadows.len());
        for index in 0..used {
            let Some(queue) = &mut session.queues[index] else { continue };
            let shadow = &mut self.shadows[index];
            match shadow.collect(queue) {
                Ok(0) => {}
                // It works.
                Ok(_) => self.pause = FIRST_PAUSE,
                Err(Trouble::Guest(error)) => return Err(error),
                Err(Trouble::Backend(error)) => {
                    self.lose(&error, session)?;
                    return Ok(true);
                }
            }
            let filled = shadow.fill(queue, &mut self.fuse_lost);
            // What came before a chain that is none is the back end's already.
            if shadow.show()
                && let Some(running) = &self.running
            {
                running.kick(index);
            }
            match filled? {
                Filled::Empty => more |= queue.allow_kicks()?,
                Filled::More => more = true,
                Filled::NoRoom => queue.hold_kicks()?,
            }
        }
        Ok(more)
    }

    /// Obeys the driver of a network interface that has several pairs; whether there is more.
    fn listen(&mut self, session: &mut Session) -> Result<bool, QueueError> {
        let own = self.kind.own_queues(self.terms.queues);
        if own.is_empty() {
            return Ok(false);
        }
        let place = self.kind.used(session.features, self.terms.queues);
        let Some(Some(queue)) = session.queues.get_mut(place) else { return Ok(false) };
        let (said, more) = control::listen(queue, &mut self.chain, (place / 2) as u16)?;
        self.pairs = said.unwrap_or(self.pairs);
        Ok(more)
    }

    /// How many queues the back end is to serve: of a network interface those that the driver uses, if its cable is in.
    fn turned_on(&self, used: usize) -> usize {
        match &self.link {
            None => used,
            Some(link) if link.is_up() => 2 * self.pairs,
            Some(_) => 0,
        }
    }

    /// Has the back end serve those queues.
    fn turn(&mut self, session: &mut Session) -> Result<(), QueueError> {
        let wanted = self.turned_on(self.kind.used(session.features, self.terms.queues));
        if let (Peer::There(frontend), Some(running)) = (&mut self.peer, &mut self.running)
            && let Err(error) = running.turn_on(wanted, frontend)
        {
            self.lose(&error, session)?;
        }
        Ok(())
    }

    /// Shows the guest whether there is a network.
    fn show_link(&mut self, session: &Session) {
        let Some(link) = &self.link else { return };
        let up = self.running.is_some() && link.is_up();
        if std::mem::replace(&mut self.shown_up, up) != up {
            let status = if up { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
            session.config.change(STATUS, &status.to_le_bytes());
        }
    }
}

impl Engine for VhostEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        if self.session.as_ptr() != Arc::as_ptr(&session.control) {
            self.begin(session);
        }
        if let Some(link) = &self.link {
            link.silence();
        }
        self.tend(session)?;
        let mut more = self.listen(session)?;
        self.turn(session)?;
        more |= self.carry(session)?;
        self.show_link(session);
        if !more && self.running.is_some() {
            more = self.shadows.iter_mut().any(Shadow::allow_calls);
        }
        if more {
            return Ok(Wait::NOTHING);
        }
        let timeout = match self.peer {
            Peer::There(_) => None,
            Peer::Away(time) => Some(time.saturating_duration_since(Instant::now())),
        };
        Ok(Wait { source: EpollFlags::EPOLLIN, timeout })
    }

    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        if self.session.as_ptr() != Arc::as_ptr(&session.control) {
            self.begin(session);
        }
        self.come_to_rest(session)
    }

    fn settle(&mut self) {
        self.stop();
    }

    fn save_into(&self, at: &str, states: &mut States, session: Option<&Session>) {
        self.save(at, states, session.is_some());
    }

    fn load(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&mut Session>,
    ) -> Result<(), StateError> {
        self.restore(at, states, config, session.as_deref())
    }

    fn end(&mut self, session: &mut Session) {
        if self.terms.way == Way::Direct {
            self.stop();
            session.control.take_back();
        }
    }

    fn is_ready(&mut self) -> Option<bool> {
        // That the back end goes is noticed when this device sleeps. What it does to the guest's queues is not looked at here.
        self.running
            .as_ref()
            .filter(|_| self.terms.way == Way::Shadow)
            .map(|_| self.shadows.iter().any(Shadow::has_news))
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.events.fd())
    }
}

fn watch(events: &Events, frontend: &Frontend) -> nix::Result<()> {
    events.watch(frontend.fd())?;
    frontend.channel().map_or(Ok(()), |channel| events.watch(channel))
}
