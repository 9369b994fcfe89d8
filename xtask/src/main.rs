//! `cargo xtask`: what a person types.

mod bench;
mod conformance;
mod counts;
mod debian;
mod demo;
mod fuzz;
mod hold;
mod soak;
mod step;
mod suite;
mod table;
mod terminal;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", about = "Builds, tests and shows Outboard")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// The main job, end to end: a guest on an emulated server, its VMM on the DPU's SoC.
    Demo(demo::Demo),
    /// Fetch what is missing and run what CI runs.
    Test {
        /// Leave out the emulated machines.
        #[arg(long)]
        quick: bool,
    },
    /// The same code as the tests, for long: [fuzz.TARGET…] [test.NAME…].
    Soak {
        /// What to run; a beginning is enough. All if none is named.
        names: Vec<String>,
        /// How long all of it together may look for failures.
        #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
        minutes: u32,
    },
    /// This project beside its peers, interleaved in one run: [NAME…] [--json FILE] [--record].
    Bench {
        /// Names of figures, all but those inside an emulated server (`server`) if none is given; and the options above.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// kvm-unit-tests under QEMU and under soc-vmm, on one KVM.
    Conformance(conformance::Conformance),
    /// Emulated DPU servers that stay up.
    Testbed {
        #[command(subcommand)]
        command: Testbed,
    },
}

#[derive(Subcommand)]
enum Testbed {
    /// Start servers and print how to reach each function.
    Up(Up),
    /// Stop them all.
    Down,
    /// Connect this terminal to a server's console; Ctrl-] leaves it.
    Console {
        /// Which server, counted from 1.
        server: usize,
        /// The console of its SoC instead.
        #[arg(long)]
        soc: bool,
    },
    /// Copy a Debian disk for a guest, who has a driver for every device, and print what soc-vmm is to be told.
    Debian {
        /// Where to; nothing may be there.
        disk: PathBuf,
    },
    /// Keep servers up until told to stop: what `up` starts.
    #[command(hide = true)]
    Hold(Up),
}

#[derive(clap::Args, Clone, Debug)]
struct Up {
    /// How many servers.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=8))]
    servers: u32,
    /// Vm functions of each server's card.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=16))]
    functions: u32,
    /// Where soc-vmm runs.
    #[arg(long, value_enum, default_value_t = Soc::Native)]
    soc: Soc,
}

#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Soc {
    /// On this machine.
    Native,
    /// On an emulated Arm SoC, one for each server.
    Arm64,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Task::Demo(demo) => demo::run(&demo),
        Task::Test { quick } => suite::run(quick),
        Task::Soak { names, minutes } => soak::run(&names, minutes),
        Task::Bench { arguments } => bench::run(&arguments),
        Task::Conformance(options) => conformance::run(&options),
        Task::Testbed { command } => match command {
            Testbed::Up(up) => hold::up(&up),
            Testbed::Down => hold::down(),
            Testbed::Console { server, soc } => hold::console(server, soc),
            Testbed::Debian { disk } => debian::copy(&disk),
            Testbed::Hold(up) => hold::hold(&up),
        },
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error}");
            ExitCode::FAILURE
        }
    }
}
