//! The value of `--net`.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::disk::{parse_id, split};
use super::values::{ValueError, limit, wrong};
use crate::net::{MAX_QUEUES, NetSource, TapSource};
use crate::virtio::{Rate, RateLimits};

/// What can be written.
const WORDS: &str = "tap=NAME|tap=fd:N[:N…]|stream=SOCKET[,queues=N][,reconnect=SECONDS][,mtu=N][,limit-bytes=N][,limit-frames=N]\
                     [,mac=MAC][,id=ID]";

/// `--net tap=NAME|tap=fd:N…|stream=SOCK[,…]`, each once, in any order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// Where its frames go.
    pub source: NetSource,
    /// The largest packet that the guest shall send.
    pub mtu: Option<u16>,
    /// What it may send and receive.
    pub limits: RateLimits,
    /// Its address; none: one made from the VM's name.
    pub mac: Option<Mac>,
    /// The name that it is known by afterwards.
    pub id: Option<String>,
}

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address for interface `index` of the VM with that name: the same whenever it is started.
    pub fn of(name: &str, index: usize) -> Self {
        // FNV-1a: spreads names well, and stays what it is.
        let hash = name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
        let [a, b, c, ..] = hash.wrapping_add(index as u64).to_le_bytes();
        // QEMU's prefix, which is no manufacturer's.
        Self([0x52, 0x54, 0, a, b, c])
    }
}

impl FromStr for Mac {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let parse = || {
            let mut bytes = [0; 6];
            let mut parts = s.split(':');
            for byte in &mut bytes {
                let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()))?;
                *byte = u8::from_str_radix(part, 16).ok()?;
            }
            parts.next().is_none().then_some(Self(bytes))
        };
        match parse() {
            None => wrong(format!("mac={s}: write six bytes, as 52:54:00:12:34:56")),
            Some(Self(bytes)) if bytes[0] & 1 != 0 || bytes == [0; 6] => {
                wrong(format!("mac={s}: that is no station's address; its first byte must be even"))
            }
            Some(mac) => Ok(mac),
        }
    }
}

impl NetSpec {
    /// Its id, or the one that it has as the interface of that place on the command line.
    pub(crate) fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("net{index}"))
    }
}

impl FromStr for NetSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let (mut network, mut queues, mut reconnect) = (None, None, None);
        let (mut mtu, mut limits, mut mac, mut id) = (None, RateLimits::default(), None, None);
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            match name {
                "tap" | "stream" if network.is_some() => return wrong("an interface has one network: tap= or stream="),
                "tap" => network = Some(NetSource::Tap(parse_tap(value)?)),
                "stream" if value.is_empty() => return wrong("stream= needs the path of a socket"),
                "stream" => network = Some(NetSource::Stream { path: PathBuf::from(value), reconnect: None }),
                "queues" if queues.is_none() => queues = Some(parse_queues(value)?),
                "reconnect" if reconnect.is_none() => reconnect = Some(parse_seconds(value)?),
                "mtu" if mtu.is_none() => mtu = Some(parse_mtu(value)?),
                "limit-bytes" if limits.bytes.is_none() => limits.bytes = Some(Rate::new(limit(name, value)?)),
                "limit-frames" if limits.operations.is_none() => {
                    limits.operations = Some(Rate::new(limit(name, value)?));
                }
                "mac" if mac.is_none() => mac = Some(value.parse()?),
                "id" if id.is_none() => id = Some(parse_id(value)?),
                _ => return wrong(format!("'{option}': write {WORDS}, each once")),
            }
        }
        let source = match network {
            None => return wrong("a network interface needs tap=INTERFACE, stream=SOCKET or vhost-user=SOCKET"),
            Some(NetSource::Tap(TapSource::Named { name, .. })) => {
                NetSource::Tap(TapSource::Named { name, queues: queues.take().unwrap_or(1) })
            }
            Some(NetSource::Stream { path, .. }) => NetSource::Stream { path, reconnect: reconnect.take() },
            Some(inherited) => inherited,
        };
        match (queues, reconnect) {
            (None, None) => Ok(Self { source, mtu, limits, mac, id }),
            (Some(_), _) => wrong("queues= is for tap=NAME: a stream has one pair, and descriptors are one each"),
            _ => wrong("reconnect= is for stream=: an interface that was deleted doesn't come back"),
        }
    }
}

/// `NAME`, or `fd:N` with more numbers behind more colons.
fn parse_tap(s: &str) -> Result<TapSource, ValueError> {
    if let Some(numbers) = s.strip_prefix("fd:") {
        // 0 to 2 are standard input and output.
        let number = |n: &str| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok())?.filter(|n| *n > 2);
        let numbers: Option<Vec<_>> = numbers.split(':').map(number).collect();
        return match numbers {
            Some(numbers) if numbers.len() <= usize::from(MAX_QUEUES) => Ok(TapSource::Inherited(numbers)),
            Some(_) => wrong(format!("tap={s}: an interface has at most {MAX_QUEUES} queues")),
            None => wrong(format!("tap={s}: write the numbers of open descriptors, as fd:5 or fd:5:6")),
        };
    }
    // What the kernel takes for a name (dev_valid_name), and no pattern of its own: it would make an interface of that.
    let bad = |b: u8| b.is_ascii_whitespace() || b.is_ascii_control() || matches!(b, b'/' | b':' | b'%');
    if !(1..=15).contains(&s.len()) || s == "." || s == ".." || s.bytes().any(bad) {
        return wrong(format!(
            "tap={s}: an interface's name has 1 to 15 characters, and none of them is a space, /, : or %"
        ));
    }
    Ok(TapSource::Named { name: s.to_owned(), queues: 1 })
}

fn parse_queues(s: &str) -> Result<u16, ValueError> {
    match digits(s) {
        Some(n) if (1..=u64::from(MAX_QUEUES)).contains(&n) => Ok(n as u16),
        _ => wrong(format!("queues={s}: write 1 to {MAX_QUEUES} pairs")),
    }
}

fn parse_seconds(s: &str) -> Result<Duration, ValueError> {
    match digits(s) {
        Some(n) if (1..=86400).contains(&n) => Ok(Duration::from_secs(n)),
        _ => wrong(format!("reconnect={s}: write 1 to 86400 seconds")),
    }
}

/// What IPv4 needs (RFC 791), to what a frame can hold.
fn parse_mtu(s: &str) -> Result<u16, ValueError> {
    match digits(s) {
        Some(n) if (68..=65535).contains(&n) => Ok(n as u16),
        _ => wrong(format!("mtu={s}: write 68 to 65535 bytes")),
    }
}

fn digits(s: &str) -> Option<u64> {
    s.bytes().all(|b| b.is_ascii_digit()).then(|| s.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_in_every_notation() {
        let stream = |path: &str, reconnect| NetSource::Stream { path: path.into(), reconnect };
        let net: NetSpec = "id=n0,stream=/run/a,,b,mac=52:54:00:AB:cd:01".parse().unwrap();
        let mac = Some(Mac([0x52, 0x54, 0, 0xab, 0xcd, 1]));
        let plain =
            NetSpec { source: stream("/run/a,b", None), mtu: None, limits: RateLimits::default(), mac, id: None };
        assert_eq!(net, NetSpec { id: Some("n0".into()), ..plain.clone() });
        let net: NetSpec = "stream=s,reconnect=5,mtu=9000,limit-bytes=10m,limit-frames=20K".parse().unwrap();
        let limits = RateLimits { operations: Some(Rate::new(20_000)), bytes: Some(Rate::new(10_000_000)) };
        let source = stream("s", Some(Duration::from_secs(5)));
        assert_eq!(net, NetSpec { source, mtu: Some(9000), limits, mac: None, ..plain });
        let named = |name: &str, queues| TapSource::Named { name: name.into(), queues };
        for (text, source) in [
            ("tap=tap0", named("tap0", 1)),
            ("queues=4,tap=vnet-1.a", named("vnet-1.a", 4)),
            ("tap=fd:5", TapSource::Inherited(vec![5])),
            ("tap=fd:5:7", TapSource::Inherited(vec![5, 7])),
        ] {
            assert_eq!(text.parse::<NetSpec>().unwrap().source, NetSource::Tap(source), "{text}");
        }
        for bad in [
            "",
            "/run/a",
            "stream=",
            "mac=52:54:00:00:00:01",
            "stream=a,stream=b",
            "stream=a,mac=52:54:00:00:00",
            "stream=a,mac=52:54:00:00:00:01:02",
            "stream=a,mac=53:54:00:00:00:01",
            "stream=a,mac=00:00:00:00:00:00",
            "stream=a,mac=5:54:00:00:00:01",
            "stream=a,mac=+2:54:00:00:00:01",
            "stream=a,queues=2",
            "stream=a,tap=b",
            "stream=a,reconnect=0",
            "stream=a,mtu=67",
            "stream=a,limit-bytes=0",
            "stream=a,limit-frames=1T",
            "stream=a,limit-frames=99999999999G",
            "tap=",
            "tap=tap%d",
            "tap=a/b",
            "tap=sixteen-letters-",
            "tap=t,queues=0",
            "tap=t,queues=17",
            "tap=t,reconnect=1",
            "tap=fd:2",
            "tap=fd:",
            "tap=fd:5:",
            "tap=fd:+5",
            "tap=fd:5,queues=2",
            "vhost-user=/s",
        ] {
            assert!(bad.parse::<NetSpec>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn an_address_belongs_to_a_name_and_an_interface() {
        assert_eq!(Mac::of("web", 0), Mac::of("web", 0));
        assert!(Mac::of("web", 0) != Mac::of("web", 1) && Mac::of("web", 0) != Mac::of("db", 0));
    }
}
