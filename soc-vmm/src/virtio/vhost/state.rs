//! How such a device comes to rest, and its state on its way to another process. Its back end's own state isn't carried: of disks and interfaces
//! there is none between requests.
//!
//! A disk's requests are finished first. An interface has buffers at its back end for as long as it likes: once that has stopped, they are the
//! guest's again. What a back end of the guest's own queues has done is in their used rings.

use std::sync::Arc;

use nix::sys::epoll::EpollFlags;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use super::direct::{INDEX, Way};
use super::engine::{STATUS, VhostEngine};
use super::kind::VhostKind;
use super::shadow::{Shadow, Trouble};
use crate::persist::{RestoreError, StateError, States};
use crate::virtio::{Config, QueueError, Session, Wait};

pub(super) const VERSION: u32 = 1;

/// Saved state of a [`VhostEngine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VhostState {
    /// A network interface's cable is in.
    up: bool,
    /// None without a driver.
    session: Option<SessionState>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct SessionState {
    /// No back end has had its queues.
    fresh: bool,
    /// Chains are in flight that only the record of the back end knows.
    indebted: bool,
    /// Pairs of queues that the driver of an interface uses.
    pairs: usize,
    /// The back end has had the guest's own queues.
    direct: bool,
    /// Of each shadow queue, heads of chains that were taken and not given back.
    taken: Vec<Vec<u16>>,
}

impl VhostEngine {
    /// Stops the back end, once a disk's has done what it was given, or is gone. What to wait for; none: it is stopped.
    pub(super) fn come_to_rest(&mut self, session: &mut Session) -> Result<Option<Wait>, QueueError> {
        if let Some(link) = &self.link {
            link.silence();
        }
        self.hear(session)?;
        if self.kind != VhostKind::Net {
            self.collect(session)?;
            if self.running.is_some() && self.shadows.iter().any(|shadow| shadow.under_way() > 0) {
                let more = self.shadows.iter_mut().any(Shadow::allow_calls);
                return Ok(Some(if more {
                    Wait::NOTHING
                } else {
                    Wait { source: EpollFlags::EPOLLIN, timeout: None }
                }));
            }
        }
        let stopped = self.stop();
        for (shadow, queue) in self.shadows.iter_mut().zip(&mut session.queues) {
            if let Some(queue) = queue {
                shadow.pause(queue)?;
            }
        }
        if self.terms.way == Way::Direct {
            let used = self.settle_queues(session)?;
            // Where it would have gone on is behind the last chain that it used: it has none.
            self.indebted &= stopped.is_empty() || used != stopped;
            session.control.take_back();
        }
        Ok(None)
    }

    /// Gives the guest what the back end has done.
    fn collect(&mut self, session: &mut Session) -> Result<(), QueueError> {
        for index in 0..self.shadows.len() {
            let Some(queue) = &mut session.queues[index] else { continue };
            match self.shadows[index].collect(queue) {
                Ok(_) => {}
                Err(Trouble::Guest(error)) => return Err(error),
                Err(Trouble::Backend(error)) => return self.lose(&error, session),
            }
        }
        Ok(())
    }

    /// Takes note of how far the guest's own queues are, which nobody here has served: of each, what was used.
    fn settle_queues(&self, session: &mut Session) -> Result<Vec<(usize, u16)>, QueueError> {
        let used = self.kind.used(session.features, self.terms.queues);
        let mut all = Vec::new();
        for (index, queue) in session.queues.iter_mut().take(used).enumerate() {
            let Some(queue) = queue.as_mut().filter(|_| !self.fresh) else { continue };
            let next = session.control.lease.read_u16(queue.layout().used + INDEX)?;
            queue.move_to(next);
            all.push((index, next));
        }
        Ok(all)
    }

    pub(super) fn save(&self, at: &str, states: &mut States, in_session: bool) {
        let session = in_session.then(|| SessionState {
            fresh: self.fresh,
            indebted: self.indebted,
            pairs: self.pairs,
            direct: self.terms.way == Way::Direct,
            taken: self.shadows.iter().map(Shadow::heads).collect(),
        });
        let up = self.link.as_ref().is_none_or(|link| link.is_up());
        states.put(self.kind.state_name(), at, VERSION, &VhostState { up, session });
    }

    pub(super) fn restore(
        &mut self,
        at: &str,
        states: &mut States,
        config: &Config,
        session: Option<&Session>,
    ) -> Result<(), StateError> {
        let device = self.kind.state_name();
        let VhostState { up, session: saved } = states.take(device, at, VERSION)?;
        let refused = |what: &'static str| StateError::from(RestoreError::new(device, what));
        match (saved, session) {
            (None, None) => {}
            (Some(saved), Some(session)) => self.take_over(saved, session).map_err(refused)?,
            _ => return Err(refused("what its driver has said is missing, or there is no driver")),
        }
        let mut shown = [0; STATUS + 2];
        config.read(0, &mut shown);
        let [a, b, c, d, e, f, low, high] = shown;
        if let Some(link) = &self.link {
            link.set_up(up);
            self.shown_up = u16::from_le_bytes([low, high]) & VIRTIO_NET_S_LINK_UP as u16 != 0;
        }
        self.moved = session.map(|_| [a, b, c, d, e, f]);
        Ok(())
    }

    fn take_over(&mut self, saved: SessionState, session: &Session) -> Result<(), &'static str> {
        let SessionState { fresh, indebted, pairs, direct, taken } = saved;
        let is_direct = self.terms.way == Way::Direct;
        if indebted {
            return Err("its back end left requests in flight: try again while it is there");
        }
        if is_direct != direct && self.kind == VhostKind::Block {
            return Err(
                "its back end has the guest's own queues on one side and shadow queues on the other, whose requests are smaller",
            );
        }
        if is_direct && taken.iter().any(|heads| !heads.is_empty()) {
            return Err("a back end had chains that can't be given to one which works on the guest's own queues");
        }
        if !(1..=usize::from(self.terms.queues)).contains(&pairs) {
            return Err("its driver uses more pairs of queues than there are");
        }
        let fits = |(heads, queue): (&Vec<u16>, usize)| {
            let queue = session.queues.get(queue).and_then(Option::as_ref);
            let size = queue.map_or(0, |queue| queue.layout().size);
            heads.len() <= size.into() && heads.iter().all(|head| *head < size)
        };
        if !taken.iter().zip(0..).all(fits) || !is_direct && !direct && taken.len() != self.shadows.len() {
            return Err("chains of a queue that isn't in use");
        }
        self.begin(session);
        (self.fresh, self.pairs) = (fresh, pairs);
        self.shadows.iter_mut().zip(taken).for_each(|(shadow, heads)| shadow.take_over(heads));
        self.session = Arc::downgrade(&session.control);
        Ok(())
    }
}
