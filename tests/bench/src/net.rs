//! What a virtio network interface carries: a guest that polls at CPL3 keeps so many frames of 1514 bytes on their way to a peer on a
//! UNIX socket that sends each back.

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread;
use std::time::Duration;

use payloads::virtio_net::{self, Echoes, virtio_net};

use crate::contender::{Entrant, Error, Job, with_sources};
use crate::figure::Figure;
use crate::host::Clock;
use crate::kicks::{self, rate_and_kicks};
use crate::turns::Extent;

/// The figures: name, frames on their way.
pub const FIGURES: [(&str, u32); 2] = [("net.echo.depth1", 1), ("net.echo.depth32", 32)];
/// What they count, and what [`kicks`] of them count.
pub const UNITS: [&str; 2] = ["frames/s", "kicks/frame"];

/// Rounds a run; the first warms up and does not count.
const ROUNDS: u32 = 6;
/// What a run may take, with a firmware's start.
const LIMIT: Duration = Duration::from_secs(60);
/// What the peer takes at once.
const BUFFER: usize = 256 << 10;

/// Measures one of [`FIGURES`], and its kicks.
///
/// # Errors
/// The payload does not assemble.
pub fn measure(
    (name, depth): (&str, u32),
    entrants: &mut [Entrant],
    clock: Clock,
    extent: Extent,
    progress: &dyn Fn(&str),
) -> Result<[Figure; 2], Error> {
    let payload = virtio_net(Echoes { depth, count: extent.requests, rounds: ROUNDS, sleeps: false })?;
    let run = |entrant: &mut Entrant| {
        let place = tempfile::tempdir().map_err(|error| format!("the peer's directory: {}", with_sources(&error)))?;
        let socket = place.path().join("peer");
        let listener = UnixListener::bind(&socket).map_err(|error| format!("the peer: {}", with_sources(&error)))?;
        // It ends with the VM that it serves.
        let peer = thread::spawn(move || listener.accept().and_then(|(stream, _)| send_back(stream)));
        let job = Job { payload: &payload, disk: None, net: Some(&socket), limit: LIMIT };
        let console = entrant.run(&job);
        if console.is_err() {
            // A VM that didn't start has left the peer waiting.
            drop(UnixStream::connect(&socket));
        }
        let ended = peer.join().map_err(|_| "the peer panicked".to_owned())?;
        let console = console?;
        ended.map_err(|error| format!("the peer: {}", with_sources(&error)))?;
        let rounds = console.lines().filter_map(virtio_net::parse).skip(1);
        Ok(rounds.map(|round| rate_and_kicks(round, clock)).collect())
    };
    Ok(kicks::measure(name, UNITS, entrants, extent.runs, progress, run))
}

/// Sends every byte back, and with them each frame, until nobody sends any.
fn send_back(mut stream: UnixStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Ok(len) => match stream.write_all(&buffer[..len]) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                written => written?,
            },
            Err(error) => return Err(error),
        }
    }
}
