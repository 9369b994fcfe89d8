//! What kind of machine the figures are from.

use std::time::Duration;

use kvm_ioctls::Kvm;
use payloads::{Privilege, hot};
use serde::{Deserialize, Serialize};

use crate::bare::{Machine, Options};
use crate::contender::Error;

/// The machine, as far as figures depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Host {
    /// CPUs that are online.
    pub cpus: usize,
    /// The processor, as /proc/cpuinfo names it.
    pub processor: String,
    /// The kernel's release.
    pub kernel: String,
    /// Whether a guest's kernel mode runs on the processor.
    pub kvm: KvmKind,
}

/// How KVM runs a guest's kernel mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum KvmKind {
    /// On the processor.
    Hardware,
    /// Instruction by instruction.
    Software,
}

impl Host {
    /// Looks.
    pub fn probe(clock: Clock) -> Result<Self, Error> {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpuinfo = read("/proc/cpuinfo");
        let processor = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, name)| name)
            .to_owned();
        Ok(Host {
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            processor,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
            kvm: kvm_kind(clock)?,
        })
    }

    /// Its class in a few words that can stand in a file's name: machines of one class are comparable.
    pub fn class(&self) -> String {
        let kvm = match self.kvm {
            KvmKind::Hardware => "hardware",
            KvmKind::Software => "software",
        };
        format!("x86_64-{}cpu-{kvm}-kvm", self.cpus)
    }
}

/// The time-stamp counter's rate, which KVM gives guests unchanged.
#[derive(Debug, Clone, Copy)]
pub struct Clock {
    kilohertz: u32,
}

impl Clock {
    /// Asks KVM.
    pub fn of_kvm() -> Result<Self, Error> {
        let ask = || Kvm::new()?.create_vm()?.create_vcpu(0)?.get_tsc_khz();
        let absent = |error| Error::Absent(format!("/dev/kvm: {error}"));
        Ok(Clock { kilohertz: ask().map_err(absent)? })
    }

    /// Ticks as nanoseconds.
    pub fn nanoseconds(self, ticks: u64) -> f64 {
        ticks as f64 * 1e6 / f64::from(self.kilohertz)
    }
}

/// 20 000 rounds of two instructions take some 10 µs on a processor, and more than 5 ms where they are emulated.
fn kvm_kind(clock: Clock) -> Result<KvmKind, Error> {
    const COUNT: u32 = 20_000;
    const EMULATED_NS: f64 = 5e6;
    let payload = hot::count_down(Privilege::Cpl0, COUNT, 1)?;
    let console = Machine::new(&payload, Options::default())?.run_floor(Duration::from_secs(10))?;
    let ticks = console.lines().find_map(hot::parse_round).map(|(_, ticks)| ticks);
    let ticks = ticks.ok_or_else(|| Error::Guest(console.clone()))?;
    Ok(if clock.nanoseconds(ticks) > EMULATED_NS { KvmKind::Software } else { KvmKind::Hardware })
}

/// The part of all CPUs' time that was not idle during the last second; `None` where the kernel doesn't tell.
pub fn busy_share() -> Option<f64> {
    // proc(5) /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal.
    let times = || -> Option<(f64, f64)> {
        let text = std::fs::read_to_string("/proc/stat").ok()?;
        let fields = text.lines().next()?.split_whitespace().skip(1).take(8);
        let times: Vec<f64> = fields.map(str::parse).collect::<Result<_, _>>().ok()?;
        Some((times.iter().sum(), times.get(3)? + times.get(4)?))
    };
    let before = times()?;
    std::thread::sleep(std::time::Duration::from_secs(1));
    let after = times()?;
    let all = after.0 - before.0;
    (all > 0.0).then(|| 1.0 - (after.1 - before.1) / all)
}
