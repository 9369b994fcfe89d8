//! Figures for a person and for a program: the same ones.

use std::fs;
use std::path::Path;

use serde::Serialize;

/// A figure with its unit.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) value: f64,
    pub(crate) unit: &'static str,
}

/// Figures in the order in which they were taken.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
#[serde(transparent)]
pub(crate) struct Table {
    figures: Vec<Figure>,
}

impl Table {
    /// Adds a figure.
    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &'static str) {
        let name = name.to_owned();
        self.figures.push(Figure { name, value, unit });
    }

    /// Writes the figures as JSON.
    pub(crate) fn write_json(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| format!("figures: {e}"))?;
        fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))
    }
}

impl std::fmt::Display for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let values: Vec<String> = self.figures.iter().map(shown).collect();
        let names = self.figures.iter().map(|figure| figure.name.len());
        let name_width = names.max().unwrap_or_default();
        let value_width = values.iter().map(String::len).max().unwrap_or_default();
        for (figure, value) in self.figures.iter().zip(&values) {
            let name = &figure.name;
            let line = format!("{name:<name_width$}  {value:>value_width$} {}", figure.unit);
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

/// Counts as they are, measured values with two decimals.
fn shown(figure: &Figure) -> String {
    if figure.value.fract() == 0.0 { format!("{:.0}", figure.value) } else { format!("{:.2}", figure.value) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::default();
        table.add("boot", 12.345, "s");
        table.add("port accesses", 4096.0, "");
        assert_eq!(table.to_string(), "boot           12.35 s\nport accesses   4096\n");
    }
}
