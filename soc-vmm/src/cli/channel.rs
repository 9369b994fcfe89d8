//! The value of `--channel`.

use std::path::PathBuf;
use std::str::FromStr;

use super::disk::{parse_id, split};
use super::values::{ValueError, wrong};
use crate::virtio::console::{MAX_PORTS, check_name};

/// `--channel unix:PATH,name=NAME[,connect=on][,id=I]`: a port that programs in the guest find by its name, and a UNIX stream socket at its
/// other end. For qemu-guest-agent the name is `org.qemu.guest_agent.0`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChannelSpec {
    /// The socket.
    pub path: PathBuf,
    /// Whether somebody else listens there; otherwise this process does.
    pub connect: bool,
    /// What the guest calls it.
    pub name: String,
    /// The name that it is known by afterwards.
    pub id: Option<String>,
}

impl ChannelSpec {
    /// Its id, or the one that it has as the channel of that place on the command line.
    pub fn id_at(&self, index: usize) -> String {
        self.id.clone().unwrap_or_else(|| format!("channel{index}"))
    }
}

impl FromStr for ChannelSpec {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let options = split(s);
        let (socket, rest) = options.split_first().expect("a part at least");
        let path = match socket.strip_prefix("unix:") {
            Some(path) if !path.is_empty() => PathBuf::from(path),
            _ => return wrong(format!("'{socket}': a channel begins with unix:PATH")),
        };
        let (mut name, mut connect, mut id) = (None, None, None);
        for option in rest {
            let (word, value) = option.split_once('=').unwrap_or((option, ""));
            match word {
                "name" if name.is_none() => name = Some(value.to_owned()),
                "connect" if connect.is_none() => match value {
                    "on" => connect = Some(true),
                    "off" => connect = Some(false),
                    other => return wrong(format!("connect={other}: write on or off")),
                },
                "id" if id.is_none() => id = Some(parse_id(value)?),
                _ => {
                    return wrong(format!("'{option}': write unix:PATH,name=NAME[,connect=on|off][,id=ID], each once"));
                }
            }
        }
        let Some(name) = name.filter(|name| !name.is_empty()) else {
            return wrong("a channel needs name=NAME; qemu-guest-agent's is org.qemu.guest_agent.0");
        };
        if let Err(why) = check_name(&name) {
            return wrong(why.to_string());
        }
        Ok(Self { path, connect: connect.unwrap_or(false), name, id })
    }
}

/// `Ok` if channels can be told apart, and there is room for them.
pub(super) fn check(channels: &[ChannelSpec]) -> Result<(), String> {
    let most = MAX_PORTS - 1;
    if channels.len() > most {
        return Err(format!("--channel: {} of them are more than the {most} that a VM can have", channels.len()));
    }
    for (index, channel) in channels.iter().enumerate() {
        let mut before = channels[..index].iter().enumerate();
        let same = |(at, other): (usize, &ChannelSpec)| {
            other.name == channel.name || other.id_at(at) == channel.id_at(index) || other.path == channel.path
        };
        if before.any(same) {
            let shown = channel.path.display();
            return Err(format!("--channel unix:{shown}: each channel has a name=, an id and a socket of its own"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channels_are_told_apart_and_have_room() {
        let channels = |count| -> Vec<ChannelSpec> {
            (0..count).map(|n| format!("unix:s{n},name=n{n}").parse().unwrap()).collect()
        };
        assert_eq!(check(&channels(15)), Ok(()));
        assert!(check(&channels(16)).unwrap_err().contains("more than the 15"));
        let twice = ["unix:a,name=n", "unix:b,name=n"].map(|spec| spec.parse().unwrap());
        assert!(check(&twice).unwrap_err().contains("unix:b"));
    }

    #[test]
    fn channels_in_every_notation() {
        let channel: ChannelSpec = "unix:/run/a,,b,name=org.qemu.guest_agent.0".parse().unwrap();
        let name = "org.qemu.guest_agent.0".to_owned();
        assert_eq!(channel, ChannelSpec { path: "/run/a,b".into(), connect: false, name, id: None });
        assert_eq!(channel.id_at(3), "channel3");
        let channel: ChannelSpec = "unix:s,id=c,connect=on,name=n".parse().unwrap();
        assert_eq!((channel.connect, channel.id_at(0)), (true, "c".into()));
        for bad in [
            "",
            "unix:",
            "name=n",
            "unix:s",
            "unix:s,name=",
            "unix:s,name=n,name=m",
            "unix:s,name=n,connect",
            "unix:s,name=n,x",
            "unix:s,name=n/m",
            "unix:s,name=n\nm",
            &format!("unix:s,name={}", "n".repeat(128)),
        ] {
            assert!(bad.parse::<ChannelSpec>().is_err(), "{bad:?}");
        }
    }
}
