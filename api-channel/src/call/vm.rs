//! The VM as a whole, and the host that runs it.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::bulk;
use crate::codec::{Malformed, Reader, Writer};

/// How interrupts get to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Irqchip {
    /// PIC, IOAPIC, LAPIC and PIT in KVM.
    Full = 1,
    /// LAPIC in KVM, IOAPIC on the SoC: level lines report their EOI as an exit.
    Split = 2,
}

/// Creates a VM.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct CreateVm {
    /// vCPUs, and so lanes: 1–1024, no more than the layout has.
    pub vcpus: u32,
    /// An [`Irqchip`].
    pub irqchip: u32,
    /// [`CreateVm::HV_SYNIC`]; others are reserved, 0.
    pub flags: u32,
    /// Entries of each vCPU's dirty ring (`KVM_CAP_DIRTY_LOG_RING`), a power of two; 0: dirty pages are logged by bitmap.
    pub dirty_ring: u32,
    /// Nanoseconds that a vCPU polls for its completion before it sleeps, at most; 0 lets the host choose.
    pub spin_ns: u64,
    /// What the host calls the VM where a person reads it.
    pub name: Name,
}

impl CreateVm {
    /// [`CreateVm::flags`]: the vCPUs have Hyper-V's synthetic interrupt controller (`KVM_CAP_HYPERV_SYNIC`).
    pub const HV_SYNIC: u32 = 1;
}

/// A VM's name: UTF-8 padded with zeros, nothing that steers a terminal; empty for none.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Name(pub [u8; Self::MOST]);

impl Name {
    /// Most bytes of a name.
    pub const MOST: usize = 64;
    /// No name.
    pub const NONE: Self = Self([0; Self::MOST]);

    /// A name, cut where it is too long, or where it can't be told.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let end = name.find(char::is_control).unwrap_or(name.len());
        let text = &name.as_bytes()[..end.min(name.floor_char_boundary(Self::MOST))];
        let mut bytes = [0; Self::MOST];
        bytes[..text.len()].copy_from_slice(text);
        Self(bytes)
    }

    /// The name as the peer wrote it.
    ///
    /// # Errors
    /// Something else than printable text and zeros behind it.
    pub fn text(&self) -> Result<&str, Malformed> {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(Self::MOST);
        let (text, rest) = self.0.split_at(end);
        let text = std::str::from_utf8(text).map_err(|_| Malformed)?;
        if text.contains(char::is_control) || rest.iter().any(|&b| b != 0) { Err(Malformed) } else { Ok(text) }
    }
}

impl std::fmt::Debug for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// A VM was created. Extents of the lanes' mailbox memory, in IOVAs.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct VmCreated {
    /// Completion lines, 64 bytes a lane.
    pub completions: u64,
    /// Credit lines, 64 bytes a lane.
    pub credits: u64,
    /// `ins` pages, 4096 bytes a lane.
    pub ins: u64,
    /// `outs` pages, 4096 bytes a lane.
    pub outs: u64,
    /// The host's TSC frequency, in kHz.
    pub tsc_khz: u32,
    /// Vector that wakes lane 0; lane n has the n-th after it. [`VmCreated::SHARED`] vectors are shared by lanes modulo.
    pub lane_vector: u32,
    /// How many vectors the lanes have.
    pub lane_vectors: u32,
    /// The first vector that is free to be wired to a GSI.
    pub free_vector: u32,
    /// How many of them.
    pub free_vectors: u32,
    /// Whether host TSCs are synchronised, so that writes may be posted (bit 0); level lines with resample work (bit 1); the host takes
    /// guest memory back (bit 2); the guest can be shown the function's notify pages (bit 3).
    pub features: u32,
}

impl VmCreated {
    /// [`VmCreated::features`]: writes may be posted.
    pub const POSTING: u32 = 1;
    /// [`VmCreated::features`]: irqfd with resample reports the guest's EOI.
    pub const RESAMPLE: u32 = 2;

    /// [`VmCreated::features`]: the host takes guest memory back; where a device pins it, it can't.
    pub const DISCARD: u32 = 4;

    /// [`VmCreated::features`]: the guest can be shown the function's notify pages. How many there are the function says to both its
    /// ends.
    pub const NOTIFY: u32 = 8;

    /// The vector that wakes `lane`.
    #[must_use]
    pub fn vector_of(&self, lane: u32) -> u32 {
        self.lane_vector + lane % self.lane_vectors.max(1)
    }
}

/// A counter by name.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable)]
pub struct Statistic {
    /// Name, padded with zeros: `io_exits`, `mmio_exits`, … (KVM's own), `shim.pio`, `shim.mmio`, … (exits by kind).
    pub name: [u8; 48],
    /// vCPU, or [`super::VM`].
    pub target: u64,
    /// Value.
    pub value: u64,
}

/// A NUMA node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NumaNode {
    /// Its number.
    pub node: u32,
    /// Its memory in KiB.
    pub memory_kib: u64,
    /// Its CPUs, as the kernel lists them: `0-3,8`.
    pub cpus: String,
}

/// A PCI device, by its address and sysfs ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// `0000:00:1f.2`.
    pub address: String,
    /// Vendor id.
    pub vendor: u16,
    /// Device id.
    pub device: u16,
    /// Class, subclass, programming interface.
    pub class: u32,
    /// NUMA node, -1 for none.
    pub numa_node: i32,
}

/// A server's inventory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInfo {
    /// CPU model name.
    pub cpu_model: String,
    /// CPU vendor.
    pub cpu_vendor: String,
    /// CPU flags, as /proc/cpuinfo lists them.
    pub cpu_flags: String,
    /// Logical CPUs online.
    pub cpus: u32,
    /// Memory in KiB, MemTotal.
    pub memory_kib: u64,
    /// Kernel release.
    pub kernel: String,
    /// NUMA nodes.
    pub nodes: Vec<NumaNode>,
    /// PCI devices.
    pub pci: Vec<PciDevice>,
}

/// Most bytes of one text.
const TEXT: usize = 1 << 14;
/// Most nodes, most devices.
const MOST: u64 = 4096;

fn put_text(w: Writer, text: &str) -> Writer {
    w.list(&text.as_bytes()[..text.floor_char_boundary(TEXT)])
}

fn take_text(r: &mut Reader<'_>) -> Result<String, Malformed> {
    let text = String::from_utf8(r.list::<u8>(TEXT)?).map_err(|_| Malformed)?;
    // It goes to a terminal: nothing that steers one.
    if text.contains(char::is_control) { Err(Malformed) } else { Ok(text) }
}

fn take_count(r: &mut Reader<'_>) -> Result<u64, Malformed> {
    r.take::<u64>().and_then(|n| if n <= MOST { Ok(n) } else { Err(Malformed) })
}

impl HostInfo {
    /// The bulk that carries it. Of more PCI devices than that can hold, some thousands, the last are left out.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::default();
        for text in [&self.cpu_model, &self.cpu_vendor, &self.cpu_flags, &self.kernel] {
            w = put_text(w, text);
        }
        w = w.put(&u64::from(self.cpus)).put(&self.memory_kib).put(&(self.nodes.len() as u64));
        for node in &self.nodes {
            w = put_text(w.put(&u64::from(node.node)).put(&node.memory_kib), &node.cpus);
        }
        let before = w.done();
        let mut room = bulk::MOST.saturating_sub(before.len() + 8);
        let mut devices = Writer::default();
        let mut count = 0u64;
        for pci in &self.pci {
            let ids = u64::from(pci.vendor) | u64::from(pci.device) << 16 | u64::from(pci.class) << 32;
            let device = put_text(Writer::default().put(&ids).put(&i64::from(pci.numa_node)), &pci.address).done();
            let Some(left) = room.checked_sub(device.len()).filter(|_| count < MOST) else { break };
            (room, count, devices) = (left, count + 1, devices.bytes(&device));
        }
        Writer::default().bytes(&before).put(&count).bytes(&devices.done()).done()
    }

    /// Reads it back.
    ///
    /// # Errors
    /// It is truncated, too long, or something else than printable text stands where text should be.
    pub fn decode(bulk: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bulk);
        let r = &mut reader;
        let [cpu_model, cpu_vendor, cpu_flags, kernel] = [take_text(r)?, take_text(r)?, take_text(r)?, take_text(r)?];
        let cpus = super::narrow(r.take()?)?;
        let memory_kib = r.take()?;
        let nodes = (0..take_count(r)?)
            .map(|_| Ok(NumaNode { node: super::narrow(r.take()?)?, memory_kib: r.take()?, cpus: take_text(r)? }))
            .collect::<Result<_, Malformed>>()?;
        let pci = (0..take_count(r)?)
            .map(|_| {
                let ids: u64 = r.take()?;
                let node: i64 = r.take()?;
                Ok(PciDevice {
                    address: take_text(r)?,
                    vendor: ids as u16,
                    device: (ids >> 16) as u16,
                    class: (ids >> 32) as u32,
                    numa_node: i32::try_from(node).map_err(|_| Malformed)?,
                })
            })
            .collect::<Result<_, Malformed>>()?;
        reader.end()?;
        Ok(Self { cpu_model, cpu_vendor, cpu_flags, cpus, memory_kib, kernel, nodes, pci })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_cut_where_it_must_be() {
        for name in ["", "web-1", "für", &"x".repeat(64)] {
            assert_eq!(Name::new(name).text(), Ok(name));
        }
        // 2 bytes each: the 33rd doesn't fit.
        assert_eq!(Name::new(&format!("x{}", "ü".repeat(40))).text(), Ok(&*format!("x{}", "ü".repeat(31))));
        assert_eq!(Name::new("a\nb").text(), Ok("a"));
    }

    #[test]
    fn a_name_that_is_no_text_is_refused() {
        let with = |bytes: &[u8]| {
            let mut name = [0; Name::MOST];
            name[..bytes.len()].copy_from_slice(bytes);
            Name(name).text().map(str::to_owned)
        };
        for bad in [&b"a\0b"[..], b"\xff", b"a\x1b[2J", b"\0a", &[0xc3; 64]] {
            assert_eq!(with(bad), Err(Malformed), "{bad:?}");
        }
    }
}
