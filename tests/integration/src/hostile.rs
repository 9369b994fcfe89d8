//! What tests of failures share: programs whose every trace is watched, and peers that break the rules.

mod trial;

pub use trial::{Ended, Running, Trial, free_of_trouble, one_line, wait_until};
