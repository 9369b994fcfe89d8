//! The vCPU runner on the host.
