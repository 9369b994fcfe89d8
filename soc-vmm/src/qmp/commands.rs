//! All commands.

use super::about::{QueryCommands, QueryKvm, QueryName, QueryQmpSchema, QueryStatus, QueryTarget, QueryVersion};
use super::backends::{BlockdevAdd, BlockdevDel, NetdevAdd, NetdevDel};
use super::cdrom::{BlockdevChangeMedium, Eject};
use super::command::Entry;
use super::cpus::{AddCpu, QueryCpusFast, QueryHotpluggableCpus};
use super::devices::{AddDisk, AddNet, DeviceAdd, DeviceDel, QomList};
use super::life::{Cont, Quit, Stop, SystemPowerdown, SystemReset};
use super::ours::{QueryOutboardCounters, QueryOutboardVm};
use super::passed::{AddFd, CloseFd, GetFd, QueryFdsets, RemoveFd};
use super::tune::{Balloon, BlockResize, QomGet, QomSet, QueryBalloon, SetLink};

/// Every command but `qmp_capabilities`, which is the session's own.
pub const COMMANDS: &[Entry] = &[
    Entry::of::<QueryStatus>(),
    Entry::of::<Stop>(),
    Entry::of::<Cont>(),
    Entry::of::<SystemReset>(),
    Entry::of::<SystemPowerdown>(),
    Entry::of::<Quit>(),
    Entry::of::<Eject>(),
    Entry::of::<BlockdevChangeMedium>(),
    Entry::of::<BlockdevAdd>(),
    Entry::of::<BlockdevDel>(),
    Entry::of::<NetdevAdd>(),
    Entry::of::<NetdevDel>(),
    Entry::of::<DeviceAdd>(),
    Entry::of::<DeviceDel>(),
    Entry::of::<QomList>(),
    Entry::of::<QomGet>(),
    Entry::of::<QomSet>(),
    Entry::of::<BlockResize>(),
    Entry::of::<SetLink>(),
    Entry::of::<Balloon>(),
    Entry::of::<QueryBalloon>(),
    Entry::of::<AddDisk>(),
    Entry::of::<AddNet>(),
    Entry::of::<AddCpu>(),
    Entry::of::<QueryCpusFast>(),
    Entry::of::<QueryHotpluggableCpus>(),
    Entry::of::<GetFd>(),
    Entry::of::<CloseFd>(),
    Entry::of::<AddFd>(),
    Entry::of::<RemoveFd>(),
    Entry::of::<QueryFdsets>(),
    Entry::of::<QueryName>(),
    Entry::of::<QueryVersion>(),
    Entry::of::<QueryCommands>(),
    Entry::of::<QueryKvm>(),
    Entry::of::<QueryTarget>(),
    Entry::of::<QueryQmpSchema>(),
    Entry::of::<QueryOutboardVm>(),
    Entry::of::<QueryOutboardCounters>(),
];
