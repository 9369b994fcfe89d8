//! The machine and its programs as /proc and /sys show them.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use testbed_init::{Cpu, Inventory, Mapping, Memory, Node, PciFunction, PciId, Program, Thread};

/// Ticks of /proc's times in a second: USER_HZ, the same on x86 and Arm.
const TICKS_PER_SECOND: u64 = 100;

/// The whole machine.
pub(crate) fn inventory() -> Result<Inventory, String> {
    let meminfo = read("/proc/meminfo")?;
    let parameter = |module: &str, name: &str| {
        fs::read_to_string(format!("/sys/module/{module}/parameters/{name}"))
            .is_ok_and(|text| matches!(text.trim(), "Y" | "1"))
    };
    Ok(Inventory {
        cpu: cpu(&read("/proc/cpuinfo")?),
        memory_kib: field(&meminfo, "MemTotal").unwrap_or_default(),
        hugepages: field(&meminfo, "HugePages_Total").unwrap_or_default(),
        nodes: nodes()?,
        pci: pci()?,
        kvm: Path::new("/dev/kvm").exists(),
        nested_paging: parameter("kvm_amd", "npt") || parameter("kvm_intel", "ept"),
    })
}

fn cpu(cpuinfo: &str) -> Cpu {
    let value = |key: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim().to_owned())
    };
    let count =
        cpuinfo.lines().filter(|line| line.split(':').next().is_some_and(|key| key.trim() == "processor")).count();
    let flags = value("flags").or_else(|| value("Features")).unwrap_or_default();
    Cpu {
        vendor: value("vendor_id").unwrap_or_default(),
        model: value("model name").unwrap_or_default(),
        count,
        flags: flags.split_whitespace().map(str::to_owned).collect(),
    }
}

fn nodes() -> Result<Vec<Node>, String> {
    let mut nodes = Vec::new();
    for name in names("/sys/devices/system/node")? {
        let Some(id) = name.strip_prefix("node").and_then(|n| n.parse().ok()) else {
            continue;
        };
        let dir = format!("/sys/devices/system/node/{name}");
        let meminfo = read(&format!("{dir}/meminfo"))?;
        // "Node 0 MemTotal:  4039380 kB"
        let memory_kib = meminfo
            .lines()
            .find(|line| line.contains(" MemTotal:"))
            .and_then(|line| line.split_whitespace().nth(3)?.parse().ok());
        nodes.push(Node {
            id,
            cpus: read(&format!("{dir}/cpulist"))?.trim().to_owned(),
            memory_kib: memory_kib.unwrap_or_default(),
        });
    }
    nodes.sort_by_key(|node| node.id);
    Ok(nodes)
}

/// Every PCI function, by address.
pub(crate) fn pci() -> Result<Vec<PciFunction>, String> {
    const DEVICES: &str = "/sys/bus/pci/devices";
    let mut functions = Vec::new();
    for address in names(DEVICES)? {
        let dir = format!("{DEVICES}/{address}");
        let number = |attribute: &str| -> Result<u32, String> {
            let text = read(&format!("{dir}/{attribute}"))?;
            u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).map_err(|e| format!("{dir}/{attribute}: {e}"))
        };
        let link = |name: &str| {
            let target = fs::read_link(format!("{dir}/{name}")).ok()?;
            Some(target.file_name()?.to_string_lossy().into_owned())
        };
        let narrow = |n: u32| u16::try_from(n).map_err(|e| format!("{dir}: {e}"));
        functions.push(PciFunction {
            id: PciId { vendor: narrow(number("vendor")?)?, device: narrow(number("device")?)? },
            class: number("class")?,
            driver: link("driver"),
            iommu_group: link("iommu_group").and_then(|n| n.parse().ok()),
            address,
        });
    }
    functions.sort_by(|a, b| a.address.cmp(&b.address));
    Ok(functions)
}

/// Every process that has a program: the kernel's own have none.
pub(crate) fn programs() -> Result<Vec<Program>, String> {
    let mut programs = Vec::new();
    for name in names("/proc")? {
        let Ok(pid) = name.parse() else { continue };
        // It may have ended meanwhile.
        let command_line = read(&format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let command: Vec<String> = command_line.split_terminator('\0').map(str::to_owned).collect();
        if !command.is_empty() {
            programs.push(Program { pid, command });
        }
    }
    programs.sort_by_key(|program| program.pid);
    Ok(programs)
}

/// Whether there is an executable file.
pub(crate) fn is_program(path: &str) -> bool {
    fs::metadata(path).is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
}

/// The memory of process `pid`.
pub(crate) fn memory(pid: i32) -> Result<Memory, String> {
    let status = read(&format!("/proc/{pid}/status"))?;
    Ok(Memory {
        private: private_mappings(&read(&format!("/proc/{pid}/smaps"))?),
        resident: field(&status, "VmRSS").unwrap_or_default(),
        page_tables: field(&status, "VmPTE").unwrap_or_default(),
    })
}

/// Private memory by mapping's name, as smaps lists it; what has none is left out.
fn private_mappings(smaps: &str) -> Vec<Mapping> {
    let mut name = String::new();
    let mut by_name: BTreeMap<String, u64> = BTreeMap::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first.starts_with("Private_") {
            let kib: u64 = words.next().and_then(|n| n.parse().ok()).unwrap_or_default();
            if kib > 0 {
                *by_name.entry(name.clone()).or_default() += kib;
            }
        } else if !first.ends_with(':') {
            // "start-end perms offset dev inode name"
            name = words.skip(4).collect::<Vec<_>>().join(" ");
        }
    }
    by_name.into_iter().map(|(name, kib)| Mapping { name, kib }).collect()
}

/// The threads of process `pid`.
pub(crate) fn threads(pid: i32) -> Result<Vec<Thread>, String> {
    let dir = format!("/proc/{pid}/task");
    let mut threads = Vec::new();
    for tid in names(&dir)? {
        let task = format!("{dir}/{tid}");
        // A thread may end while the list is read.
        let (Ok(stat), Ok(schedstat), Ok(name)) =
            (read(&format!("{task}/stat")), read(&format!("{task}/schedstat")), read(&format!("{task}/comm")))
        else {
            continue;
        };
        threads.push(Thread {
            tid: tid.parse().unwrap_or_default(),
            name: name.trim().to_owned(),
            run_ns: schedstat.split_whitespace().next().and_then(|n| n.parse().ok()).unwrap_or_default(),
            guest_ms: guest_ticks(&stat) * 1000 / TICKS_PER_SECOND,
        });
    }
    threads.sort_by_key(|thread| thread.tid);
    Ok(threads)
}

/// Field 43 of proc_pid_stat(5), `guest_time`. The name in field 2 may hold blanks, so fields count from its end.
fn guest_ticks(stat: &str) -> u64 {
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(40).and_then(|n| n.parse().ok()).unwrap_or_default()
}

/// The number after `key:` in a file like /proc/meminfo.
fn field(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(name, _)| *name == key)
        .and_then(|(_, value)| value.split_whitespace().next()?.parse().ok())
}

fn names(dir: &str) -> Result<Vec<String>, String> {
    let entries = fs::read_dir(dir).map_err(|e| format!("{dir}: {e}"))?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

fn read(path: &str) -> Result<String, String> {
    fs::read_to_string(path).map_err(|e| format!("{path}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_has_an_inventory() {
        let cpu = cpu(&read("/proc/cpuinfo").unwrap());
        assert_eq!(cpu.count, std::thread::available_parallelism().unwrap().get());
        assert!(!cpu.flags.is_empty());
    }

    #[test]
    fn private_memory_is_summed_by_name() {
        let smaps = "\
55d0-55d1 r--p 00000000 fe:00 12 /bin/shim
Size:                  8 kB
Private_Clean:         4 kB
Private_Dirty:         8 kB
55d2-55d3 rw-p 00000000 00:00 0 
Private_Dirty:        16 kB
Private_Hugetlb:       0 kB
55d4-55d5 rw-s 00000000 00:00 0 /memfd:ram (deleted)
Private_Dirty:         0 kB
";
        let mappings = private_mappings(smaps);
        assert_eq!(
            mappings,
            [Mapping { name: String::new(), kib: 16 }, Mapping { name: "/bin/shim".to_owned(), kib: 12 },]
        );
    }

    #[test]
    fn guest_time_is_found_after_a_name_with_blanks() {
        let mut fields: Vec<String> = (3..=52).map(|n| n.to_string()).collect();
        fields[0] = "S".to_owned();
        let stat = format!("7 (vcpu 0 (x)) {}", fields.join(" "));
        assert_eq!(guest_ticks(&stat), 43);
    }

    #[test]
    fn own_threads_are_listed() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let threads = threads(pid).unwrap();
        assert!(threads.iter().any(|thread| thread.run_ns > 0));
        assert!(memory(pid).unwrap().private_kib() > 0);
    }
}
