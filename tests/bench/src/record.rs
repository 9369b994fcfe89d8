//! Figures that are kept: a file a day and class of machine under docs/results, and docs/PERFORMANCE.md out of them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::figure::{Figure, Summary, ratio, text};
use crate::host::{Host, KvmKind};

/// What was measured on one machine on one day.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// Year-month-day, UTC.
    pub date: String,
    /// The machine.
    pub host: Host,
    /// The peers' versions, as they tell them.
    pub versions: BTreeMap<String, String>,
    /// The figures.
    pub figures: Vec<Figure>,
}

/// Why a record was not kept.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is no record.
    #[error("{path} is no record")]
    Json {
        /// Which.
        path: PathBuf,
        /// Why.
        source: serde_json::Error,
    },
}

impl Record {
    /// Adds the record to `docs`: its figures replace those of the same name, machine class and day.
    pub fn keep(mut self, docs: &Path) -> Result<(), Error> {
        let results = docs.join("results");
        fs::create_dir_all(&results).map_err(at(&results))?;
        let path = results.join(format!("{}-{}.json", self.date, self.host.class()));
        if path.exists() {
            let measured: Vec<_> = self.figures.iter().map(|figure| figure.name.clone()).collect();
            let earlier = Record::read(&path)?;
            self.figures.extend(earlier.figures.into_iter().filter(|figure| !measured.contains(&figure.name)));
            self.figures.sort_by(|a, b| a.name.cmp(&b.name));
        }
        let text = serde_json::to_string_pretty(&self).map_err(no_record(&path))? + "\n";
        fs::write(&path, text).map_err(at(&path))?;

        let page = docs.join("PERFORMANCE.md");
        fs::write(&page, render(&latest(&results)?)).map_err(at(&page))
    }

    fn read(path: &Path) -> Result<Self, Error> {
        let text = fs::read(path).map_err(at(path))?;
        serde_json::from_slice(&text).map_err(no_record(path))
    }
}

/// Today, UTC.
pub fn today() -> String {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    date(seconds / 86_400)
}

/// Of each class of machine the newest figures of each name, in their records, newest first.
fn latest(results: &Path) -> Result<Vec<Record>, Error> {
    let mut records = Vec::new();
    for entry in fs::read_dir(results).map_err(at(results))? {
        let path = entry.map_err(at(results))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            records.push(Record::read(&path)?);
        }
    }
    records.sort_by(|a, b| (a.host.class(), &b.date).cmp(&(b.host.class(), &a.date)));
    let mut shown = BTreeSet::new();
    for record in &mut records {
        let class = record.host.class();
        record.figures.retain(|figure| shown.insert((class.clone(), figure.name.clone())));
    }
    records.retain(|record| !record.figures.is_empty());
    Ok(records)
}

fn render(records: &[Record]) -> String {
    let mut page = String::from(
        "# Performance\n\n\
         Written by `cargo xtask bench --record` from `docs/results/`: each figure's newest record on each class of machine.\n\
         All contenders take turns in one run on one machine; a value is the median, with the least and the greatest \
         behind it. The floor is a bare KVM loop that answers in place.\n\
         Figures that end in `.kicks` are the guest's notifications, each an exit: the payloads poll, so they have no other.\n\
         `migrate.*` moves a guest of 1 GiB, 900 MiB of it random, between two processes over TCP, by two connections (`qemu-multifd` too); `.cpu` \
         is of both sides until the source has ended; with `.cold` the destination takes its memory as pages come; `.downtime` is the longest gap \
         of a vCPU that beats each millisecond. In `migrate.dirty.N` the guest writes N MB/s meanwhile and may be slowed: by how much at most \
         (`.throttle`), and what it didn't write of what it writes otherwise (`.lost`).\n\
         `server.*` is measured with both VMMs *inside* the emulated server (`cargo xtask bench server`, docs/testbed.md): KVM of \
         an unmodified kernel, on processors that QEMU's TCG emulates. Ratios and counts say something there, rates don't.\n",
    );
    for record in records {
        render_record(&mut page, record);
    }
    page
}

fn render_record(page: &mut String, record: &Record) {
    let Host { cpus, processor, kernel, kvm } = &record.host;
    let kvm = match kvm {
        KvmKind::Hardware => "KVM in hardware",
        KvmKind::Software => "KVM in software (a guest's kernel mode is emulated: its floor hides what hardware shows)",
    };
    // Writing to a String does not fail.
    let _ = write!(
        page,
        "\n## {}\n\n{cpus} CPUs, {processor}, Linux {kernel}, {kvm}; {}.",
        record.host.class(),
        record.date
    );
    for (peer, version) in &record.versions {
        let _ = write!(page, " {peer}: {version}.");
    }
    page.push_str("\n\n| figure | ours | peer | ours ÷ peer | floor | ours − floor | runs |\n");
    page.push_str("| --- | --- | --- | --- | --- | --- | --- |\n");
    for figure in &record.figures {
        render_figure(page, figure);
    }
}

/// A row for each peer, or one.
fn render_figure(page: &mut String, figure: &Figure) {
    let missing = figure.skipped.as_deref().unwrap_or("—");
    let cell = |summary: Option<&Summary>| summary.map_or("—".to_owned(), |s| amounts(s, &figure.unit));
    let ours = figure.ours.as_ref();
    let above_floor = match (ours, &figure.floor) {
        (Some(ours), Some(floor)) => format!("{:.0} {}", ours.median - floor.median, figure.unit),
        _ => "—".to_owned(),
    };
    let ours_cell = ours.map_or_else(|| missing.to_owned(), |summary| amounts(summary, &figure.unit));
    let mut row = |peer: String, ratio: String| {
        let floor = cell(figure.floor.as_ref());
        let _ = writeln!(
            page,
            "| {} | {ours_cell} | {peer} | {ratio} | {floor} | {above_floor} | {} |",
            figure.name, figure.runs
        );
    };
    if figure.peers.is_empty() {
        row("—".to_owned(), "—".to_owned());
    }
    for (name, peer) in &figure.peers {
        let ratio = ours.and_then(|ours| ratio(ours, peer)).unwrap_or("—".to_owned());
        row(format!("{name} {}", amounts(peer, &figure.unit)), ratio);
    }
}

fn amounts(summary: &Summary, unit: &str) -> String {
    let Summary { min, median, max } = *summary;
    format!("{} {unit} ({}–{})", text(median), text(min), text(max))
}

/// Year-month-day of a day counted from 1970-01-01 (the Gregorian calendar repeats after 146 097 days).
fn date(day: u64) -> String {
    const DAYS_OF_400_YEARS: u64 = 146_097;
    let mut year = 1970 + day / DAYS_OF_400_YEARS * 400;
    let mut rest = day % DAYS_OF_400_YEARS;
    let leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while rest >= 365 + u64::from(leap(year)) {
        rest -= 365 + u64::from(leap(year));
        year += 1;
    }
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if rest < length {
            break;
        }
        rest -= length;
        month += 1;
    }
    format!("{year:04}-{month:02}-{:02}", rest + 1)
}

fn at(path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    move |source| Error::File { path: path.to_path_buf(), source }
}

fn no_record(path: &Path) -> impl FnOnce(serde_json::Error) -> Error {
    move |source| Error::Json { path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(date: &str, name: &str, value: f64) -> Record {
        let mut figure = Figure::empty(name, "ns", 3);
        figure.ours = Summary::of(&[value]);
        figure.floor = Summary::of(&[8000.0]);
        figure.peers.extend(Summary::of(&[2.0 * value]).map(|summary| ("qemu".to_owned(), summary)));
        let host = Host { cpus: 2, processor: "A processor".into(), kernel: "6.1".into(), kvm: KvmKind::Hardware };
        Record { date: date.into(), host, versions: BTreeMap::new(), figures: vec![figure] }
    }

    #[test]
    fn days() {
        for (day, text) in [
            (0, "1970-01-01"),
            (59, "1970-03-01"),
            (789, "1972-02-29"),
            (19_782, "2024-02-29"),
            (20_088, "2024-12-31"),
            (20_089, "2025-01-01"),
        ] {
            assert_eq!(date(day), text);
        }
    }

    #[test]
    fn a_day_keeps_each_figure_once_and_the_page_shows_the_newest() {
        let docs = tempfile::tempdir().unwrap();
        record("2025-01-01", "old", 1000.0).keep(docs.path()).unwrap();
        record("2025-01-01", "a", 1100.0).keep(docs.path()).unwrap();
        record("2025-01-02", "b", 9000.0).keep(docs.path()).unwrap();
        record("2025-01-02", "a", 9100.0).keep(docs.path()).unwrap();
        record("2025-01-02", "b", 9200.0).keep(docs.path()).unwrap();

        let kept = Record::read(&docs.path().join("results/2025-01-02-x86_64-2cpu-hardware-kvm.json")).unwrap();
        assert_eq!(kept.figures.iter().map(|figure| figure.name.as_str()).collect::<Vec<_>>(), ["a", "b"]);
        let page = fs::read_to_string(docs.path().join("PERFORMANCE.md")).unwrap();
        assert!(page.contains("| b | 9200 ns (9200–9200) | qemu 18400 ns (18400–18400) | 0.50 |"), "{page}");
        assert!(page.contains("| 8000 ns (8000–8000) | 1200 ns | 3 |"), "{page}");
        // What nobody has measured since stands under its day.
        assert!(page.find("2025-01-02").unwrap() < page.find("2025-01-01").unwrap(), "{page}");
        assert!(page.contains("| old | 1000 ns") && !page.contains("| a | 1100 ns"), "{page}");
    }

    #[test]
    fn a_figure_that_is_missing_says_why() {
        let mut record = record("2025-01-01", "exit.read.polling", 1.0);
        record.figures[0].ours = None;
        record.figures[0].skipped = Some("outboard: no /dev/kvm".into());
        assert!(render(&[record]).contains("| exit.read.polling | outboard: no /dev/kvm |"));
    }
}
