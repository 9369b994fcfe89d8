//! Descriptors that come with commands, and the commands that keep them.

use std::os::fd::OwnedFd;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::command::Command;
use super::types::Empty;
use crate::control::VmHandle;
use crate::fds::{FdError, FdSet};
use crate::rights::MOST;

/// The descriptors that a client sent and no command has taken yet: those of its last message that had any, as QEMU keeps them.
#[derive(Debug, Default)]
pub struct Passed(Vec<OwnedFd>);

impl Passed {
    /// There came some; what came before is closed.
    pub fn replace(&mut self, fds: Vec<OwnedFd>) {
        self.0 = fds;
    }

    /// The first.
    fn take(&mut self) -> Option<OwnedFd> {
        if self.0.is_empty() { None } else { Some(self.0.remove(0)) }
    }
}

/// The descriptor of a command that takes one.
#[derive(Debug, Default)]
struct Attached(Option<OwnedFd>);

impl Attached {
    fn get(self) -> Result<OwnedFd, QmpError> {
        let why = || {
            format!(
                "No file descriptor supplied via SCM_RIGHTS: send it with the command, {MOST} at most at a time, and see that the VM's \
                 process may have more (ulimit -n)"
            )
        };
        self.0.ok_or_else(|| QmpError::generic(why()))
    }
}

/// QMP `getfd`: names the descriptor that came with it.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct GetFd {
    /// The name.
    fdname: String,
    #[serde(skip)]
    #[schemars(skip)]
    fd: Attached,
}

impl Command for GetFd {
    const NAME: &'static str = "getfd";
    type Reply = Empty;

    fn attach(&mut self, passed: &mut Passed) {
        self.fd = Attached(passed.take());
    }

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.fds().add_named(&self.fdname, self.fd.get()?)?;
        Ok(Empty {})
    }
}

/// QMP `closefd`: closes a descriptor that has a name.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct CloseFd {
    /// The name.
    fdname: String,
}

impl Command for CloseFd {
    const NAME: &'static str = "closefd";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.fds().remove_named(&self.fdname)?;
        Ok(Empty {})
    }
}

/// QMP `add-fd`: puts the descriptor that came with it into a set, which is opened as `/dev/fdset/N`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct AddFd {
    /// The set; none: a new one.
    fdset_id: Option<i64>,
    /// What the client calls it.
    opaque: Option<String>,
    #[serde(skip)]
    #[schemars(skip)]
    fd: Attached,
}

/// QMP `AddfdInfo`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[schemars(rename = "AddfdInfo")]
pub(super) struct AddedFd {
    /// The set.
    fdset_id: i64,
    /// The descriptor's number in this process.
    fd: i32,
}

impl Command for AddFd {
    const NAME: &'static str = "add-fd";
    type Reply = AddedFd;

    fn attach(&mut self, passed: &mut Passed) {
        self.fd = Attached(passed.take());
    }

    async fn run(self, vm: VmHandle) -> Result<AddedFd, QmpError> {
        let (fdset_id, fd) = vm.fds().add_to_set(self.fdset_id, self.fd.get()?, self.opaque)?;
        Ok(AddedFd { fdset_id, fd })
    }
}

/// QMP `remove-fd`: takes a descriptor out of its set, or all of them.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub(super) struct RemoveFd {
    /// The set.
    fdset_id: i64,
    /// The descriptor; none: all.
    fd: Option<i32>,
}

impl Command for RemoveFd {
    const NAME: &'static str = "remove-fd";
    type Reply = Empty;

    async fn run(self, vm: VmHandle) -> Result<Empty, QmpError> {
        vm.fds().remove(self.fdset_id, self.fd)?;
        Ok(Empty {})
    }
}

/// QMP `query-fdsets`.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryFdsets {}

/// QMP `FdsetInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct FdsetInfo {
    /// The set.
    fdset_id: i64,
    /// What is in it.
    fds: Vec<FdsetFdInfo>,
}

/// QMP `FdsetFdInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct FdsetFdInfo {
    /// The descriptor's number in this process.
    fd: i32,
    /// What the client calls it.
    #[serde(skip_serializing_if = "Option::is_none")]
    opaque: Option<String>,
}

impl Command for QueryFdsets {
    const NAME: &'static str = "query-fdsets";
    type Reply = Vec<FdsetInfo>;

    async fn run(self, vm: VmHandle) -> Result<Vec<FdsetInfo>, QmpError> {
        let set = |FdSet { id, fds }| {
            let fds = fds.into_iter().map(|(fd, opaque)| FdsetFdInfo { fd, opaque }).collect();
            FdsetInfo { fdset_id: id, fds }
        };
        Ok(vm.fds().list_sets().into_iter().map(set).collect())
    }
}

impl From<FdError> for QmpError {
    fn from(e: FdError) -> Self {
        Self::generic(e.to_string())
    }
}
