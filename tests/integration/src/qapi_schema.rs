//! QMP against its own description: checks what was said against what `query-qmp-schema` reports (QEMU's QAPI introspection,
//! `SchemaInfo`).

use std::collections::HashMap;

use serde_json::{Map, Value};

/// The classes that an error may have (`QapiErrorClass`).
const ERRORS: [&str; 5] = ["GenericError", "CommandNotFound", "DeviceNotActive", "DeviceNotFound", "KVMMissingCap"];

/// A reported schema.
#[derive(Debug)]
pub struct Schema(HashMap<String, Entity>);

#[derive(Debug)]
enum Entity {
    Builtin(String),
    Enum(Vec<String>),
    Array(String),
    Object { members: Vec<Member>, variants: Option<Variants> },
    Alternate(Vec<String>),
    Command { takes: String, returns: String },
    Event(String),
}

#[derive(Debug)]
struct Member {
    name: String,
    of: String,
    optional: bool,
}

#[derive(Debug)]
struct Variants {
    tag: String,
    cases: HashMap<String, String>,
}

impl Schema {
    /// Reads what `query-qmp-schema` returned.
    ///
    /// # Errors
    /// It isn't one: what is wrong, and where.
    pub fn read(reported: &Value) -> Result<Self, String> {
        let mut entities = HashMap::new();
        for info in reported.as_array().ok_or("a schema is a list")? {
            let name = text(info, "name")?;
            let entity = entity(info).map_err(|why| format!("{name}: {why}"))?;
            if entities.insert(name.to_owned(), entity).is_some() {
                return Err(format!("{name} is there twice"));
            }
        }
        let schema = Self(entities);
        schema.0.iter().try_for_each(|(name, entity)| schema.is_closed(name, entity))?;
        Ok(schema)
    }

    /// Whether there is such a command.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        matches!(self.0.get(name), Some(Entity::Command { .. }))
    }

    /// Checks a command as it was sent: `{"execute": …}`.
    ///
    /// # Errors
    /// What isn't as reported, and where.
    pub fn check_command(&self, sent: &Value) -> Result<(), String> {
        let name = name_of(sent)?;
        let Some(Entity::Command { takes, .. }) = self.0.get(name) else {
            return Err(format!("there is no command {name}"));
        };
        let none = Value::Object(Map::new());
        let arguments = sent.get("arguments").unwrap_or(&none);
        self.check(arguments, takes).map_err(|why| format!("{name}: arguments{why}"))
    }

    /// Checks the answer to a command. An error may be the answer to any, and has to be `CommandNotFound` where there is no such command.
    ///
    /// # Errors
    /// What isn't as reported, and where.
    pub fn check_answer(&self, sent: &Value, answer: &Value) -> Result<(), String> {
        let name = name_of(sent)?;
        if sent.get("id") != answer.get("id") {
            return Err(format!("{name}: the answer has another id"));
        }
        let known = self.0.get(name);
        if let Some(error) = answer.get("error") {
            let class = text(error, "class")?;
            let desc = text(error, "desc")?;
            let right = ERRORS.contains(&class) && (known.is_some() || class == "CommandNotFound") && !desc.is_empty();
            return if right { Ok(()) } else { Err(format!("{name}: no such error: {error}")) };
        }
        let Some(Entity::Command { returns, .. }) = known else {
            return Err(format!("{name} isn't in the schema, but is answered"));
        };
        let returned = answer.get("return").ok_or_else(|| format!("{name}: neither return nor error"))?;
        self.check(returned, returns).map_err(|why| format!("{name}: return{why}"))
    }

    /// Checks an event: `{"event": …, "timestamp": …}`.
    ///
    /// # Errors
    /// What isn't as reported, and where.
    pub fn check_event(&self, told: &Value) -> Result<(), String> {
        let name = text(told, "event")?;
        let Some(Entity::Event(of)) = self.0.get(name) else {
            return Err(format!("there is no event {name}"));
        };
        for part in ["seconds", "microseconds"] {
            if !told["timestamp"][part].is_i64() {
                return Err(format!("{name}: timestamp.{part}: no integer"));
            }
        }
        let none = Value::Object(Map::new());
        let data = told.get("data").unwrap_or(&none);
        self.check(data, of).map_err(|why| format!("{name}: data{why}"))
    }

    /// Whether all that an entity refers to is there, and of the right kind.
    fn is_closed(&self, name: &str, entity: &Entity) -> Result<(), String> {
        let is_object = |of: &String| matches!(self.0.get(of), Some(Entity::Object { .. }));
        let is_type = |of: &String| !matches!(self.0.get(of), None | Some(Entity::Command { .. } | Entity::Event(_)));
        let (types, objects): (Vec<&String>, Vec<&String>) = match entity {
            Entity::Builtin(_) | Entity::Enum(_) => (vec![], vec![]),
            Entity::Array(of) => (vec![of], vec![]),
            Entity::Alternate(members) => (members.iter().collect(), vec![]),
            Entity::Command { takes, returns } => (vec![returns], vec![takes]),
            Entity::Event(of) => (vec![], vec![of]),
            Entity::Object { members, variants } => {
                let cases = variants.iter().flat_map(|variants| variants.cases.values()).collect();
                if let Some(Variants { tag, .. }) = variants
                    && !members.iter().any(|member| member.name == *tag)
                {
                    return Err(format!("{name}: its tag {tag} is no member"));
                }
                (members.iter().map(|member| &member.of).collect(), cases)
            }
        };
        match (types.into_iter().find(|of| !is_type(of)), objects.into_iter().find(|of| !is_object(of))) {
            (Some(of), _) => Err(format!("{name}: {of} is no type")),
            (None, Some(of)) => Err(format!("{name}: {of} is no object type")),
            (None, None) => Ok(()),
        }
    }

    /// Checks a value. What is wrong begins with where: `.member`, `[3]`.
    fn check(&self, value: &Value, of: &str) -> Result<(), String> {
        match &self.0[of] {
            Entity::Builtin(json) => {
                if is_json(value, json) {
                    Ok(())
                } else {
                    Err(format!(": {value} is no {json}"))
                }
            }
            Entity::Enum(values) => match value.as_str() {
                Some(text) if values.iter().any(|value| value == text) => Ok(()),
                _ => Err(format!(": {value} is none of {values:?}")),
            },
            Entity::Array(element) => {
                let elements = value.as_array().ok_or_else(|| format!(": {value} is no list"))?;
                let check = |(at, value)| self.check(value, element).map_err(|why| format!("[{at}]{why}"));
                elements.iter().enumerate().try_for_each(check)
            }
            Entity::Alternate(members) => {
                let failures: Vec<String> = members.iter().filter_map(|of| self.check(value, of).err()).collect();
                if failures.len() < members.len() { Ok(()) } else { Err(failures.join(", and ")) }
            }
            Entity::Object { .. } => {
                let object = value.as_object().ok_or_else(|| format!(": {value} is no object"))?;
                let mut known = Vec::new();
                self.check_members(object, of, &mut known)?;
                match object.keys().find(|key| !known.contains(&key.as_str())) {
                    Some(key) => Err(format!(".{key}: unknown")),
                    None => Ok(()),
                }
            }
            Entity::Command { .. } | Entity::Event(_) => Err(format!(": {of} is no type")),
        }
    }

    /// Checks the members of an object type and of the variant that its tag selects; `known` gets their names.
    fn check_members<'s>(
        &'s self,
        object: &Map<String, Value>,
        of: &str,
        known: &mut Vec<&'s str>,
    ) -> Result<(), String> {
        let Entity::Object { members, variants } = &self.0[of] else {
            return Err(format!(": {of} is no object type"));
        };
        for Member { name, of, optional } in members {
            known.push(name);
            match object.get(name) {
                Some(value) => self.check(value, of).map_err(|why| format!(".{name}{why}"))?,
                None if *optional => {}
                None => return Err(format!(".{name}: missing")),
            }
        }
        let Some(Variants { tag, cases }) = variants else { return Ok(()) };
        // It is an enumeration's value by now.
        match object.get(tag).and_then(Value::as_str).and_then(|case| cases.get(case)) {
            Some(of) => self.check_members(object, of, known),
            None => Ok(()),
        }
    }
}

fn entity(info: &Value) -> Result<Entity, String> {
    let owned = |value: &Value, key: &str| text(value, key).map(str::to_owned);
    let list = |key: &str| info[key].as_array().ok_or(format!("no {key}"));
    let texts = |key: &str| -> Result<Vec<String>, String> {
        list(key)?.iter().map(|value| value.as_str().map(str::to_owned).ok_or(format!("{key}: no text"))).collect()
    };
    Ok(match text(info, "meta-type")? {
        "builtin" => Entity::Builtin(owned(info, "json-type")?),
        "enum" => Entity::Enum(texts("values")?),
        "array" => Entity::Array(owned(info, "element-type")?),
        "alternate" => {
            Entity::Alternate(list("members")?.iter().map(|member| owned(member, "type")).collect::<Result<_, _>>()?)
        }
        "command" => Entity::Command { takes: owned(info, "arg-type")?, returns: owned(info, "ret-type")? },
        "event" => Entity::Event(owned(info, "arg-type")?),
        "object" => {
            let member = |member: &Value| -> Result<Member, String> {
                let optional = member.get("default").is_some();
                Ok(Member { name: owned(member, "name")?, of: owned(member, "type")?, optional })
            };
            let case = |case: &Value| -> Result<_, String> { Ok((owned(case, "case")?, owned(case, "type")?)) };
            let members = list("members")?.iter().map(member).collect::<Result<_, _>>()?;
            let variants = match info.get("tag") {
                Some(_) => Some(Variants {
                    tag: owned(info, "tag")?,
                    cases: list("variants")?.iter().map(case).collect::<Result<_, _>>()?,
                }),
                None => None,
            };
            Entity::Object { members, variants }
        }
        other => return Err(format!("no meta-type {other}")),
    })
}

fn is_json(value: &Value, json: &str) -> bool {
    match json {
        "value" => true,
        "string" => value.is_string(),
        "int" => value.is_i64() || value.is_u64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "object" => value.is_object(),
        "array" => value.is_array(),
        _ => false,
    }
}

fn name_of(sent: &Value) -> Result<&str, String> {
    text(sent, "execute").or_else(|_| text(sent, "exec-oob"))
}

fn text<'v>(value: &'v Value, key: &str) -> Result<&'v str, String> {
    value[key].as_str().ok_or_else(|| format!("no text {key} in {value}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn schema() -> Schema {
        Schema::read(&json!([
            {"name": "str", "meta-type": "builtin", "json-type": "string"},
            {"name": "int", "meta-type": "builtin", "json-type": "int"},
            {"name": "any", "meta-type": "builtin", "json-type": "value"},
            {"name": "nothing", "meta-type": "object", "members": []},
            {"name": "Shape", "meta-type": "enum", "values": ["round", "flat"]},
            {"name": "[Thing]", "meta-type": "array", "element-type": "Thing"},
            {"name": "Thing", "meta-type": "object", "tag": "shape",
             "members": [{"name": "shape", "type": "Shape"}, {"name": "name", "type": "str", "default": null}],
             "variants": [{"case": "round", "type": "Round"}, {"case": "flat", "type": "nothing"}]},
            {"name": "Round", "meta-type": "object", "members": [{"name": "radius", "type": "int"}]},
            {"name": "Either", "meta-type": "alternate", "members": [{"type": "str"}, {"type": "int"}]},
            {"name": "Find", "meta-type": "object", "members": [{"name": "by", "type": "Either"}]},
            {"name": "find", "meta-type": "command", "arg-type": "Find", "ret-type": "[Thing]"},
            {"name": "LOST", "meta-type": "event", "arg-type": "Thing"},
        ]))
        .unwrap()
    }

    #[test]
    fn what_is_as_reported_passes() {
        let schema = schema();
        let find = json!({"execute": "find", "arguments": {"by": 3}, "id": "1"});
        schema.check_command(&find).unwrap();
        let things = json!({"return": [{"shape": "round", "radius": 2}, {"shape": "flat", "name": "a"}], "id": "1"});
        schema.check_answer(&find, &things).unwrap();
        let error = json!({"error": {"class": "GenericError", "desc": "not here"}, "id": "1"});
        schema.check_answer(&find, &error).unwrap();
        let stamp = json!({"seconds": 1, "microseconds": 2});
        schema.check_event(&json!({"event": "LOST", "data": {"shape": "flat"}, "timestamp": stamp})).unwrap();
        let unknown = json!({"execute": "seek"});
        schema.check_answer(&unknown, &json!({"error": {"class": "CommandNotFound", "desc": "no"}})).unwrap();
    }

    #[test]
    fn what_isn_t_is_found_and_named() {
        let schema = schema();
        let find = json!({"execute": "find", "arguments": {"by": 3}});
        for (command, words) in [
            (json!({"execute": "seek"}), "no command seek"),
            (json!({"execute": "find"}), "arguments.by: missing"),
            (json!({"execute": "find", "arguments": {"by": true}}), "true is no string"),
            (json!({"execute": "find", "arguments": {"by": 1, "at": 2}}), ".at: unknown"),
        ] {
            let why = schema.check_command(&command).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        for (answer, words) in [
            (json!({"return": {}}), "is no list"),
            (json!({"return": [{"shape": "flat"}, {"shape": "odd"}]}), "return[1].shape: \"odd\" is none of"),
            (json!({"return": [{"shape": "round"}]}), "[0].radius: missing"),
            (json!({"return": [{"shape": "flat", "radius": 1}]}), "[0].radius: unknown"),
            (json!({"return": [{"shape": "round", "radius": 1.5}]}), "1.5 is no int"),
            (json!({"return": [], "id": 1}), "another id"),
            (json!({"error": {"class": "Oops", "desc": "?"}}), "no such error"),
        ] {
            let why = schema.check_answer(&find, &answer).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        let stamp = json!({"seconds": 1, "microseconds": 2});
        for (event, words) in [
            (json!({"event": "FOUND", "timestamp": stamp}), "no event FOUND"),
            (json!({"event": "LOST", "timestamp": stamp}), "data.shape: missing"),
            (json!({"event": "LOST", "data": {"shape": "flat"}}), "timestamp.seconds"),
        ] {
            let why = schema.check_event(&event).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
        let unknown = json!({"execute": "seek"});
        assert!(schema.check_answer(&unknown, &json!({"return": {}})).is_err());
        assert!(schema.check_answer(&unknown, &json!({"error": {"class": "GenericError", "desc": "no"}})).is_err());
    }

    #[test]
    fn a_schema_with_a_hole_is_refused() {
        for (reported, words) in [
            (json!({}), "is a list"),
            (json!([{"name": "a", "meta-type": "array", "element-type": "b"}]), "b is no type"),
            (json!([{"name": "a", "meta-type": "event", "arg-type": "a"}]), "a is no object type"),
            (json!([{"name": "a", "meta-type": "odd"}]), "no meta-type odd"),
        ] {
            let why = Schema::read(&reported).unwrap_err();
            assert!(why.contains(words), "{why}");
        }
    }
}
