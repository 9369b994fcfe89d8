//! What a peer may make of a device's state on its way.

use arbitrary::Arbitrary;
use serde_json::Value;
use soc_vmm::persist::States;

/// One number of one device's state that is another, or one item too many in a list, or one digit too many in bytes.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub struct Damage {
    device: u8,
    leaf: u8,
    value: i64,
}

impl Damage {
    /// Damages what is on its way.
    pub fn to(self, states: States) -> States {
        let mut all: Vec<_> = states.into_iter().collect();
        let count = all.len().max(1);
        if let Some((_, saved)) = all.get_mut(usize::from(self.device) % count) {
            let mut state = serde_json::from_slice(&saved.state).expect("a state is JSON");
            change(&mut state, &mut self.leaf.into(), self.value);
            saved.state = serde_json::to_vec(&state).expect("a state is JSON");
        }
        let mut damaged = States::default();
        for (name, saved) in all {
            damaged.add(&name, saved).expect("names are different");
        }
        damaged
    }
}

/// Changes the `left`-th leaf in `state`, or the length of the list it is in.
pub fn change(state: &mut Value, left: &mut usize, value: i64) {
    match state {
        Value::Object(members) => members.values_mut().for_each(|member| change(member, left, value)),
        Value::Array(items) if *left == items.len() => {
            *left = usize::MAX;
            items.push(value.into());
        }
        Value::Array(items) => items.iter_mut().for_each(|item| change(item, left, value)),
        leaf => {
            if *left == 0 {
                *leaf = match leaf {
                    Value::Bool(_) => (value & 1 != 0).into(),
                    Value::String(text) => spoil(text, value).into(),
                    _ => value.into(),
                };
            }
            *left = left.wrapping_sub(1);
        }
    }
}

/// Another digit somewhere in bytes, or one more.
fn spoil(text: &str, value: i64) -> String {
    let (at, digit) = (value.unsigned_abs() as usize / 16, char::from_digit(value as u32 & 0xf, 16).unwrap_or('g'));
    let mut digits: Vec<char> = text.chars().collect();
    match digits.get_mut(at) {
        Some(old) => *old = digit,
        None => digits.push(digit),
    }
    digits.into_iter().collect()
}
