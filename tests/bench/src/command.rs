//! `cargo xtask bench [NAME…] [--json FILE] [--record] [--runs N] [--requests N] [--soc-vmm FILE] [--qemu DIR] [--guest DIR]`.

use std::collections::BTreeMap;
use std::path::PathBuf;

use payloads::Privilege;
use payloads::virtio_blk::MOST_DEPTH;
use testbed::paths;

use crate::contender::{Entrant, Qemu, with_sources};
use crate::exit_read_polling;
use crate::figure::{Figure, ratio, text};
use crate::fio::Guest;
use crate::host::{self, Clock, Host, KvmKind};
use crate::kicks::{KICKS, kicks};
use crate::record::{Record, today};
use crate::turns::Extent;
use crate::{disk, fio, idle, lane_round, migrate, net, server};

const USAGE: &str = "usage: bench [NAME…] [--json FILE] [--record] [--runs N] [--requests N] [--soc-vmm FILE] [--qemu DIR] \
                     [--guest DIR]";
/// How much is measured unless it is said.
const EXTENT: Extent = Extent { runs: 5, requests: 4_000 };

/// What others may take of all CPUs while this measures: two programs that poll want both of a small machine.
const BUSY: f64 = 0.05;

/// What to measure, and where the figures go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Command {
    /// Only figures whose name begins with one of these; all but the emulated server's if there is none: those take four minutes more, and
    /// what the testbed fetches and builds.
    pub names: Vec<String>,
    /// Where the figures are written as JSON.
    pub json: Option<PathBuf>,
    /// Whether they are kept in docs/.
    pub record: bool,
    /// How much is measured.
    pub extent: Extent,
    /// Our program.
    pub soc_vmm: PathBuf,
    /// The root of QEMU; the testbed's, else.
    pub qemu: Option<PathBuf>,
    /// Where fio's guest is; made of the testbed's parts, else.
    pub guest: Option<PathBuf>,
}

impl Command {
    /// Out of arguments; an error is one line for the user.
    pub fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut command = Command {
            names: Vec::new(),
            json: None,
            record: false,
            extent: EXTENT,
            soc_vmm: paths::target().join("release/soc-vmm"),
            qemu: None,
            guest: None,
        };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value; {USAGE}"));
            match argument.as_str() {
                "--json" => command.json = Some(value()?.into()),
                "--record" => command.record = true,
                "--soc-vmm" => command.soc_vmm = value()?.into(),
                "--qemu" => command.qemu = Some(value()?.into()),
                "--guest" => command.guest = Some(value()?.into()),
                "--runs" => command.extent.runs = number("--runs", &value()?, 1)?,
                "--requests" => command.extent.requests = number("--requests", &value()?, MOST_DEPTH)?,
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
        let mut figures = match Clock::of_kvm() {
            Ok(clock) => self.measure(clock, &show)?,
            Err(error) => skipped(figures_here(), &error.to_string()),
        };
        figures.extend(self.measure_in_the_server(&show));
        figures.retain(|figure| self.wanted(&figure.name));
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
        let mut entrants = Entrant::all(&self.soc_vmm, self.qemu.as_deref());
        let (extent, runs) = (self.extent, self.extent.runs);
        let mut figures = Vec::new();
        for privilege in [Privilege::Cpl0, Privilege::Cpl3] {
            if self.wanted(exit_read_polling::name(privilege)) {
                let figure = exit_read_polling::measure(privilege, &mut entrants, clock, runs, show);
                figures.push(figure.map_err(|error| with_sources(&error))?);
            }
        }
        let device_wanted = |name: &str| self.wanted(name) || self.wanted(&kicks(name));
        for figure in disk::FIGURES.into_iter().filter(|(name, ..)| device_wanted(name)) {
            let measured = disk::measure(figure, &mut entrants, clock, extent, show);
            figures.extend(measured.map_err(|error| with_sources(&error))?);
        }
        for figure in net::FIGURES.into_iter().filter(|(name, _)| device_wanted(name)) {
            let measured = net::measure(figure, &mut entrants, clock, extent, show);
            figures.extend(measured.map_err(|error| with_sources(&error))?);
        }
        if fio::FIGURES.iter().any(|(name, ..)| self.wanted(name)) {
            figures.extend(self.measure_linux(&mut entrants, clock, show)?);
        }
        if self.wanted(lane_round::NAME) {
            figures.push(lane_round::measure(runs).map_err(|error| with_sources(&error))?);
        }
        if migrate::FIGURES.iter().any(|(name, _)| self.wanted(name)) {
            let wanted = |name: &str| self.wanted(name);
            let measured = migrate::measure(&self.soc_vmm, self.qemu.as_deref(), clock, runs, &wanted, show);
            figures.extend(measured.map_err(|error| with_sources(&error))?);
        }
        for name in idle::NAMES.into_iter().filter(|name| self.wanted(name)) {
            figures.push(idle::measure(name, &self.soc_vmm, runs).unwrap_or_else(|error| Figure {
                skipped: Some(with_sources(&error)),
                ..Figure::empty(name, idle::unit(name), 0)
            }));
        }
        Ok(figures)
    }

    fn measure_linux(
        &self,
        entrants: &mut [Entrant],
        clock: Clock,
        show: &dyn Fn(&str),
    ) -> Result<Vec<Figure>, String> {
        let names = || fio::FIGURES.iter().map(|(name, ..)| (*name).to_owned()).collect();
        let host = Host::probe(clock).map_err(|error| with_sources(&error))?;
        if host.kvm == KvmKind::Software {
            return Ok(skipped(names(), "this KVM is in software, which boots no Linux"));
        }
        let guest = self.guest.as_deref().map_or_else(Guest::make, |directory| Ok(Guest::at(directory)));
        Ok(match guest {
            Ok(guest) => fio::measure(&guest, entrants, self.extent.runs, show).into(),
            Err(error) => skipped(names(), &with_sources(&error)),
        })
    }

    /// What is measured inside the emulated server, which needs no KVM of this machine.
    fn measure_in_the_server(&self, show: &dyn Fn(&str)) -> Vec<Figure> {
        let wanted: Vec<_> = server::figures().filter(|name| self.wanted(name)).collect();
        if wanted.is_empty() {
            return Vec::new();
        }
        server::measure(&wanted, server::EXTENT, show).unwrap_or_else(|error| {
            let why = with_sources(&error);
            show(&why);
            // A machine's error has its console's end behind the first line.
            skipped(wanted, why.lines().next().unwrap_or_default())
        })
    }

    fn keep(&self, figures: Vec<Figure>) -> Result<(), String> {
        let host = Clock::of_kvm().and_then(Host::probe).map_err(|error| with_sources(&error))?;
        let version = Qemu::new().and_then(|qemu| qemu.version());
        let versions: BTreeMap<_, _> = version.into_iter().map(|version| ("qemu".to_owned(), version)).collect();
        let record = Record { date: today(), host, versions, figures };
        record.keep(&paths::workspace().join("docs")).map_err(|error| with_sources(&error))
    }

    fn wanted(&self, figure: &str) -> bool {
        if self.names.is_empty() {
            return !figure.starts_with(server::PREFIX);
        }
        self.names.iter().any(|name| figure.starts_with(name))
    }
}

/// Every figure's name.
pub fn figures() -> Vec<String> {
    figures_here().into_iter().chain(server::figures()).collect()
}

/// Those that this machine's KVM gives.
fn figures_here() -> Vec<String> {
    let exits = [Privilege::Cpl0, Privilege::Cpl3].map(exit_read_polling::name);
    let migrations = migrate::FIGURES.map(|(name, _)| name);
    let rest = [lane_round::NAME].into_iter().chain(migrations).chain(idle::NAMES);
    exits.into_iter().map(str::to_owned).chain(device_figures()).chain(rest.map(str::to_owned)).collect()
}

/// Those of guests that use a device.
pub(crate) fn device_figures() -> Vec<String> {
    let payloads = disk::FIGURES.map(|(name, ..)| name).into_iter().chain(net::FIGURES.map(|(name, _)| name));
    let linux = fio::FIGURES.map(|(name, ..)| name.to_owned());
    payloads.flat_map(|name| [name.to_owned(), kicks(name)]).chain(linux).collect()
}

/// Figures that nobody could measure.
fn skipped(names: Vec<String>, why: &str) -> Vec<Figure> {
    let figure = |name: String| Figure { skipped: Some(why.to_owned()), ..Figure::empty(&name, unit(&name), 0) };
    names.into_iter().map(figure).collect()
}

fn unit(figure: &str) -> &'static str {
    let figure = figure.strip_prefix(server::PREFIX).unwrap_or(figure);
    let device =
        [("disk.", disk::UNITS), ("net.", net::UNITS)].into_iter().find(|(start, _)| figure.starts_with(start));
    match device {
        Some((_, [_, kicks])) if figure.ends_with(KICKS) => kicks,
        Some((_, [rate, _])) => rate,
        None if figure.starts_with("fio.") => fio::UNIT,
        None if figure.starts_with("migrate.") => {
            migrate::FIGURES.iter().find(|(name, _)| *name == figure).map_or("ms", |(_, unit)| unit)
        }
        None if idle::NAMES.contains(&figure) => idle::unit(figure),
        None => "ns",
    }
}

/// `text` as the value of `option`.
fn number(option: &str, text: &str, least: u32) -> Result<u32, String> {
    let number = text.parse().ok().filter(|&number| number >= least);
    number.ok_or_else(|| format!("{option} {text}: not a number of at least {least}"))
}

fn one_line(figure: &Figure) -> String {
    let unit = &figure.unit;
    let mut parts = Vec::new();
    if let Some(ours) = figure.ours {
        parts.push(format!("ours {} {unit}", text(ours.median)));
    }
    for (name, peer) in &figure.peers {
        let ratio = figure.ours.and_then(|ours| ratio(&ours, peer));
        let ratio = ratio.map_or_else(String::new, |ratio| format!(" (ours {ratio} × {name}'s)"));
        parts.push(format!("{name} {} {unit}{ratio}", text(peer.median)));
    }
    if let Some(floor) = figure.floor {
        let above = figure.ours.map_or_else(String::new, |ours| format!(" (ours {:+.0})", ours.median - floor.median));
        parts.push(format!("floor {} {unit}{above}", text(floor.median)));
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
        let command = parse("exit.read --json out.json --record --runs 2 --requests 32 --soc-vmm p --qemu q").unwrap();
        assert_eq!(command.names, ["exit.read"]);
        assert_eq!(command.json, Some("out.json".into()));
        assert_eq!((command.record, command.extent), (true, Extent { runs: 2, requests: 32 }));
        assert_eq!((command.soc_vmm, command.qemu), ("p".into(), Some("q".into())));
        for wrong in ["--json", "--runs 0", "--runs x", "--requests 31", "--nothing", "no.such.figure"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_machine_without_kvm_lists_every_figure() {
        let figures = skipped(figures_here(), "no /dev/kvm");
        assert_eq!(figures.len(), 38);
        assert!(figures.iter().all(|figure| figure.skipped.as_deref() == Some("no /dev/kvm")));
    }

    #[test]
    fn the_emulated_server_is_measured_by_name_only() {
        let wanted = |line: &str| figures().iter().filter(|name| parse(line).unwrap().wanted(name)).count();
        assert_eq!(wanted(""), figures_here().len());
        assert_eq!(wanted("server"), server::figures().count());
        assert_eq!(wanted("disk.read.depth1 server.fio.write"), 2 + 2);
    }

    #[test]
    fn a_figure_has_the_unit_of_its_kind() {
        for (figure, expected) in [
            ("server.disk.write.depth32", "requests/s"),
            ("disk.read.depth1.kicks", "kicks/request"),
            ("net.echo.depth1", "frames/s"),
            ("server.net.echo.depth1.kicks", "kicks/frame"),
            ("server.fio.read.depth1", "requests/s"),
            ("shim.footprint", "KiB"),
            ("lane.round", "ns"),
        ] {
            assert!(figures().iter().any(|name| name == figure), "{figure}");
            assert_eq!(unit(figure), expected, "{figure}");
        }
    }
}
