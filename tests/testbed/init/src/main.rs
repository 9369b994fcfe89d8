//! First process of a testbed machine: of the emulated server, where it and the shims are all there is in user space, and
//! of the emulated SoC.
//!
//! It mounts what a kernel offers, loads modules, binds the card's functions to vfio-pci, starts a program for each of them,
//! and then takes calls (see the library) until it is told to switch the machine off. It reaps everything.

mod boot;
mod calls;
mod console;
mod inspect;
mod kvm;
mod port;
mod programs;

use std::process::ExitCode;
use std::sync::Arc;
use std::thread;

use testbed_init::{CONFIG_PATH, CONTROL_PORT, Config, INVENTORY_MARK, READY_MARK, Start};

use crate::port::Port;
use crate::programs::Programs;

fn main() -> ExitCode {
    // Started by hand on a machine that already runs, it would mount and reboot things.
    if std::process::id() != 1 {
        eprintln!("testbed-init: runs as the first process of an emulated machine only");
        return ExitCode::from(2);
    }
    if let Err(error) = serve() {
        println!("testbed-init: {error}");
    }
    boot::power_off()
}

fn serve() -> Result<(), String> {
    boot::leave_first_root()?;
    boot::mount_all()?;
    let config = read_config()?;
    boot::name_machine(&config.name)?;
    boot::load_modules(&config.modules)?;
    let _vm = kvm::KeptVm::new();
    let functions = boot::bind_functions(&config.bind);

    let control = Arc::new(Port::open(CONTROL_PORT)?);
    let programs = Programs::new(Arc::clone(&control));
    for (address, id) in functions {
        for Start { program, args, .. } in config.start.iter().filter(|start| start.id == id) {
            let args: Vec<String> = args.iter().map(|arg| arg.replace("{}", &address)).collect();
            if let Err(error) = programs.run(program, &args, None) {
                println!("testbed-init: {error}");
            }
        }
    }

    let inventory = inspect::inventory()?;
    let text = serde_json::to_string(&inventory).map_err(|e| format!("inventory: {e}"))?;
    println!("{INVENTORY_MARK}{text}");
    println!("{READY_MARK}");
    let for_console = programs.clone();
    in_background("console", move || console::serve(&for_console));
    calls::serve(&control, &programs);
    Ok(())
}

fn read_config() -> Result<Config, String> {
    let text = std::fs::read_to_string(CONFIG_PATH).map_err(|e| format!("{CONFIG_PATH}: {e}"))?;
    serde_json::from_str(&text).map_err(|e| format!("{CONFIG_PATH}: {e}"))
}

/// Runs `work` for as long as the machine is up.
fn in_background(name: &str, work: impl FnOnce() + Send + 'static) {
    let started = thread::Builder::new().name(name.to_owned()).spawn(work);
    if let Err(error) = started {
        println!("testbed-init: thread {name}: {error}");
    }
}
