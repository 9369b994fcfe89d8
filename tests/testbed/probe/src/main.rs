//! `function-probe host ADDRESS`: the host's end of the function at a PCI address, through VFIO.
//! `function-probe soc ADDRESS`: the SoC's end.
//! `function-probe watch ADDRESS`: has its host's end open until that is lost.

use std::process::ExitCode;
use std::time::Duration;

use pcie_function::HostFunction;
use pcie_function::vfio::{VfioHost, VfioSoc};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["host", address] => host(address),
        ["soc", address] => soc(address),
        ["watch", address] => watch(address),
        _ => Err("usage: function-probe host|soc|watch ADDRESS".to_owned()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

fn host(address: &str) -> Result<(), String> {
    let function = VfioHost::open(address).map_err(|e| e.to_string())?;
    let role = function.role();
    function_probe::host::serve(function, role, &mut |line| println!("{line}"))
}

fn soc(address: &str) -> Result<(), String> {
    let function = VfioSoc::open(address).map_err(|e| e.to_string())?;
    println!("{:?}", function_probe::soc::check(&function)?);
    Ok(())
}

fn watch(address: &str) -> Result<(), String> {
    let function = VfioHost::open(address).map_err(|e| e.to_string())?;
    println!("watching");
    loop {
        let told = function_probe::readable(function.lost_event(), Duration::from_millis(50));
        if let Err(lost) = function.check() {
            println!("{lost}{}", if told { ", as was told" } else { "" });
            return Ok(());
        }
    }
}
