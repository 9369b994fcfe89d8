//! The command line.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use pcie_function::header::Role;

use crate::serve::{Level, Options};

/// Where the function is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A UNIX socket (SOCK_SEQPACKET) to listen on.
    Unix(PathBuf),
    /// An inherited, connected socket.
    Fd(i32),
    /// A PCIe function of this host.
    Pci(String),
}

/// What the command line asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Serve a function.
    Serve {
        /// Which.
        function: Spec,
        /// Whether a VM outlives the peer of an inherited socket.
        keep: bool,
        /// How.
        options: Options,
    },
    /// Print [`USAGE`].
    Help,
    /// Print the version.
    Version,
}

/// What `--help` prints.
pub const USAGE: &str = "\
usage: host-kvm-shim --function unix:PATH|pci:BDF|fd:N [--once] [--keep] [--lease 5m] [--log error|warn|info|debug]
                     [--role vm|host]

Runs the vCPUs of one VM at a time for the soc-vmm on the other end of a PCIe function.

  --function unix:PATH   listen on a UNIX socket (SOCK_SEQPACKET)
             pci:BDF     a PCIe function of this host, through VFIO
             fd:N        an inherited, connected socket
  --once                 exit after one VM
  --keep                 with fd: hold the VM when the peer goes, as unix: and pci: do
  --lease D              how long a VM is held after its soc-vmm was lost, before it is paused: 30s, 5m, 1h; 0 destroys it at once
  --log LEVEL            what is logged to the SoC
  --role host            serve the server's inventory instead of VMs
";

/// How long a VM is held, unless `--lease` says otherwise.
const DEFAULT_LEASE: Duration = Duration::from_secs(300);

/// Reads the command line (without the program's name).
///
/// # Errors
/// One sentence: which option, why, what to do.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Command, String> {
    let mut function = None;
    let mut keep = false;
    let mut options =
        Options { lease: DEFAULT_LEASE, outlives_function: true, once: false, log: Level::Info, role: Role::Vm };
    let mut given = Vec::new();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        if given.contains(&arg) {
            return Err(format!("{} is given twice: which one counts?", shown(&arg)));
        }
        given.push(arg.clone());
        let mut value = |name: &str| args.next().ok_or_else(|| format!("{name} needs a value; see --help"));
        match arg.to_str() {
            Some("-h" | "--help") => return Ok(Command::Help),
            Some("-V" | "--version") => return Ok(Command::Version),
            Some("--once") => options.once = true,
            Some("--keep") => keep = true,
            Some("--function") => function = Some(spec(&value("--function")?)?),
            Some("--lease") => options.lease = lease(&value("--lease")?)?,
            Some("--role") => options.role = role(&value("--role")?)?,
            Some("--log") => options.log = level(&value("--log")?)?,
            _ => return Err(format!("unknown argument {}; see --help", shown(&arg))),
        }
    }
    let function = function.ok_or("--function is missing: which function shall be served? See --help")?;
    Ok(Command::Serve { function, keep, options })
}

fn spec(text: &OsStr) -> Result<Spec, String> {
    let bad = |why: &str| Err(format!("--function {}: {why}", shown(text)));
    use std::os::unix::ffi::OsStrExt;
    if let Some(path) = text.as_bytes().strip_prefix(b"unix:") {
        return if path.is_empty() { bad("the path is empty") } else { Ok(Spec::Unix(OsStr::from_bytes(path).into())) };
    }
    let Some((kind, rest)) = text.to_str().and_then(|text| text.split_once(':')) else {
        return bad("it is unix:PATH, pci:BDF or fd:N");
    };
    match kind {
        "fd" => match rest.parse() {
            Ok(fd @ 0..) => Ok(Spec::Fd(fd)),
            _ => bad("that is no descriptor's number"),
        },
        "pci" => match address(rest) {
            Some(bdf) => Ok(Spec::Pci(bdf)),
            None => bad("a PCIe function is written 0000:03:00.1 or 03:00.1"),
        },
        _ => bad("it is unix:PATH, pci:BDF or fd:N"),
    }
}

/// A PCIe address in full, lower case.
fn address(text: &str) -> Option<String> {
    let (domain, rest) = match text.matches(':').count() {
        1 => ("0000", text),
        _ => text.split_once(':')?,
    };
    let (bus, rest) = rest.split_once(':')?;
    let (device, function) = rest.split_once('.')?;
    let hex = |digits: &str, len: usize, most: u32| {
        let number = u32::from_str_radix(digits, 16).ok().filter(|n| digits.len() == len && *n <= most);
        number.filter(|_| digits.bytes().all(|b| b.is_ascii_hexdigit()))
    };
    let (domain, bus) = (hex(domain, 4, 0xffff)?, hex(bus, 2, 0xff)?);
    let (device, function) = (hex(device, 2, 0x1f)?, hex(function, 1, 7)?);
    Some(format!("{domain:04x}:{bus:02x}:{device:02x}.{function}"))
}

fn lease(text: &OsStr) -> Result<Duration, String> {
    let parsed = text.to_str().and_then(|text| {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = match &text[digits.len()..] {
            "" | "s" => 1,
            "m" => 60,
            "h" => 3600,
            _ => return None,
        };
        digits.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
        digits.parse::<u32>().ok().map(|n| Duration::from_secs(u64::from(n) * unit))
    });
    parsed.ok_or_else(|| format!("--lease {}: a time is written 30s, 5m or 1h, or 0", shown(text)))
}

fn role(text: &OsStr) -> Result<Role, String> {
    match text.to_str() {
        Some("vm") => Ok(Role::Vm),
        Some("host") => Ok(Role::Host),
        _ => Err(format!("--role {}: roles are vm and host", shown(text))),
    }
}

fn level(text: &OsStr) -> Result<Level, String> {
    match text.to_str() {
        Some("error") => Ok(Level::Error),
        Some("warn") => Ok(Level::Warn),
        Some("info") => Ok(Level::Info),
        Some("debug") => Ok(Level::Debug),
        _ => Err(format!("--log {}: levels are error, warn, info and debug", shown(text))),
    }
}

/// What was typed, as a sentence can hold it: control characters escaped.
fn shown(text: &OsStr) -> String {
    let mut shown = String::new();
    for c in text.to_string_lossy().chars() {
        if c.is_control() { shown.extend(c.escape_default()) } else { shown.push(c) }
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Command, String> {
        parse(line.split_whitespace().map(OsString::from))
    }

    fn serve(line: &str) -> (Spec, bool, Options) {
        match parsed(line) {
            Ok(Command::Serve { function, keep, options }) => (function, keep, options),
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn functions_of_each_kind() {
        assert_eq!(serve("--function unix:/run/a:b").0, Spec::Unix("/run/a:b".into()));
        assert_eq!(serve("--function fd:7").0, Spec::Fd(7));
        assert_eq!(serve("--function pci:03:1F.7").0, Spec::Pci("0000:03:1f.7".into()));
        assert_eq!(serve("--function pci:0001:03:00.1").0, Spec::Pci("0001:03:00.1".into()));
    }

    #[test]
    fn options_and_their_defaults() {
        let defaults =
            Options { lease: DEFAULT_LEASE, outlives_function: true, once: false, log: Level::Info, role: Role::Vm };
        let (_, keep, options) = serve("--function fd:3");
        assert_eq!((keep, options), (false, defaults));
        let (_, keep, options) = serve("--function fd:3 --once --keep --lease 0 --log debug --role host");
        let all = Options { lease: Duration::ZERO, once: true, log: Level::Debug, role: Role::Host, ..defaults };
        assert_eq!((keep, options), (true, all));
        for (text, seconds) in [("30s", 30), ("90", 90), ("2m", 120), ("1h", 3600)] {
            assert_eq!(serve(&format!("--function fd:3 --lease {text}")).2.lease.as_secs(), seconds);
        }
        assert_eq!(parsed("--help"), Ok(Command::Help));
        assert_eq!(parsed("-V"), Ok(Command::Version));
    }

    #[test]
    fn what_was_typed_steers_no_terminal() {
        let why = parse(["--log".into(), "\u{1b}[2J\n".into()]).expect_err("no level");
        assert!(why.starts_with("--log \\u{1b}[2J\\n: "), "{why}");
        let why = parse(["\r".into()]).expect_err("no argument");
        assert!(why.starts_with("unknown argument \\r;"), "{why}");
    }

    #[test]
    fn mistakes_name_the_option() {
        for (line, names) in [
            ("", "--function"),
            ("--function", "--function"),
            ("--function tcp:1", "tcp:1"),
            ("--function unix:", "unix:"),
            ("--function fd:-1", "fd:-1"),
            ("--function pci:3:0.0", "pci:3:0.0"),
            ("--function pci:0000:00:20.0", "20.0"),
            ("--function pci:0000:00:+1.0", "+1.0"),
            ("--function fd:3 --lease 5d", "5d"),
            ("--function fd:3 --lease m", "--lease m"),
            ("--function fd:3 --lease -1", "--lease -1"),
            ("--function fd:3 --log loud", "loud"),
            ("--function fd:3 --role guest", "guest"),
            ("--function fd:3 --nope", "--nope"),
            ("--function fd:3 --function fd:4", "--function is given twice"),
            ("--once --function fd:3 --once", "--once is given twice"),
        ] {
            let why = parsed(line).expect_err(line);
            assert!(why.contains(names) && !why.contains('\n'), "{line}: {why}");
        }
    }
}
