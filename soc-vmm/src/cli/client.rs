//! The commands that ask running VMs, over their control sockets.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::json;

use super::{ExitStatus, Failure, Target, Verb, one_line};
use crate::control::{CDROM_ID, Counters, RunDir, RunState, VmName};
use crate::devices::CpuReport;
use crate::migrate::Step;
use crate::qmp::types::{Empty, NewDeviceId, ObjectProperty, OutboardCounter, OutboardMigration, OutboardVm};
use crate::qmp::{Add, Client, ClientError, PERIPHERAL, ROOT_PORT};

/// How long a VM may take to greet: it does so whatever else it does, unless it is stopped or starves.
const GREETING: Duration = Duration::from_secs(5);
/// How long it may take for a command: longer than it takes to give up by itself.
const PATIENCE: Duration = Duration::from_secs(70);
/// How long its guest may take to let a device go: Linux takes seven seconds, of which five are for the user to think again.
const LETTING_GO: Duration = Duration::from_secs(60);
/// How long it may take to show itself in a list.
const LIST_PATIENCE: Duration = Duration::from_secs(1);

/// What `status --json` prints.
#[derive(serde::Serialize)]
struct Status {
    #[serde(flatten)]
    vm: OutboardVm,
    devices: Vec<DeviceShown>,
    counters: Counters,
}

/// A device behind a root port, or a vCPU that was added.
#[derive(serde::Serialize)]
struct DeviceShown {
    id: String,
    /// By QEMU's name.
    driver: String,
}

/// Does `verb` to one VM and writes what there is to show.
///
/// # Errors
/// The VM can't be asked ([`ExitStatus::Unavailable`]) or refused ([`ExitStatus::Failed`]).
pub fn perform(verb: &Verb, target: &Target, out: &mut dyn Write) -> Result<(), Failure> {
    let (shown, socket) = match target {
        Target::Name(name) => (name.to_string(), socket_of(&run_dir()?, name)?),
        Target::Socket(path) => (path.display().to_string(), without_scheme(path)),
    };
    let failed = |e| failure(&shown, &e);
    let mut client = Client::connect(&socket, GREETING).map_err(failed)?.with_patience(PATIENCE);
    let command = match *verb {
        Verb::Status { json } => {
            let vm = client.execute("x-query-outboard-vm").map_err(failed)?;
            let devices = devices(&mut client).map_err(failed)?;
            if !json {
                return written(write_status(out, &vm, &devices));
            }
            let counters: Vec<OutboardCounter> = client.execute("x-query-outboard-counters").map_err(failed)?;
            let counters = counters.into_iter().map(|counter| (counter.name, counter.value)).collect();
            return written(write_json(out, &Status { vm, devices, counters }));
        }
        Verb::Pause => "stop",
        Verb::Resume => "cont",
        Verb::Reset => "system_reset",
        Verb::Powerdown => "system_powerdown",
        Verb::Quit => "quit",
        Verb::Eject { force } => {
            let arguments = json!({ "id": CDROM_ID, "force": force });
            return client.execute_with::<Empty>("eject", &arguments).map(drop).map_err(failed);
        }
        Verb::AddDisk(ref spec) => {
            let added = add(&mut client, "x-outboard-add-disk", spec)?.map_err(failed)?;
            return written(writeln!(out, "{}", one_line(&added.id)));
        }
        Verb::AddNet(ref spec) => {
            let added = add(&mut client, "x-outboard-add-net", spec)?.map_err(failed)?;
            return written(writeln!(out, "{}", one_line(&added.id)));
        }
        Verb::Resize { ref id, size } => {
            let arguments = json!({ "device": id, "size": size });
            return client.execute_with::<Empty>("block_resize", &arguments).map(drop).map_err(failed);
        }
        Verb::Balloon(size) => {
            let arguments = json!({ "value": size });
            return client.execute_with::<Empty>("balloon", &arguments).map(drop).map_err(failed);
        }
        Verb::Migrate(ref args) => {
            return super::migrate::migrate(&mut client, args, &shown, out).map_err(|e| e.failure(failed));
        }
        Verb::Save { ref file, keep, detach } => {
            return super::migrate::save(&mut client, file, keep, detach, &shown, out).map_err(|e| e.failure(failed));
        }
        Verb::CancelMigration => {
            return super::migrate::cancel(&mut client, &shown).map_err(|e| e.failure(failed));
        }
        Verb::AddCpu => {
            let added: NewDeviceId = client.execute("x-outboard-add-cpu").map_err(failed)?;
            return written(writeln!(out, "{}", one_line(&added.id)));
        }
        Verb::Remove { ref id } => {
            client.execute_with::<Empty>("device_del", &json!({ "id": id })).map_err(failed)?;
            let stays = |why: &str| Failure::new(ExitStatus::Failed, format!("{shown}: {id}: {why}"));
            return match client.wait_for_event(|name, data| gone(id, name, data), LETTING_GO) {
                Ok(Ok(())) => Ok(()),
                Ok(Err(status)) => Err(stays(&refusal(status))),
                Err(ClientError::Lost(ref e)) if e.kind() == io::ErrorKind::TimedOut => {
                    Err(stays("the guest is asked to let it go, and has not yet: it may still do so, and a reset will"))
                }
                Err(e) => Err(failed(e)),
            };
        }
        Verb::Insert { ref file, force } => {
            // The VM's working directory is another one.
            let file = std::path::absolute(file).map_err(|e| Failure::of(ExitStatus::Usage, "FILE", &e))?;
            let Some(file) = file.to_str() else {
                return Err(Failure::new(ExitStatus::Usage, "FILE: QMP carries UTF-8 alone; rename the image"));
            };
            let arguments = json!({ "id": CDROM_ID, "filename": file, "force": force });
            return client.execute_with::<Empty>("blockdev-change-medium", &arguments).map(drop).map_err(failed);
        }
    };
    client.execute::<Empty>(command).map_err(failed)?;
    if *verb == Verb::Quit {
        client.wait_for_end(PATIENCE).map_err(failed)?;
    }
    Ok(())
}

/// A connection to the VM of that name.
pub(super) fn connect(name: &VmName) -> Result<Client, Failure> {
    let socket = socket_of(&run_dir()?, name)?;
    let connected = Client::connect(&socket, GREETING).map_err(|e| failure(name.as_str(), &e))?;
    Ok(connected.with_patience(PATIENCE))
}

/// Why the VM `shown` can't be asked, or refused.
pub(super) fn failure(shown: &str, e: &ClientError) -> Failure {
    let (status, advice) = match e {
        ClientError::Refused(_) => (ExitStatus::Failed, ""),
        ClientError::Connect(e) if e.kind() == io::ErrorKind::NotFound => {
            let why = format!("{shown}: no such VM runs here; soc-vmm list shows what runs");
            return Failure::new(ExitStatus::Unavailable, why);
        }
        ClientError::Connect(_) => (ExitStatus::Unavailable, "; soc-vmm list shows what runs"),
        ClientError::Lost(e) if e.kind() == io::ErrorKind::TimedOut => (
            ExitStatus::Unavailable,
            "; if its soc-vmm is stopped, kill -CONT lets it go on; if it hangs, kill -KILL ends it",
        ),
        ClientError::Lost(_) | ClientError::NotQmp(_) => (ExitStatus::Unavailable, ""),
    };
    Failure::new(status, format!("{}{advice}", Failure::of(status, shown, e)))
}

/// The devices of a VM; none as long as it is being built.
fn devices(client: &mut Client) -> Result<Vec<DeviceShown>, ClientError> {
    let children: Vec<ObjectProperty> = match client.execute_with("qom-list", &json!({ "path": PERIPHERAL })) {
        Err(ClientError::Refused(_)) => Vec::new(),
        answered => answered?,
    };
    let device = |ObjectProperty { name, kind }| {
        let driver = kind.strip_prefix("child<")?.strip_suffix('>').filter(|driver| *driver != ROOT_PORT)?;
        Some(DeviceShown { id: name, driver: driver.to_owned() })
    };
    Ok(children.into_iter().filter_map(device).collect())
}

/// What an event says of the device with this name: that it is gone, or that the guest keeps it, by its status code.
fn gone(id: &str, event: &str, data: &serde_json::Value) -> Option<Result<(), u32>> {
    let number = |name: &str| data["info"][name].as_u64()?.try_into().ok();
    match event {
        "DEVICE_DELETED" if data["device"] == id => Some(Ok(())),
        "ACPI_DEVICE_OST" if data["info"]["device"] == id => {
            let report = CpuReport { cpu: 0, source: number("source")?, status: number("status")? };
            report.is_refusal().then_some(Err(report.status))
        }
        _ => None,
    }
}

/// Why a guest keeps a device (ACPI 6.5 §6.3.5.2, table 6.42).
fn refusal(status: u32) -> String {
    let why = match status {
        0x80 => "it can't let it go",
        0x81 => "it is in use",
        0x82 => "it is busy",
        0x83 => "something that depends on it is busy",
        _ => return format!("the guest refuses to let it go, with ACPI's status {status:#x}; see its log"),
    };
    format!("the guest refuses to let it go: {why}; see its log")
}

/// Adds a device; paths in its text begin where this process is.
fn add(client: &mut Client, command: &str, spec: &str) -> Result<Result<NewDeviceId, ClientError>, Failure> {
    let directory =
        std::env::current_dir().map_err(|e| Failure::of(ExitStatus::Unavailable, "the working directory", &e))?;
    let arguments = serde_json::to_value(Add { spec: spec.to_owned(), directory });
    let arguments = arguments.map_err(|e| Failure::of(ExitStatus::Usage, "the working directory", &e))?;
    Ok(client.execute_with(command, &arguments))
}

/// The control socket of the VM of that name. A VM of QEMU's command line is called otherwise there, so it is found by its guest's name.
///
/// # Errors
/// The directory can't be read, or several guests have that name.
fn socket_of(dir: &RunDir, name: &VmName) -> Result<PathBuf, Failure> {
    let socket = dir.socket(name);
    if socket.exists() {
        return Ok(socket);
    }
    let names = dir.names().map_err(|e| Failure::of(ExitStatus::Unavailable, "", &e))?;
    let asked = ask_all(dir, &names);
    let has_it = |asked: &Option<Result<OutboardVm, _>>| matches!(asked, Some(Ok(vm)) if vm.name == name.as_str());
    let found: Vec<_> = names.iter().zip(&asked).filter(|(_, asked)| has_it(asked)).map(|(name, _)| name).collect();
    match found[..] {
        [one] => Ok(dir.socket(one)),
        // Whoever connects to it says that nobody is there.
        [] => Ok(socket),
        [first, second, ..] => {
            let why = format!("{name}: several guests have that name: {first}, {second}; say one of these");
            Err(Failure::new(ExitStatus::Unavailable, why))
        }
    }
}

/// Writes a table of this user's VMs, or their JSON. A VM that doesn't answer is listed as such, one that died is not.
///
/// # Errors
/// There is no runtime directory, or it can't be read.
pub fn list(json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    list_in(&run_dir()?, json, out)
}

fn list_in(dir: &RunDir, json: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let names = dir.names().map_err(|e| Failure::of(ExitStatus::Unavailable, "", &e))?;
    let mut vms = Vec::new();
    let mut silent = Vec::new();
    for (name, asked) in names.iter().zip(ask_all(dir, &names)) {
        match asked {
            Some(Ok(vm)) => vms.push(vm),
            // A VM that just ends hangs up.
            Some(Err(ClientError::Connect(e) | ClientError::Lost(e))) if is_gone(e.kind()) => {}
            _ => silent.push(name.to_string()),
        }
    }
    if json {
        let silent = silent.into_iter().map(|name| Listed::Silent { name, status: SILENT });
        let all: Vec<_> = vms.into_iter().map(Listed::Vm).chain(silent).collect();
        return written(write_json(out, &all));
    }
    written(write_table(out, &vms, &silent))
}

/// Whether nobody is there any more.
fn is_gone(kind: io::ErrorKind) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound, UnexpectedEof};
    matches!(kind, BrokenPipe | ConnectionRefused | ConnectionReset | NotFound | UnexpectedEof)
}

/// What `list --json` prints of a VM.
#[derive(serde::Serialize)]
#[serde(untagged)]
enum Listed {
    Vm(OutboardVm),
    Silent { name: String, status: &'static str },
}

/// The status of a VM that doesn't answer.
const SILENT: &str = "silent";
/// VMs that are asked at a time.
const ASKED: usize = 64;

/// Asks each of the VMs what it is, many at a time: each that hangs costs all of its patience.
fn ask_all(dir: &RunDir, names: &[VmName]) -> Vec<Option<Result<OutboardVm, ClientError>>> {
    let next = AtomicUsize::new(0);
    let answers = Mutex::new(names.iter().map(|_| None).collect::<Vec<_>>());
    let ask = || {
        while let Some((index, name)) = names.iter().enumerate().nth(next.fetch_add(1, Ordering::Relaxed)) {
            let asked = Client::connect(&dir.socket(name), LIST_PATIENCE)
                .and_then(|mut client| client.execute::<OutboardVm>("x-query-outboard-vm"));
            answers.lock().unwrap_or_else(PoisonError::into_inner)[index] = Some(asked);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..names.len().min(ASKED) {
            // Where there can be no more threads, those that there are do it.
            if std::thread::Builder::new().spawn_scoped(scope, ask).is_err() {
                break;
            }
        }
        ask();
    });
    answers.into_inner().unwrap_or_else(PoisonError::into_inner)
}

/// Writes a text as it is.
///
/// # Errors
/// Nobody can take it.
pub fn print(text: &str, out: &mut dyn Write) -> Result<(), Failure> {
    written(out.write_all(text.as_bytes()))
}

fn run_dir() -> Result<RunDir, Failure> {
    RunDir::of_user().map_err(|e| Failure::of(ExitStatus::Unavailable, "", &e))
}

/// `--qmp` of `run` is written `unix:SOCKET`: that is understood here too.
fn without_scheme(path: &Path) -> PathBuf {
    path.to_str().and_then(|text| text.strip_prefix("unix:")).map_or_else(|| path.to_owned(), PathBuf::from)
}

/// A reader that has gone is no failure of ours.
pub(super) fn written(result: io::Result<()>) -> Result<(), Failure> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::of(ExitStatus::Unavailable, "standard output", &e))
        }
        _ => Ok(()),
    }
}

fn write_json<T: serde::Serialize>(out: &mut dyn Write, value: &T) -> io::Result<()> {
    // JSON escapes some control characters by itself; those that it leaves are in strings.
    for c in serde_json::to_string(value)?.chars() {
        if c.is_control() { write!(out, "\\u{:04x}", u32::from(c))? } else { write!(out, "{c}")? }
    }
    writeln!(out)
}

fn write_status(out: &mut dyn Write, vm: &OutboardVm, devices: &[DeviceShown]) -> io::Result<()> {
    let plural = if vm.cpus == 1 { "" } else { "s" };
    let (name, status, cpus, memory, function, pid) = row(vm);
    writeln!(out, "{name}: {status} ({cpus} vCPU{plural}, {memory}, function {function}, pid {pid})")?;
    if let Some(migration) = &vm.migration {
        writeln!(out, "  {}", shown_migration(migration, vm.status == RunState::Inmigrate))?;
    }
    devices.iter().try_for_each(|device| writeln!(out, "  {} ({})", one_line(&device.id), one_line(&device.driver)))
}

fn write_table(out: &mut dyn Write, vms: &[OutboardVm], silent: &[String]) -> io::Result<()> {
    let mut rows = vec![["NAME", "STATUS", "VCPUS", "MEMORY", "FUNCTION", "PID"].map(str::to_owned)];
    rows.extend(vms.iter().map(|vm| {
        let (name, status, cpus, memory, function, pid) = row(vm);
        [name, status, cpus.to_string(), memory, function, pid.to_string()]
    }));
    rows.extend(silent.iter().map(|name| [name, SILENT, "-", "-", "-", "-"].map(str::to_owned)));
    let widths: Vec<usize> = (0..6).map(|column| rows.iter().map(|row| row[column].len()).max().unwrap_or(0)).collect();
    for row in &rows {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    Ok(())
}

fn row(vm: &OutboardVm) -> (String, String, u16, String, String, u32) {
    // Whatever answered may say anything.
    (one_line(&vm.name), vm.status.to_string(), vm.cpus, shown_size(vm.memory), one_line(&vm.function), vm.pid)
}

/// `comes`: its guest isn't here yet, and only its source knows what is left.
fn shown_migration(migration: &OutboardMigration, comes: bool) -> String {
    let OutboardMigration { status, error_desc, door, remaining, total, transferred, rate, rounds, .. } = migration;
    let OutboardMigration { expected_downtime, throttle, limit, .. } = migration;
    if let (Step::Setup, Some(door)) = (status, door) {
        return format!("waits for its guest at {}", one_line(door));
    }
    let mebibytes = |bytes: &u64| *bytes as f64 / f64::from(1 << 20);
    let figures = match (status, total) {
        // Nobody knows yet what comes, or cares any more.
        (Step::Failed | Step::Cancelled, _) | (_, 0) => String::new(),
        (_, total) if comes => format!(", {:.1} MiB came for {:.1}", mebibytes(transferred), mebibytes(total)),
        (_, total) => format!(", {:.1} MiB left of {:.1}", mebibytes(remaining), mebibytes(total)),
    };
    let rate = match (status, rate) {
        (Step::Active | Step::PostcopyActive, 1..) => format!(", {:.1} MiB/s", mebibytes(rate)),
        _ => String::new(),
    };
    let round = match (status, expected_downtime) {
        (Step::Active, _) if comes => String::new(),
        (Step::Active, 0) => format!(", round {}", rounds + 1),
        (Step::Active, ms) => format!(", round {}, expected downtime {ms} ms", rounds + 1),
        _ => String::new(),
    };
    let slowed = match (status, throttle, limit) {
        (Step::Active, 0, 1..) => format!(", vCPUs limited to {limit} MiB/s"),
        (Step::Active, 1.., _) => format!(", vCPUs slowed by {throttle} %"),
        _ => String::new(),
    };
    let why = error_desc.as_ref().map_or(String::new(), |why| format!(": {}", one_line(why)));
    format!("migration {status}{figures}{rate}{round}{slowed}{why}")
}

/// Bytes as `--memory` takes them, in the largest unit that divides them.
fn shown_size(bytes: u64) -> String {
    let (unit, shift) =
        [("G", 30), ("M", 20)].into_iter().find(|(_, s)| bytes.is_multiple_of(1 << s)).unwrap_or(("K", 10));
    format!("{}{unit}", bytes >> shift)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{ListeningSocket, VmControl, VmInfo, channel};
    use crate::qmp::{Greet, Server};

    async fn served(dir: &RunDir, name: &str) -> (VmControl, Server) {
        guest_served(dir, name, name).await
    }

    async fn guest_served(dir: &RunDir, name: &str, guest: &str) -> (VmControl, Server) {
        let (vm, control) =
            channel(VmInfo { name: guest.into(), cpus: 2, memory: 512 << 20, function: "pci:0000:01:00.1".into() });
        let socket = ListeningSocket::bind(&dir.socket(&name.parse().unwrap())).unwrap();
        (control, Server::start(&vm, vec![socket], Greet::AtOnce).unwrap())
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_guest_of_qemu_s_command_line_is_found_by_its_name() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::at(place.path());
        let _served = [
            guest_served(&dir, "vm-1", "web").await,
            guest_served(&dir, "vm-2", "twin").await,
            guest_served(&dir, "vm-3", "twin").await,
            guest_served(&dir, "twin-4", "vm-1").await,
        ];
        let found = |name: &str| tokio::task::block_in_place(|| socket_of(&dir, &name.parse().unwrap()));
        for (name, socket) in [("web", "vm-1.qmp"), ("vm-1", "vm-1.qmp"), ("absent", "absent.qmp")] {
            assert_eq!(found(name).unwrap(), place.path().join(socket));
        }
        let why = found("twin").unwrap_err().to_string();
        assert!(why.contains("vm-2, vm-3"), "{why}");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_list_of_living_dead_and_silent_vms() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::at(place.path());
        let (mut control, server) = served(&dir, "web-1").await;
        control.started();
        let dead = std::os::unix::net::UnixListener::bind(place.path().join("dead.qmp")).unwrap();
        drop(dead);
        let _silent = std::os::unix::net::UnixListener::bind(place.path().join("silent.qmp")).unwrap();
        let ends = std::os::unix::net::UnixListener::bind(place.path().join("ends.qmp")).unwrap();
        let _hangs_up = std::thread::spawn(move || ends.incoming().for_each(drop));

        let (mut table, mut json) = (Vec::new(), Vec::new());
        tokio::task::block_in_place(|| {
            list_in(&dir, false, &mut table).unwrap();
            list_in(&dir, true, &mut json).unwrap();
        });
        assert_eq!(
            String::from_utf8(table).unwrap(),
            format!(
                "NAME    STATUS   VCPUS  MEMORY  FUNCTION          PID\n\
                 web-1   running  2      512M    pci:0000:01:00.1  {}\n\
                 silent  silent   -      -       -                 -\n",
                std::process::id()
            )
        );
        let vms: Vec<serde_json::Value> = serde_json::from_slice(&json).unwrap();
        assert_eq!((vms.len(), &vms[0]["status"]), (2, &json!("running")));
        assert_eq!(vms[1], json!({"name": "silent", "status": "silent"}));
        drop(control);
        server.close().await;
    }

    /// Each VM greets nobody until all have been asked: only who asks them at once hears all.
    #[test]
    fn a_list_asks_all_vms_at_once() {
        use std::os::unix::net::UnixListener;
        const VMS: usize = 8;
        let place = tempfile::tempdir().unwrap();
        let listeners: Vec<_> =
            (0..VMS).map(|i| UnixListener::bind(place.path().join(format!("vm{i}.qmp"))).unwrap()).collect();
        // On a machine that starves the patience of one may be over before the last is asked.
        let heard_all = (0..10).any(|_| {
            let all = std::sync::Barrier::new(VMS);
            let heard = |listener: &UnixListener| {
                let (mut client, _) = listener.accept().unwrap();
                all.wait();
                // One that has given up has closed its end.
                client.write_all(b"no greeting\n").is_ok()
            };
            std::thread::scope(|scope| {
                let vms: Vec<_> = listeners.iter().map(|listener| scope.spawn(|| heard(listener))).collect();
                list_in(&RunDir::at(place.path()), true, &mut Vec::new()).unwrap();
                let answers: Vec<bool> = vms.into_iter().map(|vm| vm.join().unwrap()).collect();
                answers.into_iter().all(|answer| answer)
            })
        });
        assert!(heard_all);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn verbs_reach_the_vm_and_failures_say_which() {
        let place = tempfile::tempdir().unwrap();
        let dir = RunDir::at(place.path());
        let (mut control, server) = served(&dir, "a").await;
        control.started();
        let target = Target::Socket(format!("unix:{}", dir.socket(&"a".parse().unwrap()).display()).into());
        let asked = tokio::task::spawn_blocking({
            let target = target.clone();
            move || {
                let mut out = Vec::new();
                let paused = perform(&Verb::Pause, &target, &mut out);
                perform(&Verb::Status { json: false }, &target, &mut out).unwrap();
                let resumed = perform(&Verb::Resume, &target, &mut out);
                perform(&Verb::Quit, &target, &mut out).unwrap();
                (paused, resumed, String::from_utf8(out).unwrap())
            }
        });
        let order = control.next().await.unwrap();
        control.finish(order, Ok(()));
        let order = control.next().await.unwrap();
        control.finish(order, Err("the function is busy".into()));
        let order = control.next().await.unwrap();
        control.finish(order, Ok(()));
        drop(control);
        let (paused, resumed, out) = asked.await.unwrap();
        assert_eq!(paused, Ok(()));
        let refused = resumed.unwrap_err();
        assert_eq!(refused.status(), ExitStatus::Failed);
        assert!(refused.to_string().ends_with("a.qmp: the function is busy"), "{refused}");
        assert!(
            out.ends_with(&format!(" paused (2 vCPUs, 512M, function pci:0000:01:00.1, pid {})\n", std::process::id()))
        );
        server.close().await;
        let gone = tokio::task::block_in_place(|| perform(&Verb::Reset, &target, &mut Vec::new())).unwrap_err();
        assert_eq!(gone.status(), ExitStatus::Unavailable);
        assert!(gone.to_string().ends_with("a.qmp: no such VM runs here; soc-vmm list shows what runs"), "{gone}");
    }

    #[test]
    fn what_a_peer_says_steers_no_terminal() {
        let vm = OutboardVm {
            name: "a\u{1b}]0;b\n\u{9b}2J\"".into(),
            status: crate::control::RunState::Running,
            cpus: 1,
            memory: 1 << 30,
            function: "local\r\u{7f}".into(),
            pid: 7,
            migration: None,
        };
        let migration = OutboardMigration {
            status: crate::migrate::Step::PostcopyPaused,
            error_desc: Some("it\nbroke\u{2028}\u{1b}[2J".into()),
            door: None,
            remaining: 3 << 19,
            total: 1 << 30,
            transferred: 5 << 20,
            rate: 0,
            rounds: 3,
            expected_downtime: 0,
            throttle: 0,
            limit: 0,
        };
        let moving = OutboardVm { migration: Some(migration), ..vm.clone() };
        let shown = |write: &dyn Fn(&mut Vec<u8>) -> io::Result<()>| {
            let mut out = Vec::new();
            write(&mut out).unwrap();
            let text = String::from_utf8(out).unwrap();
            assert!(!text.trim_end_matches('\n').contains(|c: char| c.is_control() && c != '\n'), "{text:?}");
            text
        };
        let devices = ["disk0\u{7}", "net0"].map(|id| DeviceShown { id: id.into(), driver: "virtio\n".into() });
        assert_eq!(shown(&|out| write_status(out, &vm, &[])).lines().count(), 1);
        assert_eq!(shown(&|out| write_status(out, &vm, &devices)).lines().count(), 3);
        let told = shown(&|out| write_status(out, &moving, &[]));
        assert!(told.contains("\n  migration postcopy-paused, 1.5 MiB left of 1024.0: it broke"), "{told}");
        assert_eq!(told.lines().count(), 2);
        assert_eq!(shown(&|out| write_table(out, std::slice::from_ref(&vm), &[])).lines().count(), 2);
        let json = shown(&|out| write_json(out, &vm));
        assert_eq!(json.lines().count(), 1);
        assert_eq!(serde_json::from_str::<OutboardVm>(&json).unwrap(), vm, "nothing is lost");
    }

    #[test]
    fn a_migration_is_shown_as_far_as_its_side_knows() {
        let of = |status, rounds, expected_downtime| OutboardMigration {
            status,
            error_desc: None,
            door: None,
            remaining: 3 << 20,
            total: 1 << 30,
            transferred: 5 << 20,
            rate: 7 << 20,
            rounds,
            expected_downtime,
            throttle: 0,
            limit: 0,
        };
        let shown = |status, comes, text: &str| assert_eq!(shown_migration(&of(status, 1, 4), comes), text);
        let active = "migration active, 3.0 MiB left of 1024.0, 7.0 MiB/s, round 2, expected downtime 4 ms";
        shown(Step::Active, false, active);
        shown(Step::Active, true, "migration active, 5.0 MiB came for 1024.0, 7.0 MiB/s");
        shown(Step::Cancelled, false, "migration cancelled");
        shown(Step::Device, false, "migration device, 3.0 MiB left of 1024.0");
        let waits = OutboardMigration { door: Some("unix:/d".into()), ..of(Step::Setup, 0, 0) };
        assert_eq!(shown_migration(&waits, true), "waits for its guest at unix:/d");
        let first = shown_migration(&of(Step::Active, 0, 0), false);
        assert_eq!(first, "migration active, 3.0 MiB left of 1024.0, 7.0 MiB/s, round 1");
        let slowed = |throttle, limit| OutboardMigration { throttle, limit, ..of(Step::Active, 0, 0) };
        assert_eq!(shown_migration(&slowed(20, 0), false), format!("{first}, vCPUs slowed by 20 %"));
        assert_eq!(shown_migration(&slowed(0, 5), false), format!("{first}, vCPUs limited to 5 MiB/s"));
    }

    #[test]
    fn sizes_read_as_they_are_typed() {
        assert_eq!(
            [64 << 10, 512 << 20, 3 << 30, (1 << 30) + (1 << 20)].map(shown_size),
            ["64K", "512M", "3G", "1025M"]
        );
    }
}
