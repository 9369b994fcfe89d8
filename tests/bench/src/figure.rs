//! A benchmark's result as `cargo xtask bench --json` writes it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One measured thing: this project beside its peers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// What was measured, in words with dots.
    pub name: String,
    /// What the numbers count.
    pub unit: String,
    /// This project.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ours: Option<Summary>,
    /// The others, by name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub peers: BTreeMap<String, Summary>,
    /// What nobody can be below on this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub floor: Option<Summary>,
    /// How often each of them was started.
    pub runs: u32,
    /// Why something of it is missing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
}

impl Figure {
    /// Nothing measured yet.
    pub fn empty(name: &str, unit: &str, runs: u32) -> Self {
        Figure {
            name: name.to_owned(),
            unit: unit.to_owned(),
            ours: None,
            peers: BTreeMap::new(),
            floor: None,
            runs,
            skipped: None,
        }
    }
}

/// All values of one contender.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// The least.
    pub min: f64,
    /// The middle one, or the mean of the middle two.
    pub median: f64,
    /// The greatest.
    pub max: f64,
}

impl Summary {
    /// Of at least one value.
    pub fn of(values: &[f64]) -> Option<Self> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len().is_multiple_of(2) { sorted[middle - 1].midpoint(sorted[middle]) } else { sorted[middle] };
        Some(Summary { min, median, max })
    }
}

/// A number of a figure as text: whole, unless it is small.
pub(crate) fn text(number: f64) -> String {
    match number.abs() {
        ..1.0 => format!("{number:.3}"),
        ..10.0 => format!("{number:.2}"),
        _ => format!("{number:.0}"),
    }
}

/// `ours ÷ peer` as text, unless there is nothing to divide by.
pub(crate) fn ratio(ours: &Summary, peer: &Summary) -> Option<String> {
    let ratio = ours.median / peer.median;
    ratio.is_finite().then(|| if ratio < 0.1 { format!("{ratio:.3}") } else { format!("{ratio:.2}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summary_of_values_in_any_order() {
        assert_eq!(Summary::of(&[3.0, 1.0, 2.0]), Some(Summary { min: 1.0, median: 2.0, max: 3.0 }));
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]), Some(Summary { min: 1.0, median: 2.5, max: 4.0 }));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn small_numbers_have_decimals() {
        let summary = |value| Summary::of(&[value]).unwrap();
        for (ours, peer, texts) in [
            (392_681.4, 65_589.0, ("392681", Some("5.99"))),
            (0.0024, 0.334, ("0.002", Some("0.007"))),
            (1.5, 3.0, ("1.50", Some("0.50"))),
            (0.0, 0.0, ("0.000", None)),
        ] {
            let ratio = ratio(&summary(ours), &summary(peer));
            assert_eq!((text(ours).as_str(), ratio.as_deref()), texts);
        }
    }

    #[test]
    fn json_has_the_words_of_the_interface() {
        let figure = Figure {
            name: "exit.read.polling".into(),
            unit: "ns".into(),
            ours: Summary::of(&[2.0]),
            peers: [("qemu".into(), Summary::of(&[3.0]).unwrap())].into(),
            floor: Summary::of(&[1.0]),
            runs: 1,
            skipped: None,
        };
        let expected = serde_json::json!({
            "name": "exit.read.polling",
            "unit": "ns",
            "ours": {"min": 2.0, "median": 2.0, "max": 2.0},
            "peers": {"qemu": {"min": 3.0, "median": 3.0, "max": 3.0}},
            "floor": {"min": 1.0, "median": 1.0, "max": 1.0},
            "runs": 1,
        });
        assert_eq!(serde_json::to_value(&figure).unwrap(), expected);

        let skipped = Figure { ours: None, peers: [].into(), floor: None, skipped: Some("no".into()), ..figure };
        let expected = serde_json::json!({"name": "exit.read.polling", "unit": "ns", "runs": 1, "skipped": "no"});
        assert_eq!(serde_json::to_value(&skipped).unwrap(), expected);
    }
}
