//! What a virtio disk carries for a Linux: fio in Debian's kernel, direct I/O of 4 KiB anywhere on a raw file in the page cache.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::NamedTempFile;
use testbed::debian::{Instruments, instruments};
use testbed::guest::{self, GuestImage};

use crate::contender::{Entrant, Error, Linux, with_sources};
use crate::figure::Figure;
use crate::turns;

/// The figures: name, fio's word, requests under way.
pub const FIGURES: [(&str, &str, u32); 4] = [
    ("fio.read.depth1", "randread", 1),
    ("fio.read.depth32", "randread", 32),
    ("fio.write.depth1", "randwrite", 1),
    ("fio.write.depth32", "randwrite", 32),
];
/// What they count.
pub const UNIT: &str = "requests/s";

/// Bytes of the disk.
const SIZE: u64 = 16 << 20;
/// Requests of each job.
const REQUESTS: u32 = 2_000;
/// Boots of each contender, at most: one takes some 20 s on an emulated server.
const RUNS: u32 = 3;
/// What one may take.
const LIMIT: Duration = Duration::from_secs(180);
/// Where the instruments are in the guest.
const MOUNTED: &str = "/mnt";

/// What is booted.
#[derive(Debug, Clone)]
pub struct Guest {
    image: GuestImage,
    instruments: PathBuf,
}

impl Guest {
    /// Makes it, of the testbed's parts.
    ///
    /// # Errors
    /// A part isn't there.
    pub fn make() -> Result<Self, Error> {
        let absent = |error: &dyn std::error::Error| Error::Absent(with_sources(error));
        let image = guest::image_that_does("fio", &script()).map_err(|error| absent(&error))?;
        let instruments = instruments().map_err(|error| absent(&error))?.disk();
        Ok(Guest { image, instruments })
    }

    /// The one that [`Guest::files`] put into a directory.
    pub fn at(directory: &Path) -> Self {
        let [kernel, initrd, instruments] = NAMES.map(|name| directory.join(name));
        Guest { image: GuestImage { kernel, initrd }, instruments }
    }

    /// What another machine needs of it: the name in a directory, and the file here.
    pub fn files(self) -> [(&'static str, PathBuf); 3] {
        let Guest { image: GuestImage { kernel, initrd }, instruments } = self;
        let [of_kernel, of_initrd, of_instruments] = NAMES;
        [(of_kernel, kernel), (of_initrd, initrd), (of_instruments, instruments)]
    }
}

const NAMES: [&str; 3] = ["vmlinuz", "initrd", "instruments"];

/// Measures [`FIGURES`], all in each boot.
pub fn measure(guest: &Guest, entrants: &mut [Entrant], runs: u32, progress: &dyn Fn(&str)) -> [Figure; 4] {
    let run = |entrant: &mut Entrant| {
        let failed = |error| format!("the disk's file: {}", with_sources(&error));
        let disk = NamedTempFile::with_suffix(".raw").map_err(failed)?;
        // No holes: they are read, and first written, by another path.
        fs::write(disk.path(), vec![0xa5; SIZE as usize]).map_err(failed)?;
        let Guest { image, instruments } = guest;
        let console = entrant.boot(&Linux { image, disk: disk.path(), instruments, limit: LIMIT })?;
        let mut rates = [0.0; FIGURES.len()];
        for (rate, (name, ..)) in rates.iter_mut().zip(FIGURES) {
            let line = console.lines().find_map(|line| parse(line, name));
            *rate = line.ok_or_else(|| format!("{name}: fio told no result: {:?}", console.lines().last()))?;
        }
        Ok(vec![rates])
    };
    let figures = FIGURES.map(|(name, ..)| (name, UNIT));
    turns::measure(figures, Entrant::with_devices(entrants), runs.min(RUNS), progress, run)
}

/// What the guest does.
fn script() -> String {
    let fio = Instruments::run_at(MOUNTED, "usr/bin/fio");
    let size = format!("--filename=/dev/vda --size={SIZE} --number_ios={REQUESTS}");
    let jobs = FIGURES.map(|(name, kind, depth)| format!("--name={name} --stonewall --rw={kind} --iodepth={depth}"));
    format!(
        "mount -t iso9660 -o ro /dev/vdb {MOUNTED}\n\
         {fio} --minimal --terse-version=3 --ioengine=libaio --direct=1 --bs=4k {size} {}",
        jobs.join(" ")
    )
}

/// The requests a second of a job of that name, out of a line of fio's terse output, version 3 (fio(1)): 3;version;name;group;error;KiB read;
/// bytes/s;reads/s;… and from field 46 on the same of writes.
fn parse(line: &str, name: &str) -> Option<f64> {
    let fields: Vec<&str> = line.trim().split(';').collect();
    let is_it = fields.first() == Some(&"3") && fields.get(2) == Some(&name) && fields.get(4) == Some(&"0");
    let rate = |field: usize| fields.get(field)?.parse::<f64>().ok();
    let rate = is_it.then(|| Some(rate(7)? + rate(48)?))??;
    (rate > 0.0).then_some(rate)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What fio 3.33 wrote of 100 reads, and of 100 writes; the rest of the line is left out.
    const READS: &str = "3;fio-3.33;fio.read.depth1;0;0;400;33333;8333;12;0;0;0.000000;0.000000;57;5021;118.546620;495.994919;\
        1.000000%=57;5.000000%=60;10.000000%=60;20.000000%=61;30.000000%=61;40.000000%=62;50.000000%=62;60.000000%=63;\
        70.000000%=64;80.000000%=68;90.000000%=74;95.000000%=87;99.000000%=280;99.500000%=5013;99.900000%=5013;\
        99.950000%=5013;99.990000%=5013;0%=0;0%=0;0%=0;57;5022;118.595440;496.022654;0;0;0.000000%;0.000000;0.000000;0;0;0;0\r";
    const WRITES: &str = "3;fio-3.33;fio.write.depth1;0;0;0;0;0;0;0;0;0.000000;0.000000;0;0;0.000000;0.000000;1.000000%=0;\
        5.000000%=0;10.000000%=0;20.000000%=0;30.000000%=0;40.000000%=0;50.000000%=0;60.000000%=0;70.000000%=0;80.000000%=0;\
        90.000000%=0;95.000000%=0;99.000000%=0;99.500000%=0;99.900000%=0;99.950000%=0;99.990000%=0;0%=0;0%=0;0%=0;0;0;\
        0.000000;0.000000;0;0;0.000000%;0.000000;0.000000;400;400000;100000;1;0;0;0.000000;0.000000;1;16";

    #[test]
    fn rates_are_read_from_fios_lines() {
        assert_eq!(parse(READS, "fio.read.depth1"), Some(8333.0));
        assert_eq!(parse(WRITES, "fio.write.depth1"), Some(100_000.0));
        assert_eq!(parse(WRITES, "fio.read.depth1"), None);
        let failed = READS.replacen(";0;0;400;", ";0;5;400;", 1);
        assert_eq!(parse(&failed, "fio.read.depth1"), None);
    }
}
