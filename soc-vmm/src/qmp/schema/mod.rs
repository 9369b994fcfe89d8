//! What monitors can be told and can say, in the words of QAPI (QMP `query-qmp-schema`): made of the types that serde reads and writes, so that it
//! can't say anything else than what is done.

mod convert;

use schemars::JsonSchema;
use schemars::generate::SchemaSettings;
use serde::Serialize;

use super::command::{COMMANDS, Entry, QmpCapabilities};
use crate::control::EventKind;
pub(super) use convert::{Direction, Types};

/// QMP `SchemaInfo`: one thing that the schema tells of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SchemaInfo {
    /// Its name; of commands and events what they are called.
    pub name: String,
    /// What it is.
    #[serde(flatten)]
    pub meta: SchemaMeta,
    /// QMP: what clients look for before they use it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<String>,
}

/// QMP `SchemaMetaType`, and what belongs to each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(tag = "meta-type", rename_all = "lowercase")]
pub enum SchemaMeta {
    /// A type of JSON's.
    #[serde(rename_all = "kebab-case")]
    Builtin {
        /// Which.
        json_type: JsonType,
    },
    /// One of some strings.
    Enum {
        /// The strings, each as an object.
        members: Vec<SchemaInfoEnumMember>,
        /// The strings, as clients of before QEMU 6.2 look for them.
        values: Vec<String>,
    },
    /// An array.
    #[serde(rename_all = "kebab-case")]
    Array {
        /// The type of each element.
        element_type: String,
    },
    /// An object.
    Object {
        /// Its members that are always possible.
        members: Vec<SchemaInfoObjectMember>,
        /// The member whose value says which others there are.
        #[serde(skip_serializing_if = "Option::is_none")]
        tag: Option<String>,
        /// The others, by that value.
        #[serde(skip_serializing_if = "Option::is_none")]
        variants: Option<Vec<SchemaInfoObjectVariant>>,
    },
    /// A value of one of several types.
    Alternate {
        /// The types.
        members: Vec<SchemaInfoAlternateMember>,
    },
    /// A command.
    #[serde(rename_all = "kebab-case")]
    Command {
        /// The type of its arguments, an object.
        arg_type: String,
        /// What it returns.
        ret_type: String,
    },
    /// An event.
    #[serde(rename_all = "kebab-case")]
    Event {
        /// The type of its data, an object.
        arg_type: String,
    },
}

/// QMP `JSONType`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "JSONType")]
pub enum JsonType {
    /// A string.
    String,
    /// A number.
    Number,
    /// A number without a fraction.
    Int,
    /// `true` or `false`.
    Boolean,
    /// `null`.
    Null,
    /// Any value.
    Value,
}

/// QMP `SchemaInfoEnumMember`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SchemaInfoEnumMember {
    /// The string.
    pub name: String,
}

/// QMP `SchemaInfoObjectMember`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SchemaInfoObjectMember {
    /// Its name.
    pub name: String,
    /// Its type.
    #[serde(rename = "type")]
    pub kind: String,
    /// There and `null`: it may be left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub default: Option<()>,
}

/// QMP `SchemaInfoObjectVariant`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SchemaInfoObjectVariant {
    /// The tag's value.
    pub case: String,
    /// The object whose members there are then.
    #[serde(rename = "type")]
    pub kind: String,
}

/// QMP `SchemaInfoAlternateMember`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct SchemaInfoAlternateMember {
    /// The type.
    #[serde(rename = "type")]
    pub kind: String,
}

/// The whole schema: every command, every event, and the types that they speak of.
pub fn schema() -> Vec<SchemaInfo> {
    let mut types = Types::default();
    let mut infos: Vec<_> = COMMANDS.iter().map(|entry| command(entry, &mut types)).collect();
    infos.push(SchemaInfo {
        name: QmpCapabilities::NAME.into(),
        meta: SchemaMeta::Command {
            arg_type: types.named::<QmpCapabilities>(Direction::In),
            ret_type: types.named::<super::types::Empty>(Direction::Out),
        },
        features: Vec::new(),
    });
    let events = types.tagged::<EventKind>("event", "data");
    infos.extend(events.into_iter().map(|(name, arg_type)| SchemaInfo {
        name,
        meta: SchemaMeta::Event { arg_type },
        features: Vec::new(),
    }));
    infos.extend(types.into_infos());
    infos
}

fn command(entry: &Entry, types: &mut Types) -> SchemaInfo {
    let (arg_type, ret_type) = (entry.describe)(types);
    SchemaInfo {
        name: entry.name.into(),
        meta: SchemaMeta::Command { arg_type, ret_type },
        features: entry.features.iter().map(|feature| (*feature).to_owned()).collect(),
    }
}

/// The settings by which a type is described as it is read, or as it is written.
fn settings(direction: Direction) -> SchemaSettings {
    let settings = SchemaSettings::draft2020_12();
    match direction {
        Direction::In => settings.for_deserialize(),
        Direction::Out => settings.for_serialize(),
    }
}

#[cfg(test)]
mod tests;
