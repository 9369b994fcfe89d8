//! A guest of an emulated server kicks its disk by a notify page of the card: nothing on the server hears of it.

use integration::machines::{MOST, Server, but_for_the_emulator};
use integration::test_name;
use nix::sys::signal::Signal;
use payloads::virtio_blk::{Load, PIECE, Round, parse, virtio_blk};
use serde_json::Value;

const FUNCTION: u32 = 0;

#[test]
fn a_kick_leaves_no_trace_on_the_server() {
    but_for_the_emulator(kicks_without_exits);
}

fn kicks_without_exits() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let server = Server::start("machine-notify", 1);
    let disk = server.trial.file("disk.raw", &[0; PIECE as usize]);
    let load = Load { write: false, depth: 1, count: 100, rounds: u32::MAX, sleeps: true };
    let mut vm = server.vm(FUNCTION, &virtio_blk(load).unwrap(), &["--disk", &format!("file={disk}")]);
    server.wait_until("the first round", || !rounds(&server).is_empty());
    kicks_are_the_card_s_alone(&server);

    // The same where the guest has put its devices into their places anew.
    let before = rounds(&server).len();
    server.command(FUNCTION, &["reset"]);
    server.wait_until("rounds after the reset", || rounds(&server).len() >= before + 2);
    kicks_are_the_card_s_alone(&server);

    vm.signal(Signal::SIGTERM);
    let ended = vm.wait(MOST);
    assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""), "{}", server.story());
}

fn kicks_are_the_card_s_alone(server: &Server) {
    let notified = server.stat(FUNCTION, "notifications");
    let exits = exits(server);
    // The round that is under way has kicked before.
    let first = rounds(server).len() + 1;
    let kicks = || rounds(server).iter().skip(first).map(|round| round.kicks).sum::<u64>();
    // A device that still works is not kicked, so how many rounds that takes differs.
    server.wait_until("some kicks", || kicks() >= 50);
    assert_eq!(self::exits(server), exits, "memory accesses that left KVM for the shim");
    let kicks = kicks();
    let notified = server.stat(FUNCTION, "notifications") - notified;
    assert!(notified >= kicks, "{kicks} kicks, {notified} on the card: {:?}", rounds(server));
}

fn rounds(server: &Server) -> Vec<Round> {
    server.console(FUNCTION).lines().filter_map(parse).collect()
}

fn exits(server: &Server) -> u64 {
    let status: Value = serde_json::from_str(&server.command(FUNCTION, &["status", "--json"])).expect("JSON");
    status["counters"]["host.shim.mmio"].as_u64().expect("a count of exits")
}
