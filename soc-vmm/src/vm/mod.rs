//! A VM: machine, memory, vCPUs on the host, and the loop that keeps them together.

mod arranger;
mod chipset;
mod counters;
mod dirty;
mod guest;
mod hardware;
mod host;
mod late;
mod life;
mod lines;
mod machine;
mod media;
mod memory_plan;
mod messages;
mod moving;
mod notify;
mod pages;
mod ram;
mod run;
mod shape;
mod signals;
mod split;
mod state;
mod string;
mod throttle;
mod view;
mod worker;
mod zone;

pub use counters::{Counter, Counters};
pub use ram::{GuestRam, Loader};
pub use run::run;
pub use worker::{Buses, Waker};
