//! The configuration file, `/etc/outboard/soc-vmm.toml` or what `$OUTBOARD_CONFIG` names (docs/operations.md).

use std::ffi::OsStr;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::fcntl::OFlag;
use serde::Deserialize;

use crate::cli::{Bdf, ExitStatus, Failure, FunctionSpec, ValueError};

/// Where it is unless the environment says else.
pub(crate) const FILE: &str = "/etc/outboard/soc-vmm.toml";
/// What names another one.
const VARIABLE: &str = "OUTBOARD_CONFIG";
/// Longest file that is read.
const MOST_BYTES: u64 = 1 << 20;
/// Most functions of a pool.
pub(crate) const MOST_FUNCTIONS: usize = 256;
/// Where a pool listens unless the file says else.
const SOCKET: &str = "/run/outboard-pool/socket";

/// All of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Functions that are handed out, if they are.
    pub pool: Option<PoolConfig>,
}

/// The table `[pool]`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PoolConfig {
    /// Where the pool listens.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// The functions, in the order in which they are handed out.
    #[serde(default)]
    pub functions: Vec<PoolFunction>,
    /// The server's own function, by which control planes learn what processors it has; none: this machine, where all functions are `unix:`.
    pub host: Option<PoolFunction>,
    /// Users that may have functions, beside root; none: whoever may open the socket.
    #[serde(default)]
    pub users: Vec<String>,
    /// The socket's group.
    pub group: Option<String>,
    /// The socket's mode, 0600 unless there is a group, then 0660.
    pub mode: Option<u32>,
    /// How many functions a user may have at a time; root may have them all.
    pub limit: Option<usize>,
}

/// A function that a pool hands out.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum PoolFunction {
    /// A shim on this machine that listens there.
    Unix(PathBuf),
    /// The SoC side of an emulated card, by vfio-user.
    Card(PathBuf),
    /// A function of this SoC, through VFIO.
    Pci(Bdf),
}

impl FunctionSpec {
    /// The function of a VM whose command line can't name one: the pool's where the configuration has a pool, else a shim of its own.
    ///
    /// # Errors
    /// The configuration is wrong.
    pub fn by_configuration() -> Result<Self, Failure> {
        Ok(if Config::load()?.pool.is_some() { Self::Pool } else { Self::Local })
    }
}

impl From<PoolFunction> for FunctionSpec {
    fn from(function: PoolFunction) -> Self {
        match function {
            PoolFunction::Unix(path) => Self::Unix(path),
            PoolFunction::Card(path) => Self::Card(path),
            PoolFunction::Pci(address) => Self::Pci(address),
        }
    }
}

impl PoolConfig {
    /// The function by which the server tells of itself, if there is one.
    pub fn host(&self) -> Option<FunctionSpec> {
        let is_here = || self.functions.iter().all(|function| matches!(function, PoolFunction::Unix(_)));
        self.host.clone().map(FunctionSpec::from).or_else(|| is_here().then_some(FunctionSpec::Local))
    }
}

impl Config {
    /// Reads the file; where there is none, and the environment names none, nothing is configured.
    ///
    /// # Errors
    /// It can't be read, or something in it is wrong: one line, [`ExitStatus::Usage`].
    pub fn load() -> Result<Self, Failure> {
        Self::of(std::env::var_os(VARIABLE).filter(|path| !path.is_empty()).as_deref())
    }

    fn of(named: Option<&OsStr>) -> Result<Self, Failure> {
        let path = named.map_or(Path::new(FILE), Path::new);
        let wrong = |why: &str| Failure::new(ExitStatus::Usage, format!("{}: {why}", path.display()));
        let mut text = String::new();
        // What has no end has no more than that, and a FIFO that nobody writes is empty.
        let open = File::options().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        let read = open.and_then(|file| file.take(MOST_BYTES + 1).read_to_string(&mut text));
        match read {
            Ok(_) if text.len() as u64 > MOST_BYTES => Err(wrong("has more than 1 MiB, which is no configuration")),
            Ok(_) => text.parse().map_err(|why: String| wrong(&why)),
            Err(e) if e.kind() == ErrorKind::NotFound && named.is_none() => Ok(Self::default()),
            Err(e) => Err(wrong(&e.to_string())),
        }
    }

    fn check(&self) -> Result<(), String> {
        let Some(pool) = &self.pool else { return Ok(()) };
        if let Some(mode) = pool.mode.filter(|mode| mode & !0o777 != 0) {
            return Err(format!("pool.mode: {mode:#o} is no mode; write 0o660, say"));
        }
        if !pool.socket.is_absolute() {
            return Err(format!("pool.socket: {} is no absolute path", pool.socket.display()));
        }
        if pool.functions.len() > MOST_FUNCTIONS {
            return Err(format!("pool.functions: more than {MOST_FUNCTIONS}"));
        }
        let twice = pool.functions.iter().enumerate().find(|(i, function)| pool.functions[..*i].contains(function));
        twice.map_or(Ok(()), |(_, function)| Err(format!("pool.functions: {function} is there twice")))
    }
}

impl FromStr for Config {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let config: Self = toml::from_str(text).map_err(|e| {
            let line = e.span().map(|at| text.as_bytes()[..at.start].iter().filter(|byte| **byte == b'\n').count() + 1);
            line.map_or_else(|| e.message().to_owned(), |line| format!("line {line}: {}", e.message()))
        })?;
        config.check().map(|()| config)
    }
}

impl TryFrom<String> for PoolFunction {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        match text.parse() {
            Ok(FunctionSpec::Unix(path)) => Ok(Self::Unix(path)),
            Ok(FunctionSpec::Card(path)) => Ok(Self::Card(path)),
            Ok(FunctionSpec::Pci(address)) => Ok(Self::Pci(address)),
            Ok(FunctionSpec::Local | FunctionSpec::Pool) => {
                Err(format!("{text:?} is nothing to hand out; write unix:SOCKET, card:SOCKET or pci:BDF"))
            }
            Err(e @ ValueError { .. }) => Err(format!("{text:?}: {e}")),
        }
    }
}

impl std::fmt::Display for PoolFunction {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Card(path) => write!(f, "card:{}", path.display()),
            Self::Pci(address) => write!(f, "pci:{address}"),
        }
    }
}

fn default_socket() -> PathBuf {
    SOCKET.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_is_read_with_its_defaults() {
        let text = r#"
            [pool]
            functions = ["pci:0000:01:00.0", "unix:/run/a", "card:/run/b"]
        "#;
        let pool = text.parse::<Config>().unwrap().pool.unwrap();
        assert_eq!(pool.socket, Path::new(SOCKET));
        assert_eq!(pool.functions[1..], [PoolFunction::Unix("/run/a".into()), PoolFunction::Card("/run/b".into())]);
        assert_eq!(pool.functions[0].to_string(), "pci:0000:01:00.0");
        assert_eq!((pool.users.len(), pool.group, pool.mode, pool.limit), (0, None, None, None));
        assert_eq!("".parse::<Config>(), Ok(Config::default()));
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, why) in [
            ("[pool]\nsocet = \"/a\"", "line 2: unknown field `socet`"),
            ("[pol]", "unknown field `pol`"),
            ("[pool]\nfunctions = [\"local\"]", "\"local\" is nothing to hand out"),
            ("[pool]\nfunctions = [\"pci:1\"]", "\"pci:1\""),
            ("[pool]\nfunctions = [\"unix:/a\", \"unix:/a\"]", "unix:/a is there twice"),
            ("[pool]\nmode = 0o10660", "is no mode"),
            ("[pool]\nsocket = \"pool\"", "no absolute path"),
            ("[pool]\nlimit = -1", "line 2"),
            ("[pool", "line 1"),
        ] {
            let said = text.parse::<Config>().unwrap_err();
            assert!(said.contains(why), "{text:?}: {said}");
        }
    }

    #[test]
    fn a_file_that_is_named_must_be_there() {
        let failure = Config::of(Some(OsStr::new("/nonexistent/soc-vmm.toml"))).unwrap_err();
        assert_eq!(failure.status(), ExitStatus::Usage);
        assert!(failure.to_string().starts_with("/nonexistent/soc-vmm.toml: "), "{failure}");
    }

    #[test]
    fn no_file_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(Config::of(Some(fifo.as_os_str())).unwrap(), Config::default());
        assert!(Config::of(Some(OsStr::new("/dev/zero"))).unwrap_err().to_string().contains("more than 1 MiB"));
    }
}
