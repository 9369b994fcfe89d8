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

    /// Whether `len` bytes can be had, before any is touched: a guest that is too large is refused, not killed half-way. `promised`
    /// tells what was granted before and is not taken yet: on a node, or everywhere.
    pub(crate) fn has_room(
        &self,
        len: u64,
        huge: u64,
        node: Option<u32>,
        promised: impl Fn(Option<u32>) -> u64,
    ) -> Result<(), Refusal> {
        let on = match node {
            None => None,
            Some(number) => Some(self.nodes.iter().find(|n| n.number == number).ok_or_else(|| self.no_node(number))?),
        };
        let place = node.map_or(String::new(), |n| format!(" on NUMA node {n}"));
        let mib = len.div_ceil(1 << 20);
        if let Some(i) = HUGE.iter().position(|(size, _)| *size == huge) {
            let size = huge >> 20;
            let Some(file) = on.map_or(&self.huge, |node| &node.huge)[i].as_ref() else {
                return Err(Refusal::unavailable(format!("this host has no huge pages of {size} MiB{place}")));
            };
            let (pages, needed) = (number(file).unwrap_or(0), len / huge);
            if pages < needed {
                let under = node.map_or("kernel/mm".to_owned(), |n| format!("devices/system/node/node{n}"));
                return Err(Refusal::unavailable(format!(
                    "{mib} MiB of guest memory need {needed} huge pages of {size} MiB{place}, {pages} are free: reserve more in \
                     /sys/{under}/hugepages/{}/nr_hugepages",
                    HUGE[i].1
                )));
            }
            return Ok(());
        }
        let silent = || Refusal::unavailable("the host doesn't tell its free memory");
        let all = field(&self.meminfo, "MemAvailable:").ok_or_else(silent)?;
        let mut rooms = vec![(all, promised(None), String::new())];
        if let Some(node) = on {
            rooms.push((node.available().ok_or_else(silent)?, promised(Some(node.number)), place));
        }
        for (kib, promised, place) in rooms {
            let room = kib.saturating_mul(1024).saturating_sub(promised);
            if room < len {
                let free = room >> 20;
                return Err(Refusal::unavailable(format!(
                    "{mib} MiB of guest memory, the host has {free} MiB free{place}"
                )));
            }
        }
        Ok(())
    }

    fn no_node(&self, number: u32) -> Refusal {
        let mut there: Vec<_> = self.nodes.iter().map(|node| node.number).collect();
        there.sort_unstable();
        let there: Vec<_> = there.iter().map(u32::to_string).collect();
        Refusal::unavailable(format!("this host has no NUMA node {number}; it has {}", there.join(", ")))
    }
}

impl Node {
    /// KiB that programs can have here: what is free, and what the kernel gives back for it, as MemAvailable counts for the whole host.
    fn available(&self) -> Option<u64> {
        let text = text(&self.meminfo)?;
        let keys = ["MemFree:", "Active(file):", "Inactive(file):", "SReclaimable:"];
        let mut kib = keys.iter().map(|key| parse_field(&text, key));
        let free = kib.next()??;
        Some(kib.flatten().fold(free, u64::saturating_add))
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

/// The value after `key`, in KiB.
fn field(file: &File, key: &str) -> Option<u64> {
    parse_field(&text(file)?, key)
}

/// The same of a text; node files say `Node 0 MemFree: …`.
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
        let none = |_| 0;
        memory.has_room(1 << 20, 0, None, none).unwrap();
        memory.has_room(1 << 20, 0, Some(0), none).unwrap();
        let refused = |len, huge, node, promised: u64| memory.has_room(len, huge, node, |_| promised).unwrap_err().why;
        assert!(refused(1 << 50, 0, None, 0).contains("the host has"));
        assert!(refused(1 << 50, 0, Some(0), 0).contains("the host has"));
        assert!(refused(1 << 50, 0x4000_0000, None, 0).contains("huge pages of 1024 MiB"));
        assert!(refused(4096, 0, Some(4095), 0).contains("no NUMA node 4095; it has 0"));
        assert!(refused(1 << 20, 0, None, 1 << 50).contains("1 MiB of guest memory, the host has 0 MiB free"));
        let on_node = memory.has_room(1 << 20, 0, Some(0), |node| if node.is_some() { 1 << 50 } else { 0 });
        assert!(on_node.unwrap_err().why.ends_with("0 MiB free on NUMA node 0"));
    }
}
