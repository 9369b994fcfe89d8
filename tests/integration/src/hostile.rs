//! What tests of failures share: programs whose every trace is watched, and peers that break the rules.

mod dice;
mod host;
mod trial;

pub use dice::Dice;
pub use host::{Attack, HostileHost};
pub use trial::{Ended, Running, Trial, free_of_trouble, one_line, wait_until};
