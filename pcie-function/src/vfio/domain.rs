//! The function's IOMMU domain: memory of this process that it can reach.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit};

use super::iova::{Conflict, IovaSpace};
use super::open::os;
use super::sys::Container;
use crate::{BusMemory, FunctionError, Iova, Window};

/// A domain that holds one function.
#[derive(Debug)]
pub(super) struct Domain {
    container: Container,
    space: IovaSpace,
}

impl Domain {
    /// The domain of `container`, with nothing in it.
    pub(super) fn new(container: Container) -> Result<Self, FunctionError> {
        let info = container.info().map_err(os("ask the IOMMU for its valid ranges"))?;
        Ok(Self { container, space: IovaSpace::new(info.page, info.ranges) })
    }

    /// Bytes of its smallest page.
    pub(super) fn page(&self) -> u64 {
        self.space.page()
    }

    /// Pins `memory` and maps it at `iova`.
    ///
    /// # Errors
    /// [`FunctionError::Unusable`]: that range can't be had, another one might; [`FunctionError::Os`]: none can.
    pub(super) fn map(&mut self, memory: &Window, iova: Iova, device_writes: bool) -> Result<(), FunctionError> {
        let len = memory.len() as u64;
        let refused = |why: &str| FunctionError::Unusable(format!("IOVA {iova:#x}+{len:#x} {why}"));
        self.space.check(iova, len).map_err(|conflict| {
            refused(match conflict {
                Conflict::Misaligned => "is not whole pages",
                Conflict::Reserved => "is reserved, or past what the IOMMU translates",
                Conflict::Taken => "is taken",
            })
        })?;
        self.container.map(memory, iova, device_writes).map_err(|errno| match errno {
            Errno::EINVAL | Errno::EPERM | Errno::EEXIST => refused("is refused by the IOMMU"),
            Errno::ENOMEM if is_over_limit(len) => {
                FunctionError::Os("pin memory for the function: raise RLIMIT_MEMLOCK (LimitMEMLOCK=, ulimit -l)", errno)
            }
            errno => FunctionError::Os("pin memory for the function", errno),
        })?;
        self.space.insert(iova, len);
        Ok(())
    }

    /// Pins `memory` and maps it as high as there is room: far from guest-physical addresses.
    pub(super) fn map_high(&mut self, memory: &Window, device_writes: bool) -> Result<Iova, FunctionError> {
        let iova = self
            .space
            .highest(memory.len() as u64)
            .ok_or_else(|| FunctionError::Unusable("the function's IOMMU domain has no room".into()))?;
        self.map(memory, iova, device_writes).map(|()| iova)
    }

    /// Takes a mapping back. When this returns the IOMMU has forgotten it, and what was in flight has ended.
    pub(super) fn unmap(&mut self, iova: Iova) -> Result<(), FunctionError> {
        let nothing = || FunctionError::Unusable(format!("nothing is mapped at IOVA {iova:#x}"));
        let len = self.space.len_at(iova).ok_or_else(nothing)?;
        self.container.unmap(iova, len).map_err(os("take memory away from the function"))?;
        self.space.remove(iova);
        Ok(())
    }
}

/// Whether pinning `len` bytes more can be against this process' limit.
fn is_over_limit(len: u64) -> bool {
    getrlimit(Resource::RLIMIT_MEMLOCK).is_ok_and(|(soft, _)| soft < len.saturating_mul(2))
}
