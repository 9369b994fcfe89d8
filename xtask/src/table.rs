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
pub(crate) struct Figures(Vec<Figure>);

impl Figures {
    /// Adds a figure.
    pub(crate) fn add(&mut self, name: &str, value: f64, unit: &'static str) {
        let name = name.to_owned();
        self.0.push(Figure { name, value, unit });
    }

    /// The value of the figure `name`.
    pub(crate) fn value(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|figure| figure.name == name).map(|figure| figure.value)
    }

    /// The figure `name` to be shown: a count as it is, a measured value with a decimal, `-` if it wasn't taken.
    pub(crate) fn shown(&self, name: &str) -> String {
        match self.value(name) {
            Some(value) if value.fract() == 0.0 => format!("{value:.0}"),
            Some(value) => format!("{value:.1}"),
            None => "-".to_owned(),
        }
    }

    /// Writes the figures as JSON.
    pub(crate) fn write_json(&self, path: &Path) -> Result<(), String> {
        let text = serde_json::to_string_pretty(self).map_err(|e| format!("figures: {e}"))?;
        fs::write(path, text + "\n").map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// Rows of cells as lines: the first column to the left, numbers to the right.
pub(crate) fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or_default()).collect();
    let mut text = String::new();
    for row in rows {
        let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
            if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") }
        });
        text.push_str(cells.collect::<String>().trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        let rows = [row(["exits", "SoC", "KVM"]), row(["port I/O", "3057", "3186"]), row(["posted", "0", ""])];
        assert_eq!(aligned(&rows), "exits      SoC   KVM\nport I/O  3057  3186\nposted       0\n");
    }

    #[test]
    fn counts_have_no_decimals() {
        let mut figures = Figures::default();
        figures.add("boot", 12.345, "s");
        figures.add("pio", 4096.0, "");
        assert_eq!(figures.shown("boot"), "12.3");
        assert_eq!(figures.shown("pio"), "4096");
        assert_eq!(figures.shown("absent"), "-");
    }
}
