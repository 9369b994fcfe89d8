//! States that were damaged on their way.

use serde_json::{Number, Value, json};
use soc_vmm::persist::{Saved, States};

/// Where to damage a state, and with what: numbers that choose among what there is.
pub(crate) type Damage = (u8, [u16; 6], u16);

/// Damages some of `states`: what is in their place is another value, a neighbour's, or gone.
pub(crate) fn hurt(states: States, damages: &[Damage]) -> States {
    let mut all: Vec<(String, u32, Value)> = states
        .into_iter()
        .map(|(name, Saved { version, state })| (name, version, serde_json::from_slice(&state).expect("JSON")))
        .collect();
    for (which, path, with) in damages {
        let count = all.len();
        let (_, _, state) = &mut all[usize::from(*which) % count];
        damage(state, path, *with);
    }
    let mut hurt = States::default();
    for (name, version, state) in all {
        let state = serde_json::to_vec(&state).expect("JSON");
        hurt.add(&name, Saved { version, state }).expect("names as they were");
    }
    hurt
}

fn damage(value: &mut Value, path: &[u16], with: u16) {
    let Some((&pick, rest)) = path.split_first() else { return replace(value, with) };
    let pick = usize::from(pick);
    match value {
        Value::Array(all) if !all.is_empty() => {
            let index = pick % all.len();
            match with % 8 {
                0 if rest.len() < 4 => drop(all.remove(index)),
                1 if rest.len() < 4 => all.push(all[index].clone()),
                _ => damage(&mut all[index], rest, with),
            }
        }
        Value::Object(all) if !all.is_empty() => {
            let index = pick % all.len();
            let key = all.keys().nth(index).expect("one of them").clone();
            match with % 16 {
                0 => drop(all.remove(&key)),
                _ => damage(&mut all[&key], rest, with),
            }
        }
        _ => replace(value, with),
    }
}

fn replace(value: &mut Value, with: u16) {
    let number = value.as_u64().unwrap_or(0);
    *value = match with / 16 % 16 {
        0 => Value::Null,
        1 => json!(with & 0x100 != 0),
        2 => json!("x"),
        3 => json!([]),
        4 => json!([1, 2]),
        5 => json!({}),
        6 => json!(-1),
        7 => json!(u64::MAX),
        8 => json!(number ^ 1 << (with / 256 % 64)),
        9 => json!(number.wrapping_add(1)),
        10 => json!(number.wrapping_sub(1)),
        11 => json!(with / 256),
        12 => json!(u16::MAX),
        13 => json!(u32::MAX),
        14 => json!(0),
        _ => Number::from_f64(0.5).map_or(Value::Null, Value::Number),
    };
}
