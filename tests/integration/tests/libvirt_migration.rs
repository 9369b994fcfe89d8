//! Debian's unmodified libvirtd has a domain's guest leave its process and go on in another one: saved and restored, and moved live to
//! another libvirtd's.

use integration::libvirt::{Boot, Domain, Host, Operated, Pair, image};
use integration::{kvm, test_name};
use payloads::operated;
use payloads::scribe::Scribe;

const NAME: &str = "operated";
/// One after the other over one connection, and over more.
const PARALLEL: [&str; 3] = ["--parallel", "--parallel-connections", "3"];

fn define(host: &Host) {
    host.libvirt.write(&image("kernel"), operated::operated().unwrap().file().1).unwrap();
    let boot = Boot::Kernel { kernel: image("kernel"), initrd: None, cmdline: None };
    host.define(&Domain { vcpus: (1, 2), ..Domain::new(NAME, boot) });
}

/// Two, of which the first has the domain.
fn two() -> Option<Pair> {
    let pair = Pair::start()?;
    define(&pair.here);
    pair.give("kernel", operated::operated().unwrap().file().1);
    Some(pair)
}

fn at(host: &Host) -> Operated {
    Operated(host.libvirt.console(NAME).unwrap())
}

#[test]
fn a_domain_is_saved_and_goes_on_where_it_was() {
    if !kvm(&test_name()) {
        return;
    }
    let Some(host) = Host::start(true, &[]) else { return };
    define(&host);
    host.virsh(&["start", NAME]);
    let mut guest = at(&host);
    guest.answers('x');
    let before = guest.tick();
    let file = "/var/lib/libvirt/qemu/saved";
    host.virsh(&["save", NAME, file]);
    host.becomes(NAME, "shut off (saved)");
    host.virsh(&["restore", file]);
    host.becomes(NAME, "running (restored)");
    let mut guest = at(&host);
    let after = guest.tick();
    assert!(after > before, "it began anew: {after} after {before}");
    guest.answers('y');

    host.virsh(&["managedsave", NAME]);
    host.becomes(NAME, "shut off (saved)");
    host.virsh(&["start", NAME]);
    host.becomes(NAME, "running (restored)");
    let mut guest = at(&host);
    assert!(guest.tick() > after);
    guest.answers('z');
    host.virsh(&["destroy", NAME]);
    host.check_messages();
}

/// Has the guest start, move in each of these ways, and end.
fn moves(pair: &Pair, ways: &[Vec<&str>]) {
    for more in ways {
        pair.here.virsh(&["start", NAME]);
        let mut guest = at(&pair.here);
        guest.answers('x');
        let before = guest.tick();
        pair.move_by(NAME, more);
        let mut guest = at(&pair.there);
        assert!(guest.tick() > before, "{more:?}: it began anew");
        guest.answers('y');
        pair.there.virsh(&["destroy", NAME]);
    }
}

#[test]
fn a_domain_moves_live_between_two_hosts() {
    let Some(pair) = two() else { return };
    let by_tcp = |more: &[&'static str]| [&Pair::TCP, more].concat();
    moves(&pair, &[by_tcp(&[]), by_tcp(&["--auto-converge"]), by_tcp(&PARALLEL), vec!["--tunnelled"]]);
    pair.check_messages();
}

#[test]
fn a_domain_moves_over_tls() {
    let Some(pair) = two() else { return };
    pair.trusts();
    let by_tls = |more: &[&'static str]| [&Pair::TCP[..], &["--tls"], more].concat();
    pair.here.virsh(&["start", NAME]);
    let mut guest = at(&pair.here);
    guest.answers('x');
    // Its certificate is for somebody else.
    let refused = pair.refuses_to_move(NAME, &by_tls(&["--tls-destination", "elsewhere.example"]));
    assert!(refused.contains("is not for elsewhere.example but for localhost, 127.0.0.1"), "{refused}");
    pair.here.becomes(NAME, "running");
    guest.answers('y');
    pair.here.virsh(&["destroy", NAME]);
    moves(&pair, &[by_tls(&[]), by_tls(&PARALLEL)]);
    pair.check_messages();
}

#[test]
fn a_move_is_watched_and_aborted_and_the_guest_stays() {
    const BUSY: &str = "busy";
    let Some(pair) = two() else { return };
    let scribe = Scribe { vcpus: 1, pages: 4096, pace: 0 };
    let kernel = pair.give("scribe", scribe.payload().unwrap().file().1);
    pair.here.define(&Domain::new(BUSY, Boot::Kernel { kernel, initrd: None, cmdline: None }));
    pair.here.virsh(&["start", BUSY]);
    // It writes faster than a mebibyte a second moves.
    let mover = pair.begin_to_move(BUSY, &[&Pair::TCP[..], &["--bandwidth", "1"]].concat());
    pair.moves_memory(BUSY);
    pair.here.virsh(&["domjobabort", BUSY]);
    assert!(!pair.ends_to_move(mover));
    pair.here.becomes(BUSY, "running");
    pair.leaves_nothing_there();
    // And then it goes after all.
    pair.move_by(BUSY, &[&Pair::TCP[..], &["--auto-converge"]].concat());
    pair.check_messages();
}
