//! What a device answers, now or later.

use std::sync::mpsc::Sender;

/// A device's answer to one access.
#[derive(Clone, Copy, Debug)]
#[must_use]
pub enum Answer {
    /// Finished; the value counts for reads only.
    Done(u64),
    /// Nothing here: a read gives all ones, a write vanishes; counted.
    Unclaimed,
    /// The device failed; the text goes to the log (rate-limited), the status to the vCPU's lane.
    Failed(&'static str),
    /// The device keeps the ticket and answers later.
    Deferred,
}

/// Which request a ticket stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId {
    /// The lane that waits.
    pub vcpu: u16,
    /// Its request's sequence number.
    pub sequence: u32,
}

/// A deferred answer on its way back to the thread that serves IOREQs.
#[derive(Debug)]
pub struct LateAnswer {
    /// The request.
    pub id: RequestId,
    /// The answer: never [`Answer::Deferred`].
    pub answer: Answer,
}

/// The right to defer one access. Dropping it without [`Deferred::ticket`] costs nothing.
#[derive(Debug)]
pub struct Deferred<'a> {
    id: RequestId,
    late: &'a Sender<LateAnswer>,
    wake: &'a std::sync::Arc<dyn Wake>,
}

/// Wakes the thread that serves IOREQs.
pub trait Wake: Send + Sync + std::fmt::Debug {
    /// Makes the thread look at its late answers.
    fn wake(&self);
}

impl<'a> Deferred<'a> {
    /// The right to defer the request `id`: the late answer goes to `late`, and `wake` is called then.
    pub fn new(id: RequestId, late: &'a Sender<LateAnswer>, wake: &'a std::sync::Arc<dyn Wake>) -> Self {
        Self { id, late, wake }
    }

    /// Takes the ticket; the device must then return [`Answer::Deferred`].
    pub fn ticket(self) -> Ticket {
        Ticket { id: self.id, late: self.late.clone(), wake: self.wake.clone(), spent: false }
    }
}

/// Answers one deferred access, exactly once. Dropped unanswered, it answers [`Answer::Failed`], so that no vCPU waits for ever.
#[derive(Debug)]
pub struct Ticket {
    id: RequestId,
    late: Sender<LateAnswer>,
    wake: std::sync::Arc<dyn Wake>,
    spent: bool,
}

impl Ticket {
    /// Finishes the access with `value` (reads) or just finishes it (writes).
    pub fn done(mut self, value: u64) {
        self.send(Answer::Done(value));
    }

    /// Finishes the access as failed.
    pub fn failed(mut self, why: &'static str) {
        self.send(Answer::Failed(why));
    }

    fn send(&mut self, answer: Answer) {
        self.spent = true;
        // The receiver is gone only when the VM has ended: nobody waits then.
        if self.late.send(LateAnswer { id: self.id, answer }).is_ok() {
            self.wake.wake();
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.spent {
            self.send(Answer::Failed("the device dropped a deferred access"));
        }
    }
}
