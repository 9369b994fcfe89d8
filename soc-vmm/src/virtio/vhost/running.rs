//! Queues that a back end serves: their memory, and how each side wakes the other.

use std::sync::Arc;

use nix::sys::eventfd::EventFd;

use super::direct;
use super::events::Events;
use super::region::{BASES, Layout, Region, Share};
use super::shadow::Shadow;
use crate::memory::{GuestLog, RamFiles};
use crate::vhost_user::{self, Frontend, QueueSetup, Record, Setup, VhostUserError};
use crate::virtio::session::{eventfd, ring_bell};

/// Queues that are served.
#[derive(Debug)]
pub(super) struct Running {
    memory: Memory,
    bells: Vec<Bells>,
    /// Queues below are turned on.
    turned_on: usize,
}

/// What the back end has of memory.
#[derive(Debug)]
pub(super) enum Memory {
    /// Shadow queues: new with each start.
    Shadows(Region),
    /// The guest's.
    Guest(RamFiles),
}

/// A queue to be served, and where it is by the back end's addresses.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) queue: usize,
    pub(super) size: u16,
    /// The entry of the available ring that comes first.
    pub(super) base: u16,
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// The same as descriptors have it.
    pub(super) used_guest: u64,
    pub(super) kick: Arc<EventFd>,
}

#[derive(Debug)]
struct Bells {
    queue: usize,
    kick: Arc<EventFd>,
    call: EventFd,
}

impl Running {
    /// Has the back end serve these queues, the ones below `turned_on` at once.
    pub(super) fn start(
        frontend: &mut Frontend,
        features: u64,
        (memory, places): (Memory, Vec<Place>),
        turned_on: usize,
        record: &mut Option<Record>,
        events: &Events,
    ) -> Result<Self, VhostUserError> {
        let bells = |place: &Place| Ok(Bells { queue: place.queue, kick: place.kick.clone(), call: eventfd()? });
        let bells: Vec<Bells> =
            places.iter().map(bells).collect::<nix::Result<_>>().map_err(VhostUserError::waiting)?;
        let setups: Vec<QueueSetup<'_>> = places
            .iter()
            .zip(&bells)
            .map(|(place, Bells { kick, call, .. })| {
                let &Place { queue: index, size, base, descriptors, available, used, used_guest, .. } = place;
                let enabled = index < turned_on;
                QueueSetup { index, size, base, descriptors, available, used, used_guest, kick, call, enabled }
            })
            .collect();
        let setup = Setup { features, memory: &memory.regions(), log: memory.log(), queues: &setups };
        frontend.start(&setup, record)?;
        let running = Self { memory, bells, turned_on };
        for bells in &running.bells {
            if let Err(errno) = events.watch_call(bells.queue, &bells.call) {
                running.forget(events);
                return Err(VhostUserError::waiting(errno));
            }
            // A queue is served from its first kick on; those for what is there already went to somebody else.
            ring_bell(&bells.kick);
        }
        Ok(running)
    }

    /// The queues.
    pub(super) fn queues(&self) -> impl Iterator<Item = usize> {
        self.bells.iter().map(|bells| bells.queue)
    }

    /// Turns on the queues below `wanted` and no others.
    ///
    /// # Errors
    /// The back end refuses, or is gone.
    pub(super) fn turn_on(&mut self, wanted: usize, frontend: &mut Frontend) -> Result<(), VhostUserError> {
        let was = std::mem::replace(&mut self.turned_on, wanted);
        let mut changed = self.queues().filter(|queue| (*queue < was) != (*queue < wanted));
        changed.try_for_each(|queue| frontend.enable(queue, queue < wanted))
    }

    /// Whether it is to start anew: its writes are to be logged, or no longer.
    pub(super) fn is_stale(&self) -> bool {
        matches!(&self.memory, Memory::Guest(files) if files.is_stale())
    }

    /// The memory of a shadow queue.
    pub(super) fn share(&self, queue: usize) -> Option<Share> {
        match &self.memory {
            Memory::Shadows(region) => Some(region.share(queue)),
            Memory::Guest(_) => None,
        }
    }

    pub(super) fn kick(&self, queue: usize) {
        if let Some(bells) = self.bells.iter().find(|bells| bells.queue == queue) {
            ring_bell(&bells.kick);
        }
    }

    /// Listens to its calls no longer.
    pub(super) fn forget(&self, events: &Events) {
        self.bells.iter().for_each(|bells| events.forget(&bells.call));
    }
}

impl Memory {
    /// New memory for these of the shadow queues, for the `start`th time.
    ///
    /// # Errors
    /// The system has no more memory or descriptors.
    pub(super) fn of_shadows(
        shadows: &[Shadow],
        queues: &[usize],
        start: usize,
    ) -> Result<(Self, Vec<Place>), VhostUserError> {
        let layouts: Vec<Layout> = shadows.iter().map(Shadow::layout).collect();
        let region = Region::new(&layouts, BASES[start % 2])
            .map_err(|error| VhostUserError::system("no memory for its queues", std::io::Error::other(error)))?;
        let place = |&queue: &usize| {
            let Share { base, at, .. } = region.share(queue);
            let (available, used) = (base + at.available as u64, base + at.used as u64);
            let kick = Arc::new(eventfd()?);
            Ok(Place { queue, size: at.size, base: 0, descriptors: base, available, used, used_guest: used, kick })
        };
        let places = queues.iter().map(place).collect::<nix::Result<_>>().map_err(VhostUserError::waiting)?;
        Ok((Self::Shadows(region), places))
    }

    fn log(&self) -> Option<&GuestLog> {
        match self {
            Self::Shadows(_) => None,
            Self::Guest(files) => files.log.as_deref(),
        }
    }

    fn regions(&self) -> Vec<vhost_user::Region<'_>> {
        match self {
            Self::Shadows(region) => {
                let (file, size, base) = (region.file(), region.size(), region.base());
                vec![vhost_user::Region { file, offset: 0, size, guest: base, user: base }]
            }
            Self::Guest(files) => direct::regions(files),
        }
    }
}
