//! Opening a function: group, domain, device, and what either side takes of it first.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use vfio_bindings::bindings::vfio::{VFIO_PCI_ERR_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_REQ_IRQ_INDEX};

use super::domain::Domain;
use super::sys::{Container, Device, Group};
use super::sysfs::{DEVICES, Found, find};
use crate::card::profile::{Profile, Side};
use crate::card::{NOTIFY_PAGES_MAX, bar};
use crate::function::eventfd;
use crate::header::Role;
use crate::{BusError, FunctionError, Mapping, Window};

/// PCI command register, and its bits for memory space, bus mastering, and no INTx.
const COMMAND: u64 = 0x04;
const COMMAND_BITS: u16 = 1 << 1 | 1 << 2 | 1 << 10;

/// A function in the hands of this process. Closing it resets it and takes all its DMA away.
#[derive(Debug)]
pub(super) struct Opened {
    // Dropped in this order: the device before its group and its domain.
    pub(super) device: Device,
    _group: Group,
    pub(super) domain: Domain,
    pub(super) profile: &'static Profile,
    pub(super) role: Role,
    /// Signalled when the kernel wants the function back (unbound, hot-unplugged) or it reports an error that can't be corrected.
    loss: OwnedFd,
    /// MSI-X vectors.
    pub(super) vectors: u32,
}

impl Opened {
    /// Opens the function at `address`, which resets it, and lets it master the bus. MSI-X is on, with no vector in use.
    ///
    /// # Errors
    /// It can't be had, in one line that says what to do.
    pub(super) fn new(address: &str, side: Side) -> Result<Self, FunctionError> {
        let found = find(Path::new(DEVICES), address, side)?;
        let (container, group, device) = open_found(&found)?;
        Self::with(&found, container, group, device)
    }

    /// The same, of what another process opened.
    ///
    /// # Errors
    /// As [`Opened::new`]'s.
    pub(super) fn adopt(address: &str, side: Side, opened: VfioDescriptors) -> Result<Self, FunctionError> {
        let found = find(Path::new(DEVICES), address, side)?;
        let VfioDescriptors { container, group, device } = opened;
        Self::with(&found, Container::from(container), Group::from(group), Device::from(device))
    }

    fn with(found: &Found, container: Container, group: Group, device: Device) -> Result<Self, FunctionError> {
        let domain = Domain::new(container)?;

        let command = u16::from_le_bytes(device.read_config(COMMAND).map_err(os("read configuration space"))?);
        if command == u16::MAX {
            return Err(BusError::Gone.into());
        }
        let command = (command | COMMAND_BITS).to_le_bytes();
        device.write_config(COMMAND, &command).map_err(os("write configuration space"))?;

        let vectors = device.interrupts(VFIO_PCI_MSIX_IRQ_INDEX).map_err(os("count the function's vectors"))?;
        let none = vec![None; vectors as usize];
        device.set_interrupts(VFIO_PCI_MSIX_IRQ_INDEX, 0, &none).map_err(os("turn on the function's vectors"))?;
        let loss = eventfd()?;
        for index in [VFIO_PCI_REQ_IRQ_INDEX, VFIO_PCI_ERR_IRQ_INDEX] {
            // Not every kernel and every function has them.
            if device.interrupts(index).is_ok_and(|count| count != 0) {
                let event = [Some(loss.as_fd())];
                device.set_interrupts(index, 0, &event).map_err(os("watch the function's removal"))?;
            }
        }
        let Found { profile, role, .. } = *found;
        Ok(Self { device, _group: group, domain, profile, role, loss, vectors })
    }

    /// Maps a BAR, all of it.
    pub(super) fn map_bar(&self, bar: u32) -> Result<Window, FunctionError> {
        let region = self.device.region(bar).map_err(os("look at a BAR"))?;
        let len = usize::try_from(region.size).ok().filter(|len| region.mappable && *len != 0);
        let len = len.ok_or_else(|| FunctionError::Unusable(format!("BAR {bar} of the function can't be mapped")))?;
        Mapping::device(self.device.as_fd(), region.offset, len).map(|mapping| mapping.window())
    }

    /// Maps the notify pages, of which the card says that it has `count`; none where they can't be mapped.
    pub(super) fn map_notify_pages(&self, count: u32) -> Result<Option<Window>, FunctionError> {
        if count == 0 {
            return Ok(None);
        }
        let bar = self.profile.notify;
        let region = self.device.region(bar).map_err(os("look at a BAR"))?;
        let len = u64::from(count) * bar::NOTIFY_PAGE;
        if count > NOTIFY_PAGES_MAX || len > region.size {
            let why = format!("the card says that it has {count} notify pages, in a BAR of {:#x} bytes", region.size);
            return Err(FunctionError::Unusable(why));
        }
        // The kernel lets no process map what shares a page with something else.
        if !region.mappable {
            return Ok(None);
        }
        Mapping::device(self.device.as_fd(), region.offset, len as usize).map(|mapping| Some(mapping.window()))
    }

    /// Has MSI-X vector `vector` signal `event`. One that came before is delivered now.
    pub(super) fn set_vector(&self, vector: u32, event: BorrowedFd<'_>) -> Result<(), FunctionError> {
        let set = self.device.set_interrupts(VFIO_PCI_MSIX_IRQ_INDEX, vector, &[Some(event)]);
        set.map_err(os("wire a vector to an eventfd"))
    }

    /// Readable once [`Opened::is_recalled`].
    pub(super) fn loss(&self) -> BorrowedFd<'_> {
        self.loss.as_fd()
    }

    /// Whether the kernel wants the function back, or it reported a fatal error. Stays so.
    pub(super) fn is_recalled(&self) -> bool {
        let mut event = [PollFd::new(self.loss.as_fd(), PollFlags::POLLIN)];
        poll(&mut event, PollTimeout::ZERO) != Ok(0)
    }
}

/// A function as one process opens it, so that another one, which may not, can use it: [`VfioSoc::adopt`](super::VfioSoc::adopt).
///
/// Whoever holds the container may have the device reach memory of its own, and the group can't be opened again while one of the three is held
/// anywhere, or a BAR is mapped. Once they are all closed the kernel has taken all of the device's memory away and stopped it.
#[derive(Debug)]
pub struct VfioDescriptors {
    /// The IOMMU domain, with the group in it and nothing mapped.
    pub container: OwnedFd,
    /// The function's IOMMU group.
    pub group: OwnedFd,
    /// The function.
    pub device: OwnedFd,
}

impl VfioDescriptors {
    /// Opens the SoC side of the function at a PCI address, which resets it.
    ///
    /// # Errors
    /// As [`VfioSoc::open`](super::VfioSoc::open)'s.
    pub fn open(address: &str) -> Result<Self, FunctionError> {
        let (container, group, device) = open_found(&find(Path::new(DEVICES), address, Side::Soc)?)?;
        Ok(Self { container: container.into(), group: group.into(), device: device.into() })
    }
}

/// Opens group, domain and device.
fn open_found(found: &Found) -> Result<(Container, Group, Device), FunctionError> {
    let address = found.address.to_string_lossy();
    let unusable = |why: &str| FunctionError::Unusable(format!("PCI {address} {why}"));
    let container = Container::open().map_err(|e| no_vfio(e, Path::new("/dev/vfio/vfio")))?;
    let group = Group::open(found.group).map_err(|e| match e {
        Errno::EBUSY => unusable("is in use: another program has its IOMMU group open"),
        e => no_vfio(e, &Path::new("/dev/vfio").join(found.group.to_string())),
    })?;
    if !group.is_viable().map_err(os("look at an IOMMU group"))? {
        return Err(unusable("is in an IOMMU group with a function that another driver holds"));
    }
    container.attach(&group).map_err(|e| match e {
        Errno::EPERM => unusable("can't be isolated: its interrupts aren't remapped (turn interrupt remapping on)"),
        e => FunctionError::Os("put an IOMMU group into a domain", e),
    })?;
    let device = group.device(&found.address).map_err(os("open the PCI function"))?;
    Ok((container, group, device))
}

/// [`FunctionError::Os`], for `map_err`.
pub(super) fn os(what: &'static str) -> impl Fn(Errno) -> FunctionError {
    move |errno| FunctionError::Os(what, errno)
}

/// Why a file of /dev/vfio can't be opened.
fn no_vfio(errno: Errno, path: &Path) -> FunctionError {
    let path = path.display();
    FunctionError::Unusable(match errno {
        Errno::ENOENT | Errno::ENODEV => format!("{path} isn't there: modprobe vfio-pci"),
        Errno::EACCES | Errno::EPERM => format!("{path} may not be opened: run as root, or chown it to this user"),
        errno => format!("{path} can't be opened: {}", errno.desc()),
    })
}
