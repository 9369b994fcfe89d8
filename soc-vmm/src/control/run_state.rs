//! The states of a VM, and which may follow which.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// QMP `RunState`: what the guest's vCPUs do, and why.
///
/// ```text
///             ┌────────────── reset ──────────────┐
///             ▼                                   │
///  ──▶ prelaunch ──▶ running ──▶ paused ──────────┤
///                     ▲    │                      │
///                     │    ├──▶ suspended ────────┤
///                     │    ├──▶ io-error ─────────┤
///                     │    ├──▶ guest-panicked ───┤
///          cont from  │    ├──▶ shutdown ─────────┤
///          the upper four  └──▶ internal-error ───┘
/// ```
///
/// A VM that waits for a guest from elsewhere goes from prelaunch to inmigrate, and from there to what the guest was. One whose guest
/// leaves goes from whatever it is to finish-migrate, and from there to postmigrate, or back; `cont` after that is for who knows that
/// the guest runs nowhere else.
///
/// Besides, a VM that doesn't run can still power off or fail: the access that asks for it may be the last one served
/// before the pause, and a function can vanish at any time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Not started yet, or reset while it didn't run.
    Prelaunch,
    /// The vCPUs run.
    Running,
    /// Stopped by command.
    Paused,
    /// The guest sleeps in S3.
    Suspended,
    /// The guest powered off.
    Shutdown,
    /// The VM can't go on: a failed entry, a lost function.
    InternalError,
    /// Stopped by a failed disk request.
    IoError,
    /// The guest reported its own panic.
    GuestPanicked,
    /// Waits for a guest from elsewhere.
    Inmigrate,
    /// The guest stands still on its way elsewhere.
    FinishMigrate,
    /// The guest is elsewhere.
    Postmigrate,
}

impl RunState {
    /// Every state.
    pub const ALL: [Self; 11] = [
        Self::Prelaunch,
        Self::Running,
        Self::Paused,
        Self::Suspended,
        Self::Shutdown,
        Self::InternalError,
        Self::IoError,
        Self::GuestPanicked,
        Self::Inmigrate,
        Self::FinishMigrate,
        Self::Postmigrate,
    ];

    /// Whether the vCPUs run.
    pub fn is_running(self) -> bool {
        self == Self::Running
    }

    /// Whether `cont` is refused until the machine was reset.
    pub fn needs_reset(self) -> bool {
        matches!(self, Self::Shutdown | Self::InternalError)
    }

    /// What a guest that was in this state is where it arrives; none: no guest in it is moved.
    pub fn on_arrival(self) -> Option<Self> {
        match self {
            Self::Inmigrate | Self::FinishMigrate | Self::Shutdown | Self::InternalError => None,
            // One that is in a file, and stands still here.
            Self::Postmigrate => Some(Self::Paused),
            other => Some(other),
        }
    }

    /// Whether `next` may follow. A state does not follow itself.
    pub fn may_become(self, next: Self) -> bool {
        use RunState::{
            FinishMigrate, GuestPanicked, Inmigrate, InternalError, IoError, Paused, Postmigrate, Prelaunch, Running,
            Shutdown, Suspended,
        };
        match next {
            Prelaunch => !matches!(self, Prelaunch | Running),
            Running => !matches!(self, Running | Shutdown | InternalError),
            Paused | Suspended | IoError | GuestPanicked => matches!(self, Running | Inmigrate | FinishMigrate),
            Inmigrate => self == Prelaunch,
            FinishMigrate => !matches!(self, Inmigrate | FinishMigrate | Shutdown | InternalError),
            Postmigrate => self == FinishMigrate,
            Shutdown => !matches!(self, Shutdown | InternalError),
            InternalError => self != InternalError,
        }
    }
}

impl std::fmt::Display for RunState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.serialize(f)
    }
}

#[cfg(test)]
mod tests {
    use super::RunState::{self, FinishMigrate, Inmigrate, InternalError, Paused, Prelaunch, Running, Shutdown};

    #[test]
    fn names_are_qapis() {
        let names: Vec<String> = RunState::ALL.iter().map(ToString::to_string).collect();
        assert_eq!(
            names,
            [
                "prelaunch",
                "running",
                "paused",
                "suspended",
                "shutdown",
                "internal-error",
                "io-error",
                "guest-panicked",
                "inmigrate",
                "finish-migrate",
                "postmigrate"
            ]
        );
    }

    #[test]
    fn what_needs_a_reset_runs_only_through_prelaunch() {
        for state in RunState::ALL {
            if state.needs_reset() {
                assert!(!state.may_become(Running) && state.may_become(Prelaunch), "{state}");
            }
            assert!(!state.may_become(state), "{state} follows itself");
        }
        assert!(
            !InternalError.may_become(Shutdown) && Shutdown.may_become(InternalError) && Paused.may_become(Shutdown)
        );
    }

    #[test]
    fn what_may_leave_may_arrive_and_nothing_else() {
        for state in RunState::ALL {
            assert_eq!(state.may_become(FinishMigrate), state.on_arrival().is_some(), "{state}");
            assert!(state.on_arrival().is_none_or(|arrived| Inmigrate.may_become(arrived)), "{state}");
        }
    }

    #[test]
    fn no_state_is_a_trap() {
        for start in RunState::ALL {
            let mut reached = vec![start];
            let mut next = 0;
            while let Some(&from) = reached.get(next) {
                reached.extend(
                    RunState::ALL
                        .into_iter()
                        .filter(|&to| from.may_become(to) && !reached.contains(&to))
                        .collect::<Vec<_>>(),
                );
                next += 1;
            }
            assert_eq!(reached.len(), RunState::ALL.len(), "{start} can't reach every state");
        }
    }
}
