//! What a shim costs its host while its guest of 1 GiB halts: private memory, page tables, CPU.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use payloads::smp;
use testbed::process::Child;

use crate::contender::Error;
use crate::figure::{Figure, Summary};

/// Private memory of one shim, guest RAM and the function's shared memory apart.
pub const FOOTPRINT: &str = "shim.footprint";
/// Page tables of one shim, those of its mapping of guest RAM included.
pub const PAGE_TABLES: &str = "shim.page_tables";
/// CPU of all threads of one shim, guest time apart.
pub const CPU: &str = "shim.idle_cpu";

/// Every figure of this module.
pub const NAMES: [&str; 3] = [FOOTPRINT, PAGE_TABLES, CPU];

/// How long CPU is counted.
const WINDOW: Duration = Duration::from_secs(60);
/// What the guest may take to come up and halt.
const LIMIT: Duration = Duration::from_secs(30);

/// Measures one of [`NAMES`] with our program; CPU once, whatever `runs` says.
pub fn measure(name: &str, soc_vmm: &Path, runs: u32) -> Result<Figure, Error> {
    let runs = if name == CPU { 1 } else { runs };
    let mut values = Vec::new();
    for _ in 0..runs {
        let vm = Halted::start(soc_vmm)?;
        values.push(match name {
            CPU => vm.busy_ppm()?,
            FOOTPRINT => vm.private_kib()?,
            _ => vm.page_tables_kib()?,
        });
    }
    Ok(Figure { ours: Summary::of(&values), ..Figure::empty(name, unit(name), runs) })
}

/// What a figure of this module counts.
pub fn unit(name: &str) -> &'static str {
    if name == CPU { "ppm of a core" } else { "KiB" }
}

/// A VM whose only vCPU halts, and its shim.
struct Halted {
    _soc_vmm: Child,
    _directory: tempfile::TempDir,
    shim: u32,
}

impl Halted {
    fn start(program: &Path) -> Result<Self, Error> {
        if !program.is_file() {
            return Err(Error::Absent(format!("{} is not built", program.display())));
        }
        let payload = smp::halted(1)?;
        let directory = tempfile::tempdir().map_err(at(&std::env::temp_dir()))?;
        let [image, console] = ["image", "console"].map(|name| directory.path().join(name));
        let (option, bytes) = payload.file();
        fs::write(&image, bytes).map_err(at(&image))?;
        let mut command = Command::new(program);
        command.args(["run", "--name"]).arg(format!("bench-idle-{}", std::process::id()));
        command.args(["--memory", "1G", "--serial", "null", "--debugcon"]).arg(format!("file:{}", console.display()));
        command.arg(option).arg(&image).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
        let mut soc_vmm = Child::spawn(command)?;
        let began = Instant::now();
        while !fs::read_to_string(&console).is_ok_and(|text| text.contains("halted\n")) {
            let ended = soc_vmm.try_wait().map_err(at(&image))?;
            if ended.is_some() || began.elapsed() > LIMIT {
                return Err(Error::Guest(format!("{} did not come to its halt", payload.name)));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        let shim = shim_of(soc_vmm.id()).ok_or_else(|| Error::Absent("soc-vmm has no shim of its own".into()))?;
        // The start's last second.
        std::thread::sleep(Duration::from_secs(2));
        Ok(Self { _soc_vmm: soc_vmm, _directory: directory, shim })
    }

    fn private_kib(&self) -> Result<f64, Error> {
        let (mut kib, mut counts) = (0, true);
        for line in self.read("smaps")?.lines() {
            let mut words = line.split_whitespace();
            let first = words.next().unwrap_or_default();
            if !first.ends_with(':') {
                counts = !line.contains("/memfd:outboard-");
            } else if first.starts_with("Private_") && counts {
                kib += words.next().and_then(|n| n.parse::<u32>().ok()).unwrap_or(0);
            }
        }
        Ok(kib.into())
    }

    fn page_tables_kib(&self) -> Result<f64, Error> {
        let status = self.read("status")?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmPTE:"));
        Ok(line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(f64::NAN))
    }

    fn busy_ppm(&self) -> Result<f64, Error> {
        let (before, began) = (self.nanoseconds()?, Instant::now());
        std::thread::sleep(WINDOW);
        let busy = self.nanoseconds()?.saturating_sub(before);
        Ok(busy as f64 / began.elapsed().as_nanos() as f64 * 1e6)
    }

    /// Time on a CPU of all its threads, without the guest's.
    fn nanoseconds(&self) -> Result<u64, Error> {
        let tasks = Path::new("/proc").join(self.shim.to_string()).join("task");
        let mut total = 0;
        for task in fs::read_dir(&tasks).map_err(at(&tasks))?.flatten() {
            // It may have ended.
            let number = |file: &str, after: char, field: usize| -> u64 {
                let text = fs::read_to_string(task.path().join(file)).unwrap_or_default();
                let fields = text.rsplit(after).next().unwrap_or_default();
                fields.split_whitespace().nth(field).and_then(|n| n.parse().ok()).unwrap_or(0)
            };
            // schedstat: nanoseconds on a CPU, …; proc(5) stat, field 43: guest_time, in hundredths of a second.
            let guest = number("stat", ')', 43 - 3) * 10_000_000;
            total += number("schedstat", '\0', 0).saturating_sub(guest);
        }
        Ok(total)
    }

    fn read(&self, file: &str) -> Result<String, Error> {
        let path = Path::new("/proc").join(self.shim.to_string()).join(file);
        fs::read_to_string(&path).map_err(at(&path))
    }
}

/// The shim among the processes that soc-vmm's threads have started.
fn shim_of(soc_vmm: u32) -> Option<u32> {
    let tasks = fs::read_dir(format!("/proc/{soc_vmm}/task")).ok()?;
    let children = tasks.flatten().filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let all: Vec<u32> =
        children.flat_map(|c| c.split_whitespace().filter_map(|p| p.parse().ok()).collect::<Vec<_>>()).collect();
    all.into_iter()
        .find(|pid| fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "host-kvm-shim"))
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File { path: path.to_path_buf(), source }
}
