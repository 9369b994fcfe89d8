//! Asking the SoC and waiting for it: spin for a while, then sleep on the lane's vector.

use std::os::fd::BorrowedFd;

use ioreq_ring::{Completion, HostLane, LaneError, Posted, Request};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use pcie_function::{Bell, Doorbell, HostFunction};

use super::shared::{Count, Shared, Stop};
use crate::kvm::host_tsc;

/// A vCPU's lane with all that waiting takes.
pub(crate) struct Lane<F: HostFunction> {
    ring: HostLane<F::Window, F::Window>,
    bell: F::Bell,
    sleeper: Sleeper,
    spin: Spin,
}

/// Why there is no completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// The thread was told to end.
    Stop,
    /// The SoC broke the lane's rules.
    Broken(LaneError),
}

impl From<Stop> for Unanswered {
    fn from(_: Stop) -> Self {
        Self::Stop
    }
}

impl From<LaneError> for Unanswered {
    fn from(error: LaneError) -> Self {
        Self::Broken(error)
    }
}

impl<F: HostFunction> Lane<F> {
    /// A lane whose completions are announced by `vector`.
    pub(crate) fn new(
        ring: HostLane<F::Window, F::Window>,
        bell: F::Bell,
        vector: BorrowedFd<'_>,
        shared: &Shared,
        spin: Spin,
    ) -> Result<Self, Errno> {
        Ok(Self { ring, bell, sleeper: Sleeper::new(vector, shared)?, spin })
    }

    /// The ring, for the string pages.
    pub(crate) fn ring(&self) -> &HostLane<F::Window, F::Window> {
        &self.ring
    }

    /// Posts a write; says whether it went.
    pub(crate) fn post(&mut self, request: &Request, shared: &Shared) -> Result<bool, Unanswered> {
        match self.ring.post(request)? {
            Posted::Sent { ring } => {
                shared.counters.add(Count::Posted, 1);
                self.ring_if(ring, shared);
                Ok(true)
            }
            Posted::Full => {
                shared.counters.add(Count::PostedFull, 1);
                Ok(false)
            }
        }
    }

    /// Asks, and waits for the answer. Orders that come meanwhile are acknowledged; `called` is set then, and the thread must
    /// look at them before it enters the guest.
    pub(crate) fn ask(
        &mut self,
        request: &Request,
        shared: &Shared,
        called: &mut bool,
    ) -> Result<Completion, Unanswered> {
        let ring = self.ring.submit(request)?;
        self.ring_if(ring, shared);
        let start = request.host_tsc;
        let answer = self.spin(start, shared, called)?;
        let mut waited = host_tsc().wrapping_sub(start);
        shared.counters.add(Count::SpinNs, self.spin.ns(waited));
        let answer = match answer {
            Some(completion) => completion,
            None => {
                let completion = self.sleep(shared, called)?;
                waited = host_tsc().wrapping_sub(start);
                completion
            }
        };
        self.spin.learn(waited);
        shared.counters.add(Count::WaitNs, self.spin.ns(waited));
        Ok(answer)
    }

    fn ring_if(&self, ring: bool, shared: &Shared) {
        if ring {
            shared.counters.add(Count::Doorbell, 1);
            self.bell.ring(Doorbell::Lanes);
        }
    }

    fn spin(&mut self, start: u64, shared: &Shared, called: &mut bool) -> Result<Option<Completion>, Unanswered> {
        let mut rounds = 0u32;
        loop {
            for _ in 0..LOOKS {
                if let Some(completion) = self.ring.poll()? {
                    return Ok(Some(completion));
                }
                // A pause takes up to 60 ns: a fast answer is not kept waiting by it, a slow one doesn't mind.
                if rounds > EAGER_ROUNDS {
                    std::hint::spin_loop();
                }
            }
            rounds += 1;
            if shared.called() {
                shared.acknowledge()?;
                *called = true;
            }
            if host_tsc().wrapping_sub(start) >= self.spin.budget {
                return Ok(None);
            }
        }
    }

    fn sleep(&mut self, shared: &Shared, called: &mut bool) -> Result<Completion, Unanswered> {
        self.ring.about_to_sleep();
        shared.counters.add(Count::Sleep, 1);
        let mut signalled = true;
        let answer = loop {
            if let Some(completion) = self.ring.poll()? {
                // Else there was an answer and no signal: the vector was lost, or is very late.
                if !signalled {
                    shared.counters.add(Count::SleepLate, 1);
                }
                break completion;
            }
            if shared.called() {
                shared.acknowledge()?;
                *called = true;
            }
            signalled = self.sleeper.sleep();
        };
        self.ring.awake();
        Ok(answer)
    }
}

/// The longest sleep in milliseconds (docs/wire.md §5): a vector that was lost costs its vCPU this much, not the VM.
const LONGEST_SLEEP: u16 = 1000;

/// Sleeps until the lane's vector or the vCPU's own wake-up is signalled, and never for long.
///
/// Edge-triggered, and nobody reads the eventfds: several lanes may share a vector without taking each other's signals.
struct Sleeper(Epoll);

impl Sleeper {
    fn new(vector: BorrowedFd<'_>, shared: &Shared) -> Result<Self, Errno> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, 0);
        epoll.add(vector, event)?;
        epoll.add(&shared.wake, event)?;
        Ok(Self(epoll))
    }

    /// Returns after a signal, perhaps an old one, or without any, and says which: the caller looks again.
    fn sleep(&self) -> bool {
        let mut events = [EpollEvent::empty(); 2];
        self.0.wait(&mut events, EpollTimeout::from(LONGEST_SLEEP)) != Ok(0)
    }
}

/// How long a vCPU spins before it sleeps, in TSC ticks: as long as answers of late took, where spinning can win at all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spin {
    budget: u64,
    most: u64,
    least: u64,
    fast: u64,
    /// Nanoseconds a tick, times 2³².
    ns_per_tick: u64,
    /// Answers in a row that no spin would have caught.
    slow: u32,
}

/// Looks at the completion between two looks at the clock, which takes longer than several of them.
const LOOKS: u32 = 8;
/// Rounds of looks before the first pause: some 2 µs.
const EAGER_ROUNDS: u32 = 40;
/// What is spun in any case, in nanoseconds, so that a fast answer is noticed again.
const LEAST_NS: u64 = 2_000;
/// What is spun where answers are fast, in nanoseconds: an interrupt on the SoC's core delays one by some microseconds, and to sleep for
/// that would cost ten times as much.
const FAST_NS: u64 = 25_000;
/// After so many slow answers in a row one spin is as long as it may be: a sleeper's answer always looks slow, by its wake-up.
const TRY_AGAIN: u32 = 32;

impl Spin {
    /// What a request may spin if the SoC doesn't say: twice what waking a thread on another core costs.
    pub(crate) const DEFAULT_NS: u64 = 100_000;

    /// Spins at most `most_ns` a request, on a host whose TSC has `khz`; never on a host with one CPU.
    pub(crate) fn new(most_ns: u64, khz: u32, one_cpu: bool) -> Self {
        let khz = u64::from(khz).max(1);
        let most = if one_cpu { 0 } else { most_ns.saturating_mul(khz) / 1_000_000 };
        let [least, fast] = [LEAST_NS, FAST_NS].map(|ns| (ns * khz / 1_000_000).min(most));
        Self { budget: most, most, least, fast, ns_per_tick: (1_000_000 << 32) / khz, slow: 0 }
    }

    /// Learns from an answer that took `waited` ticks: the next spin is four times as long and long enough for an interrupt, if that may
    /// be, else half of this one.
    fn learn(&mut self, waited: u64) {
        if waited <= self.most {
            self.slow = 0;
            self.budget = waited.saturating_mul(4).clamp(self.fast, self.most);
            return;
        }
        self.slow += 1;
        self.budget = if self.slow.is_multiple_of(TRY_AGAIN) { self.most } else { (self.budget / 2).max(self.least) };
    }

    fn ns(&self, ticks: u64) -> u64 {
        ((u128::from(ticks) * u128::from(self.ns_per_tick)) >> 32) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spinning_follows_fast_answers_and_gives_up_on_slow_ones() {
        let mut spin = Spin::new(100_000, 1_000_000, false);
        assert_eq!(spin.budget, 100_000);
        for _ in 0..20 {
            spin.learn(5_000_000);
        }
        assert_eq!(spin.budget, LEAST_NS);
        for _ in 20..32 {
            spin.learn(5_000_000);
        }
        assert_eq!(spin.budget, 100_000, "tried again");
        // Woken from sleep, a fast answer looks as slow as the wake-up: spinning is tried again.
        spin.learn(60_000);
        assert_eq!(spin.budget, 100_000);
        spin.learn(10_000);
        assert_eq!(spin.budget, 40_000);
        spin.learn(500);
        assert_eq!(spin.budget, FAST_NS, "an interrupt on the other side is waited for");
        assert!((11_999..=12_000).contains(&spin.ns(12_000)));
    }

    #[test]
    fn one_cpu_never_spins() {
        let mut spin = Spin::new(100_000, 2_000_000, true);
        assert_eq!(spin.budget, 0);
        spin.learn(0);
        spin.learn(1 << 40);
        assert_eq!(spin.budget, 0);
    }
}
