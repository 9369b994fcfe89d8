//! The states of a job, and what it can be told in each.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// QMP `JobStatus`, of the states that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It is made.
    Created,
    /// It is at work.
    Running,
    /// It has come where it wants to be, and stays there until it is told.
    Ready,
    /// It has done what it should.
    Waiting,
    /// The same, of all that belong together.
    Pending,
    /// It failed, or was ended.
    Aborting,
    /// It is over, and can be asked how it went.
    Concluded,
    /// It is forgotten.
    Null,
}

impl JobStatus {
    /// Whether it may come to be `next`.
    pub fn may_become(self, next: Self) -> bool {
        use JobStatus::{Aborting, Concluded, Created, Null, Pending, Ready, Running, Waiting};
        matches!(
            (self, next),
            (Created, Running)
                | (Running, Ready)
                | (Running | Ready, Waiting)
                | (Waiting, Pending)
                | (Created | Running | Ready | Waiting, Aborting)
                | (Pending | Aborting, Concluded)
                | (Concluded, Null)
        )
    }

    /// Whether it does something, or waits for a word.
    pub fn is_active(self) -> bool {
        matches!(self, Self::Created | Self::Running | Self::Ready)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
