//! Pages that a guest at the destination waits for.

use std::collections::VecDeque;
use std::sync::Mutex;

use crate::ending::lock;
use crate::stream::{MOST_PAGES, Run, connection_of};
use crate::{MigrationError, Region};

/// Most that are remembered for a connection: the others come without being asked for, only later.
const MOST: usize = 4096;

/// A queue for each connection.
pub(super) struct Wants {
    regions: Vec<Region>,
    queues: Vec<Mutex<VecDeque<Run>>>,
}

impl Wants {
    pub(super) fn new(regions: &[Region], connections: u16) -> Self {
        Self { regions: regions.to_vec(), queues: (0..connections).map(|_| Mutex::default()).collect() }
    }

    /// Somebody waits for these.
    pub(super) fn add(&self, runs: &[Run]) -> Result<(), MigrationError> {
        for run in runs {
            self.check(*run)?;
            for part in run.parts(MOST_PAGES).take(MOST) {
                let mut queue = lock(&self.queues[usize::from(connection_of(part.first, self.queues.len() as u16))]);
                if queue.len() < MOST {
                    queue.push_back(part);
                }
            }
        }
        Ok(())
    }

    /// The next that a connection should send.
    pub(super) fn next(&self, connection: u16) -> Option<Run> {
        lock(&self.queues[usize::from(connection)]).pop_front()
    }

    /// Whether there is one.
    pub(super) fn has(&self, connection: u16) -> bool {
        !lock(&self.queues[usize::from(connection)]).is_empty()
    }

    /// Whether there are such pages.
    pub(super) fn check(&self, run: Run) -> Result<(), MigrationError> {
        let has = |region: &Region| region.id == run.region && run.end().is_some_and(|end| end <= region.pages);
        if self.regions.iter().any(has) {
            return Ok(());
        }
        Err(MigrationError::no_such_pages(run))
    }
}
