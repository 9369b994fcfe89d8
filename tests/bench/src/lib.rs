//! Benchmarks beside peers.

pub mod bare;
