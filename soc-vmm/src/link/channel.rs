//! The API channel under tokio: calls that wait for their replies, orders from any thread, events as a stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Duration;

use api_channel::call::{Call, LateRun};
use api_channel::event::Event;
use api_channel::{ChannelError, Client, Incoming, Status};
use pcie_function::{Doorbell, SocFunction};
use tokio::sync::{mpsc, oneshot};

use super::bell::Bell;
use super::log::HostLog;
use super::open::CHANNEL_VECTOR;

/// How long the host may take for a call: an emulated server starves for seconds.
const DEADLINE: Duration = Duration::from_secs(60);
/// How soon a call is made again that a vCPU was in the way of.
const ONCE_MORE: Duration = Duration::from_millis(5);
/// How often each side's heartbeat grows.
const BEAT: Duration = Duration::from_secs(1);
/// Heartbeats that may be missing before the host counts as silent.
const SILENCE: u32 = 10;

/// Notices that may wait for the control loop.
const NOTICES: usize = 64;
/// Most bytes of a host's sentence that are passed on.
const MOST_WHY: usize = 1024;

/// Why a call failed.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CallError {
    /// The host refused; its own sentence.
    #[error("{text}")]
    Refused {
        /// Which kind of refusal.
        status: Status,
        /// Why.
        text: String,
    },
    /// No reply in time; the call may still be done.
    #[error("the host did not answer within {} s", DEADLINE.as_secs())]
    Late,
    /// The channel's rules were broken, or the ring is full.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The connection is over, and why.
    #[error("the connection to the host is over: {0}")]
    Over(String),
    /// The reply can't be read.
    #[error("the host's reply can't be read: host-kvm-shim and soc-vmm don't fit each other")]
    Malformed,
}

impl CallError {
    /// Whether the host went away.
    pub fn is_loss(&self) -> bool {
        matches!(self, Self::Over(_))
    }
}

impl From<api_channel::codec::Malformed> for CallError {
    fn from(_: api_channel::codec::Malformed) -> Self {
        Self::Malformed
    }
}

/// A reply.
#[derive(Clone, Debug, Default)]
pub struct Reply {
    /// Its payload.
    pub payload: Vec<u8>,
    /// What was too long for it.
    pub bulk: Vec<u8>,
}

/// What the channel tells the VM's control loop.
#[derive(Clone, Debug)]
pub enum Notice {
    /// The host's heartbeat stopped, or went on.
    Silent(bool),
    /// The connection is over: the function is lost, or a rule was broken.
    Over(String),
}

/// Hears that the guest has ended an interrupt whose vector is wired so that the host tells. Nothing blocks.
pub trait EoiSink: Send + Sync + std::fmt::Debug {
    /// It was that of a GSI.
    fn ended(&self, gsi: u32);
}

/// Hears what vCPUs wait for of the pages that were said to come later. Nothing blocks.
pub trait WantedSink: Send + Sync + std::fmt::Debug {
    /// For these; it may be said again.
    fn wanted(&self, run: LateRun);
}

/// Waits for a reply, by the request's sequence.
type Waiting = HashMap<u32, oneshot::Sender<Result<Reply, CallError>>>;

/// Asks the host. Cheap to clone; any thread may send orders.
#[derive(Debug)]
pub struct Channel<F: SocFunction> {
    shared: Arc<Shared<F>>,
}

impl<F: SocFunction> Clone for Channel<F> {
    fn clone(&self) -> Self {
        Self { shared: self.shared.clone() }
    }
}

#[derive(Debug)]
struct Shared<F: SocFunction> {
    function: Arc<F>,
    state: Mutex<State<F>>,
    eois: OnceLock<Weak<dyn EoiSink>>,
    wanted: OnceLock<Weak<dyn WantedSink>>,
}

#[derive(Debug)]
struct State<F: SocFunction> {
    client: Client<F::Card, F::Remote>,
    waiting: Waiting,
    /// Why it is, once the connection is over.
    over: Option<String>,
}

impl<F: SocFunction> Shared<F> {
    fn state(&self) -> MutexGuard<'_, State<F>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<F: SocFunction> Channel<F> {
    /// Calls the host and waits for its reply.
    ///
    /// # Errors
    /// See [`CallError`].
    pub async fn call(&self, call: &Call) -> Result<Reply, CallError> {
        loop {
            let answer = self.call_once(call).await;
            match &answer {
                // A vCPU that waits for a page doesn't leave the guest for that before it has come.
                Err(CallError::Refused { status: Status::LATE, .. }) if needs_vcpus_out(call) => {
                    tokio::time::sleep(ONCE_MORE).await;
                }
                _ => return answer,
            }
        }
    }

    async fn call_once(&self, call: &Call) -> Result<Reply, CallError> {
        let (sender, receiver) = oneshot::channel();
        let sequence = {
            let mut state = self.shared.state();
            if let Some(why) = &state.over {
                return Err(CallError::Over(why.clone()));
            }
            let sequence = state.client.send(call, DEADLINE.as_millis() as u32)?;
            state.waiting.insert(sequence, sender);
            sequence
        };
        self.shared.function.raise(CHANNEL_VECTOR);
        match tokio::time::timeout(DEADLINE, receiver).await {
            Ok(reply) => reply.unwrap_or_else(|_| Err(CallError::Over("nobody listens to it".into()))),
            Err(_) => {
                self.shared.state().waiting.remove(&sequence);
                Err(CallError::Late)
            }
        }
    }

    /// Bytes of messages, headers and bulk included: sent and received.
    pub fn bytes(&self) -> (u64, u64) {
        self.shared.state().client.bytes()
    }

    /// Has `sink` told of the interrupts that the guest ends, while it is there; the first one that is named stays.
    pub fn on_eoi(&self, sink: Weak<dyn EoiSink>) {
        let _ = self.shared.eois.set(sink);
    }

    /// The same for pages that vCPUs wait for.
    pub fn on_wanted(&self, sink: Weak<dyn WantedSink>) {
        let _ = self.shared.wanted.set(sink);
    }

    /// Sends a call that is not answered.
    ///
    /// # Errors
    /// The ring is full, or the connection is over.
    pub fn order(&self, call: &Call) -> Result<(), CallError> {
        {
            let mut state = self.shared.state();
            if let Some(why) = &state.over {
                return Err(CallError::Over(why.clone()));
            }
            state.client.order(call)?;
        }
        self.shared.function.raise(CHANNEL_VECTOR);
        Ok(())
    }
}

/// Whether the host has every vCPU leave the guest for this where pages are still to come.
fn needs_vcpus_out(call: &Call) -> bool {
    matches!(call, Call::SetMemslots(_) | Call::NotifyPages(_) | Call::IoEvent(_))
}

/// The channel's receiving end, before its task runs.
#[derive(Debug)]
pub struct ChannelEnd<F: SocFunction> {
    shared: Arc<Shared<F>>,
    bell: Bell,
    lost: Bell,
}

impl<F: SocFunction> ChannelEnd<F> {
    pub(super) fn new(function: Arc<F>, client: Client<F::Card, F::Remote>) -> std::io::Result<Self> {
        let bell = Bell::new(function.doorbell(Doorbell::Channel))?;
        let lost = Bell::new(function.lost_event())?;
        let state = Mutex::new(State { client, waiting: HashMap::new(), over: None });
        Ok(Self {
            shared: Arc::new(Shared { function, state, eois: OnceLock::new(), wanted: OnceLock::new() }),
            bell,
            lost,
        })
    }

    /// Starts the task that listens; it ends when the connection is over or nobody takes notices any more.
    pub fn listen(self) -> (Channel<F>, mpsc::Receiver<Notice>) {
        let (notices, receiver) = mpsc::channel(NOTICES);
        let channel = Channel { shared: self.shared.clone() };
        tokio::spawn(async move {
            let why = self.run(&notices).await;
            let over = why.clone().unwrap_or_else(|| "nobody listens to it".into());
            let waiting = {
                let mut state = self.shared.state();
                state.over = Some(over.clone());
                std::mem::take(&mut state.waiting)
            };
            for (_, reply) in waiting {
                // Who asked may have given up.
                let _ = reply.send(Err(CallError::Over(over.clone())));
            }
            if let Some(why) = why {
                // Nobody listens once the VM has ended.
                let _ = notices.send(Notice::Over(why)).await;
            }
        });
        (channel, receiver)
    }

    /// Listens until the connection is over; why it is, or `None` if nobody listens any more.
    async fn run(&self, notices: &mpsc::Sender<Notice>) -> Option<String> {
        let mut beats = tokio::time::interval(BEAT);
        beats.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut host = Heart::default();
        let mut log = HostLog::new();
        // The control loop may wait for a reply: nothing here may wait for it. What finds no room is one too many of what is there.
        let tell = |notice| match notices.try_send(notice) {
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => Some(()),
            Err(mpsc::error::TrySendError::Closed(_)) => None,
        };
        loop {
            let mut more = true;
            for _ in 0..A_TURN {
                let incoming = match self.shared.state().client.poll() {
                    Ok(incoming) => incoming,
                    Err(broken) => return Some(broken.to_string()),
                };
                match incoming {
                    None => {
                        more = false;
                        break;
                    }
                    Some(Incoming::Event(Event::Log { level, text })) => log.record(level, &text),
                    Some(Incoming::Event(Event::Eoi { gsi })) => {
                        tracing::trace!(gsi, "end of interrupt");
                        if let Some(sink) = self.shared.eois.get().and_then(Weak::upgrade) {
                            sink.ended(gsi);
                        }
                    }
                    Some(Incoming::Event(Event::Wanted(run))) => {
                        if let Some(sink) = self.shared.wanted.get().and_then(Weak::upgrade) {
                            sink.wanted(run);
                        }
                    }
                    Some(Incoming::Reply { sequence, status, payload, bulk }) => {
                        self.answer(sequence, status, payload, bulk);
                    }
                }
            }
            if let Err(lost) = self.shared.function.check() {
                return Some(lost.to_string());
            }
            tokio::select! {
                () = self.bell.rung() => {}
                () = tokio::task::yield_now(), if more => {}
                // The function is looked at each time round.
                () = self.lost.raised() => {}
                _ = beats.tick() => {
                    let now = {
                        let mut state = self.shared.state();
                        state.client.beat();
                        state.client.host_beat()
                    };
                    if let Some(silent) = host.look(now) {
                        tell(Notice::Silent(silent))?;
                    }
                }
                () = notices.closed() => return None,
            }
        }
    }

    fn answer(&self, sequence: u32, status: Status, payload: Vec<u8>, bulk: Vec<u8>) {
        let Some(waiting) = self.shared.state().waiting.remove(&sequence) else { return };
        let reply = if status == Status::OK {
            Ok(Reply { payload, bulk })
        } else {
            let text = String::from_utf8_lossy(&payload[..payload.len().min(MOST_WHY)]).into_owned();
            Err(CallError::Refused { status, text })
        };
        // Who asked may have given up.
        let _ = waiting.send(reply);
    }
}

/// What the host said is taken so many at a time: one that never stops holds nothing else up.
const A_TURN: usize = 256;

/// Watches the other side's heartbeat.
#[derive(Debug, Default)]
struct Heart {
    last: u64,
    missed: u32,
}

impl Heart {
    /// Looks once a second; tells when silence begins or ends.
    fn look(&mut self, beat: u64) -> Option<bool> {
        let was_silent = self.missed >= SILENCE;
        self.missed = if beat == self.last { (self.missed + 1).min(SILENCE) } else { 0 };
        self.last = beat;
        let silent = self.missed >= SILENCE;
        (silent != was_silent).then_some(silent)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread::{JoinHandle, spawn};

    use api_channel::lines::{host, soc};
    use api_channel::message::{Class, Header, SLOT};
    use api_channel::{ClientWindows, codec::Writer};
    use pcie_function::local::{LocalHost, LocalSoc};
    use pcie_function::{BusMemory, HostFunction, Windowed};

    use super::*;

    const EPOCH: u64 = 7;
    /// So many that who fills the ring may be away for a while.
    const SLOTS: usize = 1 << 15;

    /// A host whose ring of events is full again whenever it was read.
    struct Chatterbox {
        stop: Arc<AtomicBool>,
        thread: Option<JoinHandle<()>>,
    }

    impl Chatterbox {
        fn start() -> (Self, ChannelEnd<LocalSoc>) {
            use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
            let pair = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC);
            let (ours, theirs) = pair.unwrap();
            let greeting = spawn(|| LocalHost::new(ours).unwrap());
            let function = LocalSoc::new(theirs).unwrap();
            let mut host = greeting.join().unwrap();
            let card = host.card_memory();
            let (iova, inbox) = host.map_mailbox(0x2000, true).unwrap();
            let host_lines = card.cut(0x1000, 1024).unwrap();
            let events = card.cut(0x10_0000, SLOTS * SLOT).unwrap();
            let windows = ClientWindows {
                host_lines: host_lines.clone(),
                replies: card.cut(0x2000, 4096).unwrap(),
                events: events.clone(),
                soc_lines: function.remote(iova, 1024),
                requests: function.remote(iova + 0x1000, 4096),
                bulk: function.remote(iova, 8),
            };
            let client = Client::new(windows, EPOCH);
            let eoi = Event::Eoi { gsi: 9 };
            let payload = eoi.encode();
            let header = Header {
                opcode: eoi.opcode(),
                class: Class::Event,
                length: payload.len() as u32,
                sequence: 1,
                status: Status::OK,
                epoch: EPOCH,
                extra: 0,
            };
            let message = Writer::default().bytes(&header.to_bytes()).bytes(&payload).done();
            (0..SLOTS).for_each(|slot| events.copy_in(slot * SLOT, &message));
            host_lines.store(host::EPOCH, EPOCH);
            let stop = Arc::new(AtomicBool::new(false));
            let stopped = stop.clone();
            let thread = spawn(move || {
                // Until then the function is there.
                let _host = host;
                while !stopped.load(Ordering::Relaxed) {
                    host_lines.store(host::EVENTS_TAIL, inbox.load(soc::EVENTS_HEAD) + SLOTS as u64);
                }
            });
            let end = ChannelEnd::new(Arc::new(function), client).unwrap();
            (Self { stop, thread: Some(thread) }, end)
        }
    }

    impl Drop for Chatterbox {
        fn drop(&mut self) {
            self.stop.store(true, Ordering::Relaxed);
            self.thread.take().map(JoinHandle::join);
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_host_that_never_stops_talking_is_left_when_nobody_listens() {
        let (_host, end) = Chatterbox::start();
        let (channel, notices) = end.listen();
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!(channel.order(&Call::Ping), Ok(()));
        drop(notices);
        let left = async {
            while channel.order(&Call::Kick(0)).is_ok() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(5), left).await.expect("it still listens");
        assert!(matches!(channel.order(&Call::Ping), Err(CallError::Over(_))));
    }

    #[test]
    fn silence_begins_after_ten_missed_beats_and_ends_with_the_next() {
        let mut heart = Heart::default();
        assert_eq!(heart.look(1), None);
        assert!((0..9).all(|_| heart.look(1).is_none()));
        assert_eq!(heart.look(1), Some(true));
        assert_eq!(heart.look(1), None);
        assert_eq!(heart.look(2), Some(false));
        assert_eq!(heart.look(3), None);
    }
}
