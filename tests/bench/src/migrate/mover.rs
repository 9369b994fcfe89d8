//! Those who move a guest: each by two processes of this machine, over TCP.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use payloads::Payload;
use serde_json::{Value, json};
use testbed::process::Child;

use super::monitor::Monitor;
use super::processes::{cpu, cpu_of_ended};
use super::pulse::Pulse;
use super::{CHANNELS, DOWNTIME_LIMIT_MS, MEMORY_MIB};
use crate::contender::{Qemu, Side, last_line};
use crate::turns::Turn;

/// What a guest may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// What a source may take to end once its guest has left.
const END_LIMIT: Duration = Duration::from_secs(10);
/// How long a guest is looked at before it is moved, and after.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is looked whether it is over.
const TICK: Duration = Duration::from_millis(20);
/// Bytes a second: more than any connection has.
const NO_LIMIT: u64 = 100 << 30;

/// Somebody who moves guests.
pub(super) struct Mover {
    pub(super) name: &'static str,
    pub(super) side: Side,
    pub(super) program: Result<Program, String>,
    /// By several connections.
    pub(super) multifd: bool,
}

/// A VMM.
#[derive(Clone)]
pub(super) enum Program {
    Outboard(PathBuf),
    Qemu(std::sync::Arc<Qemu>),
}

impl Turn for Mover {
    fn name(&self) -> &'static str {
        self.name
    }

    fn side(&self) -> Side {
        self.side
    }
}

/// A move.
#[derive(Clone, Copy)]
pub(super) struct Trip<'a> {
    pub(super) payload: &'a Payload,
    /// The destination's memory is taken before the clock runs.
    pub(super) prepared: bool,
    /// It beats.
    pub(super) beats: bool,
    /// The guest is slowed down if it must.
    pub(super) throttle: bool,
    /// How long it may take.
    pub(super) limit: Duration,
}

/// What a move came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    /// From the command until the guest runs at the destination and the source says that it is over.
    pub(super) total_ms: f64,
    /// Of both sides until the source has ended, the guest's apart: its memory is given back too.
    pub(super) cpu_ms: f64,
    /// The longest time without a beat.
    pub(super) gap_ms: f64,
    /// The most that the guest was slowed down, in percent.
    pub(super) throttle: f64,
    /// What the guest didn't write meanwhile of what it writes otherwise, in percent.
    pub(super) lost: f64,
}

impl Mover {
    /// Moves a guest of its own once.
    pub(super) fn travel(&self, trip: Trip<'_>) -> Result<Outcome, String> {
        let program = self.program.as_ref().map_err(String::clone)?;
        let directory = tempfile::tempdir().map_err(|error| format!("a directory: {error}"))?;
        let place = Place { path: directory.path(), program, trip };
        let outcome = place.travel(self.multifd);
        outcome.map_err(|error| format!("{error}; {}", place.said()))
    }
}

struct Place<'a> {
    path: &'a Path,
    program: &'a Program,
    trip: Trip<'a>,
}

struct Vm {
    process: Child,
    monitor: Monitor,
}

impl Place<'_> {
    fn travel(&self, multifd: bool) -> io::Result<Outcome> {
        let trip = self.trip;
        let (option, bytes) = trip.payload.file();
        fs::write(self.path.join("image"), bytes)?;
        let pulse = Pulse::new(self.path.join("pulse"))?;
        let mut source = self.start("source", option, &pulse, false)?;
        pulse.says("ready\n", READY_LIMIT)?;
        let mut destination = self.start("destination", option, &pulse, true)?;
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port();
        let uri = format!("tcp:127.0.0.1:{port}");
        for vm in [&mut source, &mut destination] {
            let on = [("events", true), ("return-path", true), ("multifd", multifd), ("auto-converge", trip.throttle)];
            let on = on.map(|(name, on)| json!({ "capability": name, "state": on }));
            vm.monitor.execute("migrate-set-capabilities", &json!({ "capabilities": on }))?;
            let how = json!({ "max-bandwidth": NO_LIMIT, "downtime-limit": DOWNTIME_LIMIT_MS });
            vm.monitor.execute("migrate-set-parameters", &how)?;
            if multifd {
                vm.monitor.execute("migrate-set-parameters", &json!({ "multifd-channels": CHANNELS }))?;
            }
        }
        destination.monitor.execute("migrate-incoming", &json!({ "uri": uri }))?;
        pulse.forget();
        let settled = Instant::now();
        sleep(LOOK);
        let before = pulse.seen(settled, Instant::now());

        let cpu_before = cpu(source.process.id()) + cpu(destination.process.id()) + cpu_of_ended();
        let (began, clock) = (Instant::now(), now());
        source.monitor.execute("migrate", &json!({ "uri": uri }))?;
        let throttle = over(&mut source.monitor, began + trip.limit)?;
        let done = Instant::now();
        let left = source.monitor.event(|event| event["data"]["status"] == "completed")?;
        let here = destination.monitor.event(|event| event["event"] == "RESUME")?;
        let during = pulse.seen(began, done);
        let gap = if trip.beats {
            sleep(LOOK);
            during.gap.max(pulse.seen(done, Instant::now()).gap)
        } else {
            Duration::ZERO
        };
        self.end(&mut source)?;
        let cpu_ms = cpu(destination.process.id()) + cpu_of_ended() - cpu_before;
        // Killed, it would leave its sockets behind.
        destination.monitor.execute("quit", &json!({}))?;
        destination.process.wait(END_LIMIT)?;
        let lost = if before.work > 0.0 { (1.0 - during.work / before.work) * 100.0 } else { 0.0 };
        Ok(Outcome {
            total_ms: left.max(here).saturating_sub(clock) as f64 / 1e3,
            cpu_ms,
            gap_ms: gap.as_secs_f64() * 1e3,
            throttle,
            lost,
        })
    }

    /// The guest has left: QEMU has to be told.
    fn end(&self, source: &mut Vm) -> io::Result<()> {
        if matches!(self.program, Program::Qemu(_)) {
            source.monitor.execute("quit", &json!({}))?;
        }
        match source.process.wait(END_LIMIT)? {
            Some(_) => Ok(()),
            None => Err(io::Error::other("the source doesn't end")),
        }
    }

    fn start(&self, name: &str, option: &str, pulse: &Pulse, incoming: bool) -> io::Result<Vm> {
        let [socket, errors] = ["qmp", "errors"].map(|what| self.path.join(format!("{name}.{what}")));
        let image = self.path.join("image");
        let prepared = self.trip.prepared;
        let mut command = match self.program {
            Program::Outboard(program) => {
                let mut command = Command::new(program);
                let memory = format!("{MEMORY_MIB}{}", if prepared { ",prealloc=on" } else { "" });
                command.args(["run", "--name", &format!("bench-{}-{name}", std::process::id())]);
                command.args(["--memory", &memory, "--serial", "null", option]).arg(&image);
                command.arg("--debugcon").arg(format!("file:{}", pulse.path().display()));
                command.arg("--qmp").arg(format!("unix:{}", socket.display()));
                command
            }
            Program::Qemu(qemu) => {
                let mut command = qemu.command(1, MEMORY_MIB);
                if prepared {
                    let memory = format!("memory-backend-ram,id=ram,size={MEMORY_MIB}M,prealloc=on");
                    command.args(["-object", &memory, "-machine", "memory-backend=ram"]);
                }
                command.arg(if option == "--firmware" { "-bios" } else { "-kernel" }).arg(&image);
                command.arg("-chardev").arg(format!("file,id=debugcon,path={}", pulse.path().display()));
                command.args(["-device", "isa-debugcon,iobase=0x402,chardev=debugcon"]);
                command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
                command
            }
        };
        if incoming {
            command.args([if matches!(self.program, Program::Qemu(_)) { "-incoming" } else { "--incoming" }, "defer"]);
        }
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(fs::File::create(&errors)?);
        let process = Child::spawn(command).map_err(io::Error::other)?;
        let monitor = Monitor::connect(&socket)?;
        Ok(Vm { process, monitor })
    }

    /// The last that each side wrote.
    fn said(&self) -> String {
        let last = ["source", "destination"].map(|name| {
            let text = fs::read_to_string(self.path.join(format!("{name}.errors"))).unwrap_or_default();
            last_line(&text).to_owned()
        });
        last.join(" ")
    }
}

/// Waits until a migration is over; the most that the guest was slowed down.
fn over(monitor: &mut Monitor, end: Instant) -> io::Result<f64> {
    let mut throttle: f64 = 0.0;
    loop {
        let info: Value = monitor.execute("query-migrate", &json!({}))?;
        throttle = throttle.max(info["cpu-throttle-percentage"].as_f64().unwrap_or_default());
        match info["status"].as_str() {
            Some("completed") => return Ok(throttle),
            Some("failed" | "cancelled") => return Err(io::Error::other(info["error-desc"].to_string())),
            _ if Instant::now() >= end => return Err(io::Error::other("it doesn't converge in time")),
            _ => sleep(TICK),
        }
    }
}

/// µs of the system's clock, which events carry.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
