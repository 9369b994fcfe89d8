//! How much memory the host can still give: read through descriptors that stay open in the sandbox.

use std::fs::File;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;

use crate::error::Refusal;

/// Open descriptors of the kernel's counters.
#[derive(Debug)]
pub(crate) struct MemoryInfo {
    meminfo: File,
    /// Free huge pages: 2 MiB, 1 GiB; absent where the CPU lacks the size.
    huge: [Option<File>; 2],
    /// Free memory and free huge pages of each NUMA node.
    nodes: Vec<Node>,
}

#[derive(Debug)]
struct Node {
    number: u32,
    meminfo: File,
    huge: [Option<File>; 2],
}

const HUGE: [(u64, &str); 2] = [(0x20_0000, "hugepages-2048kB"), (0x4000_0000, "hugepages-1048576kB")];

impl MemoryInfo {
    pub(crate) fn open() -> Result<Self, Errno> {
        let meminfo = File::open("/proc/meminfo").map_err(|_| Errno::last())?;
        let huge = HUGE.map(|(_, dir)| File::open(format!("/sys/kernel/mm/hugepages/{dir}/free_hugepages")).ok());
        let nodes = std::fs::read_dir("/sys/devices/system/node").into_iter().flatten().flatten();
        let nodes = nodes.filter_map(|entry| {
            let number = entry.file_name().to_str()?.strip_prefix("node")?.parse().ok()?;
            let path = entry.path();
            Some(Node {
                number,
                meminfo: File::open(path.join("meminfo")).ok()?,
                huge: HUGE.map(|(_, dir)| File::open(path.join("hugepages").join(dir).join("free_hugepages")).ok()),
            })
        });
        Ok(Self { meminfo, huge, nodes: nodes.collect() })
    }

    /// Whether `len` bytes can be had, before any is touched: a guest that is too large is refused, not killed half-way.
    pub(crate) fn has_room(&self, len: u64, huge: u64, node: Option<u32>) -> Result<(), Refusal> {
        let on = match node {
            None => None,
            Some(n) => match self.nodes.iter().find(|node| node.number == n) {
                Some(node) => Some(node),
                None => return Err(Refusal::unavailable(format!("this host has no NUMA node {n}"))),
            },
        };
        let place = node.map_or(String::new(), |n| format!(" on NUMA node {n}"));
        let mib = len.div_ceil(1 << 20);
        if let Some(i) = HUGE.iter().position(|(size, _)| *size == huge) {
            let files = on.map_or(&self.huge, |node| &node.huge);
            let pages = files[i].as_ref().and_then(number).unwrap_or(0);
            if pages.saturating_mul(huge) < len {
                return Err(Refusal::unavailable(format!(
                    "{mib} MiB of guest memory need {} huge pages of {} MiB{place}, {pages} are free: reserve more in {}",
                    len / huge,
                    huge >> 20,
                    "/sys/kernel/mm/hugepages"
                )));
            }
            return Ok(());
        }
        let (file, key) = on.map_or((&self.meminfo, "MemAvailable:"), |node| (&node.meminfo, "MemFree:"));
        let kib = field(file, key).ok_or_else(|| Refusal::unavailable("the host doesn't tell its free memory"))?;
        if kib.saturating_mul(1024) < len {
            let free = kib / 1024;
            return Err(Refusal::unavailable(format!(
                "{mib} MiB of guest memory, the host has {free} MiB free{place}"
            )));
        }
        Ok(())
    }
}

/// A file's whole text, from its start: the kernel writes it anew at each read.
fn text(file: &File) -> Option<String> {
    let mut buffer = vec![0; 4096];
    let len = file.read_at(&mut buffer, 0).ok()?;
    buffer.truncate(len);
    String::from_utf8(buffer).ok()
}

fn number(file: &File) -> Option<u64> {
    text(file)?.trim().parse().ok()
}

/// The value after `key`, in KiB; node files say `Node 0 MemFree: …`.
fn field(file: &File, key: &str) -> Option<u64> {
    parse_field(&text(file)?, key)
}

pub(super) fn parse_field(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let mut words = line.split_whitespace().skip_while(|word| *word != key);
        words.next()?;
        words.next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_in_the_host_s_and_in_a_node_s_file() {
        let host = "MemTotal:       24000 kB\nMemFree:          100 kB\nMemAvailable:   22000 kB\n";
        assert_eq!(parse_field(host, "MemAvailable:"), Some(22000));
        assert_eq!(parse_field("Node 0 MemTotal: 9 kB\nNode 0 MemFree:  7 kB\n", "MemFree:"), Some(7));
        assert_eq!(parse_field("MemFree: many kB\n", "MemFree:"), None);
    }

    #[test]
    fn what_no_host_has_is_refused_in_a_sentence() {
        let memory = MemoryInfo::open().unwrap();
        memory.has_room(1 << 20, 0, None).unwrap();
        assert!(memory.has_room(1 << 50, 0, None).unwrap_err().why.contains("the host has"));
        assert!(memory.has_room(1 << 50, 0x4000_0000, None).unwrap_err().why.contains("huge pages of 1024 MiB"));
        assert!(memory.has_room(4096, 0, Some(4095)).unwrap_err().why.contains("no NUMA node 4095"));
    }
}
