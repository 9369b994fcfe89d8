//! Either side lost or broken: what ends, what is held, what is said.

mod soc;

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use api_channel::Status;
use api_channel::call::{Call, CreateVm, Irqchip, Name, VCPU_ALL};
use ioreq_ring::BusMemory;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use pcie_function::{SocFunction, Windowed};
use soc::Soc;
use soc::listening::{Listening, connected, offered_again};

/// Counts in SI for ever: inc si; jmp back
const COUNT: [u8; 3] = [0x46, 0xeb, 0xfd];
/// Asks port 0x90 for ever: in al, 0x90; jmp back
const ASK: [u8; 4] = [0xe4, 0x90, 0xeb, 0xfc];

const CREATE: CreateVm = CreateVm { vcpus: 1, irqchip: 1, flags: 0, dirty_ring: 0, spin_ns: 0, name: Name::NONE };

#[test]
fn an_embedded_shim_ends_with_its_peer_whatever_its_vm_does() {
    if !soc::has_kvm() {
        return;
    }
    for (code, unanswered) in [(&COUNT[..], false), (&ASK[..], true)] {
        let mut soc = Soc::start(&[]);
        soc.real_mode(2, Irqchip::Full, code);
        if unanswered {
            soc.handler = Box::new(|_, _| None);
        }
        soc.run();
        std::thread::sleep(Duration::from_millis(5));
        if unanswered {
            soc.until("asked", |soc| soc.seen.len() == 2);
        }
        let child = soc.child.take().unwrap();
        drop(soc);
        assert!(soc::wait(child).success());
    }
}

#[test]
fn an_embedded_shim_leaves_signals_to_its_soc_and_obeys_them_once_it_holds_a_vm() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&["--keep"]);
    let mut child = soc.child.take().unwrap();
    let pid = Pid::from_raw(child.id() as i32);
    soc.real_mode(2, Irqchip::Full, &COUNT);
    soc.run();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        kill(pid, signal).unwrap();
        // It answers.
        soc.pause();
        soc.run();
    }
    drop(soc);
    let ended = loop {
        // Until it has noticed, it is the SoC's matter.
        kill(pid, Signal::SIGTERM).unwrap();
        match child.try_wait().unwrap() {
            Some(ended) => break ended,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    assert_eq!(ended.signal(), Some(Signal::SIGTERM as i32));
}

#[test]
fn a_lost_soc_s_vm_is_held_named_and_paused_when_its_lease_is_over() {
    if !soc::has_kvm() {
        return;
    }
    let mut shim = Listening::start("held", &["--lease", "1s"]);
    let mut soc = shim.connect();
    soc.real_mode(2, Irqchip::Full, &COUNT);
    soc.run();
    drop(soc);
    let mut soc = shim.connect();
    let (status, why) = soc.refused(&Call::CreateVm(CREATE));
    assert_eq!(status, Status::STATE);
    assert!(why.starts_with("VM test-vm is held here") && why.contains("restart"), "{why}");
    assert_eq!(soc.refused(&Call::Run(VCPU_ALL)).0, Status::STATE);
    let deadline = Instant::now() + soc::PATIENCE;
    while !shim.said().contains("paused (soc-lost)") {
        soc.pump(None);
        std::thread::sleep(Duration::from_millis(10));
        assert!(Instant::now() < deadline, "never paused: {}", shim.said());
    }
    drop(soc);
    let said = shim.kill();
    assert!(said.contains("the soc-vmm of VM test-vm is lost: held for 1 s"), "{said}");
}

#[test]
fn without_a_lease_the_next_soc_finds_the_function_free() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("free", &["--lease", "0"]);
    for _ in 0..3 {
        let mut soc = shim.connect();
        soc.real_mode(1, Irqchip::Split, &ASK);
        soc.run();
        soc.until("asked", |soc| soc.seen.len() > 10);
    }
    // A shim that was killed leaves its socket behind; another one takes its place, but none takes a living one's.
    let second = Listening { child: None, path: shim.path.clone(), heard: String::new() };
    let taken =
        Command::new(soc::program()).args(["--function", &format!("unix:{}", shim.path.display())]).output().unwrap();
    assert_eq!(taken.status.code(), Some(4));
    let said = String::from_utf8(taken.stderr).unwrap();
    assert!(said.contains("another host-kvm-shim serves it") && said.lines().count() == 1, "{said}");
    let path = shim.path.clone();
    let mut shim = shim;
    let mut child = shim.child.take().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(path.exists());
    let third = Command::new(soc::program())
        .args(["--function", &format!("unix:{}", path.display()), "--once"])
        .spawn()
        .unwrap();
    let mut soc = Soc::connect(connected(&path));
    soc.child = Some(third);
    soc.real_mode(1, Irqchip::Full, &COUNT);
    soc.lanes.clear();
    soc.ok(&Call::DestroyVm);
    assert!(soc::wait(soc.child.take().unwrap()).success(), "--once ends after its VM");
    drop(second);
}

#[test]
fn a_restarted_soc_gets_a_new_channel_on_the_same_offer() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    soc.ok(&Call::Ping);
    let (header, child) = (soc.header, soc.child.take());
    let mut soc = Soc::answer(soc.into_function(), header, 0xbeef);
    soc.child = child;
    // At once: the words of the old connection may still be there.
    soc.ok(&Call::Ping);
    soc.real_mode(1, Irqchip::Full, &COUNT);
    assert!(soc.shut_down().success());
}

#[test]
fn a_soc_that_breaks_the_lanes_rules_loses_its_connection_and_nothing_else() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("lanes", &["--lease", "0"]);
    let mut soc = shim.connect();
    // A completion that nobody asked for, one of the wrong sequence, one with reserved bits, a line change that is none.
    for (words, sequence) in [([0, 0, 0], 77u64), ([0, 0, 0], 1 | 1 << 50), ([0, 1, 0], 1)] {
        soc.real_mode(1, Irqchip::Full, &ASK);
        soc.handler = Box::new(|_, _| None);
        soc.run();
        soc.until("asked", |soc| soc.seen.len() == 1);
        let line = soc.function.remote(soc.created.unwrap().completions, 64);
        line.store_line(32, &[words[0], words[1], words[2], sequence]);
        soc.function.raise(soc.created.unwrap().lane_vector);
        soc = offered_again(soc, 0x1234);
    }
    soc.real_mode(1, Irqchip::Full, &ASK);
    soc.run();
    soc.until("asked", |soc| soc.seen.len() > 3);
    drop(soc);
    let said = shim.kill();
    assert_eq!(said.matches("the lane of vCPU 0: the peer's line").count(), 3, "{said}");
}

/// The channel and a lane are broken at once: the lane's end is of the connection that is over, and no reason to end the next one.
#[test]
fn what_a_lost_vm_s_vcpus_said_last_does_not_end_the_next_connection() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("both", &["--lease", "0"]);
    let mut soc = shim.connect();
    // The lane's end may come first, and then there is nothing to forget.
    for round in 0..5 {
        soc.real_mode(1, Irqchip::Full, &ASK);
        soc.handler = Box::new(|_, _| None);
        soc.run();
        soc.until("asked", |soc| soc.seen.len() == 1);
        let lines = soc.function.remote(soc.header.inbox, soc.header.inbox_len as usize);
        let lane = soc.function.remote(soc.created.unwrap().completions, 64);
        lines.store(api_channel::lines::soc::REQUESTS_TAIL, 1 << 40);
        soc.function.raise(0);
        lane.store(56, 77);
        soc.function.raise(soc.created.unwrap().lane_vector);
        soc = offered_again(soc, round + 1);
        // A pause is a notice of the vCPU's thread: the API thread looks at what it was told.
        soc.real_mode(1, Irqchip::Full, &COUNT);
        soc.run();
        soc.pause();
        soc.lanes.clear();
        soc.ok(&Call::DestroyVm);
    }
}

#[test]
fn random_words_over_all_that_the_soc_writes_end_connections_at_most() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("random", &["--lease", "0"]);
    let mut soc = shim.connect();
    let mut seed = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let mut connections = 1;
    for round in 0..40 {
        // What is stored after the shim took the VM's memory back faults, and the function remembers that.
        soc.faulty = true;
        soc.real_mode(1, Irqchip::Full, &ASK);
        soc.run();
        let lines = soc.function.remote(soc.header.inbox, soc.header.inbox_len as usize);
        let lane = soc.function.remote(soc.created.unwrap().completions, 4096 * 3);
        for _ in 0..20 {
            // Lines, tails and the head of the request ring more often than all the rest; the header line stays.
            let near = (64 + (random() % 56) * 8) as usize;
            let far = (64 + random() % (u64::from(soc.header.inbox_len) - 64)) as usize & !7;
            let word = if random() % 2 == 0 { random() } else { random() % 70 };
            lines.cut(if random() % 3 == 0 { far } else { near }, 8).unwrap().store(0, word);
            if random() % 3 == 0 {
                lane.store((random() % 1536) as usize * 8, if random() % 2 == 0 { random() } else { random() % 8 });
            }
            for vector in 0..4 {
                soc.function.raise(vector);
            }
        }
        // Whatever came of it: a tail that can't be ends what is left of the connection.
        lines.store(api_channel::lines::soc::REQUESTS_TAIL, 1 << 40);
        soc.function.raise(0);
        soc = offered_again(soc, round + 1);
        connections += 1;
        soc.ok(&Call::Ping);
    }
    assert_eq!(connections, 41);
    soc.faulty = true;
    soc.real_mode(1, Irqchip::Full, &ASK);
    soc.run();
    soc.until("asked", |soc| soc.seen.len() > 3);
    drop(soc);
    let said = shim.kill();
    assert!(!said.contains("panicked"), "{said}");
}

#[test]
fn a_silent_heartbeat_is_reported_and_pauses_the_vm_when_the_lease_is_over() {
    if !soc::has_kvm() {
        return;
    }
    let shim = Listening::start("silent", &["--lease", "1s"]);
    let mut soc = shim.connect();
    soc.real_mode(1, Irqchip::Full, &COUNT);
    soc.run();
    soc.say_polling(true);
    let logged = |soc: &Soc, text: &str| {
        soc.events.iter().any(|e| matches!(e, api_channel::event::Event::Log { text: line, .. } if line.contains(text)))
    };
    soc.mute = true;
    let started = Instant::now();
    while !logged(&soc, "paused (soc-lost)") {
        soc.pump(None);
        std::thread::sleep(Duration::from_millis(10));
        assert!(started.elapsed() < soc::PATIENCE, "{:?}", soc.events);
    }
    assert!(started.elapsed() > Duration::from_secs(9) && logged(&soc, "is silent"));
    soc.pause();
    let stopped = soc.regs(0);
    // It comes back: the VM is there still, and runs when it is told to.
    soc.mute = false;
    soc.until("is back", |soc| logged(soc, "is back"));
    assert_eq!(soc.regs(0), stopped);
    let deadline = Instant::now() + soc::PATIENCE;
    while soc.regs(0).rsi == stopped.rsi {
        assert!(Instant::now() < deadline, "it doesn't go on");
        soc.run();
        std::thread::sleep(Duration::from_millis(5));
        soc.pause();
    }
}

#[test]
fn what_can_t_be_used_is_said_in_one_line_with_status_4() {
    let run = |args: &[&str]| {
        let output = Command::new(soc::program()).args(args).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(said.lines().count(), 1, "{said}");
        (output.status.code(), said)
    };
    for (args, status, text) in [
        (&["--function", "fd:99"][..], 4, "fd:99"),
        (&["--function", "fd:0"], 4, "fd:0"),
        (&["--function", "unix:/nonexistent/x"], 4, "/nonexistent/x"),
        (&["--function", "pci:0000:ff:1f.7"], 4, "0000:ff:1f.7"),
        (&["--function", "tcp:1"], 2, "tcp:1"),
    ] {
        let (code, said) = run(args);
        assert!(code == Some(status) && said.contains(text), "{args:?}: {code:?} {said}");
    }
    if nix::unistd::geteuid().is_root() {
        let hidden = Command::new("unshare")
            .args(["--mount", "sh", "-c", "mount --bind /dev/null /dev/kvm && exec \"$0\" \"$@\""])
            .arg(soc::program())
            .args(["--function", "unix:/tmp/never.sock"])
            .output()
            .unwrap();
        let said = String::from_utf8(hidden.stderr).unwrap();
        assert_eq!(hidden.status.code(), Some(4), "{said}");
        assert!(said.contains("/dev/kvm") && said.lines().count() == 1, "{said}");
    }
}
