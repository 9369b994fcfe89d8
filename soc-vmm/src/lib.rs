//! The VMM on the SoC: machine, devices, boot, QMP, CLI.
