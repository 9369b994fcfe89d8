//! QMP `query-command-line-options`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::QmpError;
use super::command::Command;
use crate::control::VmHandle;

/// What clients look for among the options: the option's group, and parameters of it.
const OPTIONS: [(&str, &[&str]); 6] = [
    ("sandbox", &["enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"]),
    ("overcommit", &["mem-lock", "cpu-pm"]),
    ("smp-opts", &["cpus", "maxcpus", "sockets", "cores", "threads", "dies"]),
    ("boot-opts", &["order", "menu", "strict"]),
    ("rtc", &["base", "clock", "driftfix"]),
    ("action", &["reboot", "shutdown", "panic"]),
];

/// QMP `query-command-line-options`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct QueryCommandLineOptions {
    /// One option; none: all.
    option: Option<String>,
}

/// QMP `CommandLineOptionInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct CommandLineOptionInfo {
    option: &'static str,
    parameters: Vec<CommandLineParameterInfo>,
}

/// QMP `CommandLineParameterInfo`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub(super) struct CommandLineParameterInfo {
    name: &'static str,
    #[serde(rename = "type")]
    kind: CommandLineParameterType,
}

/// QMP `CommandLineParameterType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum CommandLineParameterType {
    String,
}

impl Command for QueryCommandLineOptions {
    const NAME: &'static str = "query-command-line-options";
    type Reply = Vec<CommandLineOptionInfo>;

    async fn run(self, _: VmHandle) -> Result<Vec<CommandLineOptionInfo>, QmpError> {
        let parameter = |name: &&'static str| CommandLineParameterInfo { name, kind: CommandLineParameterType::String };
        let all = OPTIONS.iter().map(|(option, parameters)| CommandLineOptionInfo {
            option,
            parameters: parameters.iter().map(parameter).collect(),
        });
        let wanted = |info: &CommandLineOptionInfo| self.option.as_ref().is_none_or(|option| option == info.option);
        let found: Vec<_> = all.filter(wanted).collect();
        match self.option.as_deref().filter(|_| found.is_empty()) {
            None => Ok(found),
            Some(option) => Err(QmpError::generic(format!("Invalid option name: {option}"))),
        }
    }
}
