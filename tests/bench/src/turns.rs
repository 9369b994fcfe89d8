//! A figure of contenders whose runs take turns, so that what else the machine does meets all of them.

use crate::contender::{Entrant, Side};
use crate::figure::{Figure, Summary};

/// How much is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// How often each contender is started.
    pub runs: u32,
    /// A device's requests of a round.
    pub requests: u32,
}

/// One who takes turns.
pub trait Turn {
    /// Its name in a figure.
    fn name(&self) -> &'static str;
    /// Where it stands in a figure.
    fn side(&self) -> Side;
}

impl Turn for Entrant {
    fn name(&self) -> &'static str {
        self.name
    }

    fn side(&self) -> Side {
        self.side
    }
}

/// Measures `runs` times: `run` gives what an entrant's rounds of one run came to, a value for each of the figures (name and unit), or
/// why there are none. Then it is left out, and the figures say so.
pub fn measure<E: Turn, const N: usize>(
    figures: [(&str, &str); N],
    entrants: &mut [E],
    runs: u32,
    progress: &dyn Fn(&str),
    run: impl Fn(&mut E) -> Result<Vec<[f64; N]>, String>,
) -> [Figure; N] {
    let (name, unit) = figures.first().copied().unwrap_or_default();
    let mut results: Vec<Result<Vec<[f64; N]>, String>> = entrants.iter().map(|_| Ok(Vec::new())).collect();
    for turn in 1..=runs {
        for (entrant, result) in entrants.iter_mut().zip(&mut results) {
            let Ok(values) = result else { continue };
            match run(entrant) {
                Ok(of_run) => {
                    let first: Vec<_> = of_run.iter().filter_map(|values| values.first().copied()).collect();
                    let median = Summary::of(&first).map_or(f64::NAN, |summary| summary.median);
                    progress(&format!("{name}, run {turn} of {runs}: {} {median:.0} {unit}", entrant.name()));
                    values.extend(of_run);
                }
                Err(why) => {
                    progress(&format!("{name}: {} left out: {why}", entrant.name()));
                    *result = Err(why);
                }
            }
        }
    }

    std::array::from_fn(|at| {
        let summaries = results.iter().map(|result| {
            let rounds = result.as_ref().map_err(String::clone)?;
            Ok(Summary::of(&rounds.iter().map(|values| values[at]).collect::<Vec<_>>()))
        });
        let (name, unit) = figures[at];
        together(Figure::empty(name, unit, runs), entrants, summaries)
    })
}

/// Puts each entrant's summary where it stands in the figure.
fn together(
    mut figure: Figure,
    entrants: &[impl Turn],
    summaries: impl Iterator<Item = Result<Option<Summary>, String>>,
) -> Figure {
    let mut skipped = Vec::new();
    for (entrant, summary) in entrants.iter().zip(summaries) {
        match summary {
            Ok(Some(summary)) => match entrant.side() {
                Side::Ours => figure.ours = Some(summary),
                Side::Peer => drop(figure.peers.insert(entrant.name().to_owned(), summary)),
                Side::Floor => figure.floor = Some(summary),
            },
            Ok(None) => skipped.push(format!("{}: no round", entrant.name())),
            Err(why) => skipped.push(format!("{}: {why}", entrant.name())),
        }
    }
    figure.skipped = (!skipped.is_empty()).then(|| skipped.join("; "));
    figure
}
