//! The value of `--vsock`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::split;
use super::values::{ValueError, wrong};
use crate::virtio::vsock::FIRST_CID;

/// `--vsock cid=N,socket=PATH`: the guest's CID, and where programs of the SoC connect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockSpec {
    /// From 3 on, and not all ones.
    pub cid: u32,
    /// The socket; port P of the host is that path with `_P` behind it.
    pub socket: PathBuf,
}

impl FromStr for VsockSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let (mut cid, mut socket) = (None, None);
        for option in split(s) {
            let (name, value) = option.split_once('=').unwrap_or((&option, ""));
            match name {
                "cid" if cid.is_none() => match value.parse::<u32>() {
                    Ok(number) if (FIRST_CID..u32::MAX).contains(&number) => cid = Some(number),
                    _ => {
                        return wrong(format!("cid={value}: a guest's CID is a number from {FIRST_CID} to 4294967294"));
                    }
                },
                "socket" if socket.is_none() && !value.is_empty() => socket = Some(PathBuf::from(value)),
                "socket" if socket.is_none() => return wrong("socket= needs the path of a socket"),
                _ => return wrong(format!("'{option}': write cid=N,socket=PATH, each once")),
            }
        }
        match (cid, socket) {
            (Some(cid), Some(socket)) => Ok(Self { cid, socket }),
            (None, _) => wrong("a vsock device needs cid=N"),
            (_, None) => wrong("a vsock device needs socket=PATH"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_device_in_every_notation() {
        let spec: VsockSpec = "socket=/run/a,,b,cid=3".parse().unwrap();
        assert_eq!(spec, VsockSpec { cid: 3, socket: "/run/a,b".into() });
        for bad in [
            "",
            "cid=3",
            "socket=s",
            "cid=2,socket=s",
            "cid=4294967295,socket=s",
            "cid=x,socket=s",
            "cid=3,socket=",
            "cid=3,cid=3,socket=s",
        ] {
            assert!(bad.parse::<VsockSpec>().is_err(), "{bad:?}");
        }
    }
}
