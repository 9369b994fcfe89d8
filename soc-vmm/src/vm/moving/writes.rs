//! How fast each vCPU writes, and may write: of hosts that keep a ring of dirty pages for each.

use std::time::{Duration, Instant};

use api_channel::call::{Call, DirtyFetch, DirtyLimit, PAGE, Statistic, VCPU_ALL};
use api_channel::codec::Reader;
use pcie_function::SocFunction;
use tokio::sync::Mutex;

use super::log::{HostLog, User};
use crate::link::{CallError, Channel};
use crate::migrate::{AllWritten, VcpuWrites, Written};

/// What vCPUs write.
#[derive(Debug)]
pub(in crate::vm) struct Writes<F: SocFunction> {
    channel: Channel<F>,
    log: HostLog<F>,
    /// Entries of a ring; 0: there are none.
    entries: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Bytes a second that each vCPU may write; 0: as many as it can.
    limits: Vec<u64>,
    /// The same before a move limited them.
    before: Option<Vec<u64>>,
    last: Option<(Instant, Vec<Written>)>,
    told: Vec<VcpuWrites>,
}

/// What lies closer together tells little.
const CLOSEST: Duration = Duration::from_millis(100);
/// Most counters of a reply.
const COUNTERS: usize = 1 << 16;

impl<F: SocFunction> Writes<F> {
    pub(super) fn new(channel: Channel<F>, log: HostLog<F>, vcpus: u32, entries: u32) -> Self {
        let state = State { limits: vec![0; vcpus as usize], before: None, last: None, told: Vec::new() };
        Self { channel, log, entries, state: Mutex::new(state) }
    }

    /// Whether the host tells vCPUs apart.
    pub(super) fn are_told(&self) -> bool {
        self.entries != 0
    }

    /// Counts from now on, or no longer.
    ///
    /// # Errors
    /// The host can't.
    pub(super) async fn count(&self, on: bool) -> Result<(), CallError> {
        if on {
            return self.log.begin(User::Counter).await;
        }
        self.log.end(User::Counter).await;
        Ok(())
    }

    /// What vCPUs have written so far, what is in their rings too: from here on their pages are logged again.
    ///
    /// # Errors
    /// The host doesn't answer, or nothing is logged.
    pub(super) async fn so_far(&self) -> Result<AllWritten, CallError> {
        // The host reads its rings, and tells nothing of them.
        let look = DirtyFetch { ram: 0, flags: 0, first: 0, pages: 0 };
        self.channel.call(&Call::DirtyFetch(look)).await?;
        self.counted().await
    }

    /// What was read from their rings so far.
    async fn counted(&self) -> Result<AllWritten, CallError> {
        let reply = self.channel.call(&Call::Statistics).await?;
        let counters: Vec<Statistic> = Reader::new(&reply.bulk).list(COUNTERS)?;
        let mut all = vec![Written::default(); self.state.lock().await.limits.len()];
        let mut overruns = 0;
        for counter in counters {
            let end = counter.name.iter().position(|byte| *byte == 0).unwrap_or(counter.name.len());
            if &counter.name[..end] == b"shim.rings_overrun" {
                overruns = counter.value;
            }
            let Some(written) = usize::try_from(counter.target).ok().and_then(|vcpu| all.get_mut(vcpu)) else {
                continue;
            };
            match &counter.name[..end] {
                b"shim.dirtied" => written.bytes = counter.value.saturating_mul(PAGE),
                b"shim.stand_ns" => written.stood = Duration::from_nanos(counter.value),
                _ => {}
            }
        }
        Ok(AllWritten { vcpus: all, overruns })
    }

    /// Limits one vCPU, or all, to so many bytes a second; 0: no longer.
    ///
    /// # Errors
    /// The host can't.
    pub(super) async fn limit(&self, vcpu: Option<u32>, bytes: u64) -> Result<(), CallError> {
        let mut state = self.state.lock().await;
        self.set(&mut state, vcpu, bytes).await
    }

    /// The same of all, for a move; at its end the limits are what they were before it.
    ///
    /// # Errors
    /// The host can't.
    pub(super) async fn limit_move(&self, bytes: u64) -> Result<(), CallError> {
        let mut state = self.state.lock().await;
        if bytes != 0 {
            if state.before.is_none() {
                state.before = Some(state.limits.clone());
            }
            return self.set(&mut state, None, bytes).await;
        }
        let before = state.before.take().unwrap_or_default();
        if before.iter().all(|limit| *limit == 0) {
            return self.set(&mut state, None, 0).await;
        }
        for (vcpu, limit) in (0..).zip(before) {
            self.set(&mut state, Some(vcpu), limit).await?;
        }
        Ok(())
    }

    async fn set(&self, state: &mut State, vcpu: Option<u32>, bytes: u64) -> Result<(), CallError> {
        if bytes != 0 {
            // Without the log nothing fills a ring.
            self.log.begin(User::Limits).await?;
        }
        // Less than a page would be no limit.
        let pages = if bytes == 0 { 0 } else { (bytes / PAGE).max(1) };
        let limit = DirtyLimit { vcpu: vcpu.unwrap_or(VCPU_ALL), reserved: 0, pages };
        let done = self.channel.call(&Call::DirtyLimit(limit)).await.map(drop);
        if done.is_ok() {
            match vcpu {
                None => state.limits.fill(bytes),
                Some(vcpu) => state.limits.iter_mut().skip(vcpu as usize).take(1).for_each(|limit| *limit = bytes),
            }
        }
        if state.limits.iter().all(|limit| *limit == 0) {
            (state.last, state.told) = (None, Vec::new());
            self.log.end(User::Limits).await;
        }
        done
    }

    /// vCPUs that have limits, and how fast they write since this was last asked.
    ///
    /// # Errors
    /// The host doesn't answer.
    pub(super) async fn limited(&self) -> Result<Vec<VcpuWrites>, CallError> {
        if self.state.lock().await.limits.iter().all(|limit| *limit == 0) {
            return Ok(Vec::new());
        }
        // Rings stay as they are: who has a limit has room for no more than that.
        let now = self.counted().await?.vcpus;
        let mut state = self.state.lock().await;
        let (at, ring) = (Instant::now(), u64::from(self.entries) * PAGE);
        let is_new = state.last.as_ref().is_none_or(|(then, _)| at.duration_since(*then) >= CLOSEST);
        if is_new {
            let (then, before) = state.last.replace((at, now.clone())).unwrap_or_else(|| (at, now.clone()));
            let passed = at.duration_since(then);
            let rates = before.iter().zip(&now).map(|(before, now)| now.since(before, passed, ring));
            state.told = rates.zip(0..).map(|(writes, vcpu)| VcpuWrites { vcpu, ..writes }).collect();
        }
        let State { limits, told, .. } = &*state;
        let limited = told.iter().zip(limits).filter(|(_, limit)| **limit != 0);
        Ok(limited.map(|(writes, &limit)| VcpuWrites { limit, ..*writes }).collect())
    }
}
