//! `cargo xtask testbed`: servers that stay up.
//!
//! `up` starts a process of its own session that holds the machines, waits until they are there, and prints how to reach
//! them. That process listens on a socket; `down` connects and waits until it has ended. The machines can't outlive it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use testbed::bed::{Bed, BedConfig, GUEST_INITRD, GUEST_KERNEL};
use testbed::card::{HOST_HOST, HOST_VM, SOC_HOST, SOC_VM};
use testbed::fetch::Arch;
use testbed::machine::Machine;
use testbed::protocol::PciId;
use testbed::{build, guest, paths, scratch, server};

use crate::step::with_sources;
use crate::{Soc, Up, terminal};

const UP_LIMIT: Duration = Duration::from_secs(15 * 60);
const DOWN_LIMIT: Duration = Duration::from_secs(60);

/// What is up, as `down` and `console` find it.
#[derive(Serialize, Deserialize)]
struct Held {
    /// The holder's socket.
    socket: PathBuf,
    servers: Vec<HeldServer>,
}

#[derive(Serialize, Deserialize)]
struct HeldServer {
    name: String,
    console: PathBuf,
    log: PathBuf,
    soc: Option<HeldSoc>,
    card_control: PathBuf,
    functions: Vec<HeldFunction>,
}

#[derive(Serialize, Deserialize)]
struct HeldSoc {
    console: PathBuf,
    log: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct HeldFunction {
    /// "vm" or "host".
    role: String,
    /// Its address in the server.
    host_address: String,
    /// How soc-vmm names it: a `--function` argument.
    soc_spec: String,
}

/// Starts the holder and waits for it.
pub(crate) fn up(up: &Up) -> Result<ExitCode, String> {
    if let Some(held) = held()? {
        if UnixStream::connect(&held.socket).is_ok() {
            return Err("servers are up already; `cargo xtask testbed down` stops them".to_owned());
        }
        forget()?;
    }
    let log = paths::cache().join("hold.log");
    fs::create_dir_all(paths::cache()).map_err(|e| at(&paths::cache(), &e))?;
    let output = File::create(&log).map_err(|e| at(&log, &e))?;
    let errors = output.try_clone().map_err(|e| at(&log, &e))?;
    let program = std::env::current_exe().map_err(|e| format!("xtask: {e}"))?;
    // A session of its own, so that it stays when this terminal goes.
    let mut holder = Command::new("setsid")
        .arg("--wait")
        .arg(program)
        .args(["testbed", "hold"])
        .args(["--servers", &up.servers.to_string()])
        .args(["--functions", &up.functions.to_string()])
        .args(["--soc", if up.soc == Soc::Arm64 { "arm64" } else { "native" }])
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(errors)
        .spawn()
        .map_err(|e| format!("setsid: {e}"))?;

    println!("fetching and building what is missing, and starting {} …", plural(up.servers, "server"));
    let end = Instant::now() + UP_LIMIT;
    let mut told = 0;
    loop {
        let said = fs::read_to_string(&log).unwrap_or_default();
        print!("{}", &said[told..]);
        let _ = io::stdout().flush();
        told = said.len();
        if let Some(held) = held()? {
            print(&held);
            return Ok(ExitCode::SUCCESS);
        }
        if let Some(status) = holder.try_wait().map_err(|e| format!("holder: {e}"))? {
            // Its last words may have come after the last look.
            let said = fs::read_to_string(&log).unwrap_or_default();
            print!("{}", &said[told..]);
            return Err(format!("the servers didn't come up ({status})"));
        }
        if Instant::now() >= end {
            let _ = holder.kill();
            return Err("the servers didn't come up in time".to_owned());
        }
        sleep(Duration::from_millis(100));
    }
}

/// Tells the holder to end and waits until it has.
pub(crate) fn down() -> Result<ExitCode, String> {
    let Some(held) = held()? else {
        println!("no server is up");
        return Ok(ExitCode::SUCCESS);
    };
    if let Ok(mut stream) = UnixStream::connect(&held.socket) {
        let wait = |stream: &mut UnixStream| {
            stream.set_read_timeout(Some(DOWN_LIMIT))?;
            stream.write_all(b"down\n")?;
            // It closes the connection by ending.
            stream.read_to_end(&mut Vec::new())
        };
        wait(&mut stream).map_err(|e| format!("the servers don't stop: {e}"))?;
    }
    forget()?;
    println!("{} stopped", plural_of(held.servers.len(), "server"));
    Ok(ExitCode::SUCCESS)
}

/// Connects the terminal to the console of a server or of its SoC.
pub(crate) fn console(number: usize, soc: bool) -> Result<ExitCode, String> {
    let held = held()?.ok_or("no server is up; `cargo xtask testbed up` starts one")?;
    let server = number.checked_sub(1).and_then(|index| held.servers.get(index)).ok_or_else(|| {
        let count = plural_of(held.servers.len(), "server");
        format!("there is no server {number}: {count} up, counted from 1")
    })?;
    let socket = match (&server.soc, soc) {
        (Some(soc), true) => &soc.console,
        (None, true) => return Err(format!("{} has no emulated SoC", server.name)),
        (_, false) => &server.console,
    };
    println!("Ctrl-] leaves this console; `help` lists what it takes");
    terminal::attach(socket).map_err(|e| match e.kind() {
        io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound => {
            let (name, logs) = (&server.name, server.log.parent().unwrap_or(&server.log));
            format!("{name} has ended by itself; its last words, and QEMU's, are in {}", logs.display())
        }
        _ => at(socket, &e),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// Holds the servers until told to end.
pub(crate) fn hold(up: &Up) -> Result<ExitCode, String> {
    let dir = scratch::dir().map_err(|e| format!("temporary directory: {e}"))?;
    let socket = dir.path().join("hold");
    let listener = UnixListener::bind(&socket).map_err(|e| at(&socket, &e))?;

    let mut beds = Vec::new();
    for number in 1..=up.servers {
        let mut config = BedConfig::new(&format!("server-{number}"), up.functions);
        if up.soc == Soc::Arm64 {
            config = config.with_arm_soc();
        }
        let bed = config.start().and_then(|bed| {
            server::slow_periodic_timers(&bed.server)?;
            Ok(bed)
        });
        beds.push(bed.map_err(|e| with_sources(&e))?);
    }
    let servers: Result<Vec<_>, _> = beds.iter().map(describe).collect();
    let held = Held { socket, servers: servers? };
    remember(&held)?;
    for stream in listener.incoming() {
        let mut stream = stream.map_err(|e| format!("holder: {e}"))?;
        let mut word = [0; 5];
        // Anyone who only looks whether somebody listens says nothing.
        if stream.read_exact(&mut word).is_ok() && word == *b"down\n" {
            drop(beds);
            drop(dir);
            // The connection closes after that, which is the answer.
            break;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn describe(bed: &Bed) -> Result<HeldServer, String> {
    let on_host = addresses(&bed.server, &[HOST_VM, HOST_HOST])?;
    let on_soc = match &bed.soc {
        Some(soc) => addresses(soc, &[SOC_VM, SOC_HOST])?.into_iter().map(|address| format!("pci:{address}")).collect(),
        None => {
            let sockets = bed.card.soc_sockets();
            let spec = |path: &PathBuf| format!("card:{}", path.display());
            sockets.iter().map(spec).collect::<Vec<_>>()
        }
    };
    let last = on_host.len().saturating_sub(1);
    let functions = on_host.into_iter().zip(on_soc).enumerate();
    Ok(HeldServer {
        name: bed.server.name().to_owned(),
        console: bed.server.console().socket().to_path_buf(),
        log: bed.server.console().log().to_path_buf(),
        soc: bed.soc.as_ref().map(|soc| HeldSoc {
            console: soc.console().socket().to_path_buf(),
            log: soc.console().log().to_path_buf(),
        }),
        card_control: bed.card.control_socket(),
        functions: functions
            .map(|(number, (host_address, soc_spec))| HeldFunction {
                role: if number == last { "host" } else { "vm" }.to_owned(),
                host_address,
                soc_spec,
            })
            .collect(),
    })
}

/// The addresses of a machine's functions of these kinds, in the order of their slots.
fn addresses(machine: &Machine, kinds: &[PciId]) -> Result<Vec<String>, String> {
    let inventory = machine.inventory().map_err(|e| with_sources(&e))?;
    let functions = inventory.pci.into_iter();
    Ok(functions.filter(|function| kinds.contains(&function.id)).map(|function| function.address).collect())
}

fn print(held: &Held) {
    let image = guest::image().ok();
    let program = build::programs(Arch::Amd64, &["soc-vmm"]).ok().map(|mut programs| programs.remove(0));
    for (index, server) in held.servers.iter().enumerate() {
        let number = index + 1;
        println!("\n{} is up; its console: cargo xtask testbed console {number}", server.name);
        println!("  console log   {}", server.log.display());
        println!("  card control  {}", server.card_control.display());
        if let Some(soc) = &server.soc {
            println!("  its SoC       cargo xtask testbed console {number} --soc");
            println!("  its SoC's log {}", soc.log.display());
        }
        println!("  function  role  in the server  for soc-vmm");
        for (number, function) in server.functions.iter().enumerate() {
            println!(
                "  {number:<9} {:<5} {:<14} --function {}",
                function.role, function.host_address, function.soc_spec
            );
        }
    }
    let (Some(server), Some(image), Some(program)) = (held.servers.first(), image, program) else {
        return;
    };
    let Some(function) = server.functions.first() else {
        return;
    };
    let spec = &function.soc_spec;
    println!("\na guest on the first of them:");
    if server.soc.is_some() {
        println!(
            "  at the SoC's console: soc-vmm run --name guest --cpus 2 --memory 512M,hugepages=2M --function {spec} --kernel {GUEST_KERNEL} --initrd {GUEST_INITRD}"
        );
    } else {
        println!(
            "  {} run --name guest --cpus 2 --memory 512M,hugepages=2M --function {spec} --kernel {} --initrd {}",
            program.display(),
            image.kernel.display(),
            image.initrd.display()
        );
    }
    println!("(Ctrl-A x quits it, Ctrl-A h helps; the guest knows no power button)");
}

fn state_file() -> PathBuf {
    paths::cache().join("held.json")
}

fn held() -> Result<Option<Held>, String> {
    let path = state_file();
    match fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|e| at(&path, &e)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at(&path, &error)),
    }
}

/// Whole or absent, for `up` looks for it all the time.
fn remember(held: &Held) -> Result<(), String> {
    let path = state_file();
    let partial = path.with_extension("partial");
    let text = serde_json::to_string_pretty(held).map_err(|e| at(&path, &e))?;
    fs::write(&partial, text).map_err(|e| at(&partial, &e))?;
    fs::rename(&partial, &path).map_err(|e| at(&path, &e))
}

fn forget() -> Result<(), String> {
    let path = state_file();
    fs::remove_file(&path).map_err(|e| at(&path, &e))
}

fn at(path: &Path, error: &dyn std::error::Error) -> String {
    format!("{}: {error}", path.display())
}

fn plural(count: u32, thing: &str) -> String {
    let ending = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{ending}")
}

fn plural_of(count: usize, thing: &str) -> String {
    plural(u32::try_from(count).unwrap_or(u32::MAX), thing)
}
