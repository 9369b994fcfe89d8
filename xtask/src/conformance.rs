//! `cargo xtask conformance`: kvm-unit-tests under QEMU and under soc-vmm, entry by entry on one KVM (docs/conformance.md).
//!
//! The suite isn't built here: its licence isn't this project's. It is pointed at.

mod entries;
mod place;
mod qemu;
mod soc_vmm;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::ValueEnum;
use serde::Serialize;
use testbed::paths;
use testbed::protocol::Status;

use crate::table::aligned;
use entries::Entry;
use place::{Ended, Place};
use qemu::Qemu;

#[derive(clap::Args, Debug)]
pub(crate) struct Conformance {
    /// Entries of the suite; a beginning is enough. All if none is named.
    names: Vec<String>,
    /// The suite, built: the directory that has x86/unittests.cfg.
    #[arg(long, value_name = "DIR", default_value_os_t = paths::target().join("kvm-unit-tests"))]
    suite: PathBuf,
    /// Whose KVM.
    #[arg(long, value_enum, default_value_t = On::Here)]
    on: On,
    /// Which QEMU to compare with.
    #[arg(long, value_enum, default_value_t = qemu::Which::System)]
    qemu: qemu::Which,
    /// How many times the suite's own time limits a test has; 1 suits an idle machine with hardware virtualization.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100))]
    patience: u32,
    /// Write the table to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Show what both printed where they differ.
    #[arg(long)]
    verbose: bool,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum On {
    /// This machine's /dev/kvm.
    Here,
    /// An emulated server's, with soc-vmm, its shim and QEMU all in it.
    Server,
}

/// How an entry ended under one of the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Verdict {
    Passed,
    /// The test itself says that it can't run here.
    Skipped,
    Failed(String),
    /// It wasn't run, for this reason.
    Left(String),
}

#[derive(Clone, Debug, Serialize)]
struct Row {
    name: String,
    qemu: Verdict,
    soc_vmm: Verdict,
}

impl Row {
    /// It passes under QEMU, doesn't under soc-vmm, and isn't left out by its name.
    fn is_worse(&self) -> bool {
        self.qemu == Verdict::Passed && matches!(self.soc_vmm, Verdict::Failed(_) | Verdict::Skipped)
    }
}

/// Runs the entries; it fails where one is worse under soc-vmm.
pub(crate) fn run(options: &Conformance) -> Result<ExitCode, String> {
    let images = options.suite.join("x86");
    let list = images.join("unittests.cfg");
    let text = fs::read_to_string(&list).map_err(|e| {
        format!("{}: {e}; --suite names a directory with kvm-unit-tests, built (docs/conformance.md)", list.display())
    })?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let entries = entries::parse(&text, now).map_err(|e| format!("{}: {e}", list.display()))?;
    let entries: Vec<Entry> = entries.into_iter().filter(|entry| options.wants(entry)).collect();
    if entries.is_empty() {
        return Err(format!("no entry of {} begins so", list.display()));
    }

    let qemu = Qemu::find(options.qemu)?;
    println!("{} entries; {}", entries.len(), qemu.version()?);
    let place = match options.on {
        On::Here => Place::here(&qemu, &images)?,
        On::Server => {
            let files: BTreeSet<String> = entries.iter().map(|entry| entry.file.clone()).collect();
            let there: Vec<String> = files.into_iter().filter(|file| images.join(file).exists()).collect();
            Place::server(&qemu, &images, &there)?
        }
    };
    let mut rows = Vec::new();
    for entry in &entries {
        let row = compare(&place, entry, options)?;
        println!("{:<44} {:<28} {}", row.name, shown(&row.qemu), shown(&row.soc_vmm));
        rows.push(row);
        if let Some(path) = &options.json {
            let text = serde_json::to_string_pretty(&rows).map_err(|e| format!("table: {e}"))?;
            fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))?;
        }
    }
    Ok(summary(&rows))
}

impl Conformance {
    /// Those for 32-bit builds alone aren't built.
    fn wants(&self, entry: &Entry) -> bool {
        let named = self.names.is_empty() || self.names.iter().any(|name| entry.name.starts_with(name.as_str()));
        named && entry.only_for.is_none()
    }
}

fn compare(place: &Place, entry: &Entry, options: &Conformance) -> Result<Row, String> {
    let limit = entry.timeout * options.patience;
    let row = |qemu, soc_vmm| Row { name: entry.name.clone(), qemu, soc_vmm };
    if let Some(why) = left_out(place, entry) {
        return Ok(row(Verdict::Left(why.clone()), Verdict::Left(why)));
    }
    let image = place.image(&entry.file);
    let under_qemu = place.qemu(&qemu::arguments(entry, &image), limit)?;
    let qemu = if qemu::has_failed(&under_qemu.output) {
        Verdict::Failed(last_line(&under_qemu.output))
    } else {
        verdict(&under_qemu)
    };
    if let Some(what) = soc_vmm::missing(entry) {
        return Ok(row(qemu, Verdict::Left(what.to_owned())));
    }
    let under_soc_vmm = place.soc_vmm(&soc_vmm::arguments(entry, &image), limit)?;
    let row = row(qemu, verdict(&under_soc_vmm));
    if options.verbose && row.is_worse() {
        println!("--- QEMU\n{}\n--- soc-vmm\n{}\n---", under_qemu.output, under_soc_vmm.output);
    }
    Ok(row)
}

/// Why neither runs it, if so.
fn left_out(place: &Place, entry: &Entry) -> Option<String> {
    if entry.is_in("nodefault") {
        return Some("the suite runs it by hand only".to_owned());
    }
    entry.checks.iter().find_map(|check| {
        let (path, value) = check.split_once('=')?;
        (place.read(path).as_deref() != Some(value)).then(|| format!("{path} isn't {value}"))
    })
}

/// A test writes 0 to the debug exit port where it passed, which makes a status of 1; 77 is the suite's "skip".
fn verdict(ended: &Ended) -> Verdict {
    match ended.status {
        Some(Status::Code(1)) => Verdict::Passed,
        Some(Status::Code(77)) => Verdict::Skipped,
        Some(Status::Code(code)) => Verdict::Failed(format!("status {code}: {}", last_line(&ended.output))),
        Some(Status::Signal(signal)) => Verdict::Failed(format!("signal {signal}: {}", last_line(&ended.output))),
        None => Verdict::Failed(format!("no end: {}", last_line(&ended.output))),
    }
}

/// The last line that tells of a fault, else the last one.
fn last_line(output: &str) -> String {
    let mut lines = output.lines().rev().map(str::trim).filter(|line| !line.is_empty());
    let fault = lines
        .clone()
        .filter(|line| !line.contains("warning: "))
        .find(|line| ["FAIL", "soc-vmm:", "KVM internal error", "qemu-system"].iter().any(|mark| line.contains(mark)));
    fault.or_else(|| lines.next()).unwrap_or_default().to_owned()
}

fn shown(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Passed => "pass".to_owned(),
        Verdict::Skipped => "skip".to_owned(),
        Verdict::Failed(why) => format!("FAIL ({why})"),
        Verdict::Left(why) => format!("- ({why})"),
    }
}

fn summary(rows: &[Row]) -> ExitCode {
    let count = |of: fn(&Row) -> &Verdict, verdict: &Verdict| rows.iter().filter(|row| of(row) == verdict).count();
    let line = |name: &str, of: fn(&Row) -> &Verdict| {
        let [passed, skipped] = [Verdict::Passed, Verdict::Skipped].map(|verdict| count(of, &verdict));
        vec![name.to_owned(), passed.to_string(), skipped.to_string(), (rows.len() - passed - skipped).to_string()]
    };
    let head = ["", "pass", "skip", "else"].map(str::to_owned).to_vec();
    println!("\n{}", aligned(&[head, line("QEMU", |row| &row.qemu), line("soc-vmm", |row| &row.soc_vmm)]));
    for row in rows.iter().filter(|row| row.is_worse()) {
        println!("worse  {}: {}", row.name, shown(&row.soc_vmm));
    }
    for row in rows.iter().filter(|row| row.qemu == Verdict::Passed) {
        if let Verdict::Left(what) = &row.soc_vmm {
            println!("lacks  {}: {what}", row.name);
        }
    }
    if rows.iter().any(Row::is_worse) { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: Option<Status>, output: &str) -> Ended {
        Ended { status, output: output.to_owned() }
    }

    #[test]
    fn a_status_is_a_verdict() {
        assert_eq!(verdict(&ended(Some(Status::Code(1)), "SUMMARY: 1 tests\n")), Verdict::Passed);
        assert_eq!(verdict(&ended(Some(Status::Code(77)), "SUMMARY: 0 tests\n")), Verdict::Skipped);
        let failed = verdict(&ended(Some(Status::Code(3)), "FAIL: a\nSUMMARY: 2 tests, 1 unexpected failures\n"));
        assert_eq!(failed, Verdict::Failed("status 3: FAIL: a".to_owned()));
        assert_eq!(verdict(&ended(None, "on\n\n")), Verdict::Failed("no end: on".to_owned()));
    }

    #[test]
    fn worse_is_what_passes_under_qemu_alone() {
        let row = |qemu, soc_vmm| Row { name: String::new(), qemu, soc_vmm };
        let failed = || Verdict::Failed(String::new());
        assert!(row(Verdict::Passed, failed()).is_worse());
        assert!(row(Verdict::Passed, Verdict::Skipped).is_worse());
        assert!(!row(failed(), failed()).is_worse());
        assert!(!row(Verdict::Passed, Verdict::Left("VMX".to_owned())).is_worse());
    }
}
