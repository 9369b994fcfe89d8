//! From JSON Schema, as schemars derives it of serde types, to QAPI's types.
//!
//! QAPI knows less: what it has no word for (a map, a tuple) becomes `any`. A type is converted once, and found by its name again.

use std::collections::BTreeMap;

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value};

use super::{
    JsonType, SchemaInfo, SchemaInfoAlternateMember, SchemaInfoEnumMember, SchemaInfoObjectMember,
    SchemaInfoObjectVariant, SchemaMeta, settings,
};

/// Whether a type is read from clients or written to them: what may be left out differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::qmp) enum Direction {
    /// Read.
    In,
    /// Written.
    Out,
}

/// The types that were spoken of so far.
#[derive(Debug, Default)]
pub(in crate::qmp) struct Types {
    infos: BTreeMap<String, SchemaMeta>,
}

/// The definitions that a type's schema refers to.
type Definitions = Map<String, Value>;

const ANY: &str = "any";
const REFERENCE: &str = "#/$defs/";

impl Types {
    /// The name of `T`, which is described from now on.
    pub(in crate::qmp) fn named<T: JsonSchema>(&mut self, direction: Direction) -> String {
        let (schema, definitions) = generate::<T>(direction);
        Conversion { types: self, definitions, direction }.name_of(&schema, &T::schema_name())
    }

    /// The cases of an enum that serde writes with its name in `tag` and what is in it in `content`: name, and the type of that.
    pub(super) fn tagged<T: JsonSchema>(&mut self, tag: &str, content: &str) -> Vec<(String, String)> {
        let (schema, definitions) = generate::<T>(Direction::Out);
        let mut conversion = Conversion { types: self, definitions, direction: Direction::Out };
        let schema = conversion.resolved(&schema).clone();
        let cases = schema["oneOf"].as_array().cloned().unwrap_or_default();
        let case = |case: Value| {
            let name = constant(&case["properties"][tag])?;
            let data = match case["properties"].get(content) {
                Some(data) => conversion.name_of(data, &format!("{name}-data")),
                None => conversion.types.named::<crate::qmp::types::Empty>(Direction::Out),
            };
            Some((name, data))
        };
        cases.into_iter().filter_map(case).collect()
    }

    /// All of them.
    pub(super) fn into_infos(self) -> impl Iterator<Item = SchemaInfo> {
        self.infos.into_iter().map(|(name, meta)| SchemaInfo { name, meta, features: Vec::new() })
    }
}

fn generate<T: JsonSchema>(direction: Direction) -> (Value, Definitions) {
    let mut generator: SchemaGenerator = settings(direction).into_generator();
    let schema = generator.subschema_for::<T>().to_value();
    (schema, generator.take_definitions(true))
}

/// The conversion of one type and what it refers to.
struct Conversion<'a> {
    types: &'a mut Types,
    definitions: Definitions,
    direction: Direction,
}

impl Conversion<'_> {
    /// The name of a type, which is described under that if it isn't yet. `hint`: its name if it has none of its own.
    fn name_of(&mut self, schema: &Value, hint: &str) -> String {
        if let Some(target) = schema["$ref"].as_str().and_then(|to| to.strip_prefix(REFERENCE)) {
            let target = target.to_owned();
            let definition = self.definitions.get(&target).cloned().unwrap_or(Value::Bool(true));
            return self.name_of(&definition, &target);
        }
        if let Some(inner) = without_null(schema) {
            return self.name_of(&inner, hint);
        }
        if let Some(values) = strings(schema) {
            let members = values.iter().map(|name| SchemaInfoEnumMember { name: name.clone() }).collect();
            return self.describe(hint, SchemaMeta::Enum { members, values });
        }
        match schema["type"].as_str() {
            Some("string") => self.builtin("str", JsonType::String),
            Some("integer") => self.builtin("int", JsonType::Int),
            Some("number") => self.builtin("number", JsonType::Number),
            Some("boolean") => self.builtin("bool", JsonType::Boolean),
            Some("null") => self.builtin("null", JsonType::Null),
            Some("array") if schema.get("items").is_some() => {
                let element_type = self.name_of(&schema["items"], &format!("{hint}-element"));
                self.describe(&format!("[{element_type}]"), SchemaMeta::Array { element_type })
            }
            Some("object") if is_map(schema) => self.builtin(ANY, JsonType::Value),
            _ if schema["oneOf"].is_array() || schema["type"] == "object" => self.object(schema, hint),
            _ => match schema["anyOf"].as_array() {
                Some(types) => self.alternate(types, hint),
                None => self.builtin(ANY, JsonType::Value),
            },
        }
    }

    fn builtin(&mut self, name: &str, json_type: JsonType) -> String {
        self.describe(name, SchemaMeta::Builtin { json_type })
    }

    fn alternate(&mut self, types: &[Value], hint: &str) -> String {
        let member =
            |(n, kind): (usize, &Value)| SchemaInfoAlternateMember { kind: self.name_of(kind, &format!("{hint}-{n}")) };
        let members = types.iter().enumerate().map(member).collect();
        self.describe(hint, SchemaMeta::Alternate { members })
    }

    /// An object: its members, and, where it is an enum of serde's or has one within it, those of each case.
    fn object(&mut self, schema: &Value, hint: &str) -> String {
        let mut members = self.members(schema, hint, None);
        let cases = schema["oneOf"].as_array().cloned().unwrap_or_default();
        let cases: Vec<Value> = cases.iter().map(|case| self.resolved(case).clone()).collect();
        let Some(tag) = common_tag(&cases) else {
            // No cases, or such as QAPI has no word for: then only what they have in common could be said.
            let meta = SchemaMeta::Object { members, tag: None, variants: None };
            return if cases.is_empty() { self.describe(hint, meta) } else { self.builtin(ANY, JsonType::Value) };
        };
        let names: Vec<String> = cases.iter().filter_map(|case| constant(&case["properties"][&tag])).collect();
        let kind = format!("{hint}-{tag}");
        let values = names.iter().map(|name| SchemaInfoEnumMember { name: name.clone() }).collect();
        let kind = self.describe(&kind, SchemaMeta::Enum { members: values, values: names.clone() });
        let is_optional = !cases.iter().all(|case| requires(case, &tag));
        members.retain(|member| member.name != tag);
        members.push(SchemaInfoObjectMember { name: tag.clone(), kind, default: is_optional.then_some(()) });
        let variant = |(case, schema): (String, &Value)| {
            let hint = format!("{hint}-{case}");
            let members = self.members(schema, &hint, Some(&tag));
            let kind = self.describe(&hint, SchemaMeta::Object { members, tag: None, variants: None });
            SchemaInfoObjectVariant { case, kind }
        };
        let variants = names.into_iter().zip(&cases).map(variant).collect();
        self.describe(hint, SchemaMeta::Object { members, tag: Some(tag), variants: Some(variants) })
    }

    fn members(&mut self, schema: &Value, hint: &str, tag: Option<&str>) -> Vec<SchemaInfoObjectMember> {
        let properties = schema["properties"].as_object().cloned().unwrap_or_default();
        let properties = properties.iter().filter(|(name, _)| Some(name.as_str()) != tag);
        let member = |(name, kind): (&String, &Value)| SchemaInfoObjectMember {
            name: name.clone(),
            kind: self.name_of(kind, &format!("{hint}-{name}")),
            default: (!requires(schema, name)).then_some(()),
        };
        properties.map(member).collect()
    }

    /// What a reference refers to, or the schema itself.
    fn resolved<'s>(&'s self, schema: &'s Value) -> &'s Value {
        let target = schema["$ref"].as_str().and_then(|to| to.strip_prefix(REFERENCE));
        target.and_then(|target| self.definitions.get(target)).unwrap_or(schema)
    }

    /// Keeps a description; the name under which it is kept. What is read and what is written may differ: then both are kept.
    fn describe(&mut self, name: &str, meta: SchemaMeta) -> String {
        let name = match self.types.infos.get(name) {
            Some(known) if *known != meta => match self.direction {
                Direction::In => format!("{name}-arg"),
                Direction::Out => format!("{name}-ret"),
            },
            _ => name.to_owned(),
        };
        self.types.infos.entry(name.clone()).or_insert(meta);
        name
    }
}

/// The schema of what may also be `null`, which is how serde has what may be left out.
fn without_null(schema: &Value) -> Option<Value> {
    if let Some(types) = schema["type"].as_array().filter(|types| types.iter().any(|it| it == "null")) {
        let rest: Vec<_> = types.iter().filter(|it| *it != "null").cloned().collect();
        let mut schema = schema.clone();
        schema["type"] = if let [one] = &rest[..] { one.clone() } else { Value::Array(rest) };
        return Some(schema);
    }
    let types = schema["anyOf"].as_array()?;
    let [one] = &types.iter().filter(|it| it["type"] != "null").collect::<Vec<_>>()[..] else { return None };
    (types.len() == 2).then(|| (*one).clone())
}

/// The strings that an enum without content may be: told one by one where each has a description.
fn strings(schema: &Value) -> Option<Vec<String>> {
    let text = |value: &Value| value.as_str().map(str::to_owned);
    if let Some(one) = schema["const"].as_str() {
        return Some(vec![one.to_owned()]);
    }
    if let Some(values) = schema["enum"].as_array() {
        return values.iter().filter(|value| !value.is_null()).map(text).collect();
    }
    let cases = schema["oneOf"].as_array()?;
    let values: Option<Vec<_>> = cases.iter().map(|case| if is_string(case) { strings(case) } else { None }).collect();
    values.map(|values| values.concat())
}

fn is_string(schema: &Value) -> bool {
    schema["type"] == "string"
}

/// The one value that a property has.
fn constant(schema: &Value) -> Option<String> {
    schema["const"].as_str().map(str::to_owned)
}

/// The property that has one value, another one, in each case.
fn common_tag(cases: &[Value]) -> Option<String> {
    let properties = cases.first()?["properties"].as_object()?;
    let is_tag = |name: &&String| cases.iter().all(|case| constant(&case["properties"][name.as_str()]).is_some());
    properties.keys().find(is_tag).cloned()
}

fn requires(schema: &Value, name: &str) -> bool {
    schema["required"].as_array().is_some_and(|required| required.iter().any(|it| it == name))
}

/// Whether its members have any names.
fn is_map(schema: &Value) -> bool {
    schema.get("properties").is_none()
        && schema.get("oneOf").is_none()
        && schema.get("additionalProperties").is_some_and(|rest| *rest != Value::Bool(false))
}
