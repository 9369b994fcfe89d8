//! A shadow virtqueue: the guest's chains on one side, a ring in soc-vmm's own memory on the other, which is all that the back end sees.
//!
//! A chain's bytes are copied into bounce buffers, and what the back end wrote there is copied back when it is done. The buffers of the
//! copy are not those of the guest, but the first one to read and the last one to write keep their size, since that is where devices have
//! their headers and their status: at most four.
//!
//! What the back end has is known here and nowhere else: when it goes, each chain is dealt with as its kind of device wants it ([`Loss`]).

use std::collections::VecDeque;
use std::ops::Range;

use super::fuse::FuseRequest;
use super::pool::{PAGE, Pool};
use super::region::{Layout, SMALL, Share};
use super::ring::{DriverRing, Manners, PARTS, Part};
use crate::vhost_user::VhostUserError;
use crate::virtio::{Chain, Queue, QueueError};

/// What becomes of a chain whose back end is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// The next one gets it, in the order in which the guest made it available. Until then the guest waits.
    Replay,
    /// It counts as used.
    Drop,
    /// It is answered, as is what comes after it until the guest begins again ([`FuseRequest`]).
    Fuse,
}

/// How a queue is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conduct {
    /// What becomes of its chains without a back end.
    pub loss: Loss,
    /// The guest's request alone says how much the back end writes: all of it is copied back.
    pub whole: bool,
}

/// Whose fault it is.
#[derive(Debug)]
pub enum Trouble {
    /// The guest's, or its memory's.
    Guest(QueueError),
    /// The back end's.
    Backend(VhostUserError),
}

impl From<QueueError> for Trouble {
    fn from(error: QueueError) -> Self {
        Self::Guest(error)
    }
}

/// Whether there is more to be had from the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// No: it is to kick.
    Empty,
    /// There may be.
    More,
    /// There is no room, until the back end has done something.
    NoRoom,
}

/// A chain that the back end has.
#[derive(Debug)]
struct Slot {
    chain: Chain,
    /// Entries of the ring, the first of which is its place.
    entries: Vec<u16>,
    parts: Vec<Part>,
    /// Where each part is in the share, and its pages, if it has any.
    places: Vec<(usize, Range<usize>)>,
    /// When it was made available.
    order: u64,
    fuse: FuseRequest,
}

/// A queue's shadow.
#[derive(Debug)]
pub struct Shadow {
    queue: usize,
    at: Layout,
    conduct: Conduct,
    indirect: bool,
    pool: Pool,
    /// Entries of the ring that no chain has.
    free: Vec<u16>,
    slots: Vec<Option<Slot>>,
    under_way: usize,
    orders: u64,
    /// The next chain, for which there was no room, or no back end.
    waiting: Option<Chain>,
    /// Heads of chains that were taken in another process, to be given to the back end before any other; and how many there were.
    taken: VecDeque<u16>,
    foreign: u64,
    spare: Vec<Chain>,
    scratch: Vec<u8>,
    /// None before the first back end.
    ring: Option<DriverRing>,
    /// Whether there is somebody at its other end.
    attached: bool,
}

impl Shadow {
    /// Of queue `queue`, with a ring of `size` entries over so many pages. `indirect`: every back end knows indirect descriptors.
    pub fn new(queue: usize, size: u16, pages: usize, conduct: Conduct, indirect: bool) -> Self {
        Self {
            queue,
            at: Layout::new(size, pages),
            conduct,
            indirect,
            pool: Pool::new(pages),
            free: (0..size).rev().collect(),
            slots: (0..size).map(|_| None).collect(),
            under_way: 0,
            orders: 0,
            waiting: None,
            taken: VecDeque::new(),
            foreign: 0,
            spare: Vec::new(),
            scratch: Vec::new(),
            ring: None,
            attached: false,
        }
    }

    /// What it needs of a region.
    pub fn layout(&self) -> Layout {
        self.at
    }

    /// Forgets what the guest gave: it has taken it back.
    pub fn reset(&mut self) {
        let spare = std::mem::take(&mut self.spare);
        *self = Self { spare, ..Self::new(self.queue, self.at.size, self.pool.pages(), self.conduct, self.indirect) };
    }

    /// Chains that the back end has, or the next one will have.
    pub fn under_way(&self) -> usize {
        self.under_way
    }

    /// The back end has stopped and may come back. What it has done before counts; what it has not done is the guest's again, as if it had never
    /// been taken, where that is all that was taken last.
    ///
    /// # Errors
    /// The guest's.
    pub fn pause(&mut self, queue: &mut Queue) -> Result<(), QueueError> {
        if let Err(Trouble::Guest(error)) = self.collect(queue) {
            return Err(error);
        }
        self.attached = false;
        // Those from elsewhere came first, and never by this side's queue.
        let first = self.slots.iter().flatten().map(|slot| slot.order).min().unwrap_or(self.orders);
        if first >= self.foreign && self.orders - first == self.under_way as u64 {
            let waiting = usize::from(self.waiting.take().is_some());
            queue.put_back((self.under_way + waiting) as u16);
            self.reset();
        }
        Ok(())
    }

    /// Heads of the chains that were taken and not given back, in the order in which they came.
    pub fn heads(&self) -> Vec<u16> {
        let mut slots: Vec<&Slot> = self.slots.iter().flatten().collect();
        slots.sort_by_key(|slot| slot.order);
        let slots = slots.into_iter().map(|slot| slot.chain.head());
        slots.chain(self.waiting.iter().map(Chain::head)).chain(self.taken.iter().copied()).collect()
    }

    /// Has chains to give to the back end that were taken in another process.
    pub fn take_over(&mut self, heads: Vec<u16>) {
        self.reset();
        self.foreign = heads.len() as u64;
        self.taken = heads.into();
    }

    /// There is a new back end, over new memory: it gets what the one before has not done.
    pub fn attach(&mut self, share: Share, manners: Manners) {
        let mut ring = DriverRing::new(share, manners);
        let mut slots: Vec<&mut Slot> = self.slots.iter_mut().flatten().collect();
        slots.sort_by_key(|slot| slot.order);
        for slot in slots {
            if let Some(before) = &self.ring {
                let filled = slot.parts.iter().zip(&slot.places).filter(|(part, _)| !part.writable);
                for (part, (place, _)) in filled {
                    self.scratch.resize(part.len as usize, 0);
                    before.share().window.read_bytes(*place, &mut self.scratch);
                    ring.share().window.write_bytes(*place, &self.scratch);
                }
            }
            for (part, (place, _)) in slot.parts.iter_mut().zip(&slot.places) {
                part.address = ring.share().base + *place as u64;
            }
            ring.offer(&slot.entries, &slot.parts);
        }
        self.ring = Some(ring);
        self.attached = true;
    }

    /// The back end is gone. What it has done before counts.
    ///
    /// # Errors
    /// The guest's.
    pub fn detach(&mut self, queue: &mut Queue, fuse_lost: &mut bool) -> Result<(), QueueError> {
        if let Err(Trouble::Guest(error)) = self.collect(queue) {
            return Err(error);
        }
        self.attached = false;
        if self.conduct.loss == Loss::Replay {
            return Ok(());
        }
        let mut kept = false;
        for place in 0..self.slots.len() {
            // A session that had not begun begins with the next one.
            let begins = |slot: &Slot| self.conduct.loss == Loss::Fuse && slot.fuse.is_init();
            kept |= self.slots[place].as_ref().is_some_and(begins);
            let Some(mut slot) = self.slots[place].take_if(|slot| !begins(slot)) else { continue };
            let written = self.answer(slot.fuse, &mut slot.chain, queue)?;
            self.finish(slot, written, queue)?;
        }
        *fuse_lost |= self.conduct.loss == Loss::Fuse && !kept;
        queue.publish()
    }

    /// Takes what the guest made available, as long as there is room. The back end sees it after [`Shadow::show`].
    ///
    /// # Errors
    /// The guest's.
    pub fn fill(&mut self, queue: &mut Queue, fuse_lost: &mut bool) -> Result<Filled, QueueError> {
        if !self.attached && self.conduct.loss == Loss::Replay {
            return Ok(Filled::NoRoom);
        }
        let mut answered = false;
        let mut filled = Filled::More;
        for _ in 0..self.at.size {
            let mut chain = match self.waiting.take() {
                Some(chain) => chain,
                None => {
                    let mut chain = self.spare.pop().unwrap_or_default();
                    if let Some(head) = self.taken.pop_front() {
                        queue.retake(head, &mut chain)?;
                    } else if !queue.pop(&mut chain)? {
                        self.spare.push(chain);
                        filled = Filled::Empty;
                        break;
                    }
                    chain
                }
            };
            let request = match self.conduct.loss {
                Loss::Fuse if *fuse_lost || !self.attached => FuseRequest::peek(&chain, queue.lease())?,
                _ => FuseRequest::default(),
            };
            let answer_it = match self.conduct.loss {
                Loss::Replay => false,
                Loss::Drop => !self.attached,
                Loss::Fuse => (*fuse_lost || !self.attached) && !request.is_init(),
            };
            if answer_it {
                let written = self.answer(request, &mut chain, queue)?;
                queue.push(chain.head(), written)?;
                self.spare.push(chain);
                answered = true;
                continue;
            }
            if !self.attached {
                self.waiting = Some(chain);
                filled = Filled::NoRoom;
                break;
            }
            if let Some(chain) = self.place(chain, queue)? {
                self.waiting = Some(chain);
                filled = Filled::NoRoom;
                break;
            }
            *fuse_lost = false;
        }
        if answered {
            queue.publish()?;
        }
        Ok(filled)
    }

    /// Shows the back end what it was given; whether it wants a kick.
    pub fn show(&mut self) -> bool {
        self.ring.as_mut().is_some_and(|ring| self.attached && ring.show())
    }

    /// Gives the guest what the back end has done; how many chains.
    ///
    /// # Errors
    /// The back end's, after which [`Shadow::detach`] is due; or the guest's.
    pub fn collect(&mut self, queue: &mut Queue) -> Result<usize, Trouble> {
        let Some(ring) = self.ring.as_mut().filter(|_| self.attached) else { return Ok(0) };
        let count = usize::from(ring.has_used());
        if count == 0 {
            return Ok(0);
        }
        ring.hold_calls();
        let done = if count > self.under_way {
            Err(self.broken("more used buffers than it has"))
        } else {
            (0..count).try_for_each(|_| self.collect_one(queue))
        };
        queue.publish()?;
        done.map(|()| count)
    }

    /// Whether the back end has done something.
    pub fn has_news(&self) -> bool {
        self.ring.as_ref().is_some_and(|ring| self.attached && ring.has_used() > 0)
    }

    /// Asks the back end for a call when it has done something; whether it has already.
    pub fn allow_calls(&mut self) -> bool {
        self.ring.as_mut().is_some_and(|ring| self.attached && ring.allow_calls())
    }

    fn collect_one(&mut self, queue: &mut Queue) -> Result<(), Trouble> {
        let Some(ring) = &mut self.ring else { return Ok(()) };
        let (id, len) = ring.take_used();
        let slot = self.slots.get_mut(id as usize).and_then(|slot| {
            let room = slot.as_ref()?.chain.writable();
            Some((room, slot))
        });
        let Some((room, slot)) = slot else { return Err(self.broken("a used buffer that it doesn't have")) };
        if u64::from(len) > room {
            return Err(self.broken("more bytes written than its buffers have"));
        }
        let Some(mut slot) = slot.take() else { return Ok(()) };
        self.copy_back(&mut slot, len, queue)?;
        self.finish(slot, len, queue)?;
        Ok(())
    }

    /// Copies what the back end wrote to the guest.
    fn copy_back(&mut self, slot: &mut Slot, len: u32, queue: &Queue) -> Result<(), QueueError> {
        let Some(ring) = &self.ring else { return Ok(()) };
        let mut left = if self.conduct.whole { u32::MAX } else { len };
        let written = slot.parts.iter().zip(&slot.places).filter(|(part, _)| part.writable);
        for (part, (place, _)) in written {
            let count = part.len.min(left);
            left -= count;
            self.scratch.resize(count as usize, 0);
            ring.share().window.read_bytes(*place, &mut self.scratch);
            slot.chain.write(queue.lease(), &self.scratch)?;
        }
        Ok(())
    }

    /// Copies a chain to where the back end finds it; the chain, if there is no room.
    fn place(&mut self, mut chain: Chain, queue: &Queue) -> Result<Option<Chain>, QueueError> {
        let lens = lens(&chain);
        let pages = |len: u64| if len <= SMALL as u64 { 0 } else { len.div_ceil(PAGE as u64) };
        let count = lens.iter().filter(|(len, _)| *len > 0).count();
        if count == 0 {
            return Err(QueueError::Broken("a chain without buffers"));
        }
        if lens.iter().map(|(len, _)| pages(*len)).sum::<u64>() > self.pool.pages() as u64 {
            return Err(QueueError::Broken("a chain of more bytes than its device takes"));
        }
        let entries = if self.indirect { 1 } else { count };
        let Some(ring) = self.ring.as_ref().filter(|_| self.free.len() >= entries) else { return Ok(Some(chain)) };
        let entries = self.free.split_off(self.free.len() - entries);
        let mut slot = Slot {
            entries,
            parts: Vec::with_capacity(PARTS),
            places: Vec::with_capacity(PARTS),
            order: self.orders,
            fuse: FuseRequest::default(),
            chain: Chain::default(),
        };
        let head = slot.entries[0];
        for (index, (len, writable)) in lens.into_iter().filter(|(len, _)| *len > 0).enumerate() {
            let (place, run) = match pages(len) as usize {
                0 => (self.at.small + SMALL * (PARTS * usize::from(head) + index), 0..0),
                pages => match self.pool.take(pages) {
                    Some(first) => (self.at.pages + first * PAGE, first..first + pages),
                    None => {
                        self.free_up(slot);
                        return Ok(Some(chain));
                    }
                },
            };
            slot.places.push((place, run));
            slot.parts.push(Part { address: ring.share().base + place as u64, len: len as u32, writable });
        }
        let filled = slot.parts.iter().zip(&slot.places).filter(|(part, _)| !part.writable);
        for (index, (part, (place, _))) in filled.enumerate() {
            self.scratch.resize(part.len as usize, 0);
            chain.read(queue.lease(), &mut self.scratch)?;
            ring.share().window.write_bytes(*place, &self.scratch);
            if index == 0 {
                slot.fuse = FuseRequest::parse(&self.scratch);
            }
        }
        slot.chain = chain;
        self.orders += 1;
        self.under_way += 1;
        if let Some(ring) = &mut self.ring {
            ring.offer(&slot.entries, &slot.parts);
        }
        self.slots[usize::from(head)] = Some(slot);
        Ok(None)
    }

    /// Gives a chain back to the guest that was taken from its place.
    fn finish(&mut self, mut slot: Slot, written: u32, queue: &mut Queue) -> Result<(), QueueError> {
        let chain = std::mem::take(&mut slot.chain);
        self.under_way -= 1;
        self.free_up(slot);
        queue.push(chain.head(), written)?;
        self.spare.push(chain);
        Ok(())
    }

    /// Frees what a slot has of the ring and of the pages.
    fn free_up(&mut self, slot: Slot) {
        self.free.extend(slot.entries);
        slot.places.into_iter().for_each(|(_, run)| self.pool.give_back(run));
    }

    /// Answers a chain in place of the back end; bytes of the answer.
    fn answer(&self, request: FuseRequest, chain: &mut Chain, queue: &Queue) -> Result<u32, QueueError> {
        if self.conduct.loss == Loss::Fuse { request.answer(chain, queue.lease()) } else { Ok(0) }
    }

    fn broken(&self, what: &'static str) -> Trouble {
        Trouble::Backend(VhostUserError::Queue { queue: self.queue, what })
    }
}

/// A chain's parts as the back end will see them: bytes, and whether it writes them; some are empty.
fn lens(chain: &Chain) -> [(u64, bool); PARTS] {
    let (first, last) = chain.ends();
    let (first, last) = (u64::from(first), u64::from(last));
    [(first, false), (chain.readable() - first, false), (chain.writable() - last, true), (last, true)]
}
