//! What this process gives up before its guest runs: QEMU's `-sandbox`, by seccomp (docs/operations.md).
//!
//! A call that no category allows ends the process (SIGSYS, and a line in the kernel's audit log): nothing here calls it, so who does has taken the process
//! over. Of what says where and how urgently a thread runs, which a library may try without need, a refusal is EPERM.

mod calls;

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::libc::{self, c_long};
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter_all_threads, sock_filter,
};

use crate::cli::ValueError;
use calls::own;

/// Whether a kind of calls may be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// As without a sandbox.
    Allow,
    /// Not.
    Deny,
}

/// What a sandbox leaves; beyond it, calls that soc-vmm never makes are always denied, and new privileges can't be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxSpec {
    /// `obsolete`: calls of old kernels.
    pub obsolete: Permission,
    /// `elevateprivileges`: set*uid and set*gid, capset. QEMU's `children`, by which programs that are started gain no privileges, is as `allow`: with a
    /// filter nothing gains any.
    pub elevate_privileges: Permission,
    /// `spawn`: programs and processes. Threads are always allowed.
    pub spawn: Permission,
    /// `resourcecontrol`: affinity, priority, memory policy.
    pub resource_control: Permission,
}

impl SandboxSpec {
    /// Everything denied: what `soc-vmm run --sandbox on` asks for.
    pub const STRICT: Self = Self {
        obsolete: Permission::Deny,
        elevate_privileges: Permission::Deny,
        spawn: Permission::Deny,
        resource_control: Permission::Deny,
    };

    /// QEMU's `-sandbox on` without more.
    pub const QEMU: Self = Self {
        obsolete: Permission::Deny,
        elevate_privileges: Permission::Allow,
        spawn: Permission::Allow,
        resource_control: Permission::Allow,
    };

    /// Understands the value of QEMU's `-sandbox`; `None`: it is off.
    ///
    /// # Errors
    /// It is none.
    pub fn of_qemu(text: &str) -> Result<Option<Self>, ValueError> {
        let wrong = |why: String| Err(ValueError::new(why));
        let mut parts = text.split(',');
        let first = parts.next().unwrap_or_default();
        let on = match first.strip_prefix("enable=").unwrap_or(first) {
            "on" => true,
            "off" => false,
            _ => return wrong(format!("write on or off, not '{first}'")),
        };
        let mut spec = Self::QEMU;
        let mut seen = BTreeSet::new();
        for part in parts {
            let Some((key, value)) = part.split_once('=') else {
                return wrong(format!("'{part}': write KEY=allow or KEY=deny"));
            };
            let place = match key {
                "obsolete" => &mut spec.obsolete,
                "elevateprivileges" => &mut spec.elevate_privileges,
                "spawn" => &mut spec.spawn,
                "resourcecontrol" => &mut spec.resource_control,
                _ => {
                    return wrong(format!(
                        "there is no '{key}'; there are obsolete, elevateprivileges, spawn, resourcecontrol"
                    ));
                }
            };
            *place = match value {
                "allow" => Permission::Allow,
                "deny" => Permission::Deny,
                "children" if key == "elevateprivileges" => Permission::Allow,
                _ => return wrong(format!("{key} is allow or deny, not '{value}'")),
            };
            if !seen.insert(key) {
                return wrong(format!("{key} is there twice"));
            }
        }
        Ok(on.then_some(spec))
    }

    /// The filters, of which a call must pass each.
    fn filters(&self) -> Result<Vec<BpfProgram>, BackendError> {
        let denied = |permission: Permission, calls: [&'static [c_long]; 2]| match permission {
            Permission::Deny => calls.concat(),
            Permission::Allow => Vec::new(),
        };
        let kill = [
            [calls::FOREIGN, own::FOREIGN].concat(),
            denied(self.obsolete, [calls::OBSOLETE, own::OBSOLETE]),
            denied(self.elevate_privileges, [calls::PRIVILEGES, &[]]),
            denied(self.spawn, [calls::SPAWN, own::SPAWN]),
        ];
        let mut kill: Rules = kill.concat().into_iter().map(|call| (call, Vec::new())).collect();
        let mut filters: Vec<_> = own::FIRST_FOREIGN.map(without_calls_from).into_iter().collect();
        if self.spawn == Permission::Deny {
            // A process is what is not a thread.
            let no_thread = SeccompCmpOp::MaskedEq(libc::CLONE_THREAD as u64);
            let no_thread = SeccompCondition::new(0, SeccompCmpArgLen::Dword, no_thread, 0)?;
            kill.insert(libc::SYS_clone, vec![SeccompRule::new(vec![no_thread])?]);
            // It hides its flags from a filter. The C library falls back to clone where the kernel doesn't know it.
            filters.push(filter([(libc::SYS_clone3, Vec::new())].into(), refusal(libc::ENOSYS))?);
        }
        filters.push(filter(kill, SeccompAction::KillProcess)?);
        let refused = denied(self.resource_control, [calls::RESOURCES, &[]]);
        if !refused.is_empty() {
            filters.push(filter(refused.into_iter().map(|call| (call, Vec::new())).collect(), refusal(libc::EPERM))?);
        }
        Ok(filters)
    }

    /// Confines this process: all its threads, those that it starts later, and the programs that it still may start. There is no way back.
    ///
    /// # Errors
    /// The kernel has no seccomp filters; the process may be confined in part.
    pub fn apply(&self) -> Result<(), SandboxError> {
        let filters = self.filters()?;
        if self.spawn == Permission::Deny {
            SPAWN_DENIED.store(true, Ordering::SeqCst);
        }
        filters.iter().try_for_each(|filter| apply_filter_all_threads(filter)).map_err(Into::into)
    }
}

/// `--sandbox`, as `soc-vmm run` has it: on is [`SandboxSpec::STRICT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SandboxSwitch(pub Option<SandboxSpec>);

impl FromStr for SandboxSwitch {
    type Err = ValueError;

    fn from_str(s: &str) -> Result<Self, ValueError> {
        match s {
            "on" => Ok(Self(Some(SandboxSpec::STRICT))),
            "off" => Ok(Self(None)),
            _ => Err(ValueError::new("write on or off".into())),
        }
    }
}

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter came out wrong.
    #[error("the filter of calls can't be made")]
    Filter(#[from] BackendError),
    /// The kernel refuses it.
    #[error("the kernel takes no filter of calls; use one with CONFIG_SECCOMP_FILTER, or leave the sandbox out")]
    Kernel(#[from] seccompiler::Error),
}

/// Whether this process may start programs. Where a sandbox denies it, trying would end the process.
pub fn may_spawn() -> bool {
    !SPAWN_DENIED.load(Ordering::SeqCst)
}

static SPAWN_DENIED: AtomicBool = AtomicBool::new(false);

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// A filter that does `action` for these calls.
fn filter(rules: Rules, action: SeccompAction) -> Result<BpfProgram, BackendError> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, SeccompAction::Allow, action, architecture)?.try_into()
}

/// A filter that ends the process for calls from a number on.
fn without_calls_from(first: u32) -> BpfProgram {
    // seccomp(2), bpf: load the call's number; skip the next instruction where it is below; the verdicts.
    let (load_word, jump_if_at_least, ret) = (0x20, 0x35, 0x06);
    let statement = |code, k| sock_filter { code, jt: 0, jf: 0, k };
    vec![
        statement(load_word, 0),
        sock_filter { code: jump_if_at_least, jt: 0, jf: 1, k: first },
        statement(ret, SeccompAction::KillProcess.into()),
        statement(ret, SeccompAction::Allow.into()),
    ]
}

fn refusal(errno: i32) -> SeccompAction {
    SeccompAction::Errno(errno as u32)
}

#[cfg(test)]
mod tests;
