//! From `--function SPEC` to an open function, whatever stands behind it.

use pcie_function::header::Role;
use pcie_function::local::LocalSoc;
use pcie_function::vfio::VfioSoc;
use pcie_function::{FunctionError, SocFunction};

use crate::cli::{ExitStatus, Failure, FunctionSpec};
use crate::shim;

/// What is done with a function, whichever kind it is.
pub(crate) trait Use {
    /// What comes of it.
    type Output;

    /// Does it. The function is gone when this returns.
    async fn on<F: SocFunction>(self, function: F) -> Result<Self::Output, Failure>;
}

/// Opens the function that `spec` names and hands it to `user`. A `local` one gets a shim of its own, of the role that is wanted.
///
/// # Errors
/// It can't be opened, or what `user` says.
pub(crate) async fn open<U: Use>(spec: &FunctionSpec, role: Role, user: U) -> Result<U::Output, Failure> {
    let cant = |e: FunctionError| Failure::of(ExitStatus::Unavailable, &format!("--function {spec}"), &e);
    match spec {
        FunctionSpec::Local => {
            let (function, mut shim) = shim::start(role).await?;
            let outcome = user.on(function).await;
            let ended = shim.end().await;
            outcome.and_then(|outcome| ended.map(|()| outcome))
        }
        FunctionSpec::Unix(path) => user.on(tokio::task::block_in_place(|| LocalSoc::dial(path)).map_err(cant)?).await,
        FunctionSpec::Card(path) => user.on(pcie_function_card::open(path).map_err(cant)?).await,
        FunctionSpec::Pci(address) => user.on(VfioSoc::open(&address.to_string()).map_err(cant)?).await,
        FunctionSpec::Pool => Err(Failure::new(
            ExitStatus::Unavailable,
            format!("--function {spec}: not there yet; use local, unix:SOCKET, pci:ADDRESS or card:SOCKET"),
        )),
    }
}
