//! The vCPU runner on the host.

fn main() {}
