//! Benchmarks: this project beside its peers on one machine, in one run.

pub mod bare;
pub mod command;
pub mod contender;
pub mod disk;
pub mod exit_read_polling;
pub mod figure;
pub mod fio;
pub mod host;
pub mod idle;
pub mod kicks;
pub mod lane_round;
pub mod migrate;
pub mod net;
pub mod record;
pub mod server;
pub mod turns;
