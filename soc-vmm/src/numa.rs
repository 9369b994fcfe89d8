//! The guest's NUMA nodes: which memory and which vCPUs are near each other, and on which node of the host they are.

use api_channel::call::HostInfo;

use crate::acpi;
use crate::layout::{AddressRange, MemoryLayout};

/// Most nodes of a guest: each is an allocation, one of them two, and a VM has 64 in all (docs/wire.md §7).
pub const MAX_NODES: usize = 24;

/// A node as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeSpec {
    /// Its vCPUs.
    pub vcpus: Vec<u16>,
    /// Bytes of its memory.
    pub memory: u64,
    /// The node of the host that its memory is on.
    pub host: Option<u16>,
    /// Whether its vCPUs stay on that node's CPUs.
    pub pinned: bool,
}

/// A node with its place in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Its vCPUs.
    pub vcpus: Vec<u16>,
    /// Its memory: one range, or two around the hole below 4 GiB.
    pub memory: Vec<AddressRange>,
    /// The node of the host that its memory is on.
    pub host: Option<u16>,
    /// Whether its vCPUs stay on that node's CPUs.
    pub pinned: bool,
}

/// All nodes; none where the guest is told of none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Numa {
    /// By number.
    pub nodes: Vec<Node>,
}

impl Numa {
    /// Lays the nodes' memory out one after the other.
    pub fn new(specs: &[NodeSpec], layout: &MemoryLayout) -> Self {
        let mut first = 0u64;
        let nodes = specs.iter().map(|spec| {
            let memory = layout.ranges_of(first, spec.memory);
            first = first.saturating_add(spec.memory);
            Node { vcpus: spec.vcpus.clone(), memory, host: spec.host, pinned: spec.pinned }
        });
        Self { nodes: nodes.collect() }
    }

    /// The nodes as the SRAT tells of them.
    pub fn acpi(&self) -> Vec<acpi::NumaNode> {
        let node = |node: &Node| acpi::NumaNode {
            processors: node.vcpus.iter().copied().map(usize::from).collect(),
            memory: node.memory.iter().map(|range| (range.start, range.len)).collect(),
            distances: Vec::new(),
        };
        self.nodes.iter().map(node).collect()
    }

    /// vCPUs that stay on their node, each with the host's CPUs that it may use.
    ///
    /// # Errors
    /// The host hasn't got the node, or the node has no CPU.
    pub fn affinity(&self, host: &HostInfo) -> Result<Vec<(u16, Vec<u32>)>, NumaError> {
        let mut all = Vec::new();
        for node in self.nodes.iter().filter(|node| node.pinned) {
            let Some(number) = node.host else { continue };
            let Some(there) = host.nodes.iter().find(|there| there.node == u32::from(number)) else {
                let there: Vec<_> = host.nodes.iter().map(|node| node.node.to_string()).collect();
                return Err(NumaError::NoSuchNode { number, there: there.join(", ") });
            };
            let cpus = cpu_list(&there.cpus);
            if cpus.is_empty() {
                return Err(NumaError::NoCpus { number });
            }
            all.extend(node.vcpus.iter().map(|vcpu| (*vcpu, cpus.clone())));
        }
        Ok(all)
    }
}

/// Why vCPUs can't stay on a node of the host.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NumaError {
    /// There is none of that number.
    #[error("--numa: this host has no NUMA node {number}; it has {there}")]
    NoSuchNode {
        /// Its number.
        number: u16,
        /// Those that there are.
        there: String,
    },
    /// It is memory alone.
    #[error("--numa: the host's NUMA node {number} has no CPUs that vCPUs could be kept on: leave pin=on out")]
    NoCpus {
        /// Its number.
        number: u16,
    },
}

/// Most CPUs that are taken from a host's list.
const MOST_CPUS: u32 = 4096;

/// CPUs as the kernel lists them, `0-3,8`; what is no number is left out.
fn cpu_list(text: &str) -> Vec<u32> {
    let mut cpus = Vec::new();
    for range in text.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u32>(), last.trim().parse::<u32>()) {
            cpus.extend(first..=last.min(MOST_CPUS - 1));
        }
        cpus.truncate(MOST_CPUS as usize);
    }
    cpus
}

#[cfg(test)]
mod tests {
    use api_channel::call::NumaNode;
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;
    const FOUR_GIB: u64 = 4 * GIB;

    fn spec(vcpus: &[u16], memory: u64, host: Option<u16>, pinned: bool) -> NodeSpec {
        NodeSpec { vcpus: vcpus.to_vec(), memory, host, pinned }
    }

    fn host(nodes: &[(u32, &str)]) -> HostInfo {
        let node = |(node, cpus): &(u32, &str)| NumaNode { node: *node, memory_kib: 1 << 20, cpus: (*cpus).to_owned() };
        HostInfo {
            cpu_model: String::new(),
            cpu_vendor: String::new(),
            cpu_flags: String::new(),
            cpus: 8,
            memory_kib: 2 << 20,
            kernel: String::new(),
            nodes: nodes.iter().map(node).collect(),
            pci: vec![],
        }
    }

    #[test]
    fn memory_follows_node_by_node_around_the_hole() {
        let layout = MemoryLayout::new(6 * GIB).unwrap();
        let specs = [spec(&[0], GIB, None, false), spec(&[1], 3 * GIB, None, false), spec(&[], 2 * GIB, None, false)];
        let memory: Vec<_> = Numa::new(&specs, &layout).acpi().into_iter().map(|node| node.memory).collect();
        assert_eq!(
            memory,
            [vec![(0, GIB)], vec![(GIB, GIB), (FOUR_GIB, 2 * GIB)], vec![(FOUR_GIB + 2 * GIB, 2 * GIB)]]
        );
        assert_eq!(Numa::new(&[], &layout), Numa::default());
    }

    #[test]
    fn pinned_vcpus_have_their_nodes_cpus() {
        let layout = MemoryLayout::new(2 * GIB).unwrap();
        let specs = [spec(&[0, 1], GIB, Some(1), true), spec(&[2], GIB, Some(0), false)];
        let numa = Numa::new(&specs, &layout);
        assert_eq!(numa.affinity(&host(&[(0, "0-1"), (1, "2-3,6")])), Ok(vec![(0, vec![2, 3, 6]), (1, vec![2, 3, 6])]));
        let error = numa.affinity(&host(&[(0, "0-1"), (2, "2")])).unwrap_err();
        assert_eq!(error.to_string(), "--numa: this host has no NUMA node 1; it has 0, 2");
        assert_eq!(numa.affinity(&host(&[(1, "")])), Err(NumaError::NoCpus { number: 1 }));
    }

    #[test]
    fn the_kernels_lists_are_read() {
        assert_eq!(cpu_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert!(cpu_list("").is_empty());
        assert_eq!(cpu_list("3-1,x,4"), [4]);
    }

    proptest! {
        /// What a host says is bounded.
        #[test]
        fn any_list_is_read(text in "[0-9,-]{0,40}") {
            prop_assert!(cpu_list(&text).len() <= MOST_CPUS as usize);
        }

        #[test]
        fn nodes_are_all_of_ram(sizes in prop::collection::vec(1u64..2048, 1..24)) {
            let bytes: Vec<u64> = sizes.iter().map(|mib| (mib + 1) << 20).collect();
            let layout = MemoryLayout::new(bytes.iter().sum()).unwrap();
            let specs: Vec<_> = bytes.iter().map(|memory| spec(&[], *memory, None, false)).collect();
            let numa = Numa::new(&specs, &layout);
            for (node, memory) in numa.nodes.iter().zip(&bytes) {
                prop_assert_eq!(node.memory.iter().map(|range| range.len).sum::<u64>(), *memory);
            }
            let ranges: Vec<_> = numa.nodes.iter().flat_map(|node| &node.memory).collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
            prop_assert_eq!(ranges.last().map(|last| last.start + last.len),
                Some(if layout.high_bytes() == 0 { layout.low_end() } else { layout.high_end() }));
        }
    }
}
