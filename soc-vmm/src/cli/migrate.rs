//! `soc-vmm migrate`: begins a move, and shows how it goes.

use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use serde_json::{Value, json};

use super::args::{Keeps, MigrateArgs};
use super::{ExitStatus, Failure, one_line};
use crate::migrate::Uri;
use crate::qmp::types::Empty;
use crate::qmp::{Client, ClientError};

/// How often it is looked at, and of these looks how many a line is written for.
const LOOK: Duration = Duration::from_millis(200);
const A_LINE: u32 = 5;
/// Connections of a move, unless it is said how many.
const CONNECTIONS: u8 = 2;
/// How long a VM may take to end whose guest has left.
const LEAVING: Duration = Duration::from_secs(10);
/// How the VM knows the certificates that a move is begun with.
const CREDENTIALS: &str = "x-outboard-migrate-tls";

/// Why a guest is not moved.
pub(super) enum Trouble {
    /// The VM can't be asked, or refused.
    Client(ClientError),
    /// It was moved only in part.
    Told(Failure),
}

impl Trouble {
    /// As a failure; `of_client` knows whom it was asked of.
    pub(super) fn failure(self, of_client: impl FnOnce(ClientError) -> Failure) -> Failure {
        match self {
            Self::Client(e) => of_client(e),
            Self::Told(failure) => failure,
        }
    }
}

impl From<ClientError> for Trouble {
    fn from(e: ClientError) -> Self {
        Self::Client(e)
    }
}

/// Moves the guest of the VM `shown`.
pub(super) fn migrate(
    client: &mut Client,
    args: &MigrateArgs,
    shown: &str,
    out: &mut dyn Write,
) -> Result<(), Trouble> {
    let place = args.uri.to_string();
    let file = match &args.uri {
        Uri::File(place) => place.path.to_str(),
        _ => None,
    };
    let watched = Watched { shown, post_copy: args.postcopy, leaves: true, place: &place, file };
    if args.resume {
        begin(client, args)?;
        return if args.detach { Ok(()) } else { watched.watch(client, out, write_result) };
    }
    let is_door = matches!(args.uri, Uri::Tcp(..) | Uri::Tls(..) | Uri::Unix(_));
    let connections = match args.connections {
        None if is_door => CONNECTIONS,
        None => 1,
        Some(number) if number > 1 && !is_door => {
            let why = "--connections: a file or a descriptor is one connection: leave it out";
            return Err(Trouble::Told(Failure::new(ExitStatus::Usage, why)));
        }
        Some(number) => number,
    };
    let capability = |name: &str, state: bool| json!({ "capability": name, "state": state });
    let capabilities = [
        capability("return-path", true),
        capability("multifd", connections > 1),
        capability("auto-converge", args.auto_converge == "on" && args.dirty_limit.is_none()),
        capability("dirty-limit", args.dirty_limit.is_some()),
        capability("pause-before-switchover", false),
        capability("postcopy-ram", args.postcopy),
    ];
    client.execute_with::<Empty>("migrate-set-capabilities", &json!({ "capabilities": capabilities }))?;
    let parameters = json!({
        "vcpu-dirty-limit": args.dirty_limit.unwrap_or(1),
        "downtime-limit": args.downtime,
        "max-bandwidth": args.bandwidth.map_or(0, |size| size.0),
        "multifd-channels": connections,
        "multifd-compression": if args.zstd { "zstd" } else { "none" },
    });
    client.execute_with::<Empty>("migrate-set-parameters", &parameters)?;
    begin(client, args)?;
    if args.detach { Ok(()) } else { watched.watch(client, out, write_result) }
}

/// Keeps the guest of the VM `shown` in a file.
pub(super) fn save(
    client: &mut Client,
    file: &Path,
    keep: Option<Keeps>,
    detach: bool,
    shown: &str,
    out: &mut dyn Write,
) -> Result<(), Trouble> {
    if let Some(name) = file.to_str().and_then(|text| text.strip_prefix("file:")) {
        // One that is called so is ./file:….
        let why = format!("FILE: save takes the file alone: say {}", one_line(name));
        return Err(Trouble::Told(Failure::new(ExitStatus::Usage, why)));
    }
    // The VM's working directory is another one.
    let told = |e: Failure| Trouble::Told(e);
    let file = std::path::absolute(file).map_err(|e| told(Failure::of(ExitStatus::Usage, "FILE", &e)))?;
    let Some(file) = file.to_str() else {
        return Err(told(Failure::new(ExitStatus::Usage, "FILE: QMP carries UTF-8 alone; take another name")));
    };
    let then = match keep {
        None => "end",
        Some(Keeps::Running) => "run",
        Some(Keeps::Paused) => "pause",
    };
    client.execute_with::<Empty>("x-outboard-save", &json!({ "file": file, "then": then }))?;
    let watched = Watched { shown, post_copy: false, leaves: keep.is_none(), place: file, file: Some(file) };
    let result = |out: &mut dyn Write, told: &Value| {
        write_saved(out, told)?;
        if keep == Some(Keeps::Paused) {
            writeln!(out, "the guest stands still until soc-vmm resume: copy the images of its disks before")?;
        }
        Ok(())
    };
    if detach { Ok(()) } else { watched.watch(client, out, result) }
}

/// Ends what is under way in the VM `shown`.
pub(super) fn cancel(client: &mut Client, shown: &str) -> Result<(), Trouble> {
    let failed = |why: &str| Err(Trouble::Told(Failure::new(ExitStatus::Failed, format!("{shown}: {why}"))));
    let told: Value = client.execute("query-migrate")?;
    if matches!(told["status"].as_str(), None | Some("none" | "completed" | "failed" | "cancelled")) {
        return failed("no migration is under way");
    }
    let vm: Value = client.execute("query-status")?;
    if vm["status"] == "inmigrate" {
        return failed("a guest is awaited here: cancel its migration at its source, or soc-vmm quit this VM");
    }
    client.execute::<Empty>("migrate_cancel")?;
    let told: Value = client.execute("query-migrate")?;
    let why = match told["status"].as_str().unwrap_or_default() {
        "postcopy-active" => "it is too late: the guest runs at its destination already, and waits for its pages",
        "postcopy-paused" | "postcopy-recover" => {
            let why = "it is too late: the guest runs at its destination already";
            return failed(&format!(
                "{why}; go on by soc-vmm migrate URI {shown} --resume, or if it has ended there, soc-vmm quit {shown}"
            ));
        }
        _ => return Ok(()),
    };
    failed(why)
}

/// What is under way.
struct Watched<'a> {
    /// The VM.
    shown: &'a str,
    /// The guest is to run there after the first round.
    post_copy: bool,
    /// The VM ends then.
    leaves: bool,
    /// Where the guest goes.
    place: &'a str,
    /// Where that is a file: its path.
    file: Option<&'a str>,
}

impl Watched<'_> {
    /// Shows how it goes until it is over.
    fn watch(
        &self,
        client: &mut Client,
        out: &mut dyn Write,
        write_result: impl Fn(&mut dyn Write, &Value) -> io::Result<()>,
    ) -> Result<(), Trouble> {
        let Self { shown, post_copy, leaves, place, file } = *self;
        let mut wants_post_copy = post_copy;
        let mut looks = 0;
        loop {
            let told: Value = match client.execute("query-migrate") {
                // It waits a second for who wants to know how that ended.
                Err(ClientError::Lost(e)) if leaves && e.kind() != io::ErrorKind::TimedOut => {
                    let why = format!(
                        "{shown}: the VM ended while its guest was on its way to {place}: see whether it is there"
                    );
                    return Err(Trouble::Told(Failure::new(ExitStatus::Unavailable, why)));
                }
                told => told?,
            };
            let status = told["status"].as_str().unwrap_or_default();
            let failed = |why: String| Err(Trouble::Told(Failure::new(ExitStatus::Failed, format!("{shown}: {why}"))));
            match status {
                "completed" => {
                    written(write_result(out, &told))?;
                    // Whoever starts another VM with its name or its disks right away finds them free. One that stays was kept, or is libvirt's.
                    if leaves {
                        _ = client.wait_for_end(LEAVING);
                    }
                    return Ok(());
                }
                "cancelled" => return failed("it was cancelled; the guest stays as it was".into()),
                "postcopy-paused" => {
                    let why = one_line(told["error-desc"].as_str().unwrap_or("nobody knows why"));
                    return failed(format!(
                        "the connection broke while the guest runs at its destination and waits for pages ({why}): \
                     go on by soc-vmm migrate URI {shown} --resume, or if it has ended there, soc-vmm quit {shown}"
                    ));
                }
                "active" if wants_post_copy && number(&told["ram"], "dirty-sync-count") > 0 => {
                    wants_post_copy = false;
                    match client.execute::<Empty>("migrate-start-postcopy") {
                        // It may have come so far without.
                        Ok(Empty {}) | Err(ClientError::Refused(_)) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
                "failed" => {
                    let why = one_line(told["error-desc"].as_str().unwrap_or("the move failed"));
                    return failed(match file {
                        Some(file) => of_file(file, &why, runs(client)),
                        None => why,
                    });
                }
                _ => {}
            }
            if looks % A_LINE == 0 {
                written(write_progress(out, status, &told))?;
            }
            looks += 1;
            std::thread::sleep(LOOK);
        }
    }
}

/// Why a guest didn't come into that file, where the VM says `why`, and whether it runs on.
fn of_file(file: &str, why: &str, runs: bool) -> String {
    // Of the one connection that a file is nobody knows.
    let connection = ["connection 0 can't be opened: ", "connection 0: the connection failed: ", "connection 0: "];
    let why = connection.iter().find_map(|words| why.strip_prefix(words)).unwrap_or(why);
    let named = if why.contains(file) { String::new() } else { format!("{file}: ") };
    let has_no_room = [Errno::ENOSPC, Errno::EDQUOT].iter().any(|errno| why.contains(errno.desc()));
    let advice = if has_no_room { ": free some space there, or take another place" } else { "" };
    format!("{named}{why}{advice}{}", if runs { "; the guest runs on here" } else { "" })
}

fn runs(client: &mut Client) -> bool {
    client.execute::<Value>("query-status").is_ok_and(|vm| vm["status"] == "running")
}

/// Has it begin, with certificates that the VM has for that alone.
fn begin(client: &mut Client, args: &MigrateArgs) -> Result<(), Trouble> {
    // The VM's working directory is another one.
    let mut begin = json!({ "uri": args.uri.clone().absolute().to_string() });
    if args.resume {
        begin["resume"] = true.into();
    }
    let Some(dir) = &args.tls_dir else {
        client.execute_with::<Empty>("migrate", &begin)?;
        return Ok(());
    };
    // The VM's working directory is another one.
    let told = |e: Failure| Trouble::Told(e);
    let dir = std::path::absolute(dir).map_err(|e| told(Failure::of(ExitStatus::Usage, "--tls-dir", &e)))?;
    let Some(dir) = dir.to_str() else {
        return Err(told(Failure::new(ExitStatus::Usage, "--tls-dir: QMP carries UTF-8 alone; rename the directory")));
    };
    let name = json!({ "id": CREDENTIALS });
    let creds = json!({ "qom-type": "tls-creds-x509", "id": CREDENTIALS, "dir": dir, "endpoint": "client" });
    let parameters = |creds: &str, host: &str| json!({ "tls-creds": creds, "tls-hostname": host });
    // Of one that was interrupted.
    _ = client.execute_with::<Empty>("object-del", &name);
    client.execute_with::<Empty>("object-add", &creds)?;
    let host = args.tls_hostname.as_deref().unwrap_or_default();
    let began = client
        .execute_with::<Empty>("migrate-set-parameters", &parameters(CREDENTIALS, host))
        .and_then(|_| client.execute_with::<Empty>("migrate", &begin));
    // What has begun has read them, and nothing else shall use them.
    client.execute_with::<Empty>("migrate-set-parameters", &parameters("", ""))?;
    client.execute_with::<Empty>("object-del", &name)?;
    Ok(began.map(drop)?)
}

fn written(result: io::Result<()>) -> Result<(), Trouble> {
    super::client::written(result).map_err(Trouble::Told)
}

fn number(told: &Value, name: &str) -> u64 {
    told[name].as_u64().unwrap_or(0)
}

fn mebibytes(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

/// Bytes a second, of megabits.
fn rate(ram: &Value) -> f64 {
    ram["mbps"].as_f64().unwrap_or(0.0) * 1e6 / 8.0 / f64::from(1 << 20)
}

fn write_progress(out: &mut dyn Write, status: &str, told: &Value) -> io::Result<()> {
    let ram = &told["ram"];
    if status == "setup" {
        writeln!(out, "setup")?;
        return out.flush();
    }
    let expected = match (status, number(told, "expected-downtime")) {
        // The first round tells it; later it is no longer expected.
        ("active", ms @ 1..) => format!(", expected downtime {ms} ms"),
        _ => String::new(),
    };
    let round = match status {
        "active" => format!(", round {}", number(ram, "dirty-sync-count") + 1),
        _ => String::new(),
    };
    let throttle = match number(told, "cpu-throttle-percentage") {
        0 => String::new(),
        percent => format!(", vCPUs slowed by {percent} %"),
    };
    let stands = if told["dirty-limit-throttle-time-per-round"].is_null() { "" } else { ", vCPUs limited" };
    writeln!(
        out,
        "{}: {:.1} MiB left of {:.1}, {:.1} MiB/s{expected}{round}{throttle}{stands}",
        one_line(status),
        mebibytes(number(ram, "remaining")),
        mebibytes(number(ram, "total")),
        rate(ram),
    )?;
    out.flush()
}

fn write_saved(out: &mut dyn Write, told: &Value) -> io::Result<()> {
    let ram = &told["ram"];
    writeln!(
        out,
        "saved in {} ms: {:.1} MiB written of {:.1}, the guest stood still for {} ms of that",
        number(told, "total-time"),
        mebibytes(number(ram, "transferred")),
        mebibytes(number(ram, "total")),
        number(told, "downtime"),
    )
}

fn write_result(out: &mut dyn Write, told: &Value) -> io::Result<()> {
    let ram = &told["ram"];
    let late = match number(ram, "postcopy-bytes") {
        0 => String::new(),
        bytes => format!(", {:.1} MiB of that while it ran there", mebibytes(bytes)),
    };
    writeln!(
        out,
        "completed in {} ms: {:.1} MiB sent of {:.1} in {} rounds{late}, {:.1} MiB/s, downtime {} ms",
        number(told, "total-time"),
        mebibytes(number(ram, "transferred")),
        mebibytes(number(ram, "total")),
        number(ram, "dirty-sync-count"),
        rate(ram),
        number(told, "downtime"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_downtime_is_expected_until_the_guest_has_left() {
        let told = json!({ "expected-downtime": 7, "ram": { "total": 4 << 20, "remaining": 1 << 20, "mbps": 0.0 } });
        for (status, said) in [
            ("active", "active: 1.0 MiB left of 4.0, 0.0 MiB/s, expected downtime 7 ms, round 1\n"),
            ("postcopy-active", "postcopy-active: 1.0 MiB left of 4.0, 0.0 MiB/s\n"),
        ] {
            let mut out = Vec::new();
            write_progress(&mut out, status, &told).unwrap();
            assert_eq!(String::from_utf8(out).unwrap(), said);
        }
    }

    #[test]
    fn a_file_that_can_t_be_written_is_named_with_what_to_do() {
        for (told, runs, said) in [
            (
                "connection 0: the connection failed: No space left on device (os error 28)",
                true,
                "/f: No space left on device (os error 28): free some space there, or take another place; the guest runs on here",
            ),
            ("connection 0 can't be opened: file:/f: is busy", false, "file:/f: is busy"),
            (
                "writing pages into the file failed: no",
                true,
                "/f: writing pages into the file failed: no; the guest runs on here",
            ),
        ] {
            assert_eq!(of_file("/f", told, runs), said);
        }
    }
}
