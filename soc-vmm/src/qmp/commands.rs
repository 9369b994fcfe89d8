//! All commands.

use super::about::{QueryCommands, QueryKvm, QueryName, QueryQmpSchema, QueryStatus, QueryTarget, QueryVersion};
use super::backends::{BlockdevDel, NetdevDel, ObjectAdd, ObjectDel};
use super::block::{BlockSetIoThrottle, QueryBlock, QueryBlockstats, QueryNamedBlockNodes};
use super::cdrom::{
    BlockdevChangeMedium, BlockdevCloseTray, BlockdevInsertMedium, BlockdevOpenTray, BlockdevRemoveMedium, Eject,
};
use super::chardevs::{ChardevAdd, ChardevRemove, QueryChardev};
use super::command::Entry;
use super::cpus::{AddCpu, QueryCpusFast, QueryHotpluggableCpus};
use super::devices::{AddDisk, AddNet, DeviceDel};
use super::exports::{BlockExportAdd, BlockExportDel, NbdServerStart, NbdServerStop, QueryBlockExports};
use super::jobs::{
    BlockJobCancel, BlockJobComplete, BlockJobSetSpeed, BlockdevMirror, JobCancel, JobComplete, JobDismiss,
    QueryBlockJobs, QueryJobs,
};
use super::life::{Cont, Quit, SetAction, Stop, SystemPowerdown, SystemReset};
use super::machines::{QueryCpuDefinitions, QueryCpuModelExpansion, QueryMachines, QueryTpmModels, QueryTpmTypes};
use super::migration::{
    CalcDirtyRate, CancelVcpuDirtyLimit, Migrate, MigrateCancel, MigrateContinue, MigrateIncoming, MigratePause,
    MigrateRecover, MigrateSetCapabilities, MigrateSetParameters, MigrateStartPostcopy, QueryDirtyRate, QueryMigrate,
    QueryMigrateCapabilities, QueryMigrateParameters, QueryVcpuDirtyLimit, Save, SetVcpuDirtyLimit,
};
use super::objects::{DeviceListProperties, QomListProperties, QomListTypes};
use super::options::QueryCommandLineOptions;
use super::ours::{QueryOutboardCounters, QueryOutboardVm};
use super::passed::{AddFd, CloseFd, GetFd, QueryFdsets, RemoveFd};
use super::tree::{QomGet, QomList, QomSet};
use super::tune::{Balloon, BlockResize, QueryBalloon, SetLink};
use crate::qemu::{BlockdevAdd, Device, NetdevAdd};

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
    Entry::of::<BlockdevOpenTray>(),
    Entry::of::<BlockdevCloseTray>(),
    Entry::of::<BlockdevRemoveMedium>(),
    Entry::of::<BlockdevInsertMedium>(),
    Entry::of::<QueryBlock>(),
    Entry::of::<QueryBlockstats>(),
    Entry::of::<QueryNamedBlockNodes>(),
    Entry::of::<BlockSetIoThrottle>(),
    Entry::of::<ChardevAdd>(),
    Entry::of::<ChardevRemove>(),
    Entry::of::<QueryChardev>(),
    Entry::of::<SetAction>(),
    Entry::of::<QueryJobs>(),
    Entry::of::<JobCancel>(),
    Entry::of::<JobComplete>(),
    Entry::of::<JobDismiss>(),
    Entry::of::<BlockdevMirror>(),
    Entry::of::<QueryBlockJobs>(),
    Entry::of::<BlockJobCancel>(),
    Entry::of::<BlockJobComplete>(),
    Entry::of::<BlockJobSetSpeed>(),
    Entry::of::<NbdServerStart>(),
    Entry::of::<NbdServerStop>(),
    Entry::of::<BlockExportAdd>(),
    Entry::of::<BlockExportDel>(),
    Entry::of::<QueryBlockExports>(),
    Entry::of::<BlockdevAdd>(),
    Entry::of::<BlockdevDel>(),
    Entry::of::<NetdevAdd>(),
    Entry::of::<NetdevDel>(),
    Entry::of::<ObjectAdd>(),
    Entry::of::<ObjectDel>(),
    Entry::of::<Device>(),
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
    Entry::of::<QueryMachines>(),
    Entry::of::<QueryCpuDefinitions>(),
    Entry::of::<QueryCpuModelExpansion>(),
    Entry::of::<QueryTpmModels>(),
    Entry::of::<QueryTpmTypes>(),
    Entry::of::<QomListTypes>(),
    Entry::of::<DeviceListProperties>(),
    Entry::of::<QomListProperties>(),
    Entry::of::<QueryCommandLineOptions>(),
    Entry::of::<QueryMigrateCapabilities>(),
    Entry::of::<MigrateSetCapabilities>(),
    Entry::of::<QueryMigrateParameters>(),
    Entry::of::<MigrateSetParameters>(),
    Entry::of::<Migrate>(),
    Entry::of::<MigrateIncoming>(),
    Entry::of::<MigrateCancel>(),
    Entry::of::<MigratePause>(),
    Entry::of::<MigrateRecover>(),
    Entry::of::<MigrateStartPostcopy>(),
    Entry::of::<MigrateContinue>(),
    Entry::of::<QueryMigrate>(),
    Entry::of::<CalcDirtyRate>(),
    Entry::of::<QueryDirtyRate>(),
    Entry::of::<SetVcpuDirtyLimit>(),
    Entry::of::<CancelVcpuDirtyLimit>(),
    Entry::of::<QueryVcpuDirtyLimit>(),
    Entry::of::<QueryOutboardVm>(),
    Entry::of::<QueryOutboardCounters>(),
    Entry::of::<Save>(),
];
