//! `cargo xtask bench [NAME…] [--json FILE] [--record] [--runs N] [--soc-vmm FILE]`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use payloads::Privilege;
use testbed::paths;

use crate::contender::{Entrant, Qemu, with_sources};
use crate::exit_read_polling;
use crate::figure::Figure;
use crate::host::{self, Clock, Host};
use crate::record::{Record, today};
use crate::{idle, lane_round};

const USAGE: &str = "usage: bench [NAME…] [--json FILE] [--record] [--runs N] [--soc-vmm FILE]";
const RUNS: u32 = 5;

/// What others may take of all CPUs while this measures: two programs that poll want both of a small machine.
const BUSY: f64 = 0.05;

/// What to measure, and where the figures go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Only figures whose name begins with one of these; all if there is none.
    pub names: Vec<String>,
    /// Where the figures are written as JSON.
    pub json: Option<PathBuf>,
    /// Whether they are kept in docs/.
    pub record: bool,
    /// How often each contender is started.
    pub runs: u32,
    /// Our program.
    pub soc_vmm: PathBuf,
}

impl Command {
    /// Out of arguments; an error is one line for the user.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut command = Command {
            names: Vec::new(),
            json: None,
            record: false,
            runs: RUNS,
            soc_vmm: paths::target().join("release/soc-vmm"),
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value; {USAGE}"));
            match argument.as_str() {
                "--json" => command.json = Some(value()?.into()),
                "--record" => command.record = true,
                "--soc-vmm" => command.soc_vmm = value()?.into(),
                "--runs" => {
                    let runs = value()?;
                    command.runs = runs
                        .parse()
                        .ok()
                        .filter(|&runs| runs > 0)
                        .ok_or_else(|| format!("--runs {runs}: not a number of at least 1"))?;
                }
                option if option.starts_with('-') => return Err(format!("{option} is unknown; {USAGE}")),
                name if figures().iter().any(|figure| figure.starts_with(name)) => command.names.push(argument),
                name => return Err(format!("no figure is called {name}; there are: {}", figures().join(", "))),
            }
        }
        Ok(command)
    }

    /// Measures, shows, writes; an error is one line for the user.
    pub fn run(&self) -> Result<(), String> {
        let show = |line: &str| eprintln!("{line}");
        if let Some(share) = host::busy_share().filter(|&share| share > BUSY) {
            let why = format!("other programs take {:.0} % of the machine, so figures mean little", share * 100.0);
            if self.record {
                return Err(format!("--record: {why}; end them first"));
            }
            show(&why);
        }
        let figures = match Clock::of_kvm() {
            Ok(clock) => self.measure(clock, &show)?,
            Err(error) => self.skip_all(&error.to_string()),
        };
        for figure in &figures {
            println!("{}", one_line(figure));
        }
        if let Some(path) = &self.json {
            let text = serde_json::to_string_pretty(&figures).map_err(|error| error.to_string())? + "\n";
            std::fs::write(path, text).map_err(|error| format!("{}: {error}", path.display()))?;
        }
        if self.record {
            self.keep(figures)?;
        }
        Ok(())
    }

    fn measure(&self, clock: Clock, show: &dyn Fn(&str)) -> Result<Vec<Figure>, String> {
        let mut entrants = Entrant::all(&self.soc_vmm);
        let mut figures = Vec::new();
        for privilege in [Privilege::Cpl0, Privilege::Cpl3] {
            if self.wanted(exit_read_polling::name(privilege)) {
                let figure = exit_read_polling::measure(privilege, &mut entrants, clock, self.runs, show);
                figures.push(figure.map_err(|error| with_sources(&error))?);
            }
        }
        if self.wanted(lane_round::NAME) {
            figures.push(lane_round::measure(self.runs).map_err(|error| with_sources(&error))?);
        }
        for name in idle::NAMES.into_iter().filter(|name| self.wanted(name)) {
            figures.push(idle::measure(name, &self.soc_vmm, self.runs).unwrap_or_else(|error| Figure {
                skipped: Some(with_sources(&error)),
                ..Figure::empty(name, idle::unit(name), 0)
            }));
        }
        Ok(figures)
    }

    fn skip_all(&self, why: &str) -> Vec<Figure> {
        let wanted = figures().into_iter().filter(|name| self.wanted(name));
        wanted.map(|name| Figure { skipped: Some(why.to_owned()), ..Figure::empty(name, unit(name), 0) }).collect()
    }

    fn keep(&self, figures: Vec<Figure>) -> Result<(), String> {
        let host = Clock::of_kvm().and_then(Host::probe).map_err(|error| with_sources(&error))?;
        let version = Qemu::new().and_then(|qemu| qemu.version());
        let versions: BTreeMap<_, _> = version.into_iter().map(|version| ("qemu".to_owned(), version)).collect();
        let record = Record { date: today(), host, versions, figures };
        record.keep(&paths::workspace().join("docs")).map_err(|error| with_sources(&error))
    }

    fn wanted(&self, figure: &str) -> bool {
        self.names.is_empty() || self.names.iter().any(|name| figure.starts_with(name))
    }
}

/// Every figure's name.
pub fn figures() -> Vec<&'static str> {
    let exits = [Privilege::Cpl0, Privilege::Cpl3].map(exit_read_polling::name);
    exits.into_iter().chain([lane_round::NAME]).chain(idle::NAMES).collect()
}

fn unit(figure: &str) -> &'static str {
    if idle::NAMES.contains(&figure) { idle::unit(figure) } else { "ns" }
}

fn one_line(figure: &Figure) -> String {
    let unit = &figure.unit;
    let mut parts = Vec::new();
    if let Some(ours) = figure.ours {
        parts.push(format!("ours {:.0} {unit}", ours.median));
    }
    for (name, peer) in &figure.peers {
        let ratio =
            figure.ours.map_or_else(String::new, |ours| format!(" (ours {:.2} × {name}'s)", ours.median / peer.median));
        parts.push(format!("{name} {:.0} {unit}{ratio}", peer.median));
    }
    if let Some(floor) = figure.floor {
        let above = figure.ours.map_or_else(String::new, |ours| format!(" (ours {:+.0})", ours.median - floor.median));
        parts.push(format!("floor {:.0} {unit}{above}", floor.median));
    }
    if let Some(why) = &figure.skipped {
        parts.push(format!("skipped: {why}"));
    }
    format!("{}: {}", figure.name, parts.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Command, String> {
        Command::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn arguments() {
        let command = parse("exit.read --json out.json --record --runs 2 --soc-vmm p").unwrap();
        assert_eq!(command.names, ["exit.read"]);
        assert_eq!(command.json, Some("out.json".into()));
        assert_eq!((command.record, command.runs, command.soc_vmm), (true, 2, "p".into()));
        for wrong in ["--json", "--runs 0", "--runs x", "--nothing", "no.such.figure"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_machine_without_kvm_lists_every_figure() {
        let figures = parse("").unwrap().skip_all("no /dev/kvm");
        assert_eq!(figures.len(), super::figures().len());
        assert!(figures.iter().all(|figure| figure.skipped.as_deref() == Some("no /dev/kvm")));
    }
}
