//! A level-triggered line by a vector of the function that is resampled, as a device of a SoC drives one.

use std::time::Instant;

use api_channel::event::Event;
use ioreq_ring::Completion;
use payloads::interrupts::{LEVEL_ENTRIES, LEVEL_LINE};
use payloads::ports;
use pcie_function::SocFunction;

use super::{Answer, Board, PATIENCE, Seen, Soc};

/// Runs [`payloads::interrupts::level`] to its end: raises `vector` when its line gets high, and at each notice of an end while it is; the board,
/// and how many notices came.
///
/// A line is raised when all notices of its earlier ends have come. One that came later would raise it once more, and the one of that end might then
/// find the line low again: a surplus interrupt of this device's own making.
///
/// # Panics
/// A notice does not come.
pub fn resampled<F: SocFunction>(soc: &mut Soc<F>, vector: u32) -> (Board, u32) {
    let mut board = Board::default();
    let (mut high, mut rounds, mut notices) = (false, 0, 0);
    while board.exit.is_none() {
        notices += take_notices(soc, vector, high);
        let Some(seen) = soc.try_take() else { continue };
        let answer = match level(&seen) {
            Some(true) => {
                let deadline = Instant::now() + PATIENCE;
                while notices < rounds * LEVEL_ENTRIES {
                    assert!(Instant::now() < deadline, "{notices} notices of {} ends", rounds * LEVEL_ENTRIES);
                    notices += take_notices(soc, vector, false);
                }
                rounds += 1;
                high = true;
                soc.function.raise(vector);
                Answer::Plain(Completion::ok(0))
            }
            Some(false) => {
                high = false;
                Answer::Plain(Completion::ok(0))
            }
            None => board.serve(&seen),
        };
        soc.answer(&seen, answer);
    }
    (board, notices)
}

/// Takes the notices that have come; at each the line is raised again if it is high.
fn take_notices<F: SocFunction>(soc: &mut Soc<F>, vector: u32, high: bool) -> u32 {
    let events = soc.take_events();
    let notices = events.iter().filter(|event| **event == Event::Eoi { gsi: LEVEL_LINE.into() }).count();
    for _ in 0..if high { notices } else { 0 } {
        soc.function.raise(vector);
    }
    notices as u32
}

/// The level that the guest sets its line to.
fn level(seen: &Seen) -> Option<bool> {
    seen.writes(ports::IRQ_LINES + u16::from(LEVEL_LINE)).then_some(seen.request.data != 0)
}
