//! `cargo xtask demo`: the main job, end to end.

mod moving;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::bed::{Bed, BedConfig, GUEST_RAM, SHIM};
use testbed::guest;
use testbed::machine::Error;
use testbed::protocol::Status;
use testbed::vmm::{VmConfig, Vmm};

use crate::Soc;
use crate::step::with_sources;
use crate::table::{Figures, aligned};

/// How long a guest of an emulated server may take to come up, on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
const PROMPT: &str = "# ";

#[derive(clap::Args, Debug)]
pub(crate) struct Demo {
    /// Where soc-vmm runs.
    #[arg(long, value_enum, default_value_t = Soc::Native)]
    soc: Soc,
    /// Write the figures to this file, too.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Boots a guest, uses it, reboots it from inside and from outside, switches it off, and moves another one to a second server.
pub(crate) fn run(demo: &Demo) -> Result<ExitCode, String> {
    let mut figures = Figures::default();
    if let Some(path) = &demo.json {
        // What can't be written is better known now.
        figures.write_json(path)?;
    }
    play(demo.soc, &mut figures).map_err(|e| with_sources(&e))?;
    println!("\n{}", shown(&figures));
    println!(
        "Everything in the server ran under emulation: times say nothing about hardware. KVM's counts have the exits that"
    );
    println!(
        "it finished itself, too; DMA from the host is mostly what going to sleep costs. This server's TSCs allow no posted writes."
    );
    println!(
        "The guest's clock has gaps without a move too, as long as the emulators have to wait for this machine's processors."
    );
    if let Some(path) = &demo.json {
        figures.write_json(path)?;
    }
    let (seen, counted) = (figures.value("exits.pio"), figures.value("host.io_exits"));
    if seen > counted {
        return Err(format!("soc-vmm saw {seen:?} port exits, KVM counted {counted:?}"));
    }
    Ok(ExitCode::SUCCESS)
}

fn play(soc: Soc, figures: &mut Figures) -> Result<(), Error> {
    let mut config = BedConfig::new("demo-server", 1);
    if soc == Soc::Arm64 {
        config = config.with_arm_soc();
    }
    say("fetching and building what is missing");
    config.prepare()?;

    say(match soc {
        Soc::Native => "starting the emulated server and its card; soc-vmm runs on this machine",
        Soc::Arm64 => "starting the emulated server, its card, and the Arm SoC that soc-vmm runs on",
    });
    let began = Instant::now();
    let bed = config.start()?;
    figures.add("server.up", began.elapsed().as_secs_f64(), "s");

    say("starting a guest: Debian's unmodified kernel, 2 vCPUs");
    let vm = VmConfig::new("demo", 0);
    let began = Instant::now();
    let mut guest = Guest { vmm: Vmm::run(&bed, &vm)?, up: format!("{}{}", guest::UP_MARK, vm.cpus), shown: 0 };
    figures.add("guest.boot", guest.wait_until_up(began)?, "s");

    say("typing at its serial console");
    let typed = Instant::now();
    guest.vmm.type_text("uname -a; echo $((6 * 7)) is the answer\n")?;
    guest.vmm.expect("42 is the answer", ANSWER_LIMIT)?;
    figures.add("guest.answer", typed.elapsed().as_secs_f64(), "s");
    guest.wait_for_prompt()?;

    say("rebooting it from inside: reboot -f");
    let began = Instant::now();
    guest.vmm.type_text("reboot -f\n")?;
    figures.add("guest.reboot", guest.wait_until_up(began)?, "s");

    say("resetting it from outside: soc-vmm reset demo");
    let began = Instant::now();
    guest.ask(&["reset"])?;
    figures.add("guest.reset", guest.wait_until_up(began)?, "s");

    guest.counters(figures)?;
    footprint(&bed, figures)?;

    say("switching it off: poweroff -f");
    guest.vmm.type_text("poweroff -f\n")?;
    let ended = guest.vmm.wait_for_exit(ANSWER_LIMIT)?;
    guest.show();
    if ended != Status::Code(0) {
        return Err(guest.refused(&format!("ended with {ended:?}")));
    }
    say("it powered off, and soc-vmm's exit status is 0");
    drop(guest);
    match soc {
        Soc::Native => moving::play(&bed, figures)?,
        Soc::Arm64 => say(
            "the move to a second server is left out: it is shown where soc-vmm runs on this machine (cargo xtask demo)",
        ),
    }
    bed.server.power_off(ANSWER_LIMIT)
}

/// The guest, and how much of its console was shown.
struct Guest<'a> {
    vmm: Vmm<'a>,
    up: String,
    shown: usize,
}

impl Guest<'_> {
    /// Waits for the guest's first words and its prompt; seconds from `began` to the words.
    fn wait_until_up(&mut self, began: Instant) -> Result<f64, Error> {
        self.vmm.expect(&self.up, BOOT_LIMIT)?;
        let seconds = began.elapsed().as_secs_f64();
        self.wait_for_prompt()?;
        say(&format!("it is up after {seconds:.1} s"));
        Ok(seconds)
    }

    fn wait_for_prompt(&mut self) -> Result<(), Error> {
        self.vmm.expect(PROMPT, ANSWER_LIMIT)?;
        self.show();
        Ok(())
    }

    /// Shows what the guest printed since the last time, without what only a terminal understands.
    fn show(&mut self) {
        let text = self.vmm.text();
        let new = text.get(self.shown..).unwrap_or_default();
        for line in new.lines() {
            let plain = without_control(line);
            if !plain.trim().is_empty() {
                println!("      | {plain}");
            }
        }
        self.shown = text.len();
    }

    /// Asks soc-vmm for something and returns what it printed.
    fn ask(&self, verb: &[&str]) -> Result<String, Error> {
        let ended = self.vmm.command(verb)?;
        if ended.status == Status::Code(0) {
            Ok(ended.stdout)
        } else {
            Err(self.refused(&format!("refused {}: {}", verb.join(" "), ended.stderr.trim())))
        }
    }

    /// Adds every counter of the VM by its own name.
    fn counters(&self, figures: &mut Figures) -> Result<(), Error> {
        let status = self.ask(&["status", "--json"])?;
        let status: Value =
            serde_json::from_str(&status).map_err(|e| self.refused(&format!("answered no JSON ({e})")))?;
        for (name, value) in status["counters"].as_object().into_iter().flatten() {
            if let Some(value) = value.as_f64() {
                figures.add(name, value, if name.ends_with("-bytes") { "B" } else { "" });
            }
        }
        Ok(())
    }

    fn refused(&self, what: &str) -> Error {
        refused(&self.vmm, what)
    }
}

fn refused(vmm: &Vmm<'_>, what: &str) -> Error {
    Error::Dead { name: "soc-vmm".to_owned(), what: what.to_owned(), console: vmm.text(), said: vmm.errors() }
}

/// What the busy shim costs the host. Its function is the first, so its process is, too.
fn footprint(bed: &Bed, figures: &mut Figures) -> Result<(), Error> {
    let programs = bed.server.programs()?;
    let shim = programs.iter().find(|program| program.command.first().is_some_and(|word| word == SHIM));
    if let Some(shim) = shim {
        let memory = bed.server.memory(shim.pid)?;
        let mut threads = bed.server.threads(shim.pid)?;
        threads.retain(|thread| !thread.is_of_kvm());
        let count = u32::try_from(threads.len()).unwrap_or(u32::MAX);
        figures.add("shim.private", memory.private_kib_without(GUEST_RAM) as f64, "KiB");
        figures.add("shim.page_tables", memory.page_tables as f64, "KiB");
        figures.add("shim.threads", f64::from(count), "");
    }
    Ok(())
}

/// The figures that a person wants to see; all of them are in the JSON.
fn shown(figures: &Figures) -> String {
    let row = |cells: &[&str]| {
        let (title, names) = cells.split_first().expect("a row has a title");
        let values = names.iter().map(|name| if name.is_empty() { String::new() } else { figures.shown(name) });
        std::iter::once((*title).to_owned()).chain(values).collect::<Vec<_>>()
    };
    let head = |cells: &[&str]| cells.iter().map(|&cell| cell.to_owned()).collect::<Vec<_>>();
    let times = [
        head(&["seconds", ""]),
        row(&["server up", "server.up"]),
        row(&["guest's boot", "guest.boot"]),
        row(&["reboot -f", "guest.reboot"]),
        row(&["soc-vmm reset", "guest.reset"]),
        row(&["answer at the console", "guest.answer"]),
    ];
    let exits = [
        head(&["exits", "soc-vmm", "shim", "KVM"]),
        row(&["port I/O", "exits.pio", "host.shim.pio", "host.io_exits"]),
        row(&["memory (MMIO)", "exits.mmio", "host.shim.mmio", "host.mmio_exits"]),
        row(&["posted writes", "exits.posted", "host.shim.posted"]),
        row(&["other", "exits.other", "host.shim.other"]),
        row(&["all that KVM handled", "", "", "host.exits"]),
    ];
    let bus = [
        head(&["across the bus", "number", "bytes"]),
        row(&["DMA to the host", "dma.writes", "dma.write-bytes"]),
        row(&["DMA from the host", "dma.reads", "dma.read-bytes"]),
        row(&["channel, sent", "", "channel.sent-bytes"]),
        row(&["channel, received", "", "channel.received-bytes"]),
        row(&["doorbells", "doorbells"]),
        row(&["vectors", "vectors"]),
    ];
    let cost = [
        head(&["on the host", ""]),
        row(&["shim's memory without the guest's, KiB", "shim.private"]),
        row(&["its page tables, KiB", "shim.page_tables"]),
        row(&["its threads", "shim.threads"]),
    ];
    let moved = [
        head(&["live move to the second server", ""]),
        row(&["time, ms", "move.total"]),
        row(&["rounds", "move.rounds"]),
        row(&["MiB sent", "move.sent"]),
        row(&["downtime as soc-vmm has it, ms", "move.downtime"]),
        row(&["longest gap of the guest's clock, ms", "guest.gap"]),
        row(&["such a gap in the 5 s before, ms", "guest.gap.before"]),
    ];
    let mut tables = vec![&times[..], &exits, &bus, &cost];
    if figures.value("move.total").is_some() {
        tables.push(&moved);
    }
    tables.into_iter().map(aligned).collect::<Vec<_>>().join("\n")
}

/// `line` without control characters and sequences (ECMA-48 §5.4): the guest's shell asks where the cursor is.
fn without_control(line: &str) -> String {
    let mut plain = String::new();
    let mut characters = line.chars();
    while let Some(character) = characters.next() {
        if character == '\x1b' {
            // ESC [ parameters, up to a final byte of 0x40 to 0x7e.
            if characters.next() == Some('[') {
                characters.find(|c| ('@'..='~').contains(c));
            }
        } else if !character.is_control() {
            plain.push(character);
        }
    }
    plain
}

fn say(text: &str) {
    println!("demo: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_to_be_read_is_shown() {
        assert_eq!(without_control("\x1b[6nuname -a\r"), "uname -a");
        assert_eq!(without_control("\x1b[1;32mgreen\x1b[0m"), "green");
        assert_eq!(without_control("\x1b["), "");
    }
}
