//! The fabric's state, and that of all that is plugged into it.

use serde::{Deserialize, Serialize};

use super::config::ConfigState;
use super::fabric::{Fabric, FabricSide, Node, is_bridge};
use crate::persist::{Moves, RestoreError, StateError, States};

const NAME: &str = "pci";
const VERSION: u32 = 1;

/// Saved state of a [`Fabric`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FabricState {
    /// The configuration address register.
    latch: u32,
    /// The guest has looked at no configuration space yet.
    untouched: bool,
    /// The host bridge's registers.
    host: ConfigState,
}

impl Fabric {
    /// Where a node is, as slot and function of each bridge on the way to it and of its own: `01.0/00.0`.
    fn path(&self, index: usize) -> String {
        let mut path = Vec::new();
        let mut next = Some(index);
        while let Some(node) = next.and_then(|index| self.nodes[index].as_ref()) {
            path.push(format!("{:02x}.{}", node.devfn >> 3, node.devfn & 7));
            next = node.parent;
        }
        path.reverse();
        path.join("/")
    }

    /// What is plugged in, by where it is.
    fn paths(&self) -> impl Iterator<Item = (usize, String)> {
        (0..self.nodes.len()).filter(|index| self.nodes[*index].is_some()).map(|index| (index, self.path(index)))
    }

    fn load_functions(&mut self, states: &mut States, which: impl Fn(&Node) -> bool) -> Result<(), StateError> {
        for (index, path) in self.paths().collect::<Vec<_>>() {
            if let Some(node) = self.nodes[index].as_mut().filter(|node| which(node)) {
                node.function.load(&path, states)?;
            }
        }
        Ok(())
    }
}

impl Moves for Fabric {
    fn halt(&mut self) {
        self.nodes.iter_mut().flatten().for_each(|node| node.function.halt());
    }

    fn is_halted(&mut self) -> bool {
        let nodes = self.nodes.iter_mut().flatten();
        nodes.filter_map(|node| (!node.function.is_halted()).then_some(())).count() == 0
    }

    fn go_on(&mut self) {
        self.nodes.iter_mut().flatten().for_each(|node| node.function.go_on());
    }

    fn blocker(&self) -> Option<String> {
        self.nodes.iter().flatten().find_map(|node| node.function.blocker())
    }

    fn save_into(&self, at: &str, states: &mut States) {
        let Self { latch, untouched, host, .. } = self;
        states.put(NAME, at, VERSION, &FabricState { latch: *latch, untouched: *untouched, host: host.save() });
        for (index, path) in self.paths() {
            self.nodes[index].iter().for_each(|node| node.function.save_into(&path, states));
        }
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        let state: FabricState = states.take(NAME, at, VERSION)?;
        if !self.host.restore(&state.host) {
            return Err(RestoreError::new(NAME, "its host bridge is another one").into());
        }
        (self.latch, self.untouched) = (state.latch, state.untouched);
        // A function's messages are looked up, where there is an IOMMU, by the number of its bus, which the bridge above has.
        let bridges = |node: &Node| is_bridge(node.function.config());
        self.load_functions(states, bridges)?;
        self.place_requesters();
        self.load_functions(states, |node| !bridges(node))?;
        self.settle();
        self.view = self.host.view();
        // Nobody waits: no vCPU is in the guest.
        self.platform.show(&self.view, None);
        Ok(())
    }
}

/// Once for both sides.
impl Moves for FabricSide {
    fn halt(&mut self) {
        if !self.io {
            self.fabric().halt();
        }
    }

    fn is_halted(&mut self) -> bool {
        self.io || self.fabric().is_halted()
    }

    fn go_on(&mut self) {
        if !self.io {
            self.fabric().go_on();
        }
    }

    fn blocker(&self) -> Option<String> {
        if self.io { None } else { self.fabric().blocker() }
    }

    fn save_into(&self, at: &str, states: &mut States) {
        if !self.io {
            self.fabric().save_into(at, states);
        }
    }

    fn load(&mut self, at: &str, states: &mut States) -> Result<(), StateError> {
        if self.io { Ok(()) } else { self.fabric().load(at, states) }
    }
}
