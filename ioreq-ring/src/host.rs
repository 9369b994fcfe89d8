//! The host's end of a lane: a vCPU thread submits its exits and waits.

use crate::wire::{CORE, HEADER, IDLE, POSTED_SLOT, POSTED_SLOTS, TAIL};
use crate::{BusMemory, Completion, LaneError, Request};

/// The windows of one lane as the host sees them: `B` the BAR, `M` the mailbox.
#[derive(Debug)]
pub struct HostWindows<B, M> {
    /// Request line, 64 bytes of BAR.
    pub request: B,
    /// Control line, 64 bytes of BAR.
    pub control: B,
    /// Posted ring, [`crate::wire::POSTED_RING`] bytes of BAR.
    pub posted: B,
    /// Completion line, 64 bytes of inbox.
    pub completion: M,
    /// Credit line, 64 bytes of inbox.
    pub credit: M,
    /// The SoC's idle flag, 8 bytes of inbox, shared by all lanes: 0 = ring me, 1 = I poll.
    pub soc_idle: M,
    /// Data of string writes, 4096 bytes of outbox.
    pub outs: M,
    /// Data of string reads, 4096 bytes of inbox.
    pub ins: M,
}

/// The host's end of a lane. One vCPU thread owns it.
#[derive(Debug)]
pub struct HostLane<B, M> {
    windows: HostWindows<B, M>,
    /// Sequence of the last request submitted.
    submitted: u32,
    /// Sequence of the last completion taken; `submitted` or the one before.
    completed: u32,
    tail: u32,
    credit: u32,
    reads_back: bool,
}

/// What became of a posted write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// On its way; the doorbell must be rung if `ring`.
    Sent {
        /// The SoC sleeps.
        ring: bool,
    },
    /// The ring is full, or the request can't be posted: submit it instead.
    Full,
}

impl<B: BusMemory, M: BusMemory> HostLane<B, M> {
    /// A lane in zeroed windows. Says at once that this end polls: nothing is in flight yet.
    pub fn new(windows: HostWindows<B, M>) -> Self {
        windows.control.store(IDLE, 1);
        Self { windows, submitted: 0, completed: 0, tail: 0, credit: 0, reads_back: false }
    }

    /// For a card whose DMA reads don't push the host's earlier posted writes ahead of their completions: every request and post
    /// then loads once across the bus before it looks at the SoC's flag.
    #[must_use]
    pub fn reading_back(self) -> Self {
        Self { reads_back: true, ..self }
    }

    /// Submits a synchronous request: four stores, and four more for an exit report. Returns whether the doorbell must be rung.
    ///
    /// # Errors
    /// [`LaneError::Order`] while the last request waits.
    pub fn submit(&mut self, request: &Request) -> Result<bool, LaneError> {
        if self.waiting() {
            return Err(LaneError::Order);
        }
        self.submitted = self.submitted.wrapping_add(1);
        let line = &self.windows.request;
        if let Some(words) = &request.words {
            line.store_line(0, words);
        }
        line.store_line(CORE, &[request.address, request.data, request.host_tsc, request.header(self.submitted)]);
        Ok(self.soc_sleeps())
    }

    /// Takes the completion of the waiting request, if it is there: one load of local memory while it isn't.
    ///
    /// # Errors
    /// The completion's sequence is neither the last one's nor the request's, or it is malformed.
    pub fn poll(&mut self) -> Result<Option<Completion>, LaneError> {
        let line = &self.windows.completion;
        let header = line.load(HEADER);
        let found = header as u32;
        if found == self.completed {
            return Ok(None);
        }
        if !self.waiting() || found != self.submitted {
            return Err(LaneError::Sequence { expected: self.completed.wrapping_add(1), found });
        }
        let completion = Completion::parse([line.load(CORE), line.load(CORE + 8), line.load(CORE + 16), header])?;
        self.completed = found;
        Ok(Some(completion))
    }

    /// Posts a write that nobody waits for: four stores and the tail's.
    ///
    /// # Errors
    /// [`LaneError::Credit`] if the SoC gave back more than was posted.
    pub fn post(&mut self, request: &Request) -> Result<Posted, LaneError> {
        if !request.postable() || !self.has_room()? {
            return Ok(Posted::Full);
        }
        let slot = (self.tail % POSTED_SLOTS) as usize * POSTED_SLOT;
        self.tail = self.tail.wrapping_add(1);
        self.windows
            .posted
            .store_line(slot, &[request.address, request.data, request.host_tsc, request.header(self.tail)]);
        self.windows.control.store(TAIL, u64::from(self.tail));
        Ok(Posted::Sent { ring: self.soc_sleeps() })
    }

    /// Whether a request waits for its completion.
    pub fn waiting(&self) -> bool {
        self.submitted != self.completed
    }

    /// Says that this end is about to sleep: the flag by posted write, then the one load across the bus that pushes it out. Poll
    /// once more before sleeping, and call [`HostLane::awake`] afterwards.
    pub fn about_to_sleep(&self) {
        self.windows.control.store(IDLE, 0);
        // In memory that both sides cache the fence keeps the poll that follows behind the flag. Across the bus the load does: it
        // returns when the flag has reached the card, and no later load overtakes it. So a completion that was sent before the SoC
        // could see the flag is seen by that poll.
        self.windows.control.fence();
        let _ = self.windows.control.load(IDLE);
    }

    /// Says that this end polls again.
    pub fn awake(&self) {
        self.windows.control.store(IDLE, 1);
    }

    /// The window for the data of string writes; filled before the request is submitted.
    pub fn outs(&self) -> &M {
        &self.windows.outs
    }

    /// The window with the data of string reads; valid once the completion was taken.
    pub fn ins(&self) -> &M {
        &self.windows.ins
    }

    /// Store, full fence, look at the flag: with the SoC's mirror image (flag by DMA, read back, look at the line) at least one
    /// side sees the other's store.
    fn soc_sleeps(&self) -> bool {
        self.windows.request.fence();
        if self.reads_back {
            let _ = self.windows.control.load(IDLE);
        }
        self.windows.soc_idle.load(0) == 0
    }

    fn has_room(&mut self) -> Result<bool, LaneError> {
        if self.tail.wrapping_sub(self.credit) < POSTED_SLOTS {
            return Ok(true);
        }
        let word = self.windows.credit.load(0);
        let credit = word as u32;
        let used = self.tail.wrapping_sub(credit);
        if word >> 32 != 0 || used > POSTED_SLOTS {
            return Err(LaneError::Credit { tail: self.tail, credit });
        }
        self.credit = credit;
        Ok(used < POSTED_SLOTS)
    }
}

#[cfg(test)]
impl<B: BusMemory, M: BusMemory> HostLane<B, M> {
    /// A lane that has carried so many requests and posted writes. Its windows must say the same.
    pub(crate) fn after(windows: HostWindows<B, M>, requests: u32, posts: u32) -> Self {
        Self { submitted: requests, completed: requests, tail: posts, credit: posts, ..Self::new(windows) }
    }
}
