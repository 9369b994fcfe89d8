use std::collections::HashSet;

use serde::Deserialize;

use super::*;

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[expect(dead_code, reason = "described, and never read")]
struct Sample {
    name: String,
    #[serde(default)]
    force: bool,
    count: Option<u32>,
    inner: Vec<Inner>,
    either: Either,
    #[serde(flatten)]
    kind: Kind,
}

#[derive(Deserialize, JsonSchema)]
#[expect(dead_code, reason = "described, and never read")]
struct Inner {
    state: State,
    rest: serde_json::Value,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum State {
    /// Has a description.
    On,
    Off,
}

#[derive(Deserialize, JsonSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "described, and never read")]
enum Either {
    Name(String),
    Inner(Inner),
}

#[derive(Deserialize, JsonSchema)]
#[serde(tag = "driver", rename_all = "kebab-case")]
#[expect(dead_code, reason = "described, and never read")]
enum Kind {
    File { filename: String },
    Null,
}

fn described() -> Vec<SchemaInfo> {
    let mut types = Types::default();
    assert_eq!(types.named::<Sample>(Direction::In), "Sample");
    types.into_infos().collect()
}

fn find<'a>(infos: &'a [SchemaInfo], name: &str) -> &'a SchemaMeta {
    &infos.iter().find(|info| info.name == name).unwrap_or_else(|| panic!("{name} is in {infos:#?}")).meta
}

#[test]
fn serde_s_types_become_qapi_s() {
    let infos = described();
    let SchemaMeta::Object { members, tag, variants } = find(&infos, "Sample") else { panic!("an object") };
    let shown: Vec<_> = members.iter().map(|member| (&*member.name, &*member.kind, member.default.is_some())).collect();
    assert_eq!(
        shown,
        [
            ("count", "int", true),
            ("either", "Either", false),
            ("force", "bool", true),
            ("inner", "[Inner]", false),
            ("name", "str", false),
            ("driver", "Sample-driver", false),
        ]
    );
    assert_eq!(tag.as_deref(), Some("driver"));
    let variants = variants.as_ref().unwrap();
    assert_eq!(
        variants.iter().map(|v| (&*v.case, &*v.kind)).collect::<Vec<_>>(),
        [("file", "Sample-file"), ("null", "Sample-null")]
    );
    let SchemaMeta::Object { members, .. } = find(&infos, "Sample-file") else { panic!("an object") };
    assert_eq!(members.iter().map(|m| &*m.name).collect::<Vec<_>>(), ["filename"]);
    let SchemaMeta::Enum { values, .. } = find(&infos, "State") else { panic!("an enum") };
    assert_eq!(values.iter().collect::<HashSet<_>>(), HashSet::from([&"on".to_owned(), &"off".to_owned()]));
    let SchemaMeta::Alternate { members } = find(&infos, "Either") else { panic!("an alternate") };
    assert_eq!(members.iter().map(|m| &*m.kind).collect::<Vec<_>>(), ["str", "Inner"]);
    let SchemaMeta::Object { members, .. } = find(&infos, "Inner") else { panic!("an object") };
    assert_eq!(members.iter().map(|m| (&*m.name, &*m.kind)).collect::<Vec<_>>(), [("rest", "any"), ("state", "State")]);
}

/// Every name is there once, and every type that is spoken of is there.
#[test]
fn the_schema_is_whole() {
    let infos = schema();
    let names: HashSet<&str> = infos.iter().map(|info| &*info.name).collect();
    assert_eq!(names.len(), infos.len(), "each name once");
    for info in &infos {
        let spoken_of: Vec<&str> = match &info.meta {
            SchemaMeta::Builtin { .. } | SchemaMeta::Enum { .. } => Vec::new(),
            SchemaMeta::Array { element_type } => vec![element_type],
            SchemaMeta::Object { members, variants, .. } => {
                let variants = variants.iter().flatten().map(|variant| &*variant.kind);
                members.iter().map(|member| &*member.kind).chain(variants).collect()
            }
            SchemaMeta::Alternate { members } => members.iter().map(|member| &*member.kind).collect(),
            SchemaMeta::Command { arg_type, ret_type } => vec![arg_type, ret_type],
            SchemaMeta::Event { arg_type } => vec![arg_type],
        };
        for name in spoken_of {
            assert!(names.contains(name), "{} speaks of {name}", info.name);
        }
    }
}

/// Arguments are objects, and so is the data of an event.
#[test]
fn commands_and_events_take_objects() {
    let infos = schema();
    for info in &infos {
        let (SchemaMeta::Command { arg_type, .. } | SchemaMeta::Event { arg_type }) = &info.meta else { continue };
        assert!(matches!(find(&infos, arg_type), SchemaMeta::Object { .. }), "{}: {arg_type}", info.name);
    }
    for name in ["STOP", "SHUTDOWN", "DEVICE_DELETED", "query-qmp-schema", "qmp_capabilities", "device_add"] {
        find(&infos, name);
    }
}
