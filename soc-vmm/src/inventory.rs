//! `soc-vmm host`: the server's inventory, by its host function.

use std::error::Error;
use std::io::Write;
use std::sync::Arc;

use api_channel::call::{Call, HostInfo};
use pcie_function::SocFunction;
use pcie_function::header::Role;
use serde::Serialize;

use crate::cli::{self, ExitStatus, Failure, FunctionSpec};
use crate::function::{self, Use};
use crate::link::{CallError, Link};
use crate::runtime::runtime;

/// Asks the server behind `function` for its inventory and prints it.
///
/// # Errors
/// The function can't be used, or the host refused.
pub fn host(function: &FunctionSpec, json: bool, out: &mut impl Write) -> Result<(), Failure> {
    let info = runtime(1)?.block_on(function::open(function, Role::Host, Ask))?;
    let inventory = Inventory::from(info);
    let mut text = Vec::new();
    let rendered = if json {
        serde_json::to_writer_pretty(&mut text, &inventory).map_err(Into::into).and_then(|()| writeln!(text))
    } else {
        inventory.print(&mut text)
    };
    rendered.map_err(|e| Failure::of(ExitStatus::Unavailable, "the host's inventory", &e))?;
    cli::print(&String::from_utf8_lossy(&text), out)
}

struct Ask;

impl Use for Ask {
    type Output = HostInfo;

    fn vm(&self) -> String {
        "host".into()
    }

    async fn given_up(&mut self) -> HostInfo {
        // A signal ends this process.
        std::future::pending().await
    }

    async fn on<F: SocFunction>(self, function: F) -> Result<HostInfo, Failure> {
        let failed =
            |e: &dyn Error, loss| Failure::of(ExitStatus::Unavailable, "the host's inventory", e).by_loss(loss);
        let opened = Link::open(Arc::new(function), Role::Host).await;
        let (_link, end) = opened.map_err(|e| failed(&e, e.is_loss()))?;
        let (channel, _notices) = end.listen();
        let reply = channel.call(&Call::HostInfo).await.map_err(|e| failed(&e, e.is_loss()))?;
        HostInfo::decode(&reply.bulk).map_err(|_| failed(&CallError::Malformed, false))
    }
}

/// A server's inventory, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Inventory {
    cpu: Cpu,
    /// MemTotal.
    memory_kib: u64,
    kernel: String,
    numa_nodes: Vec<Node>,
    pci: Vec<Pci>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    vendor: String,
    model: String,
    count: u32,
    flags: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Node {
    node: u32,
    memory_kib: u64,
    cpus: String,
}

#[derive(Debug, Serialize)]
struct Pci {
    address: String,
    vendor: String,
    device: String,
    class: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    numa_node: Option<i32>,
}

impl From<HostInfo> for Inventory {
    fn from(info: HostInfo) -> Self {
        let flags = info.cpu_flags.split_ascii_whitespace().map(str::to_owned).collect();
        let node = |n: api_channel::call::NumaNode| Node { node: n.node, memory_kib: n.memory_kib, cpus: n.cpus };
        let pci = |d: api_channel::call::PciDevice| Pci {
            address: d.address,
            vendor: format!("{:#06x}", d.vendor),
            device: format!("{:#06x}", d.device),
            class: format!("{:#08x}", d.class),
            numa_node: (d.numa_node >= 0).then_some(d.numa_node),
        };
        Self {
            cpu: Cpu { vendor: info.cpu_vendor, model: info.cpu_model, count: info.cpus, flags },
            memory_kib: info.memory_kib,
            kernel: info.kernel,
            numa_nodes: info.nodes.into_iter().map(node).collect(),
            pci: info.pci.into_iter().map(pci).collect(),
        }
    }
}

impl Inventory {
    fn print(&self, out: &mut dyn Write) -> std::io::Result<()> {
        writeln!(out, "cpu     {} × {} ({})", self.cpu.count, self.cpu.model, self.cpu.vendor)?;
        writeln!(out, "memory  {} MiB", self.memory_kib >> 10)?;
        writeln!(out, "kernel  {}", self.kernel)?;
        for node in &self.numa_nodes {
            writeln!(out, "node {}  {} MiB, CPUs {}", node.node, node.memory_kib >> 10, node.cpus)?;
        }
        for pci in &self.pci {
            writeln!(out, "pci     {} {}:{} class {}", pci.address, pci.vendor, pci.device, pci.class)?;
        }
        Ok(())
    }
}
