//! The AHCI controller and its CD-ROM drives, as a driver sees them.

mod controller;
mod drive;
mod moving;
mod properties;
mod rig;
