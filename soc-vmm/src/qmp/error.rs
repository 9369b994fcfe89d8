//! What a failed command answers.

use serde::{Deserialize, Serialize};

use crate::control::ControlError;

/// QMP `QapiErrorClass`; clients tell errors apart by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorClass {
    /// Everything that has no class of its own.
    GenericError,
    /// No such command, or not before (or after) the capabilities were negotiated.
    CommandNotFound,
    /// No such device.
    DeviceNotFound,
    /// The VM has no device of that kind.
    DeviceNotActive,
}

/// A command's error: class and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// The class.
    pub class: ErrorClass,
    /// A sentence for people.
    pub desc: String,
}

impl QmpError {
    /// A [`ErrorClass::GenericError`].
    pub fn generic(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::GenericError, desc: desc.into() }
    }

    /// A [`ErrorClass::CommandNotFound`].
    pub fn not_found(desc: impl Into<String>) -> Self {
        Self { class: ErrorClass::CommandNotFound, desc: desc.into() }
    }
}

impl From<ControlError> for QmpError {
    fn from(e: ControlError) -> Self {
        Self::generic(e.to_string())
    }
}
