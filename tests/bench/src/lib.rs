//! Benchmarks: this project beside its peers on one machine, in one run.

pub mod bare;
pub mod command;
pub mod contender;
pub mod exit_read_polling;
pub mod figure;
pub mod host;
pub mod idle;
pub mod lane_round;
pub mod record;
