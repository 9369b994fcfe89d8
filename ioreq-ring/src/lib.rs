//! The IOREQ ring: wire layout, host end, SoC end.
