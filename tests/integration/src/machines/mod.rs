//! What the tests on emulated servers share.

mod counters;

pub use counters::Counters;
