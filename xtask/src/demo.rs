//! `cargo xtask demo`: the main job, end to end.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use serde_json::Value;
use testbed::bed::BedConfig;
use testbed::guest;
use testbed::protocol::Status;
use testbed::vmm::{VmConfig, Vmm};

use crate::Soc;
use crate::step::with_sources;
use crate::table::Table;

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

/// Boots a guest, uses it, reboots it from inside and from outside, and switches it off.
pub(crate) fn run(demo: &Demo) -> Result<ExitCode, String> {
    let mut table = Table::default();
    play(demo, &mut table).map_err(|e| with_sources(&e))?;
    println!("\n{table}");
    if let Some(path) = &demo.json {
        table.write_json(path)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn play(demo: &Demo, table: &mut Table) -> Result<(), testbed::machine::Error> {
    let mut config = BedConfig::new("demo-server", 1);
    if demo.soc == Soc::Arm64 {
        config = config.with_arm_soc();
    }
    say("starting the emulated server and its card");
    let began = Instant::now();
    let bed = config.start()?;
    table.add("server up", began.elapsed().as_secs_f64(), "s");

    let vm = VmConfig::new("demo", 0);
    say("starting a guest: Debian's unmodified kernel, 2 vCPUs");
    let began = Instant::now();
    let mut vmm = Vmm::run(&bed, &vm)?;
    let up = format!("{}{}", guest::UP_MARK, vm.cpus);
    let boot = wait_until_up(&mut vmm, &up, began)?;
    table.add("guest's boot", boot, "s");

    say("typing at its serial console");
    let typed = Instant::now();
    vmm.type_text("uname -r; echo $((6 * 7)) is the answer\n")?;
    vmm.expect("42 is the answer", ANSWER_LIMIT)?;
    vmm.expect(PROMPT, ANSWER_LIMIT)?;
    table.add("answer at its console", typed.elapsed().as_secs_f64(), "s");

    say("rebooting it from inside: reboot -f");
    let began = Instant::now();
    vmm.type_text("reboot -f\n")?;
    let boot = wait_until_up(&mut vmm, &up, began)?;
    table.add("reboot", boot, "s");

    say("resetting it from outside: soc-vmm reset demo");
    let began = Instant::now();
    ask(&vmm, &["reset"])?;
    let boot = wait_until_up(&mut vmm, &up, began)?;
    table.add("reset", boot, "s");

    let status = ask(&vmm, &["status", "--json"])?;
    counts(&serde_json::from_str(&status).unwrap_or_default(), table);

    say("switching it off: poweroff -f");
    vmm.type_text("poweroff -f\n")?;
    let ended = vmm.wait_for_exit(ANSWER_LIMIT)?;
    if ended != Status::Code(0) {
        return Err(refused(&vmm, &format!("ended with {ended:?}")));
    }
    println!("\n{}", vmm.text().trim_end());
    say("it powered off; soc-vmm's exit status is 0");
    drop(vmm);
    bed.server.power_off(ANSWER_LIMIT)
}

/// Waits for the guest's first words and its prompt; seconds since `began`.
fn wait_until_up(vmm: &mut Vmm<'_>, up: &str, began: Instant) -> Result<f64, testbed::machine::Error> {
    vmm.expect(up, BOOT_LIMIT)?;
    let seconds = began.elapsed().as_secs_f64();
    vmm.expect(PROMPT, ANSWER_LIMIT)?;
    say(&format!("it is up after {seconds:.1} s"));
    Ok(seconds)
}

/// Asks soc-vmm for something and returns what it printed.
fn ask(vmm: &Vmm<'_>, verb: &[&str]) -> Result<String, testbed::machine::Error> {
    let ended = vmm.command(verb)?;
    if ended.status == Status::Code(0) {
        Ok(ended.stdout)
    } else {
        let what = format!("refused {}: {}", verb.join(" "), ended.stderr.trim());
        Err(refused(vmm, &what))
    }
}

fn refused(vmm: &Vmm<'_>, what: &str) -> testbed::machine::Error {
    testbed::machine::Error::Dead {
        name: "soc-vmm".to_owned(),
        what: what.to_owned(),
        console: vmm.text(),
        said: vmm.errors(),
    }
}

/// Adds every number of the VM's counters.
fn counts(status: &Value, table: &mut Table) {
    for (name, value) in status["counters"].as_object().into_iter().flatten() {
        if let Some(value) = value.as_f64() {
            table.add(&name.replace('-', " "), value, "");
        }
    }
}

fn say(text: &str) {
    println!("demo: {text}");
}
