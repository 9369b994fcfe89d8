//! The value of `--net`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::{parse_id, split};
use super::values::{ValueError, wrong};

/// `--net stream=SOCK[,mac=M][,id=I]`, each once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetSpec {
    /// A UNIX socket on which frames go as QEMU's `-netdev stream` frames them: passt's.
    pub stream: PathBuf,
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
        let (mut stream, mut mac, mut id) = (None, None, None);
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            match name {
                "stream" if stream.is_none() && !value.is_empty() => stream = Some(PathBuf::from(value)),
                "stream" if stream.is_none() => return wrong("stream= needs the path of a socket"),
                "tap" | "vhost-user" => return wrong(format!("{name}= is not there yet; use stream=SOCKET")),
                "mac" if mac.is_none() => mac = Some(value.parse()?),
                "id" if id.is_none() => id = Some(parse_id(value)?),
                _ => return wrong(format!("'{option}': write stream=SOCKET[,mac=MAC][,id=ID], each once")),
            }
        }
        let Some(stream) = stream else { return wrong("a network interface needs stream=SOCKET") };
        Ok(Self { stream, mac, id })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_in_every_notation() {
        let net: NetSpec = "id=n0,stream=/run/a,,b,mac=52:54:00:AB:cd:01".parse().unwrap();
        let mac = Mac([0x52, 0x54, 0, 0xab, 0xcd, 1]);
        assert_eq!(net, NetSpec { stream: "/run/a,b".into(), mac: Some(mac), id: Some("n0".into()) });
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
            "tap=tap0",
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
