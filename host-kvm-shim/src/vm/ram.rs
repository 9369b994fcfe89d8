//! Guest RAM: allocated, and mapped for the device.

use std::collections::BTreeMap;

use api_channel::call::{Discard, Extent, PAGE, RamRequest};
use nix::errno::Errno;
use pcie_function::{FunctionError, HostFunction, Iova};

use crate::error::Refusal;
use crate::host::MemoryInfo;
use crate::kvm::GuestMemory;

/// An allocation that the SoC asked for.
#[derive(Debug)]
pub(crate) struct Ram {
    pub(crate) memory: GuestMemory,
    /// The node that it is on, where the SoC said so.
    node: Option<u32>,
    /// Bytes of a huge page, 0 for none.
    huge: u64,
    iova: Iova,
}

/// Most allocations of a VM, and so their ids.
const MOST: u32 = 64;
/// Where RAM goes for the device if it can't go where it was wanted: bases that IOMMUs of 39, 42 and 48 bits reach.
const ELSEWHERE: [Iova; 3] = [1 << 38, 1 << 41, 1 << 46];

impl Ram {
    /// Allocates what `request` wants, beside the VM's `others`, and maps it for the device; where, the extents say. Where it fails,
    /// nothing is left of it.
    pub(crate) fn new<F: HostFunction>(
        function: &mut F,
        host: &MemoryInfo,
        others: &BTreeMap<u32, Self>,
        request: &RamRequest,
    ) -> Result<(Self, Vec<Extent>), Refusal> {
        let RamRequest { id, node, len, iova, huge } = *request;
        if id >= MOST || !matches!(huge, 0 | 0x20_0000 | 0x4000_0000) {
            return Err(Refusal::argument(format!(
                "RAM {id} in pages of {huge} bytes: ids go to 63, pages are 0, 2 MiB or 1 GiB"
            )));
        }
        let unit = huge.max(PAGE);
        let size = usize::try_from(len).ok().filter(|_| len != 0 && len.is_multiple_of(unit) && len < 1 << 46);
        let Some(size) = size.filter(|_| iova.is_multiple_of(PAGE)) else {
            return Err(Refusal::argument(format!(
                "{len} bytes of RAM at IOVA {iova:#x}: not whole pages of {unit} bytes"
            )));
        };
        let node = match node {
            -1 => None,
            n => Some(u32::try_from(n).map_err(|_| Refusal::argument(format!("NUMA node {n}")))?),
        };
        host.has_room(len, huge, node, |node| {
            let there = others.values().filter(|ram| node.is_none() || ram.node == node);
            there.map(|ram| ram.memory.untaken()).fold(0, u64::saturating_add)
        })?;
        let memory = GuestMemory::new(size, huge, node).map_err(|(what, errno)| match errno {
            // Free ones may be reserved for others, or not where they are wanted.
            Errno::ENOMEM | Errno::EFAULT if huge != 0 => Refusal::unavailable(format!(
                "{} huge pages of {} MiB are free, but others have reserved some of them: reserve more",
                len / huge,
                huge >> 20
            )),
            errno => Refusal::os(what, errno),
        })?;
        let iova = map(function, &memory, iova)?;
        Ok((Self { memory, node, huge, iova }, vec![Extent { offset: 0, iova, len }]))
    }

    /// Bytes of one of its pages.
    pub(crate) fn page(&self) -> u64 {
        self.huge.max(PAGE)
    }

    /// Gives part of it back to the host.
    pub(crate) fn discard(&self, run: &Discard) -> Result<(), Refusal> {
        let Discard { ram, offset, len, .. } = *run;
        if self.huge != 0 {
            return Err(Refusal::unavailable(format!("RAM {ram} is huge pages, which are its VM's until it ends")));
        }
        let within = len != 0 && offset.checked_add(len).is_some_and(|end| end <= self.memory.len());
        if !within || !offset.is_multiple_of(PAGE) || !len.is_multiple_of(PAGE) {
            return Err(Refusal::argument(format!("{len:#x} bytes at {offset:#x} are no pages of RAM {ram}")));
        }
        self.memory.discard(offset as usize, len as usize).map_err(Refusal::nix("give memory back"))
    }

    /// Takes the memory away from the device; once this returns, no transfer touches it.
    pub(crate) fn unmap<F: HostFunction>(&self, function: &mut F) -> Result<(), Refusal> {
        Ok(function.unmap(self.iova)?)
    }
}

/// Maps the memory where it is wanted, or where there is room.
fn map<F: HostFunction>(function: &mut F, memory: &GuestMemory, wanted: Iova) -> Result<Iova, Refusal> {
    let mut first = None;
    let elsewhere = ELSEWHERE.into_iter().flat_map(|base| (0..u64::from(MOST)).map(move |i| base + (i << 32)));
    for iova in std::iter::once(wanted).chain(elsewhere) {
        match function.map_ram(memory.fd(), 0, iova, memory.len(), true) {
            Ok(()) => return Ok(iova),
            // That range can't be had; what else fails would fail anywhere, and pinning takes its time.
            Err(error @ FunctionError::Unusable(_)) => first = first.or(Some(error)),
            Err(error) => return Err(error.into()),
        }
    }
    Err(first.map_or_else(|| Refusal::unavailable("no IOVA is free"), Into::into))
}
