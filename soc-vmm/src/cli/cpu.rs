//! `--cpus`: how many vCPUs, and how they are arranged.

use std::str::FromStr;

use super::values::{ValueError, wrong};
use crate::cpuid::{MAX_CPUS, Topology};

/// vCPUs as `N[,maxcpus=M][,sockets=S][,cores=C][,threads=T]`: N at the start, of M that there can be, which are arranged. What isn't
/// said follows, and is as many as at the start, one socket, one thread a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cpus {
    /// How many at the start.
    pub(super) present: u16,
    /// How those that there can be are arranged.
    pub(super) topology: Topology,
}

impl FromStr for Cpus {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let mut words = s.split(',');
        let present = match words.next().unwrap_or_default().parse() {
            Ok(count @ 1..=MAX_CPUS) => count,
            _ => return wrong(format!("a VM has 1 to {MAX_CPUS} vCPUs")),
        };
        let mut given = [("maxcpus", None), ("sockets", None), ("cores", None), ("threads", None)];
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            let slot = given.iter_mut().find(|(known, value)| *known == name && value.is_none());
            match (slot, value.parse::<u32>()) {
                (Some((_, slot)), Ok(value @ 1..=MAX_CPUS)) => *slot = Some(value),
                (Some(_), _) => return wrong(format!("{word}: it is a number from 1 to {MAX_CPUS}")),
                _ => {
                    return wrong(format!(
                        "'{word}': write N[,maxcpus=M][,sockets=S][,cores=C][,threads=T], each once"
                    ));
                }
            }
        }
        let [(_, count), (_, sockets), (_, cores), (_, threads)] = given;
        let count = count.unwrap_or(present);
        if count < present {
            return wrong(format!("{present} vCPUs at the start, of at most {count}: maxcpus= is no smaller"));
        }
        let sockets = sockets.unwrap_or_else(|| match cores {
            Some(cores) => count / (cores * threads.unwrap_or(1)),
            None => 1,
        });
        let threads = threads.unwrap_or_else(|| cores.map_or(1, |cores| count / (sockets.max(1) * cores)));
        let cores = cores.unwrap_or_else(|| count / (sockets * threads));
        match Topology::new(sockets, cores, threads) {
            Ok(topology) if topology.cpus() == count => Ok(Self { present: present as u16, topology }),
            _ => wrong(format!("{count} vCPUs can't be arranged so: sockets × cores × threads must be {count}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn cpus(s: &str) -> Option<(u32, u32, u32)> {
        let topology = s.parse::<Cpus>().ok()?.topology;
        Some((topology.sockets(), topology.cores(), topology.threads()))
    }

    #[test]
    fn what_is_not_said_follows() {
        for (text, arranged) in [
            ("1", (1, 1, 1)),
            ("6", (1, 6, 1)),
            ("1024", (1, 1024, 1)),
            ("8,sockets=2", (2, 4, 1)),
            ("8,threads=2", (1, 4, 2)),
            ("8,cores=2", (4, 2, 1)),
            ("8,sockets=2,cores=2", (2, 2, 2)),
            ("8,cores=2,threads=2", (2, 2, 2)),
            ("8,threads=2,sockets=4", (4, 1, 2)),
            ("12,sockets=2,cores=3,threads=2", (2, 3, 2)),
            ("1,maxcpus=1", (1, 1, 1)),
            ("3,maxcpus=8", (1, 8, 1)),
            ("3,sockets=4,maxcpus=8", (4, 2, 1)),
        ] {
            assert_eq!(cpus(text), Some(arranged), "{text}");
        }
    }

    #[test]
    fn what_can_t_be_is_refused() {
        for bad in [
            "",
            "0",
            "1025",
            "-1",
            "a",
            "4,",
            "4,4",
            "4,sockets",
            "4,sockets=",
            "4,sockets=0",
            "4,sockets=3",
            "4,cores=3",
            "4,cores=8",
            "4,threads=8",
            "4,sockets=2,sockets=2",
            "4,dies=1",
            "4,maxcpus=3",
            "4,maxcpus=0",
            "4,maxcpus=1025",
            "4,maxcpus=8,sockets=4,cores=3",
            "8,sockets=2,cores=3,threads=1",
            "1024,cores=1024,threads=1024",
        ] {
            assert_eq!(cpus(bad), None, "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn any_numbers_are_that_many_vcpus_or_refused(
            count in 0u32..1100,
            most in prop::option::of(0u32..1100),
            given in prop::array::uniform3(prop::option::of(0u32..1100)),
        ) {
            let mut text = count.to_string();
            most.into_iter().for_each(|most| text += &format!(",maxcpus={most}"));
            for (name, value) in ["sockets", "cores", "threads"].into_iter().zip(given) {
                value.into_iter().for_each(|value| text += &format!(",{name}={value}"));
            }
            if let Ok(cpus) = text.parse::<Cpus>() {
                prop_assert_eq!((u32::from(cpus.present), cpus.topology.cpus()), (count, most.unwrap_or(count)));
            }
        }
    }
}
