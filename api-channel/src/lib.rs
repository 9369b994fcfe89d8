//! Every message between SoC and host.
