//! Sockets, cores and threads, and the APIC IDs that follow from them.

/// Most vCPUs of a VM: as many as a function's lanes can be (docs/wire.md §7). A host's KVM may have fewer.
pub const MAX_CPUS: u32 = 1024;

/// How a guest's vCPUs are arranged. Each level takes whole bits of the APIC ID (Intel SDM volume 3A §9.9.1), so that the IDs have
/// gaps where a count is no power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

/// Where a vCPU sits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Socket, from 0.
    pub socket: u32,
    /// Core in its socket.
    pub core: u32,
    /// Thread in its core.
    pub thread: u32,
}

impl Topology {
    /// `sockets` of `cores` of `threads`.
    ///
    /// # Errors
    /// A count is 0, or there are more than [`MAX_CPUS`] vCPUs.
    pub fn new(sockets: u32, cores: u32, threads: u32) -> Result<Self, TopologyError> {
        let cpus = u64::from(sockets).saturating_mul(cores.into()).saturating_mul(threads.into());
        if cpus == 0 {
            return Err(TopologyError::Zero);
        }
        if cpus > MAX_CPUS.into() {
            return Err(TopologyError::TooMany { cpus });
        }
        Ok(Self { sockets, cores, threads })
    }

    /// One socket of `cpus` cores.
    ///
    /// # Errors
    /// As [`Topology::new`].
    pub fn flat(cpus: u32) -> Result<Self, TopologyError> {
        Self::new(1, cpus, 1)
    }

    /// How many vCPUs there are.
    pub fn cpus(&self) -> u32 {
        self.sockets * self.cpus_per_package()
    }

    /// APIC IDs of all vCPUs, the boot processor first. KVM takes them as vCPU IDs.
    pub fn apic_ids(&self) -> impl Iterator<Item = u32> + use<> {
        let topology = *self;
        (0..topology.cpus()).map(move |index| topology.apic_id(index))
    }

    /// APIC ID of the vCPU that is the `index`-th: threads are counted first, sockets last.
    pub fn apic_id(&self, index: u32) -> u32 {
        let thread = index % self.threads;
        let core = index / self.threads % self.cores;
        let socket = index / self.cpus_per_package();
        socket << self.package_bits() | core << self.thread_bits() | thread
    }

    /// Where the vCPU with an APIC ID sits.
    pub fn place(&self, apic_id: u32) -> Place {
        let below = |bits: u32| apic_id & ((1 << bits) - 1);
        Place {
            socket: apic_id >> self.package_bits(),
            core: below(self.package_bits()) >> self.thread_bits(),
            thread: below(self.thread_bits()),
        }
    }

    /// Sockets.
    pub fn sockets(&self) -> u32 {
        self.sockets
    }

    /// Cores of a socket.
    pub fn cores(&self) -> u32 {
        self.cores
    }

    /// Threads of a core.
    pub fn threads(&self) -> u32 {
        self.threads
    }

    /// vCPUs of a socket.
    pub(super) fn cpus_per_package(&self) -> u32 {
        self.cores * self.threads
    }

    /// Bits of an APIC ID below the core's number.
    pub(super) fn thread_bits(&self) -> u32 {
        bits_for(self.threads)
    }

    /// Bits of an APIC ID below the socket's number.
    pub(super) fn package_bits(&self) -> u32 {
        bits_for(self.cores) + self.thread_bits()
    }
}

/// Bits that tell `count` things apart.
fn bits_for(count: u32) -> u32 {
    count.next_power_of_two().trailing_zeros()
}

/// Why there is no such topology.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// No vCPU at all.
    #[error("a guest without vCPUs can't run: give at least one socket, core and thread")]
    Zero,
    /// More than we can describe.
    #[error("{cpus} vCPUs are more than the {MAX_CPUS} that a guest may have: give it fewer")]
    TooMany {
        /// vCPUs asked for.
        cpus: u64,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_count_threads_then_cores_then_sockets() {
        let ids =
            |sockets, cores, threads| Topology::new(sockets, cores, threads).unwrap().apic_ids().collect::<Vec<_>>();
        assert_eq!(ids(1, 1, 1), [0]);
        assert_eq!(ids(1, 3, 1), [0, 1, 2]);
        assert_eq!(ids(1, 3, 2), [0, 1, 2, 3, 4, 5]);
        assert_eq!(ids(2, 3, 1), [0, 1, 2, 4, 5, 6]);
        assert_eq!(ids(2, 3, 2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(Topology::flat(1024).unwrap().apic_ids().last(), Some(1023));
    }

    #[test]
    fn an_id_leads_back_to_its_place() {
        let topology = Topology::new(3, 5, 2).unwrap();
        for (index, id) in (0..).zip(topology.apic_ids()) {
            let place = topology.place(id);
            assert_eq!((place.socket * 5 + place.core) * 2 + place.thread, index);
        }
    }

    #[test]
    fn impossible_counts_are_refused() {
        assert_eq!(Topology::flat(0), Err(TopologyError::Zero));
        assert_eq!(Topology::new(2, 0, 2), Err(TopologyError::Zero));
        assert_eq!(Topology::flat(1025), Err(TopologyError::TooMany { cpus: 1025 }));
        assert!(matches!(Topology::new(u32::MAX, u32::MAX, u32::MAX), Err(TopologyError::TooMany { .. })));
    }
}
