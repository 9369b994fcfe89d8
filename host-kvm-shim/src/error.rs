//! What ends the shim, and what it refuses.

use api_channel::Status;
use api_channel::codec::Malformed;
use nix::errno::Errno;
use pcie_function::FunctionError;

/// Why the shim can't serve.
#[derive(Debug)]
pub enum ServeError {
    /// KVM can't be used: what was tried, why, what to do.
    Kvm(String),
    /// The function can't be used.
    Function(FunctionError),
    /// The host lacks something else: what was tried, and the error.
    Os(&'static str, Errno),
    /// Card memory can't be laid out.
    Layout(pcie_function::regions::TableError),
}

impl std::fmt::Display for ServeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Kvm(why) => f.write_str(why),
            Self::Function(error) => write!(f, "{error}"),
            Self::Os(what, errno) => write!(f, "can't {what}: {}", errno.desc()),
            Self::Layout(error) => write!(f, "the function's card memory is too small: {error}"),
        }
    }
}

impl std::error::Error for ServeError {}

impl From<ServeError> for String {
    fn from(error: ServeError) -> Self {
        error.to_string()
    }
}

impl From<FunctionError> for ServeError {
    fn from(error: FunctionError) -> Self {
        Self::Function(error)
    }
}

/// Why a call is answered with an error: a status, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: Status,
    pub(crate) why: String,
}

impl Refusal {
    /// Not in this state of the VM.
    pub(crate) fn state(why: impl Into<String>) -> Self {
        Self { status: Status::STATE, why: why.into() }
    }

    /// An argument is out of range: what was asked for.
    pub(crate) fn argument(what: String) -> Self {
        Self { status: Status::ARGUMENT, why: what }
    }

    /// The host has not what was asked for.
    pub(crate) fn unavailable(why: impl Into<String>) -> Self {
        Self { status: Status::UNAVAILABLE, why: why.into() }
    }

    /// A system call failed.
    pub(crate) fn os(what: &str, errno: Errno) -> Self {
        Self { status: Status::os(errno as i32), why: format!("can't {what}: {}", errno.desc()) }
    }

    /// [`Refusal::os`], for `map_err`.
    pub(crate) fn nix(what: &'static str) -> impl Fn(Errno) -> Self {
        move |errno| Self::os(what, errno)
    }

    /// [`Refusal::os`] of kvm-ioctls' error, for `map_err`.
    pub(crate) fn kvm(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Self {
        move |error| Self::os(what, Errno::from_raw(error.errno()))
    }
}

impl From<Malformed> for Refusal {
    fn from(_: Malformed) -> Self {
        Self { status: Status::MALFORMED, why: "a record can't be read".into() }
    }
}

impl From<FunctionError> for Refusal {
    fn from(error: FunctionError) -> Self {
        match error {
            FunctionError::Os(what, errno) => Self::os(what, errno),
            FunctionError::Unusable(why) => Self::unavailable(why),
            FunctionError::Bus(bus) => Self::unavailable(bus.to_string()),
        }
    }
}
