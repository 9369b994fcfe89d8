//! Character devices: `-chardev`, and the short forms of `-serial`, `-qmp` and `-debugcon`.

use std::path::PathBuf;

use serde::Deserialize;

use super::{Properties, Wrong, inert};

/// A character device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chardev {
    /// Its name.
    pub id: String,
    /// What it is.
    pub kind: ChardevKind,
    /// Where what the guest writes is written too.
    pub log: Option<LogFile>,
}

/// What a character device is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ChardevKind {
    /// A new pseudo-terminal.
    Pty,
    /// Nothing.
    Null,
    /// This process's terminal, or its standard input and output.
    Stdio,
    /// A file that is written.
    File {
        /// The file.
        path: PathBuf,
        /// What is in it stays.
        append: bool,
    },
    /// A UNIX socket that is listened on.
    Listen(Socket),
    /// One that is connected to: where its peer listens, which is looked for again when it has gone.
    Connect(PathBuf),
}

/// A socket to listen on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Socket {
    /// It is to be made.
    Path(PathBuf),
    /// An inherited one, by its number, or one with a name.
    Descriptor(String),
}

/// A copy of the output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogFile {
    /// The file.
    pub path: PathBuf,
    /// What is in it stays.
    pub append: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Common {
    id: String,
    logfile: Option<PathBuf>,
    #[serde(default)]
    logappend: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileProperties {
    path: PathBuf,
    #[serde(default)]
    append: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SocketProperties {
    path: Option<PathBuf>,
    fd: Option<String>,
    #[serde(default)]
    server: bool,
    wait: Option<bool>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoProperties {}

impl Chardev {
    /// Reads the value of `-chardev`.
    ///
    /// # Errors
    /// It can't be meant, or is not there.
    pub fn parse(text: &str) -> Result<Self, Wrong> {
        Self::of(Properties::parse(text, Some("backend"))?)
    }

    fn of(mut properties: Properties) -> Result<Self, Wrong> {
        inert::strip("-chardev", &mut properties)?;
        let backend = properties.take("backend")?;
        let common: Common = properties.split_off(&["id", "logfile", "logappend"]).read()?;
        let log = common.logfile.map(|path| LogFile { path, append: common.logappend });
        let kind = match &*backend {
            "pty" => properties.read::<NoProperties>().map(|_| ChardevKind::Pty),
            "null" => properties.read::<NoProperties>().map(|_| ChardevKind::Null),
            "stdio" => properties.read::<NoProperties>().map(|_| ChardevKind::Stdio),
            "file" => properties.read().map(|FileProperties { path, append }| ChardevKind::File { path, append }),
            "socket" => properties.read::<SocketProperties>().and_then(socket),
            other => {
                let other = other.escape_default();
                return Err(Wrong::new(format!("there is no '{other}': there is pty, null, stdio, file, socket")));
            }
        };
        let kind = kind.map_err(|wrong| wrong.at(backend))?;
        super::check_id(&common.id)?;
        Ok(Self { id: common.id, kind, log })
    }

    /// Reads the short form, which stands for a device of that name.
    ///
    /// # Errors
    /// As [`Chardev::parse`].
    pub fn parse_short(text: &str, id: &str) -> Result<Self, Wrong> {
        let of = |kind| Ok(Self { id: id.to_owned(), kind, log: None });
        match (text, text.split_once(':')) {
            ("pty", _) => of(ChardevKind::Pty),
            ("null", _) => of(ChardevKind::Null),
            ("stdio" | "mon:stdio", _) => of(ChardevKind::Stdio),
            (_, Some(("file", path))) if !path.is_empty() => of(ChardevKind::File { path: path.into(), append: false }),
            (_, Some(("unix", rest))) => {
                let mut properties = Properties::parse(rest, Some("path"))?;
                inert::strip("-chardev", &mut properties)?;
                of(socket(properties.read()?)?)
            }
            (_, Some(("chardev", _))) => Err(Wrong::new("name a chardev by -device or -mon")),
            _ => Err(Wrong::new(format!(
                "'{}': write pty, null, stdio, file:FILE or unix:SOCKET,server=on,wait=off",
                text.escape_default()
            ))),
        }
    }
}

fn socket(properties: SocketProperties) -> Result<ChardevKind, Wrong> {
    let SocketProperties { path, fd, server, wait } = properties;
    if server && wait != Some(false) {
        return Err(Wrong::new("nobody is waited for: write wait=off").at("wait"));
    }
    if !server && wait.is_some() {
        return Err(Wrong::new("that is of a server: write server=on, or leave it out").at("wait"));
    }
    match (path, fd, server) {
        (Some(path), None, true) => Ok(ChardevKind::Listen(Socket::Path(path))),
        (None, Some(fd), true) => Ok(ChardevKind::Listen(Socket::Descriptor(fd))),
        (Some(path), None, false) => Ok(ChardevKind::Connect(path)),
        (None, Some(_), false) => Err(Wrong::new("a socket that is passed listens: write server=on").at("fd")),
        _ => Err(Wrong::new("a socket needs one of 'path' and 'fd'")),
    }
}
