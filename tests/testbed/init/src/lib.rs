//! The language between a testbed machine and who drives it.
