//! The platform devices, driven through a bus as guests drive them.

mod acpi_pm;
mod i8042;
mod pipes;
mod properties;
mod rig;
mod rtc;
mod serial;
mod small;
