//! The SoC's end of a lane: takes requests, finishes them.

use crate::wire::{CORE, HEADER, IDLE, POSTED_SLOT, POSTED_SLOTS, TAIL};
use crate::{BusMemory, Completion, LaneError, PostedWrite, Request};

/// The windows of one lane as the SoC sees them: `C` card memory, `M` the mailbox, `P` words of the SoC's own.
#[derive(Debug)]
pub struct SocWindows<C, M, P> {
    /// Request line, 64 bytes of card memory.
    pub request: C,
    /// Control line, 64 bytes of card memory.
    pub control: C,
    /// Posted ring, [`crate::wire::POSTED_RING`] bytes of card memory.
    pub posted: C,
    /// Completion line, 64 bytes of inbox.
    pub completion: M,
    /// Credit line, 64 bytes of inbox.
    pub credit: M,
    /// Data of string writes, 4096 bytes of outbox.
    pub outs: M,
    /// Data of string reads, 4096 bytes of inbox.
    pub ins: M,
    /// [`SocLane::PRIVATE`] bytes that outlive the process (the VM's state directory) and that no peer sees.
    pub private: P,
}

/// Where a lane's current request stands, derived from the two lines and the private words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// No request, or the last one is finished.
    Free,
    /// A request was taken and no answer is written down yet.
    Processing,
    /// An answer is written down; its completion may or may not have reached the host.
    Answered,
}

/// The SoC's end of a lane. The thread that serves IOREQs owns all of a VM's.
#[derive(Debug)]
pub struct SocLane<C, M, P> {
    windows: SocWindows<C, M, P>,
    /// Sequence of the last request finished.
    finished: u32,
    /// Whether the request after it has been taken.
    taken: bool,
    /// Posted writes consumed.
    head: u32,
    /// What the host knows of `head`.
    credited: u32,
    /// The posted write at `head`, copied out once.
    next: Option<PostedWrite>,
    /// Tails of the drain that is under way: the first look's and the second's.
    pub(crate) tails: [u32; 2],
}

/// A credit goes back when this many posted writes were consumed since the last one.
const CREDIT_BATCH: u32 = POSTED_SLOTS / 4;

/// Offsets of the private words.
mod private {
    pub(super) const TAKEN: usize = 0;
    pub(super) const ANSWERED: usize = 8;
    pub(super) const FINISHED: usize = 16;
    pub(super) const HEAD: usize = 24;
    pub(super) const ANSWER: usize = 32;
}

impl<C: BusMemory, M: BusMemory, P: BusMemory> SocLane<C, M, P> {
    /// Bytes of private words a lane.
    pub const PRIVATE: usize = 64;

    /// A lane as the private words say: all free where they are zeroed, else where the last process left it.
    ///
    /// After another process [`SocLane::phase`] says what to do before anything else: [`Phase::Processing`], serve
    /// [`SocLane::in_flight`]; [`Phase::Answered`], [`SocLane::resend`]. Then raise the lane's vector: whether the last process did
    /// is not known.
    pub fn new(windows: SocWindows<C, M, P>) -> Self {
        let word = |offset| windows.private.load(offset) as u32;
        let (finished, head) = (word(private::FINISHED), word(private::HEAD));
        let taken = word(private::TAKEN) != finished;
        // The last process may have consumed more than it gave back; a ring that is full for the host would stay so.
        windows.credit.store(0, u64::from(head));
        Self { windows, finished, taken, head, credited: head, next: None, tails: [head; 2] }
    }

    /// Takes the next request, if there is one: one load of local memory while there isn't. Copied once, then checked. Drain the
    /// posted writes of *all* lanes before serving it.
    ///
    /// # Errors
    /// The line's sequence is neither the last one nor the next, or the request is malformed.
    pub fn poll(&mut self) -> Result<Option<Request>, LaneError> {
        let header = self.windows.request.load(HEADER);
        let found = header as u32;
        let expected = self.finished.wrapping_add(1);
        if found == self.finished && !self.taken || found == expected && self.taken {
            return Ok(None);
        }
        if found != expected {
            return Err(LaneError::Sequence { expected, found });
        }
        let request = self.request(header)?;
        self.taken = true;
        self.windows.private.store(private::TAKEN, u64::from(found));
        Ok(Some(request))
    }

    /// Sequence number of the request that was taken, or of the last one finished.
    pub fn sequence(&self) -> u32 {
        self.finished.wrapping_add(u32::from(self.taken))
    }

    /// Where the current request stands.
    pub fn phase(&self) -> Phase {
        let answered = self.windows.private.load(private::ANSWERED) as u32;
        match self.taken {
            false => Phase::Free,
            true if answered == self.sequence() => Phase::Answered,
            true => Phase::Processing,
        }
    }

    /// The request that was taken, read and checked once more: for a process that takes over from the one that took it.
    ///
    /// # Errors
    /// [`LaneError::Order`] unless the phase is [`Phase::Processing`]; else as [`SocLane::poll`].
    pub fn in_flight(&self) -> Result<Request, LaneError> {
        if self.phase() != Phase::Processing {
            return Err(LaneError::Order);
        }
        let header = self.windows.request.load(HEADER);
        let (expected, found) = (self.sequence(), header as u32);
        if found != expected {
            return Err(LaneError::Sequence { expected, found });
        }
        self.request(header)
    }

    /// The rest of the request line under `header`, copied once, then checked.
    fn request(&self, header: u64) -> Result<Request, LaneError> {
        let line = &self.windows.request;
        let core = [line.load(CORE), line.load(CORE + 8), line.load(CORE + 16), header];
        Request::parse(core, || core::array::from_fn(|i| line.load(i * 8)))
    }

    /// Finishes the request that was taken: one write of four words. [`SocLane::host_sleeps`] then tells whether the vector
    /// must be raised.
    ///
    /// # Errors
    /// [`LaneError::Order`] if none was taken. A bus failure is not one of them: it shows at [`SocLane::host_sleeps`], and the
    /// answer stays written down in the private words.
    pub fn complete(&mut self, completion: &Completion) -> Result<(), LaneError> {
        if !self.taken {
            return Err(LaneError::Order);
        }
        let sequence = self.sequence();
        let words = completion.to_words(sequence);
        self.windows.private.store_line(private::ANSWER, &words);
        self.windows.private.store(private::ANSWERED, u64::from(sequence));
        self.send(sequence, &words);
        Ok(())
    }

    /// Sends the answer that is written down once more: for a request that another process answered and perhaps did not deliver.
    ///
    /// # Errors
    /// [`LaneError::Order`] unless the phase is [`Phase::Answered`].
    pub fn resend(&mut self) -> Result<(), LaneError> {
        if self.phase() != Phase::Answered {
            return Err(LaneError::Order);
        }
        let words = core::array::from_fn(|i| self.windows.private.load(private::ANSWER + i * 8));
        self.send(self.sequence(), &words);
        Ok(())
    }

    fn send(&mut self, sequence: u32, words: &[u64; 4]) {
        self.windows.completion.store_line(CORE, words);
        self.finished = sequence;
        self.taken = false;
        self.windows.private.store(private::FINISHED, u64::from(sequence));
    }

    /// Whether the host's vCPU sleeps, looked at after everything sent before has arrived.
    ///
    /// # Errors
    /// The bus no longer carries.
    pub fn host_sleeps(&self) -> Result<bool, crate::BusError> {
        self.windows.completion.flush()?;
        Ok(self.windows.control.load(IDLE) == 0)
    }

    /// Whether a request or posted writes wait: the last look before this side sleeps.
    pub fn has_work(&self) -> bool {
        let found = self.windows.request.load(HEADER) as u32;
        found != self.sequence() || self.windows.control.load(TAIL) as u32 != self.head
    }

    /// The window with the data of string writes; valid from the request until its completion.
    pub fn outs(&self) -> &M {
        &self.windows.outs
    }

    /// The window for the data of string reads; filled before the completion.
    pub fn ins(&self) -> &M {
        &self.windows.ins
    }

    /// Looks at the posted ring's tail.
    pub(crate) fn tail(&self) -> Result<u32, LaneError> {
        let word = self.windows.control.load(TAIL);
        let tail = word as u32;
        if word >> 32 != 0 || tail.wrapping_sub(self.head) > POSTED_SLOTS {
            return Err(LaneError::Tail { head: self.head, tail });
        }
        Ok(tail)
    }

    /// How many posted writes lie between the head and `tail`.
    pub(crate) fn behind(&self, tail: u32) -> u32 {
        tail.wrapping_sub(self.head)
    }

    /// The posted write `ahead` of the head.
    pub(crate) fn posted(&self, ahead: u32) -> Result<PostedWrite, LaneError> {
        let sequence = self.head.wrapping_add(ahead).wrapping_add(1);
        let slot = (sequence.wrapping_sub(1) % POSTED_SLOTS) as usize * POSTED_SLOT;
        let words: [u64; 4] = core::array::from_fn(|i| self.windows.posted.load(slot + i * 8));
        let header = words[3];
        if header as u32 != sequence {
            return Err(LaneError::Sequence { expected: sequence, found: header as u32 });
        }
        let request = Request::parse(words, || [0; 4])?;
        if !request.postable() {
            return Err(LaneError::Malformed { header });
        }
        Ok(PostedWrite { request })
    }

    /// The next posted write before the first or second tail, copied out once.
    pub(crate) fn peek(&mut self, tail: u32) -> Result<Option<PostedWrite>, LaneError> {
        if self.behind(tail) == 0 {
            return Ok(None);
        }
        if self.next.is_none() {
            self.next = Some(self.posted(0)?);
        }
        Ok(self.next)
    }

    /// Consumes what [`SocLane::peek`] showed.
    pub(crate) fn advance(&mut self) {
        self.next = None;
        self.head = self.head.wrapping_add(1);
        self.windows.private.store(private::HEAD, u64::from(self.head));
        if self.head.wrapping_sub(self.credited) >= CREDIT_BATCH {
            self.credited = self.head;
            self.windows.credit.store(0, u64::from(self.head));
        }
    }
}

#[cfg(test)]
impl<C: BusMemory, M: BusMemory, P: BusMemory> SocLane<C, M, P> {
    /// Private words of a lane that has carried so many requests and posted writes.
    pub(crate) fn after(private: &P, requests: u32, posts: u32) {
        for offset in [private::TAKEN, private::ANSWERED, private::FINISHED] {
            private.store(offset, u64::from(requests));
        }
        private.store(private::HEAD, u64::from(posts));
    }

    /// The sequence of the last request whose answer is written down.
    pub(crate) fn answered(private: &P) -> u32 {
        private.load(private::ANSWERED) as u32
    }
}
