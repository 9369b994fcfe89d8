//! What a command is: a type, named and shaped as QAPI says. [`COMMANDS`] is what dispatch, `query-commands`, the schema and everything else that
//! speaks of all commands goes by.

use std::future::Future;
use std::pin::Pin;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

pub use super::commands::COMMANDS;
use super::schema::{Direction, Types};
use super::{ErrorClass, Passed, QmpError};
use crate::control::{RunState, VmHandle};

/// A command that is carried out.
pub type Execution = Pin<Box<dyn Future<Output = Result<Value, QmpError>> + Send>>;

/// A QMP command; its fields are the arguments.
pub trait Command: DeserializeOwned + JsonSchema + Send + 'static {
    /// Its QAPI name.
    const NAME: &'static str;
    /// What clients look for before they use what not every QEMU has.
    const FEATURES: &'static [&'static str] = &[];
    /// Whether it changes what is saved of a guest that stands still to be moved: refused then.
    const ALTERS: bool = false;
    /// Whether it changes which devices there are, or what the other side has compared of them: refused while the guest leaves.
    const PLUGS: bool = false;
    /// What it returns.
    type Reply: Serialize + JsonSchema + Send;

    /// Takes of the descriptors that came with it.
    fn attach(&mut self, _passed: &mut Passed) {}

    /// Carries it out.
    fn run(self, vm: VmHandle) -> impl Future<Output = Result<Self::Reply, QmpError>> + Send;
}

/// Reads a command's arguments, and gives what is then to be done.
type Prepare = fn(Map<String, Value>, &mut Passed, &VmHandle) -> Result<Execution, QmpError>;

/// A row of the table of commands.
#[derive(Debug)]
pub struct Entry {
    /// The command's QAPI name.
    pub name: &'static str,
    /// Its features.
    pub features: &'static [&'static str],
    /// Describes its arguments and what it returns: the names of both types.
    pub(super) describe: fn(&mut Types) -> (String, String),
    prepare: Prepare,
}

impl Entry {
    pub(super) const fn of<C: Command>() -> Self {
        Self { name: C::NAME, features: C::FEATURES, describe: describe::<C>, prepare: prepare::<C> }
    }

    /// Reads the arguments; the command is carried out when the result is polled.
    ///
    /// # Errors
    /// An argument is missing, unknown, or of the wrong type.
    pub fn prepare(
        &self,
        arguments: Map<String, Value>,
        passed: &mut Passed,
        vm: &VmHandle,
    ) -> Result<Execution, QmpError> {
        (self.prepare)(arguments, passed, vm)
    }
}

fn describe<C: Command>(types: &mut Types) -> (String, String) {
    (types.named::<C>(Direction::In), types.named::<C::Reply>(Direction::Out))
}

fn prepare<C: Command>(
    arguments: Map<String, Value>,
    passed: &mut Passed,
    vm: &VmHandle,
) -> Result<Execution, QmpError> {
    if C::ALTERS && vm.state() == RunState::FinishMigrate || C::PLUGS && vm.migration().leaves() {
        return Err(QmpError::generic("The guest is just being moved: wait, or cancel that"));
    }
    let mut command: C = serde_json::from_value(Value::Object(arguments))
        .map_err(|e| QmpError::generic(format!("Invalid arguments of '{}': {e}", C::NAME)))?;
    command.attach(passed);
    let vm = vm.clone();
    Ok(Box::pin(async move {
        let reply = command.run(vm).await?;
        serde_json::to_value(reply).map_err(|e| QmpError::generic(format!("The reply can't be written: {e}")))
    }))
}

/// The command of this name.
///
/// # Errors
/// [`ErrorClass::CommandNotFound`].
pub fn find(name: &str) -> Result<&'static Entry, QmpError> {
    COMMANDS.iter().find(|entry| entry.name == name).ok_or_else(|| QmpError {
        class: ErrorClass::CommandNotFound,
        desc: format!("The command {name} has not been found"),
    })
}

/// QMP `qmp_capabilities`: ends the negotiation.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QmpCapabilities {
    /// QMP `QMPCapability` to enable.
    #[serde(default)]
    pub enable: Vec<String>,
}

impl QmpCapabilities {
    /// Its QAPI name.
    pub const NAME: &'static str = "qmp_capabilities";
}
