//! From `--function SPEC` to an open function, whatever stands behind it.

use std::ops::ControlFlow::{self, Break, Continue};

use nix::errno::Errno;
use pcie_function::header::Role;
use pcie_function::local::LocalSoc;
use pcie_function::vfio::VfioSoc;
use pcie_function::{FunctionError, SocFunction};
use tokio::sync::oneshot;

use crate::cli::{ExitStatus, Failure, FunctionSpec};
use crate::pool::{Lent, Loan};
use crate::shim::Shim;

/// What is done with a function, whichever kind it is.
pub(crate) trait Use {
    /// What comes of it.
    type Output;

    /// The VM that it is for, as others shall see it.
    fn vm(&self) -> String;

    /// Waits until the function isn't wanted any more, while it is being opened; what comes of it then. Safe to cancel.
    async fn given_up(&mut self) -> Self::Output;

    /// Does it. The function is gone when this returns.
    async fn on<F: SocFunction>(self, function: F) -> Result<Self::Output, Failure>;
}

/// Opens the function that `spec` names and hands it to `user`. A `local` one gets a shim of its own, of the role that is wanted.
///
/// # Errors
/// It can't be opened, or what `user` says.
pub(crate) async fn open<U: Use>(spec: &FunctionSpec, role: Role, mut user: U) -> Result<U::Output, Failure> {
    let cant = |e: FunctionError| Failure::of(ExitStatus::Unavailable, &format!("--function {spec}"), &e);
    match spec {
        FunctionSpec::Local => {
            let (shim, socket) = Shim::start(role)?;
            match wait(&mut user, move || LocalSoc::new(socket)).await {
                Ok(Continue(function)) => shim.end(used(spec, function, user).await).await,
                // The shim is killed.
                Ok(Break(output)) => Ok(output),
                // This side's lack; the shim knows only that it was left.
                Err(e @ FunctionError::Os(_, Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM)) => Err(cant(e)),
                Err(e) => Err(shim.failed(&e).await),
            }
        }
        FunctionSpec::Unix(path) => {
            let path = path.clone();
            match wait(&mut user, move || LocalSoc::dial(&path)).await.map_err(cant)? {
                Continue(function) => used(spec, function, user).await,
                Break(output) => Ok(output),
            }
        }
        FunctionSpec::Card(path) => {
            let path = path.clone();
            opened(wait(&mut user, move || pcie_function_card::open(&path)).await.map_err(cant)?, user).await
        }
        FunctionSpec::Pci(address) => {
            let address = address.to_string();
            opened(wait(&mut user, move || VfioSoc::open(&address)).await.map_err(cant)?, user).await
        }
        FunctionSpec::Pool if role == Role::Host => Err(Failure::new(
            ExitStatus::Usage,
            format!("--function {spec}: a pool has functions for VMs; name the host function: pci:BDF or card:SOCKET"),
        )),
        FunctionSpec::Pool => of_pool(spec, user).await,
    }
}

/// Has the pool lend a function, and hands it over. It is given back when this returns.
async fn of_pool<U: Use>(spec: &FunctionSpec, mut user: U) -> Result<U::Output, Failure> {
    let cant = |e: FunctionError| Failure::of(ExitStatus::Unavailable, &format!("--function {spec}"), &e);
    let vm = user.vm();
    // A refusal is no error of a function's.
    let loan = match wait(&mut user, move || Ok(Loan::ask(&vm))).await.map_err(cant)? {
        Continue(loan) => loan?,
        Break(output) => return Ok(output),
    };
    let (lent, lease) = loan.split();
    let ended = match lent {
        Lent::Unix(socket) => match wait(&mut user, move || LocalSoc::new(socket)).await.map_err(cant) {
            Ok(Continue(function)) => used(spec, function, user).await,
            Ok(Break(output)) => Ok(output),
            Err(e) => Err(e),
        },
        Lent::Card(socket) => match wait(&mut user, move || pcie_function_card::adopt(socket)).await.map_err(cant) {
            Ok(function) => opened(function, user).await,
            Err(e) => Err(e),
        },
        Lent::Pci(address, fds) => match wait(&mut user, move || VfioSoc::adopt(&address, fds)).await.map_err(cant) {
            Ok(function) => opened(function, user).await,
            Err(e) => Err(e),
        },
    };
    if let Err(failure) = &ended
        && failure.status() == ExitStatus::Unavailable
        && !failure.is_wish()
    {
        lease.complain(&failure.to_string());
    }
    ended
}

/// Hands a local function over. Where this end gave it up, for want of room, that is said: all else that failed, on either side, failed by it.
async fn used<U: Use>(spec: &FunctionSpec, function: LocalSoc, user: U) -> Result<U::Output, Failure> {
    let failure = function.failure();
    user.on(function).await.map_err(|e| match failure.why() {
        Some(why) => {
            let advice = if why.contains(Errno::ENOMEM.desc()) { "; raise ulimit -v" } else { "" };
            Failure::new(ExitStatus::Unavailable, format!("--function {spec}: {why}{advice}"))
        }
        None => e,
    })
}

async fn opened<U: Use, F: SocFunction>(what: ControlFlow<U::Output, F>, user: U) -> Result<U::Output, Failure> {
    match what {
        Continue(function) => user.on(function).await,
        Break(output) => Ok(output),
    }
}

/// Opens a function on a thread of its own, since its other end may take its time; until then `user` may give it up. The thread ends
/// with the process then, if it doesn't before.
async fn wait<U: Use, F: Send + 'static>(
    user: &mut U,
    open: impl FnOnce() -> Result<F, FunctionError> + Send + 'static,
) -> Result<ControlFlow<U::Output, F>, FunctionError> {
    const THREAD: &str = "start a thread";
    let (sender, receiver) = oneshot::channel();
    let thread = std::thread::Builder::new().name("open-function".into());
    // Nobody takes a function that was given up.
    let started = thread.spawn(move || drop(sender.send(open())));
    started.map_err(|e| FunctionError::Os(THREAD, Errno::from_raw(e.raw_os_error().unwrap_or_default())))?;
    tokio::select! {
        opened = receiver => opened.unwrap_or(Err(FunctionError::Os(THREAD, Errno::ECANCELED))).map(Continue),
        output = user.given_up() => Ok(Break(output)),
    }
}
