//! The language between a testbed machine's first process and whoever drives the machine.
//!
//! The machine reads its [`Config`] from [`CONFIG_PATH`]. Then it speaks over a character channel, one JSON object a line:
//! [`Call`]s go in, [`Line`]s come out. Replies carry the call's number; events come whenever something happened.

use std::{fs, io};

use serde::{Deserialize, Serialize};

/// Where the machine's [`Config`] lies in its initramfs.
pub const CONFIG_PATH: &str = "/etc/testbed.json";
/// Name of the virtio-serial port that carries calls and lines.
pub const CONTROL_PORT: &str = "control";
/// Begins the console's line that holds the [`Inventory`].
pub const INVENTORY_MARK: &str = "OUTBOARD-INVENTORY ";
/// The console's line once the machine takes calls.
pub const READY_MARK: &str = "OUTBOARD-READY";

/// What the machine's first process does before it takes calls.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Config {
    /// Host name of the machine.
    pub name: String,
    /// Module files of the initramfs, in the order of loading, with their parameters.
    pub modules: Vec<Module>,
    /// PCI functions that are bound to vfio-pci.
    pub bind: Vec<PciId>,
    /// Programs that are started as soon as the functions are bound.
    pub start: Vec<Start>,
}

/// A kernel module to load.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// Its file in the initramfs.
    pub path: String,
    /// Its parameters, as insmod takes them.
    pub parameters: String,
}

/// PCI vendor and device number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciId {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
}

/// A program started once for each PCI function of a kind.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Start {
    /// The kind of function.
    pub id: PciId,
    /// The program's path in the machine.
    pub program: String,
    /// Its arguments; `{}` in one of them stands for the function's address.
    pub args: Vec<String>,
}

/// A request with the number that its reply repeats.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the caller.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub request: Request,
}

/// What a machine can be asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Request {
    /// Answers with [`Answer::Inventory`].
    Inventory,
    /// The whole user space; answers with [`Answer::Programs`].
    List,
    /// Starts a program and answers with its [`Answer::Pid`]; its output and its end come as events. With a channel, its
    /// standard streams are the virtio-serial port of that name instead.
    Run {
        /// Its path in the machine.
        program: String,
        /// Its arguments.
        args: Vec<String>,
        /// A virtio-serial port.
        channel: Option<String>,
    },
    /// Runs a program to its end, at most for `seconds`; answers with [`Answer::Ended`].
    Exec {
        /// Its path in the machine.
        program: String,
        /// Its arguments.
        args: Vec<String>,
        /// Then it is killed.
        seconds: u64,
    },
    /// Sends a signal; answers with [`Answer::Done`].
    Signal {
        /// To whom.
        pid: i32,
        /// Which, by number.
        signal: i32,
    },
    /// A program's memory; answers with [`Answer::Memory`].
    Memory {
        /// Whose.
        pid: i32,
    },
    /// A program's threads and the CPU time each used; answers with [`Answer::Threads`].
    Threads {
        /// Whose.
        pid: i32,
    },
    /// What a program has open; answers with [`Answer::Descriptors`].
    Descriptors {
        /// Whose.
        pid: i32,
    },
    /// What its clock says; answers with [`Answer::Clock`].
    Clock,
    /// Steps its clock; answers with [`Answer::Done`].
    StepClock {
        /// By how much, in ns.
        by: i64,
    },
    /// A file's text; answers with [`Answer::Text`].
    Read {
        /// Which.
        path: String,
    },
    /// Writes text to a file, as to an attribute of sysfs; answers with [`Answer::Done`].
    Write {
        /// Which.
        path: String,
        /// What.
        text: String,
    },
    /// Binds the function to vfio-pci (again); answers with [`Answer::Done`].
    Bind {
        /// Its PCI address, `0000:01:00.0`.
        function: String,
    },
    /// Switches the machine off; answers with [`Answer::Done`] before it does.
    PowerOff,
}

/// A line from the machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line {
    /// The machine takes calls from now on.
    Ready,
    /// To the call of that number.
    Reply {
        /// The call's number.
        id: u64,
        /// What came of it; an error is one line of text.
        result: Result<Answer, String>,
    },
    /// A program wrote a line to its standard output or error.
    Output {
        /// Which program.
        pid: i32,
        /// The line, without its end.
        text: String,
    },
    /// A program that was started by itself or by [`Request::Run`] ended.
    Exited {
        /// Which.
        pid: i32,
        /// How.
        status: Status,
    },
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// By itself, with this status.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// A successful reply's content.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// It was done.
    Done,
    /// What the machine has.
    Inventory(Inventory),
    /// What runs.
    Programs(Vec<Program>),
    /// What was started.
    Pid(i32),
    /// What came of [`Request::Exec`].
    Ended(Ended),
    /// To [`Request::Memory`].
    Memory(Memory),
    /// To [`Request::Threads`].
    Threads(Vec<Thread>),
    /// To [`Request::Descriptors`]: as [`descriptors`] has them.
    Descriptors(Vec<String>),
    /// To [`Request::Clock`]: CLOCK_REALTIME, in ns since 1970.
    Clock(i64),
    /// To [`Request::Read`].
    Text(String),
}

/// A machine as its own kernel describes it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Inventory {
    /// /proc/cpuinfo, of the first processor.
    pub cpu: Cpu,
    /// MemTotal of /proc/meminfo, in KiB.
    pub memory_kib: u64,
    /// 2 MiB pages that are reserved.
    pub hugepages: u64,
    /// NUMA nodes.
    pub nodes: Vec<Node>,
    /// Every PCI function in sysfs, by address.
    pub pci: Vec<PciFunction>,
    /// /dev/kvm is there.
    pub kvm: bool,
    /// KVM uses nested paging (or EPT).
    pub nested_paging: bool,
}

/// Processors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cpu {
    /// `vendor_id`; empty where the architecture has none.
    pub vendor: String,
    /// `model name`; empty where the architecture has none.
    pub model: String,
    /// How many are online.
    pub count: usize,
    /// `flags` (x86) or `Features` (Arm).
    pub flags: Vec<String>,
}

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// Its number.
    pub id: u32,
    /// Its processors, as a list like `0-3`.
    pub cpus: String,
    /// Its memory in KiB.
    pub memory_kib: u64,
}

/// A PCI function in sysfs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciFunction {
    /// `0000:01:00.0`.
    pub address: String,
    /// Vendor and device.
    pub id: PciId,
    /// Class code, 24 bits.
    pub class: u32,
    /// The driver that holds it.
    pub driver: Option<String>,
    /// Its IOMMU group.
    pub iommu_group: Option<u32>,
}

/// A running program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Program {
    /// Its process.
    pub pid: i32,
    /// Its command line.
    pub command: Vec<String>,
}

/// A program that was waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// How it ended.
    pub status: Status,
    /// Everything it wrote to standard output.
    pub stdout: String,
    /// Everything it wrote to standard error.
    pub stderr: String,
}

/// A program's memory in KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Private_Clean + Private_Dirty + Private_Hugetlb of each mapping that has any.
    pub private: Vec<Mapping>,
    /// VmRSS.
    pub resident: u64,
    /// VmPTE: page tables.
    pub page_tables: u64,
}

/// A mapping's private memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// File or tag, empty for anonymous memory.
    pub name: String,
    /// In KiB.
    pub kib: u64,
}

/// A thread and its CPU time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    /// Its id.
    pub tid: i32,
    /// Its name.
    pub name: String,
    /// Time on a processor by the scheduler's clock, guest time included, in ns.
    pub run_ns: u64,
    /// Time in the guest by the tick's count, in ms.
    pub guest_ms: u64,
}

impl Thread {
    /// Whether it is KVM's own, one a VM: the kernel's thread that splits executable huge pages shows up in the process.
    #[must_use]
    pub fn is_of_kvm(&self) -> bool {
        // The kernel cuts names after 15 bytes.
        self.name == "kvm-nx-lpage-re"
    }
}

impl Memory {
    /// All private memory in KiB, but for mappings whose name holds `left_out`.
    #[must_use]
    pub fn private_kib_without(&self, left_out: &str) -> u64 {
        self.private.iter().filter(|mapping| !mapping.name.contains(left_out)).map(|mapping| mapping.kib).sum()
    }

    /// All private memory in KiB.
    #[must_use]
    pub fn private_kib(&self) -> u64 {
        self.private.iter().map(|mapping| mapping.kib).sum()
    }
}

/// What process `pid` of this machine has open, by proc_pid_fd(5) and in order: two lists of one program that has opened the same are equal,
/// since what stands for an inode's number is left out (`socket`, `anon_inode:kvm-vcpu`).
///
/// # Errors
/// There is no such process, or it isn't the caller's to look at.
pub fn descriptors(pid: u32) -> io::Result<Vec<String>> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd"))?;
    // One that is closed meanwhile isn't open.
    let targets = entries.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    let mut open: Vec<_> = targets.map(|target| without_number(&target.to_string_lossy())).collect();
    open.sort();
    Ok(open)
}

/// `socket` for `socket:[4711]`, `kvm-vcpu` for `kvm-vcpu:3`.
fn without_number(target: &str) -> String {
    let is_number = |text: &str| text.chars().all(|c| c.is_ascii_digit() || c == '[' || c == ']');
    let kind = target.rsplit_once(':').filter(|(_, number)| is_number(number)).map(|(kind, _)| kind);
    kind.unwrap_or(target).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_one_line_of_json() {
        let call = Call { id: 7, request: Request::Memory { pid: 42 } };
        let line = serde_json::to_string(&call).unwrap();
        assert_eq!(line, r#"{"id":7,"do":"memory","pid":42}"#);
        let back: Call = serde_json::from_str(&line).unwrap();
        assert!(matches!(back.request, Request::Memory { pid: 42 }));
    }

    #[test]
    fn what_is_open_is_told_by_its_kind() {
        let before = descriptors(std::process::id()).unwrap();
        let pair = std::os::unix::net::UnixStream::pair().unwrap();
        let mut with = before.clone();
        with.extend(["socket".to_owned(), "socket".to_owned()]);
        with.sort();
        assert_eq!(descriptors(std::process::id()).unwrap(), with);
        drop(pair);
        assert_eq!(descriptors(std::process::id()).unwrap(), before);
        assert_eq!(without_number("anon_inode:kvm-vm"), "anon_inode:kvm-vm");
    }

    #[test]
    fn replies_say_whose_and_what() {
        let line = Line::Reply { id: 7, result: Err("no such program".to_owned()) };
        let text = serde_json::to_string(&line).unwrap();
        assert_eq!(text, r#"{"reply":{"id":7,"result":{"Err":"no such program"}}}"#);
        assert_eq!(serde_json::from_str::<Line>(&text).unwrap(), line);
    }
}
