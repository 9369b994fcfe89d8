//! Where a guest goes to or comes from: `tcp:HOST:PORT`, `unix:PATH`, `fd:NAME`, `file:PATH[,offset=N]`, as QEMU's URIs,
//! `file:PATH[,offset=N],pages=first` and `tls:HOST:PORT`.

use std::path::PathBuf;
use std::str::FromStr;

/// A place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Uri {
    /// A TCP port: host, which may be a name or in brackets, and port. An empty host is every address of this machine.
    Tcp(String, u16),
    /// The same with TLS, always.
    Tls(String, u16),
    /// A UNIX socket.
    Unix(PathBuf),
    /// A descriptor that was passed under that name or inherited under that number.
    Fd(String),
    /// A file.
    File(FilePlace),
    /// Told later, by a monitor.
    Defer,
}

/// A place in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FilePlace {
    /// The file.
    pub path: PathBuf,
    /// Where in it the stream begins.
    pub offset: u64,
    /// Whether all pages of a guest that is restored are to be there before it starts, even if it could wait for some.
    pub pages_first: bool,
}

/// A text that names no place.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("'{0:.100}': {1}; say tcp:HOST:PORT, tls:HOST:PORT, unix:PATH, fd:NAME or file:PATH")]
pub struct UriError(String, &'static str);

impl Uri {
    /// The same for whoever has another working directory; one that is nowhere stays as it is.
    #[must_use]
    pub fn absolute(self) -> Self {
        let absolute = |path: PathBuf| std::path::absolute(&path).unwrap_or(path);
        match self {
            Self::Unix(path) => Self::Unix(absolute(path)),
            Self::File(place) => Self::File(FilePlace { path: absolute(place.path), ..place }),
            elsewhere => elsewhere,
        }
    }
}

impl FromStr for Uri {
    type Err = UriError;

    fn from_str(text: &str) -> Result<Self, UriError> {
        let wrong = |why| UriError(text.to_owned(), why);
        if text == "defer" {
            return Ok(Self::Defer);
        }
        let (scheme, rest) = text.split_once(':').ok_or_else(|| wrong("it names no place"))?;
        if rest.is_empty() {
            return Err(wrong("nothing is behind the colon"));
        }
        match scheme {
            "tcp" | "tls" => {
                let (host, port) = rest
                    .rsplit_once(':')
                    .ok_or_else(|| wrong("write tcp:HOST:PORT; where a VM waits the host may be empty, tcp::PORT"))?;
                let port = port.parse().map_err(|_| wrong("its port is no number from 0 to 65535"))?;
                let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
                if bare.is_none() && host.contains(':') {
                    return Err(wrong("an IPv6 address is put in brackets"));
                }
                let host = bare.unwrap_or(host).to_owned();
                Ok(if scheme == "tls" { Self::Tls(host, port) } else { Self::Tcp(host, port) })
            }
            "unix" => Ok(Self::Unix(rest.into())),
            "fd" => Ok(Self::Fd(rest.to_owned())),
            "file" => {
                let (rest, pages_first) = match rest.rsplit_once(",pages=") {
                    None => (rest, false),
                    Some((rest, "first")) => (rest, true),
                    // In the wrong order.
                    Some((_, pages)) if pages.contains(",offset=") => (rest, false),
                    Some(_) => return Err(wrong("its pages come first, or as they are touched without pages=")),
                };
                let (path, offset) = match rest.rsplit_once(",offset=") {
                    None => (rest, 0),
                    Some((path, offset)) => {
                        (path, parse_offset(offset).ok_or_else(|| wrong("its offset is no number below 2^63"))?)
                    }
                };
                // A comma is a name's, too, but nobody means these.
                if path.is_empty() || path.contains(",offset=") || path.contains(",pages=") {
                    return Err(wrong(
                        "it has a file, then offset= and pages=first, each once at most and in this order",
                    ));
                }
                Ok(Self::File(FilePlace { path: path.into(), offset, pages_first }))
            }
            "exec" => Err(wrong("soc-vmm starts no programs for it")),
            "rdma" => Err(wrong("there is no RDMA")),
            _ => Err(wrong("it names no place")),
        }
    }
}

/// Decimal, or hexadecimal with 0x. A file ends before 2^63.
fn parse_offset(text: &str) -> Option<u64> {
    let offset = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok()?,
        None => text.parse().ok()?,
    };
    (offset <= i64::MAX as u64).then_some(offset)
}

impl std::fmt::Display for Uri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tcp(host, port) => write_host(f, "tcp", host, *port),
            Self::Tls(host, port) => write_host(f, "tls", host, *port),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Fd(name) => write!(f, "fd:{name}"),
            Self::File(FilePlace { path, offset, pages_first }) => {
                write!(f, "file:{}", path.display())?;
                if *offset > 0 {
                    write!(f, ",offset={offset}")?;
                }
                f.write_str(if *pages_first { ",pages=first" } else { "" })
            }
            Self::Defer => f.write_str("defer"),
        }
    }
}

fn write_host(f: &mut std::fmt::Formatter<'_>, scheme: &str, host: &str, port: u16) -> std::fmt::Result {
    if host.contains(':') { write!(f, "{scheme}:[{host}]:{port}") } else { write!(f, "{scheme}:{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_as_qemu_writes_them() {
        let file = |path: &str, offset, pages_first| Uri::File(FilePlace { path: path.into(), offset, pages_first });
        for (text, place) in [
            ("tcp:10.0.0.2:49152", Uri::Tcp("10.0.0.2".into(), 49152)),
            ("tcp:[::]:1", Uri::Tcp("::".into(), 1)),
            ("tcp::4444", Uri::Tcp(String::new(), 4444)),
            ("tls:there.example:4444", Uri::Tls("there.example".into(), 4444)),
            ("tls:[::1]:1", Uri::Tls("::1".into(), 1)),
            ("unix:/run/a:b", Uri::Unix("/run/a:b".into())),
            ("fd:migrate", Uri::Fd("migrate".into())),
            ("file:/a,b", file("/a,b", 0, false)),
            ("file:/a,offset=0x1000", file("/a", 4096, false)),
            ("file:/a,offset=7,pages=first", file("/a", 7, true)),
            ("file:/a,pages=first", file("/a", 0, true)),
            ("defer", Uri::Defer),
        ] {
            let uri: Uri = text.parse().unwrap();
            assert_eq!(uri, place);
            assert_eq!(uri.to_string().parse(), Ok(place));
        }
        for text in [
            "",
            "tcp",
            "tcp:",
            "tcp:a",
            "tcp:a:b",
            "tcp:a:65536",
            "tcp:::1",
            "tls:a",
            "fd:",
            "exec:cat",
            "x:y",
            "file:/a,offset=q",
            "file:/a,offset=9223372036854775808",
            "file:/a,offset=1,offset=2",
            "file:/a,pages=first,offset=5",
            "file:/a,pages=first,pages=first",
            "file:,offset=5",
            "file:/a,pages=last",
        ] {
            let why = text.parse::<Uri>().unwrap_err().to_string();
            assert!(why.contains("say tcp:HOST:PORT"), "{why}");
        }
    }
}
