//! The VMM on the SoC: machine, devices, boot, QMP, CLI.

#![deny(clippy::print_stderr, clippy::print_stdout)]

use std::process::ExitCode;

use soc_vmm::cli::{self, ExitStatus, Failure, FunctionSpec, Invocation, PoolVerb};
use soc_vmm::{arena, inventory, log, pool, probe, vm};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

fn main() -> ExitCode {
    arena::share();
    let ended = Invocation::parse(std::env::args_os()).and_then(invoke);
    match ended {
        Ok(status) => status.into(),
        Err(failure) => failure.tell().status().into(),
    }
}

fn invoke(invocation: Invocation) -> Result<ExitStatus, Failure> {
    let mut out = std::io::stdout();
    match invocation {
        Invocation::List { json } => cli::list(json, &mut out)?,
        Invocation::Perform(verb, target) => cli::perform(&verb, &target, &mut out)?,
        Invocation::Print(text) => cli::print(&text, &mut out)?,
        Invocation::Run(mut config) => {
            if config.process.function_by_configuration {
                config.function = FunctionSpec::by_configuration()?;
            }
            // Where a record can't be written, it would say so on the same standard error, and panic.
            let log = tracing_subscriber::fmt().with_max_level(config.log).log_internal_errors(false);
            log.with_writer(std::io::stderr).finish().with(log::records(config.log)).init();
            return vm::run(&config);
        }
        Invocation::Pool(PoolVerb::List { json }) => pool::list(json, &mut out)?,
        Invocation::Pool(PoolVerb::Serve) => pool::serve()?,
        Invocation::Probe(probe) => return probe::serve(&probe),
        Invocation::Host { function, json } => inventory::host(&function, json, &mut out)?,
    }
    Ok(ExitStatus::Done)
}
