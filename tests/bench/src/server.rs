//! The same figures inside the emulated server: this program runs there, with both contenders beside it.
//!
//! The server's KVM is the kernel's own, on a processor that QEMU's TCG emulates (docs/testbed.md). Everything is slow there, a peer's program
//! as much as ours: ratios and counts can be compared with those of other machines, rates can't.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use testbed::bed::{SHIM, SOC_VMM};
use testbed::build;
use testbed::fetch::{self, Arch};
use testbed::machine::{self, Machine};
use testbed::protocol::Status;
use testbed::server::ServerConfig;

use crate::command::device_figures;
use crate::contender;
use crate::figure::Figure;
use crate::fio::{self, Guest};
use crate::turns::Extent;

/// What a figure's name begins with when it is from the server.
pub const PREFIX: &str = "server.";

/// How much is worth it. A run takes some 2 s, half of it a VMM's start.
pub const EXTENT: Extent = Extent { runs: 5, requests: 1_000 };
/// What one run of all figures may take.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// How often the program's words are looked at.
const GLANCE: Duration = Duration::from_secs(1);
/// RAM in MiB, without huge pages: a guest has 256 MiB at most, the files are some 200 MiB.
const MEMORY_MIB: u32 = 2048;

const BENCH: &str = "/bin/bench";
const QEMU: &str = "/qemu";
const GUEST: &str = "/guest";
const FIGURES: &str = "/tmp/figures.json";

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server, or a part of it.
    #[error(transparent)]
    Server(#[from] machine::Error),
    /// fio's guest.
    #[error("fio's guest")]
    Guest(#[from] contender::Error),
    /// The server has ended while it measured; how.
    #[error("the emulated server {0}")]
    Gone(String),
    /// The program in the server did not come to its good end.
    #[error("the benchmark inside the emulated server {0}")]
    Inside(String),
    /// What it wrote.
    #[error("the benchmark inside the emulated server wrote no figures")]
    Json(#[from] serde_json::Error),
}

/// The names of all: those of guests that use a device.
pub fn figures() -> impl Iterator<Item = String> {
    device_figures().into_iter().map(|name| format!("{PREFIX}{name}"))
}

/// Measures some of [`figures`].
///
/// # Errors
/// [`Error`].
pub fn measure(figures: &[String], extent: Extent, progress: &dyn Fn(&str)) -> Result<Vec<Figure>, Error> {
    match measure_once(figures, extent, progress) {
        // QEMU's TCG shuts a server down now and then (docs/testbed.md).
        Err(Error::Gone(why)) => {
            progress(&format!("once more, for the emulated server {why}"));
            measure_once(figures, extent, progress)
        }
        measured => measured,
    }
}

fn measure_once(figures: &[String], extent: Extent, progress: &dyn Fn(&str)) -> Result<Vec<Figure>, Error> {
    let linux = fio::FIGURES.iter().any(|(name, ..)| figures.iter().any(|figure| figure.ends_with(name)));
    let server = start(linux.then(Guest::make).transpose()?)?;
    let [runs, requests] = [extent.runs, extent.requests].map(|number| number.to_string());
    let mut args = vec!["--soc-vmm", SOC_VMM, "--qemu", QEMU, "--guest", GUEST, "--json", FIGURES];
    args.extend(["--runs", &runs, "--requests", &requests]);
    args.extend(figures.iter().filter_map(|name| name.strip_prefix(PREFIX)));
    let pid = server.run(BENCH, &args, None)?;
    let status = watch(&server, pid, progress)?;
    if status != Status::Code(0) {
        return Err(Error::Inside(format!("ended ({status:?}): {}", server.control().output(pid).join("; "))));
    }
    let mut measured: Vec<Figure> = serde_json::from_str(&server.read(FIGURES)?)?;
    for figure in &mut measured {
        figure.name.insert_str(0, PREFIX);
    }
    Ok(measured)
}

/// A server that has the benchmark and what it measures.
fn start(guest: Option<Guest>) -> Result<Machine, machine::Error> {
    let programs =
        [build::programs(Arch::Amd64, &["host-kvm-shim", "soc-vmm"])?, build::programs(Arch::Amd64, &["bench"])?];
    let places = [SHIM, SOC_VMM, BENCH].map(str::to_owned);
    let mut files: Vec<(String, PathBuf)> = places.into_iter().zip(programs.concat()).collect();
    let peer = fetch::qemu()?.for_guests()?;
    files.extend(peer.into_iter().map(|(part, here)| (format!("{QEMU}/{}", part.display()), here)));
    if let Some(guest) = guest {
        files.extend(guest.files().map(|(name, here)| (format!("{GUEST}/{name}"), here)));
    }
    let mut config = ServerConfig::new("bench");
    config.hugepages = 0;
    config.basics.memory_mib = MEMORY_MIB;
    config.basics.files = files;
    config.start()
}

/// Waits for the program's end and tells what it says meanwhile.
fn watch(server: &Machine, pid: i32, progress: &dyn Fn(&str)) -> Result<Status, Error> {
    let end = Instant::now() + LIMIT;
    let mut told = 0;
    loop {
        let ended = server.control().wait_for_exit(pid, GLANCE);
        let output = server.control().output(pid);
        for line in &output[told..] {
            progress(&format!("in the server: {line}"));
        }
        told = output.len();
        if let Some(status) = ended {
            return Ok(status);
        }
        if let Some(epitaph) = server.epitaph() {
            return Err(Error::Gone(epitaph));
        }
        if Instant::now() >= end {
            return Err(Error::Inside(format!("has no end within {LIMIT:?}")));
        }
    }
}
