//! Entropy, ports, sockets and a balloon against a driver that writes anything, and against their peers on this side.
#![no_main]

use libfuzzer_sys::fuzz_target;
use program::{Kind, run};

#[path = "../../../../soc-vmm/tests/virtio/program.rs"]
mod program;
#[allow(dead_code, reason = "shared with the devices' own tests")]
#[path = "../../../../soc-vmm/tests/virtio/rig.rs"]
mod rig;

fuzz_target!(|data: &[u8]| {
    let Some((kind, program)) = data.split_first() else { return };
    run([Kind::Entropy, Kind::Console, Kind::Vsock, Kind::Balloon][usize::from(kind % 4)], program);
});
