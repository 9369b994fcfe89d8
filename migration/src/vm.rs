//! What a migration needs of the two sides' VMs.

use std::time::Duration;

use crate::stream::Run;

/// What a side's VM couldn't do, in one line.
pub type VmError = Box<dyn std::error::Error + Send + Sync>;

/// A piece of guest memory: RAM, ROM, or flash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its name on the wire: the same on both sides, no other region's.
    pub id: u32,
    /// Its size, in pages of [`crate::stream::PAGE`] bytes.
    pub pages: u64,
}

/// The state of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceState {
    /// The device, as the description names it. Once in a [`State`].
    pub name: String,
    /// The version of `state`.
    pub version: u32,
    /// The state itself, in JSON.
    pub state: Vec<u8>,
}

/// What a guest is besides its memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// In the order in which they are loaded.
    pub devices: Vec<DeviceState>,
    /// What KVM keeps, of a vCPU or (none) of the VM: records of `api-channel`. In the order in which they are loaded.
    pub guest: Vec<(Option<u32>, Vec<u8>)>,
}

/// The guest that moves. Called from several of the migration's threads. A call may block, but has a deadline of its own.
pub trait SourceVm: Send + Sync {
    /// What the machine is, in JSON: what the destination needs to prepare one, or to refuse.
    ///
    /// # Errors
    /// It can't be told.
    fn description(&self) -> Result<Vec<u8>, VmError>;

    /// Its memory. Stays as it is until the migration is over.
    fn regions(&self) -> Vec<Region>;

    /// Whether all of a region has to be there before the guest starts, post-copy or not.
    fn comes_whole(&self, region: u32) -> bool {
        _ = region;
        false
    }

    /// Begins to log writes to memory: once it returns, every later write is told by [`Self::take_dirty`].
    ///
    /// # Errors
    /// Something writes to memory unseen: a blocker, by its name.
    fn start_log(&self) -> Result<(), VmError>;

    /// The pages of a region that were written since they were last told, and forgets them: the caller keeps them until they are sent.
    ///
    /// # Errors
    /// The log can't be read. Pages may be forgotten then: the migration has failed.
    fn take_dirty(&self, region: u32) -> Result<Vec<Run>, VmError>;

    /// Ends the log.
    fn stop_log(&self);

    /// Reads memory; `to` is as long as `run`.
    ///
    /// # Errors
    /// It can't be read.
    fn read(&self, run: Run, to: &mut [u8]) -> Result<(), VmError>;

    /// Has the guest stand still, vCPUs and devices: what [`Self::take_dirty`] tells after that is the last.
    ///
    /// # Errors
    /// It runs on.
    fn pause(&self) -> Result<(), VmError>;

    /// The migration has failed: the guest goes on here, if it ran before.
    ///
    /// # Errors
    /// It can't.
    fn resume(&self) -> Result<(), VmError>;

    /// The state of a paused guest.
    ///
    /// # Errors
    /// It can't be had.
    fn state(&self) -> Result<State, VmError>;

    /// From here on vCPUs stand still `percent` of their time; 0: not at all.
    ///
    /// # Errors
    /// They can't be slowed.
    fn throttle(&self, percent: u8) -> Result<(), VmError>;

    /// From here on each vCPU writes so many bytes a second at most; 0: as many as it can.
    ///
    /// # Errors
    /// Nothing tells which vCPU writes what.
    fn limit_writes(&self, bytes: u64) -> Result<(), VmError> {
        _ = bytes;
        Err("nothing tells here which vCPU writes what".into())
    }

    /// The destination runs the guest: what is left of it here may go.
    fn gone(&self);

    /// Nobody knows whether the destination runs the guest: it stands still here until somebody says that it runs nowhere else.
    fn in_doubt(&self);

    /// The guest is in a file, and is this side's as before: it goes on if it ran, or stands still until somebody has it go on.
    ///
    /// # Errors
    /// It can't.
    fn stays(&self, paused: bool) -> Result<(), VmError> {
        _ = paused;
        self.resume()
    }
}

/// Where the guest goes. Called from several of the migration's threads, for a page always from the same one. A call may block, but has
/// a deadline of its own.
pub trait DestinationVm: Send + Sync {
    /// Makes a machine that was described. Its memory is all zeros. Its regions.
    ///
    /// # Errors
    /// Such a machine can't run here, and why.
    fn prepare(&self, description: &[u8]) -> Result<Vec<Region>, VmError>;

    /// Writes memory. `run` is in its region, `bytes` as long.
    ///
    /// # Errors
    /// It can't be written.
    fn write(&self, run: Run, bytes: &[u8]) -> Result<(), VmError>;

    /// Writes zeros over pages that were written before.
    ///
    /// # Errors
    /// They can't be.
    fn clear(&self, run: Run) -> Result<(), VmError>;

    /// Loads the state.
    ///
    /// # Errors
    /// Something is missing, unknown, or impossible: which, and what.
    fn load(&self, state: State) -> Result<(), VmError>;

    /// Starts the guest: it is this side's from here on.
    ///
    /// # Errors
    /// It has not run, and never will.
    fn start(&self) -> Result<(), VmError>;

    /// Whether the guest may run before all of its pages are there: then the four calls below come too, after [`Self::prepare`].
    fn can_post_copy(&self) -> bool {
        false
    }

    /// Whether all of a region has to be there before the guest starts.
    fn needs_whole(&self, region: u32) -> bool {
        _ = region;
        false
    }

    /// These pages come after the guest has started, whatever was written of them before: whoever touches one waits. Before
    /// [`Self::load`], which touches no page.
    ///
    /// # Errors
    /// They can't be waited for.
    fn lacks(&self, runs: &[Run]) -> Result<(), VmError> {
        _ = runs;
        Err("this machine waits for no page".into())
    }

    /// Pages that somebody waits for since this was last called; none for `at_most`: none. Called by a thread of its own.
    fn wanted(&self, at_most: Duration) -> Vec<Run> {
        std::thread::sleep(at_most);
        Vec::new()
    }

    /// Some of the pages that it lacks are there, and whoever waits for them may go on. `bytes` as long as `run`; none: they are the zeros that
    /// they are here, after [`Self::clear`] where they were written. Once for a page.
    ///
    /// # Errors
    /// It can't be put there: the guest is broken.
    fn place(&self, run: Run, bytes: Option<&[u8]>) -> Result<(), VmError> {
        _ = (run, bytes);
        Err("this machine waits for no page".into())
    }
}
