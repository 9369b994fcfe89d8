//! How a source of entropy fills buffers (virtio 1.2 §5.4.6).

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::{EntropyConfig, RateLimit};
use crate::persist::{StateError, States};
use crate::virtio::complaint::Complaints;
use crate::virtio::{Chain, Config, Engine, Queue, QueueError, Session, Wait};

/// Bytes of a buffer that are filled, at most. The driver is told how many there are.
const MOST: usize = 64 << 10;
/// Buffers filled before it is seen whether the session goes on.
const TURN: usize = 16;
/// Pause after the kernel gave nothing.
const PAUSE: Duration = Duration::from_millis(100);
/// Its state's name and version.
pub(super) const NAME: &str = "virtio-rng";
pub(super) const VERSION: u32 = 1;

/// A source's engine.
pub struct EntropyEngine {
    name: String,
    budget: Option<Budget>,
    chain: Chain,
    buffer: Vec<u8>,
    complaints: Complaints,
}

/// What of a limit is left.
struct Budget {
    limit: RateLimit,
    left: u64,
    /// Since when; none: nothing of it is used.
    since: Option<Instant>,
}

impl EntropyEngine {
    /// The engine of that source.
    pub fn new(source: EntropyConfig) -> Self {
        let budget = source.limit.map(|limit| Budget { limit, left: limit.bytes, since: None });
        Self {
            name: source.name,
            budget,
            chain: Chain::default(),
            buffer: vec![0; MOST],
            complaints: Complaints::default(),
        }
    }

    /// Fills buffers; what to wait for before there is more to do.
    fn fill(&mut self, queue: &mut Queue) -> Result<Wait, QueueError> {
        for _ in 0..TURN {
            let Budgeted { bytes: left, pause } = self.budget.as_mut().map_or(Budgeted::ALL, Budget::look);
            if let Some(pause) = pause {
                // No kick makes the period end.
                queue.publish()?;
                return Ok(Wait { timeout: Some(pause), ..Wait::KICKS });
            }
            if !queue.pop(&mut self.chain)? {
                queue.publish()?;
                return Ok(if queue.allow_kicks()? { Wait::NOTHING } else { Wait::KICKS });
            }
            if self.chain.readable() > 0 || self.chain.writable() == 0 {
                return Err(QueueError::Broken("a buffer for random bytes that can hold none, or holds some"));
            }
            let count = self.chain.writable().min(MOST as u64).min(left) as usize;
            if let Err(error) = getrandom::fill(&mut self.buffer[..count]) {
                self.complaints.say(&self.name, format_args!("the kernel gives no random bytes: {error}; tries on"));
                queue.put_back(1);
                queue.publish()?;
                return Ok(Wait { timeout: Some(PAUSE), ..Wait::KICKS });
            }
            self.chain.write(queue.lease(), &self.buffer[..count])?;
            queue.push(self.chain.head(), count as u32)?;
            if let Some(budget) = &mut self.budget {
                budget.take(count as u64);
            }
        }
        queue.publish()?;
        Ok(Wait::NOTHING)
    }
}

impl Engine for EntropyEngine {
    fn serve(&mut self, session: &mut Session) -> Result<Wait, QueueError> {
        let Some(Some(queue)) = session.queues.first_mut() else { return Ok(Wait::KICKS) };
        queue.hold_kicks()?;
        self.fill(queue)
    }

    /// A buffer that was taken is filled before anything else is done.
    fn halt(&mut self, _: &mut Session) -> Result<Option<Wait>, QueueError> {
        Ok(None)
    }

    fn save_into(&self, at: &str, states: &mut States, _: Option<&Session>) {
        states.put(NAME, at, VERSION, &EntropyState {});
    }

    fn load(&mut self, at: &str, states: &mut States, _: &Config, _: Option<&mut Session>) -> Result<(), StateError> {
        let EntropyState {} = states.take(NAME, at, VERSION)?;
        Ok(())
    }
}

/// Saved state of an [`EntropyEngine`]: it has none of its own, and a limit's period begins anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EntropyState {}

/// What may be handed out now, or how long that takes.
struct Budgeted {
    bytes: u64,
    pause: Option<Duration>,
}

impl Budgeted {
    const ALL: Self = Self { bytes: u64::MAX, pause: None };
}

impl Budget {
    fn look(&mut self) -> Budgeted {
        let left = self.since.map(|since| self.limit.period.saturating_sub(since.elapsed()));
        if left == Some(Duration::ZERO) {
            (self.left, self.since) = (self.limit.bytes, None);
        }
        Budgeted { bytes: self.left, pause: left.filter(|_| self.left == 0) }
    }

    fn take(&mut self, bytes: u64) {
        self.left -= bytes;
        self.since.get_or_insert_with(Instant::now);
    }
}
