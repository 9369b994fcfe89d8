//! Which memory the host is asked for: an allocation for each piece of RAM that is apart from the next, by node or by the hole below
//! 4 GiB.

use api_channel::call::RamRequest;

use super::view::Backing;
use crate::cli::Memory;
use crate::layout::{AddressRange, MemoryLayout};
use crate::numa::Numa;

/// The allocations of a guest's RAM, and where it sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MemoryPlan {
    /// What to ask the host for, in this order; ids count from 0.
    pub(super) requests: Vec<Request>,
    /// Where each is, in ascending order, from 0.
    pub(super) ram: Vec<Backing>,
}

/// An allocation to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// What the host is asked.
    pub(super) ram: RamRequest,
    /// What asked for it, as a refusal names it.
    pub(super) option: String,
}

impl MemoryPlan {
    /// Plans for the RAM of `layout`: of the nodes of `numa`, or, where there are none, as `memory` says.
    pub(super) fn new(layout: &MemoryLayout, memory: &Memory, numa: &Numa) -> Self {
        let whole = || layout.ranges_of(0, layout.ram()).into_iter().map(|range| (range, memory.node, None));
        let of_nodes = numa
            .nodes
            .iter()
            .enumerate()
            .flat_map(|(number, node)| node.memory.iter().map(move |range| (*range, node.host, Some(number))));
        let pieces: Vec<(AddressRange, Option<u16>, Option<usize>)> =
            if numa.nodes.is_empty() { whole().collect() } else { of_nodes.collect() };
        let huge = memory.hugepages.map_or(0, |pages| pages.size());
        let mut plan = Self { requests: Vec::new(), ram: Vec::new() };
        for (id, (AddressRange { start, len }, host, node)) in (0u32..).zip(pieces) {
            let option = node.map_or_else(|| "--memory".to_owned(), |node| format!("--numa node={node}"));
            // For the device it is where the guest sees it, so that one address names a byte for both.
            let ram = RamRequest { id, node: host.map_or(-1, i32::from), len, iova: start, huge };
            plan.requests.push(Request { ram, option });
            plan.ram.push(Backing { base: start, len, ram: id, offset: 0 });
        }
        plan
    }

    /// The first id that is free for other allocations.
    pub(super) fn next_id(&self) -> u32 {
        self.requests.len() as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::HugePages;
    use crate::layout::FOUR_GIB;
    use crate::numa::{MAX_NODES, NodeSpec};

    const GIB: u64 = 1 << 30;

    fn memory(size: u64, hugepages: Option<HugePages>, node: Option<u16>) -> Memory {
        Memory { size, hugepages, node, prealloc: false }
    }

    fn plan(memory: &Memory, nodes: &[(u64, Option<u16>)]) -> MemoryPlan {
        let layout = MemoryLayout::new(memory.size).unwrap();
        let spec = |(memory, host): &(u64, Option<u16>)| NodeSpec {
            vcpus: vec![],
            memory: *memory,
            host: *host,
            pinned: false,
        };
        let specs: Vec<_> = nodes.iter().map(spec).collect();
        MemoryPlan::new(&layout, memory, &Numa::new(&specs, &layout))
    }

    fn asked(plan: &MemoryPlan) -> Vec<(u32, i32, u64, u64, u64)> {
        plan.requests.iter().map(|Request { ram, .. }| (ram.id, ram.node, ram.iova, ram.len, ram.huge)).collect()
    }

    #[test]
    fn without_nodes_ram_is_one_allocation_or_two() {
        assert_eq!(asked(&plan(&memory(GIB, None, None), &[])), [(0, -1, 0, GIB, 0)]);
        let plan = plan(&memory(4 * GIB, Some(HugePages::Size1G), Some(1)), &[]);
        assert_eq!(asked(&plan), [(0, 1, 0, 2 * GIB, GIB), (1, 1, FOUR_GIB, 2 * GIB, GIB)]);
        assert_eq!(plan.requests[1].option, "--memory");
        assert_eq!(plan.next_id(), 2);
    }

    #[test]
    fn each_node_has_its_own_on_its_node_of_the_host() {
        let plan = plan(&memory(4 * GIB, None, Some(9)), &[(GIB, Some(0)), (2 * GIB, Some(1)), (GIB, None)]);
        assert_eq!(
            asked(&plan),
            [(0, 0, 0, GIB, 0), (1, 1, GIB, GIB, 0), (2, 1, FOUR_GIB, GIB, 0), (3, -1, FOUR_GIB + GIB, GIB, 0),]
        );
        let shown: Vec<_> = plan.ram.iter().map(|piece| (piece.base, piece.len, piece.ram, piece.offset)).collect();
        assert_eq!(shown, [(0, GIB, 0, 0), (GIB, GIB, 1, 0), (FOUR_GIB, GIB, 2, 0), (FOUR_GIB + GIB, GIB, 3, 0)]);
        assert_eq!(plan.requests[2].option, "--numa node=1");
    }

    #[test]
    fn as_many_nodes_as_there_may_be_fit_the_ids() {
        let nodes = vec![(GIB, None); MAX_NODES];
        let plan = plan(&memory(GIB * MAX_NODES as u64, None, None), &nodes);
        // ROM and flash banks take ids of the same 64.
        assert!(plan.next_id() <= 48, "{}", plan.next_id());
    }
}
