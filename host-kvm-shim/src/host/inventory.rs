//! The server's inventory: /proc and /sys, read once while the shim may still open files.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;

use api_channel::call::{HostInfo, NumaNode, PciDevice};

/// Reads everything. What this host doesn't tell is empty or absent; nothing is guessed.
pub(super) fn read() -> HostInfo {
    let cpu = fs::File::open("/proc/cpuinfo").map(|file| cpu_info(BufReader::new(file).lines().map_while(Result::ok)));
    let cpu = cpu.unwrap_or_default();
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    HostInfo {
        cpu_model: cpu.model,
        cpu_vendor: cpu.vendor,
        cpu_flags: cpu.flags,
        cpus: cpu.count,
        memory_kib: super::memory::parse_field(&meminfo, "MemTotal:").unwrap_or(0),
        kernel: kernel.trim().to_owned(),
        nodes: nodes(Path::new("/sys/devices/system/node")),
        pci: pci(Path::new("/sys/bus/pci/devices")),
    }
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Cpu {
    model: String,
    vendor: String,
    flags: String,
    count: u32,
}

/// The first processor's paragraph, and how many there are; the lines of the others are not kept.
fn cpu_info(lines: impl Iterator<Item = String>) -> Cpu {
    let mut cpu = Cpu::default();
    for line in lines {
        let Some((key, value)) = line.split_once(':') else { continue };
        let value = value.trim();
        let field = match key.trim() {
            "processor" => {
                cpu.count += 1;
                continue;
            }
            "model name" => &mut cpu.model,
            "vendor_id" => &mut cpu.vendor,
            "flags" => &mut cpu.flags,
            _ => continue,
        };
        if field.is_empty() {
            value.clone_into(field);
        }
    }
    cpu
}

fn nodes(dir: &Path) -> Vec<NumaNode> {
    let mut nodes: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let node = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let meminfo = fs::read_to_string(entry.path().join("meminfo")).ok()?;
            let cpus = fs::read_to_string(entry.path().join("cpulist")).ok()?.trim().to_owned();
            Some(NumaNode { node, memory_kib: super::memory::parse_field(&meminfo, "MemTotal:")?, cpus })
        })
        .collect();
    nodes.sort_by_key(|node| node.node);
    nodes
}

fn pci(dir: &Path) -> Vec<PciDevice> {
    let mut devices: Vec<_> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let address = entry.file_name().into_string().ok()?;
            let file = |name| fs::read_to_string(entry.path().join(name)).ok();
            let hex = |name| u32::from_str_radix(file(name)?.trim().strip_prefix("0x")?, 16).ok();
            let numa_node = file("numa_node").and_then(|text| text.trim().parse().ok()).unwrap_or(-1);
            let (vendor, device) = (u16::try_from(hex("vendor")?).ok()?, u16::try_from(hex("device")?).ok()?);
            Some(PciDevice { address, vendor, device, class: hex("class")?, numa_node })
        })
        .collect();
    devices.sort_by(|a, b| a.address.cmp(&b.address));
    devices
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_processor_speaks_for_all_and_every_one_is_counted() {
        let text = "processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: A CPU: fast\nflags\t\t: fpu vme\n\n\
                    processor\t: 1\nvendor_id\t: Other\nmodel name\t: B\nflags\t\t: fpu\n";
        let cpu = cpu_info(text.lines().map(str::to_owned));
        let expected =
            Cpu { model: "A CPU: fast".into(), vendor: "GenuineIntel".into(), flags: "fpu vme".into(), count: 2 };
        assert_eq!(cpu, expected);
        assert_eq!(cpu_info(["no colon", "flags"].into_iter().map(str::to_owned)), Cpu::default());
    }

    #[test]
    fn nodes_and_devices_come_from_sysfs_and_what_is_malformed_does_not() {
        let root = std::env::temp_dir().join(format!("inventory-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("node/node1/meminfo", "Node 1 MemTotal: 2048 kB\n");
        write("node/node1/cpulist", "2-3\n");
        write("node/node0/meminfo", "Node 0 MemTotal: 1024 kB\n");
        write("node/node0/cpulist", "0-1\n");
        write("node/nodex/meminfo", "");
        for (name, text) in
            [("vendor", "0x8086\n"), ("device", "0x100e\n"), ("class", "0x020000\n"), ("numa_node", "-1\n")]
        {
            write(&format!("pci/0000:00:01.0/{name}"), text);
        }
        write("pci/0000:00:02.0/vendor", "8086");
        assert_eq!(
            nodes(&root.join("node")),
            [(0, 1024, "0-1"), (1, 2048, "2-3")].map(|(node, memory_kib, cpus)| NumaNode {
                node,
                memory_kib,
                cpus: cpus.into()
            })
        );
        let device = PciDevice {
            address: "0000:00:01.0".into(),
            vendor: 0x8086,
            device: 0x100e,
            class: 0x02_0000,
            numa_node: -1,
        };
        assert_eq!(pci(&root.join("pci")), [device]);
        fs::remove_dir_all(root).unwrap();
    }
}
