//! First process of the emulated server.

fn main() {}
