//! A SoC that never stops calling.

mod soc;

use api_channel::lines::{host, soc as soc_lines};
use api_channel::message::{Class, Header, SLOT, Status};
use ioreq_ring::BusMemory;
use pcie_function::SocFunction;
use pcie_function::header::epoch;
use pcie_function::regions::{self, Type};
use soc::Soc;

#[test]
fn the_shim_goes_on_with_everything_else() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.ok(&api_channel::call::Call::Ping);
    let inbox = soc.function.remote(soc.header.inbox, soc.header.inbox_len as usize);
    let region = |kind| regions::find(&soc.regions, kind, 0, 0).unwrap();
    let requests = regions::window(&inbox, &region(Type::REQUESTS)).unwrap();
    let lines = regions::window(&inbox, &region(Type::SOC_LINES)).unwrap();
    let slots = (requests.len() / SLOT) as u64;
    // A ring full of orders that are known, and do nothing.
    let header = Header {
        opcode: api_channel::call::Call::Ping.opcode(),
        class: Class::Order,
        length: 0,
        sequence: 9,
        status: Status::OK,
        epoch: epoch(soc.header.nonce, 0x5eed),
        extra: 0,
    };
    (0..slots as usize).for_each(|slot| requests.copy_in(slot * SLOT, &header.to_bytes()));
    let host_lines = regions::window(&soc.function.card_memory(), &region(Type::HOST_LINES)).unwrap();
    let first = host_lines.load(host::HEARTBEAT);
    // As fast as it takes them, it gets new ones. One thread: two could move the tail backwards, which ends the connection.
    while host_lines.load(host::HEARTBEAT) < first + 3 {
        lines.store(soc_lines::REQUESTS_TAIL, host_lines.load(host::REQUESTS_HEAD) + slots);
        assert!(soc.child.as_mut().unwrap().try_wait().unwrap().is_none(), "the shim ended");
    }
    let taken = host_lines.load(host::REQUESTS_HEAD);
    assert!(taken > slots, "{taken} calls were taken");
    // Its end is seen, too.
    let child = soc.child.take().unwrap();
    drop((inbox, requests, lines, soc));
    soc::wait(child);
}
