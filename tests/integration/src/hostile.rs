//! What tests of failures share: programs whose every trace is watched, and peers that break the rules.

mod dice;
mod host;
mod soc;
mod trial;

pub use dice::Dice;
pub use host::{Attack, HostileHost};
pub use soc::{HostileSoc, Stage, random_call};
pub use trial::{Ended, Running, Trial, free_of_trouble, is_listened_on, one_line, wait_until};
