//! What a virtio disk carries: a guest that polls at CPL3 keeps so many requests of 4 KiB under way, on a raw file in the page cache.
//!
//! QEMU has an iothread for its disk, as soc-vmm has a thread a device.

use std::io::Write;
use std::time::Duration;

use payloads::virtio_blk::{self, Load, MOST_DEPTH, PIECE, virtio_blk};
use tempfile::NamedTempFile;

use crate::contender::{Entrant, Error, Job, with_sources};
use crate::figure::Figure;
use crate::host::Clock;
use crate::kicks::{self, rate_and_kicks};
use crate::turns::Extent;

/// The figures: name, writes, requests under way.
pub const FIGURES: [(&str, bool, u32); 4] = [
    ("disk.read.depth1", false, 1),
    ("disk.read.depth32", false, 32),
    ("disk.write.depth1", true, 1),
    ("disk.write.depth32", true, 32),
];
/// What they count, and what [`kicks`] of them count.
pub const UNITS: [&str; 2] = ["requests/s", "kicks/request"];

/// Rounds a run; the first warms up and does not count.
const ROUNDS: u32 = 6;
/// What a run may take, with a firmware's start.
const LIMIT: Duration = Duration::from_secs(60);

/// Measures one of [`FIGURES`], and its kicks.
///
/// # Errors
/// The payload does not assemble.
pub fn measure(
    (name, write, depth): (&str, bool, u32),
    entrants: &mut [Entrant],
    clock: Clock,
    extent: Extent,
    progress: &dyn Fn(&str),
) -> Result<[Figure; 2], Error> {
    let payload = virtio_blk(Load { write, depth, count: extent.requests, rounds: ROUNDS, sleeps: false })?;
    let run = |entrant: &mut Entrant| {
        let disk = disk().map_err(|error| format!("the disk's file: {}", with_sources(&error)))?;
        let console = entrant.run(&Job { payload: &payload, disk: Some(disk.path()), net: None, limit: LIMIT })?;
        let rounds = console.lines().filter_map(virtio_blk::parse).skip(1);
        Ok(rounds.map(|round| rate_and_kicks(round, clock)).collect())
    };
    Ok(kicks::measure(name, UNITS, entrants, extent.runs, progress, run))
}

/// A disk whose n-th piece begins with n.
fn disk() -> std::io::Result<NamedTempFile> {
    let mut file = NamedTempFile::with_suffix(".raw")?;
    for n in 0..u64::from(MOST_DEPTH) {
        let mut piece = n.to_le_bytes().to_vec();
        piece.resize(PIECE as usize, 0);
        file.write_all(&piece)?;
    }
    Ok(file)
}
