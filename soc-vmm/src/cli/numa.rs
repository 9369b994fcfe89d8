//! `--numa`: the guest's nodes.

use std::str::FromStr;

use super::values::{Memory, ValueError, parse_size, wrong};
use crate::numa::{MAX_NODES, NodeSpec};

/// One node: `[node=N,]memory=SIZE[,cpus=A[-B]]…[,host=H[,pin=on]]`, in QEMU's words where it has them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NumaNode {
    /// Its number, where it is said.
    node: Option<u16>,
    spec: NodeSpec,
}

impl FromStr for NumaNode {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        let (mut node, mut memory, mut host, mut pinned, mut vcpus) = (None, None, None, None, Vec::new());
        for option in s.split(',') {
            match option.split_once('=') {
                Some(("node", number)) if node.is_none() => node = Some(parse_node(number)?),
                Some(("memory", size)) if memory.is_none() => memory = Some(parse_size(size)?),
                Some(("cpus", range)) => vcpus.extend(parse_range(range)?),
                Some(("host", number)) if host.is_none() => host = Some(parse_node(number)?),
                Some(("pin", "on")) if pinned.is_none() => pinned = Some(true),
                Some(("pin", "off")) if pinned.is_none() => pinned = Some(false),
                _ => {
                    return wrong(format!(
                        "'{option}': write [node=N,]memory=SIZE[,cpus=A-B]…[,host=H[,pin=on]], all but cpus once"
                    ));
                }
            }
        }
        let Some(memory) = memory else { return wrong("a node needs memory=SIZE") };
        let pinned = pinned.unwrap_or(false);
        if pinned && host.is_none() {
            return wrong("pin=on needs host=H, the node whose CPUs are meant");
        }
        Ok(Self { node, spec: NodeSpec { vcpus, memory, host, pinned } })
    }
}

fn parse_node(number: &str) -> Result<u16, ValueError> {
    number.parse().or_else(|_| wrong(format!("'{number}': a NUMA node is a number")))
}

fn parse_range(range: &str) -> Result<std::ops::RangeInclusive<u16>, ValueError> {
    let (first, last) = range.split_once('-').unwrap_or((range, range));
    match (first.parse(), last.parse()) {
        (Ok(first), Ok(last)) if first <= last => Ok(first..=last),
        _ => wrong(format!("cpus={range}: write a vCPU or a range of them, as 0-3")),
    }
}

/// The nodes and all their memory, from what was given; without nodes the memory as it was given.
///
/// # Errors
/// What doesn't fit, in a sentence.
pub(super) fn check(
    given: Vec<NumaNode>,
    memory: Option<Memory>,
    cpus: u16,
) -> Result<(Memory, Vec<NodeSpec>), String> {
    if given.is_empty() {
        return Ok((memory.unwrap_or_default(), Vec::new()));
    }
    if given.len() > MAX_NODES {
        return Err(format!("--numa: {} nodes, a guest has at most {MAX_NODES}", given.len()));
    }
    let mut nodes = vec![None; given.len()];
    for (index, NumaNode { node, spec }) in given.into_iter().enumerate() {
        let number = node.map_or(index, usize::from);
        match nodes.get_mut(number) {
            Some(slot @ None) => *slot = Some(spec),
            Some(Some(_)) => return Err(format!("--numa: node={number} is there twice")),
            None => {
                return Err(format!("--numa: node={number}, but there are {} nodes: they count from 0", nodes.len()));
            }
        }
    }
    let mut nodes: Vec<NodeSpec> = nodes.into_iter().flatten().collect();

    let mut of_vcpu = vec![0u32; cpus.into()];
    for vcpu in nodes.iter().flat_map(|node| &node.vcpus) {
        match of_vcpu.get_mut(usize::from(*vcpu)) {
            Some(count) => *count += 1,
            None => return Err(format!("--numa names vCPU {vcpu}, but --cpus is {cpus}: vCPUs count from 0")),
        }
    }
    if let Some(vcpu) = of_vcpu.iter().position(|count| *count != 1) {
        return Err(format!("--numa: vCPU {vcpu} is on {} nodes; put each on one by cpus=", of_vcpu[vcpu]));
    }

    let page = memory.as_ref().and_then(|memory| memory.hugepages).map_or(4096, |pages| pages.size());
    if let Some(number) = nodes.iter().position(|node| !node.memory.is_multiple_of(page)) {
        return Err(format!(
            "--numa node={number}: {} bytes are not whole pages of {page} bytes",
            nodes[number].memory
        ));
    }
    let sum = nodes.iter().try_fold(0u64, |sum, node| sum.checked_add(node.memory));
    let Some(sum) = sum else { return Err("--numa: no host has that much memory".to_owned()) };
    let memory = match memory {
        Some(memory) if memory.size != sum => {
            let mib = |bytes| bytes >> 20;
            return Err(format!(
                "--numa: the nodes have {} MiB together, --memory says {}: make them equal",
                mib(sum),
                mib(memory.size)
            ));
        }
        Some(memory) => memory,
        None => Memory { size: sum, ..Memory::default() },
    };
    // A node that doesn't say where it is, is where --memory says.
    nodes.iter_mut().for_each(|node| node.host = node.host.or(memory.node));
    Ok((memory, nodes))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn checked(nodes: &[&str], memory: Option<&str>, cpus: u16) -> Result<(u64, Vec<NodeSpec>), String> {
        let nodes = nodes.iter().map(|node| node.parse::<NumaNode>().map_err(|e| e.to_string()));
        let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
        let (memory, nodes) = check(nodes, memory.map(|memory| memory.parse().unwrap()), cpus)?;
        Ok((memory.size, nodes))
    }

    #[test]
    fn nodes_by_number_or_in_order() {
        let (size, nodes) =
            checked(&["node=1,cpus=1,memory=1G,host=3,pin=on", "node=0,cpus=0,cpus=2-3,memory=512"], None, 4).unwrap();
        assert_eq!(size, 1536 << 20);
        assert_eq!(nodes[0], NodeSpec { vcpus: vec![0, 2, 3], memory: 512 << 20, host: None, pinned: false });
        assert_eq!(nodes[1], NodeSpec { vcpus: vec![1], memory: 1 << 30, host: Some(3), pinned: true });
        let (_, nodes) = checked(&["memory=1G,cpus=0", "memory=1G"], Some("2G,node=5"), 1).unwrap();
        assert_eq!((nodes[0].host, nodes[1].host), (Some(5), Some(5)));
        assert_eq!(checked(&[], None, 1), Ok((512 << 20, vec![])));
    }

    #[test]
    fn what_does_not_fit_is_said() {
        for (nodes, memory, cpus, said) in [
            (&["cpus=0"][..], None, 1, "needs memory=SIZE"),
            (&["memory=1G,cpus=0,pin=on"], None, 1, "needs host=H"),
            (&["memory=1G,cpus=1-0"], None, 1, "cpus=1-0"),
            (&["memory=1G,memory=1G"], None, 1, "all but cpus once"),
            (&["memory=1G,frob=1"], None, 1, "'frob=1'"),
            (&["memory=1G,host=x"], None, 1, "'x'"),
            (&["memory=1G,cpus=0,node=0", "memory=1G,node=0"], None, 1, "node=0 is there twice"),
            (&["memory=1G,cpus=0,node=1"], None, 1, "there are 1 nodes"),
            (&["memory=1G,cpus=0-1"], None, 1, "vCPU 1, but --cpus is 1"),
            (&["memory=1G,cpus=0"], None, 2, "vCPU 1 is on 0 nodes"),
            (&["memory=1G,cpus=0", "memory=1G,cpus=0"], None, 1, "vCPU 0 is on 2 nodes"),
            (&["memory=1G,cpus=0"], Some("2G"), 1, "1024 MiB together, --memory says 2048"),
            (&["memory=1023M,cpus=0", "memory=3M"], Some("1026M,hugepages=2M"), 1, "node=0: 1072693248 bytes"),
            (&["memory=5K,cpus=0"], None, 1, "not whole pages"),
        ] {
            let error = checked(nodes, memory, cpus).expect_err(said);
            assert!(error.contains(said), "{nodes:?}: {error}");
        }
        let many = vec!["memory=1G"; MAX_NODES + 1];
        assert!(checked(&many, None, 1).unwrap_err().contains("at most"));
    }

    proptest! {
        #[test]
        fn any_words_are_nodes_or_refused(texts in prop::collection::vec(node_text(), 1..4), cpus in 1u16..6) {
            let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
            if let Ok((size, nodes)) = checked(&texts, None, cpus) {
                prop_assert_eq!(nodes.iter().map(|node| node.memory).sum::<u64>(), size);
                let mut vcpus: Vec<_> = nodes.iter().flat_map(|node| node.vcpus.clone()).collect();
                vcpus.sort_unstable();
                prop_assert_eq!(vcpus, (0..cpus).collect::<Vec<_>>());
            }
        }
    }

    fn node_text() -> impl Strategy<Value = String> {
        let option =
            prop_oneof!["(node|host)=[0-2]", "memory=[0-9]{1,3}[MG]?", "cpus=[0-5](-[0-5])?", "pin=on", ".{0,6}"];
        prop::collection::vec(option, 1..5).prop_map(|options| options.join(","))
    }
}
