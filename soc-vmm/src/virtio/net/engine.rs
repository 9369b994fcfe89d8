//! What an interface does from DRIVER_OK to the next reset: its control queue, then its pairs of queues in turn.

use std::os::fd::BorrowedFd;
use std::sync::{Arc, Weak};
use std::time::Instant;

use nix::sys::epoll::EpollFlags;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP,
};

use super::announce::Announcer;
use super::control::Said;
use super::features::Features;
use super::pair::{Pair, Round, Scratch};
use super::poller::Poller;
use super::{NetConfig, NetCounters, NetLink, STATUS};
use crate::persist::{StateError, States};
use crate::virtio::complaint::Rarely;
use crate::virtio::limit::Clock;
use crate::virtio::session::Control;
use crate::virtio::{Config, Engine, QueueError, Session, Wait};

/// An interface's engine.
pub struct NetEngine {
    name: String,
    pub(super) mac: [u8; 6],
    counters: Arc<NetCounters>,
    pub(super) link: Arc<NetLink>,
    clock: Clock,
    pub(super) pairs: Vec<Pair>,
    /// What waits for the link and for the networks of all pairs.
    poller: Poller,
    scratch: Scratch,
    /// What the driver of this session has said.
    pub(super) said: Said,
    pub(super) session: Weak<Control>,
    /// It has said so in another process: this network knows nothing of it yet.
    pub(super) moved: bool,
    /// Tells the network that the guest is here now.
    announcer: Option<Announcer>,
    /// The status that the guest finds in the configuration.
    pub(super) shown: u16,
    /// Of a peer that comes and goes.
    losses: Rarely,
}

impl NetEngine {
    /// The engine of that interface.
    ///
    /// # Errors
    /// There is no more room for descriptors in this process.
    pub fn new(interface: NetConfig) -> nix::Result<Self> {
        Self::with_clock(interface, Arc::new(Instant::now))
    }

    /// The same with a clock of the caller's.
    ///
    /// # Errors
    /// As [`NetEngine::new`].
    pub fn with_clock(interface: NetConfig, clock: Clock) -> nix::Result<Self> {
        let NetConfig { name, backends, mac, limits, link, counters, .. } = interface;
        let now = clock();
        let pairs: Vec<Pair> = backends.into_iter().map(|backend| Pair::new(backend, limits, now)).collect();
        Ok(Self {
            name,
            mac,
            counters,
            poller: Poller::new(link.bell(), pairs.len())?,
            link,
            clock,
            said: Said::new(Features::default(), pairs.len(), mac),
            pairs,
            scratch: Scratch::new(),
            session: Weak::new(),
            moved: false,
            announcer: None,
            shown: VIRTIO_NET_S_LINK_UP as u16,
            losses: Rarely::default(),
        })
    }

    /// A driver is there that has said nothing yet.
    fn begin(&mut self, session: &Session, now: Instant) {
        self.session = Arc::downgrade(&session.control);
        self.said = Said::new(Features(session.features), self.pairs.len(), self.mac);
        self.pairs.iter_mut().for_each(Pair::restart);
        (self.moved, self.announcer) = (false, None);
        self.configure(now);
    }

    /// A driver has come here from another process.
    fn arrive(&mut self, now: Instant) {
        self.pairs.iter_mut().for_each(Pair::restart);
        self.configure(now);
        self.announcer = Some(Announcer::new(now));
    }

    /// Tells the network where the guest is, as often as that is due.
    fn announce(&mut self, now: Instant) {
        self.announcer.take_if(|announcer| announcer.is_done());
        let Some(announcer) = &mut self.announcer else { return };
        if announcer.is_due(now)
            && self.link.is_up()
            && let Some(pair) = self.pairs.first_mut()
        {
            pair.announce(self.said.filter.own, now);
        }
    }

    /// Makes the network what the driver has said.
    fn configure(&mut self, now: Instant) {
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            pair.configure(index < self.said.active, self.said.guest, now);
        }
    }

    /// Obeys the control queue; whether there is more in it.
    fn listen(&mut self, session: &mut Session, now: Instant) -> Result<bool, QueueError> {
        let Some(Some(queue)) = session.queues.get_mut(self.said.control_queue()) else { return Ok(false) };
        let before = (self.said.active, self.said.guest);
        let more = self.said.listen(queue, &mut self.scratch.chains[0]);
        if before != (self.said.active, self.said.guest) {
            self.configure(now);
        }
        more
    }

    /// Looks for peers that went.
    fn look(&mut self, now: Instant) -> Result<(), QueueError> {
        let (active, guest) = (self.said.active, self.said.guest);
        for (index, pair) in self.pairs.iter_mut().enumerate() {
            // Its descriptor may become another one.
            if !pair.is_connected() {
                let fd = pair.backend.fd();
                self.poller.watch(index, fd, EpollFlags::empty()).map_err(QueueError::NoRoom)?;
            }
            if pair.begin(now) {
                tracing::info!("virtio-net {}: {}: it is there again; the link is up", self.name, pair.backend.name());
                pair.configure(index < active, guest, now);
            }
        }
        Ok(())
    }

    /// Says in the log what became of the network, in one line however many queues notice.
    fn tell(&mut self, was_connected: bool, now: Instant) {
        for pair in &mut self.pairs {
            if let Some(error) = pair.take_news().filter(|_| was_connected) {
                let again = match pair.backend.retry_after() {
                    Some(time) => format!(", and it is looked for every {time:?}"),
                    None => String::new(),
                };
                let (name, backend) = (&self.name, pair.backend.name());
                self.losses.say(now, format_args!("virtio-net {name}: {backend}: {error}; the link is down{again}"));
                break;
            }
        }
        self.pairs.iter_mut().for_each(|pair| drop(pair.take_news()));
    }

    fn is_connected(&self) -> bool {
        self.pairs.iter().all(Pair::is_connected)
    }

    /// Shows the guest the link's status, where it is another one (virtio 1.2 §5.1.4).
    fn show(&mut self, session: &Session) {
        let up = self.link.is_up() && self.is_connected();
        let bits = [(up, VIRTIO_NET_S_LINK_UP), (self.said.announcing, VIRTIO_NET_S_ANNOUNCE)];
        let status = bits.into_iter().fold(0, |status, (on, bit)| if on { status | bit as u16 } else { status });
        if std::mem::replace(&mut self.shown, status) != status {
            session.config.change(STATUS, &status.to_le_bytes());
        }
    }

    /// What to wait for.
    fn wait(&mut self) -> Result<Wait, QueueError> {
        let mut timeout = None;
        for (index, pair) in self.pairs.iter().enumerate() {
            let (flags, time) = pair.wait();
            self.poller.watch(index, pair.backend.fd(), flags).map_err(QueueError::NoRoom)?;
            timeout = timeout.into_iter().chain(time).min();
        }
        let announcer = self.announcer.as_ref().map(|announcer| announcer.wait((self.clock)()));
        let timeout = timeout.into_iter().chain(announcer).min();
        Ok(Wait { source: EpollFlags::EPOLLIN, timeout })
    }
}

impl Engine for NetEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        let now = (self.clock)();
        let was_connected = self.is_connected();
        if self.session.as_ptr() != Arc::as_ptr(&session.control) {
            self.begin(session, now);
        }
        if std::mem::take(&mut self.moved) {
            self.arrive(now);
        }
        self.link.silence();
        if self.link.take_announcement() && self.said.features.controls(VIRTIO_NET_F_GUEST_ANNOUNCE) {
            self.said.announcing = true;
        }
        let mut more = self.listen(session, now)?;
        self.look(now)?;
        let was_connected = was_connected || self.is_connected();
        let mut round = Round {
            now,
            plugged: self.link.is_up(),
            mergeable: session.has(VIRTIO_NET_F_MRG_RXBUF),
            host: self.said.features.host_offloads(),
            filter: &self.said.filter,
            counters: &self.counters,
            scratch: &mut self.scratch,
        };
        for (pair, queues) in self.pairs[..self.said.active].iter_mut().zip(session.queues.chunks_mut(2)) {
            let [receive, transmit] = queues else { break };
            pair.flush(now);
            if let Some(queue) = transmit {
                more |= pair.transmit(queue, &mut round)?;
            }
            // Without it nobody takes what comes.
            if let Some(queue) = receive {
                more |= pair.receive(queue, &mut round)?;
            }
        }
        self.announce(now);
        self.tell(was_connected, now);
        self.show(session);
        if more { Ok(Wait::NOTHING) } else { self.wait() }
    }

    /// What was taken is given back before anything else is done: what there is no buffer for waits in the network, or is lost there.
    fn halt(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        if self.session.as_ptr() != Arc::as_ptr(&session.control) {
            self.begin(session, (self.clock)());
        }
        Ok(None)
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

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.poller.fd())
    }
}
