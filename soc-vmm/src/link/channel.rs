//! The API channel under tokio: calls that wait for their replies, orders from any thread, events as a stream.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use api_channel::call::Call;
use api_channel::event::Event;
use api_channel::{ChannelError, Client, Incoming, Status};
use pcie_function::{BusError, Doorbell, SocFunction};
use tokio::sync::{mpsc, oneshot};

use super::bell::Bell;
use super::open::CHANNEL_VECTOR;

/// How long the host may take for a call: an emulated server starves for seconds.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often each side's heartbeat grows.
const BEAT: Duration = Duration::from_secs(1);
/// Heartbeats that may be missing before the host counts as silent.
const SILENCE: u32 = 10;

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
    /// The connection is over.
    #[error("the connection to the host is over")]
    Over,
    /// The reply can't be read.
    #[error("the host's reply can't be read: host-kvm-shim and soc-vmm don't fit each other")]
    Malformed,
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
    /// The host reports.
    Event(Event),
    /// The host's heartbeat stopped, or went on.
    Silent(bool),
    /// The connection is over: the function is lost, or a rule was broken.
    Over(String),
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
}

#[derive(Debug)]
struct State<F: SocFunction> {
    client: Client<F::Card, F::Remote>,
    waiting: Waiting,
    over: bool,
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
        let (sender, receiver) = oneshot::channel();
        let sequence = {
            let mut state = self.shared.state();
            if state.over {
                return Err(CallError::Over);
            }
            let sequence = state.client.send(call, DEADLINE.as_millis() as u32)?;
            state.waiting.insert(sequence, sender);
            sequence
        };
        self.shared.function.raise(CHANNEL_VECTOR);
        match tokio::time::timeout(DEADLINE, receiver).await {
            Ok(reply) => reply.unwrap_or(Err(CallError::Over)),
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

    /// Sends a call that is not answered.
    ///
    /// # Errors
    /// The ring is full, or the connection is over.
    pub fn order(&self, call: &Call) -> Result<(), CallError> {
        {
            let mut state = self.shared.state();
            if state.over {
                return Err(CallError::Over);
            }
            state.client.order(call)?;
        }
        self.shared.function.raise(CHANNEL_VECTOR);
        Ok(())
    }
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
        let state = Mutex::new(State { client, waiting: HashMap::new(), over: false });
        Ok(Self { shared: Arc::new(Shared { function, state }), bell, lost })
    }

    /// Starts the task that listens; it ends when the connection is over or nobody takes notices any more.
    pub fn listen(self) -> (Channel<F>, mpsc::Receiver<Notice>) {
        let (notices, receiver) = mpsc::channel(64);
        let channel = Channel { shared: self.shared.clone() };
        tokio::spawn(async move {
            let why = self.run(&notices).await;
            let waiting = {
                let mut state = self.shared.state();
                state.over = true;
                std::mem::take(&mut state.waiting)
            };
            for (_, reply) in waiting {
                // Who asked may have given up.
                let _ = reply.send(Err(CallError::Over));
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
        loop {
            loop {
                let incoming = match self.shared.state().client.poll() {
                    Ok(incoming) => incoming,
                    Err(broken) => return Some(broken.to_string()),
                };
                match incoming {
                    None => break,
                    Some(Incoming::Event(event)) => notices.send(Notice::Event(event)).await.ok()?,
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
                () = self.lost.raised() => return Some(self.shared.function.check().err().unwrap_or(BusError::Gone).to_string()),
                _ = beats.tick() => {
                    let now = {
                        let mut state = self.shared.state();
                        state.client.beat();
                        state.client.host_beat()
                    };
                    if let Some(silent) = host.look(now) {
                        notices.send(Notice::Silent(silent)).await.ok()?;
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
            Err(CallError::Refused { status, text: String::from_utf8_lossy(&payload).into_owned() })
        };
        // Who asked may have given up.
        let _ = waiting.send(reply);
    }
}

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
    use super::*;

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
