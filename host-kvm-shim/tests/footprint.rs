//! What a shim costs its host: private memory, threads, wake-ups while the guest halts.

mod soc;

use std::fs;
use std::time::{Duration, Instant};

use api_channel::call::Irqchip;
use soc::Soc;

/// KiB of private memory of a process, without what guest RAM and the function's shared memory hold: all of it, what is no code or constant
/// of the program's file (which a host's other shims share), and the list.
fn private_kib(pid: u32) -> (u64, u64, String) {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut total, mut own, mut name, mut shared, mut by_name) = (0, 0, "", false, String::new());
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("Private_Clean:" | "Private_Dirty:" | "Private_Hugetlb:") => {
                let kib: u64 = words.next().unwrap().parse().unwrap();
                if !shared && kib != 0 {
                    total += kib;
                    own += if name.contains(" r-xp ") || name.contains(" r--p 00000000 ") { 0 } else { kib };
                    by_name += &format!("{kib:6} {line} {name}\n");
                }
            }
            Some(range) if range.contains('-') => {
                name = line;
                shared = line.contains("memfd:outboard-") || line.contains("vfio");
            }
            _ => {}
        }
    }
    (total, own, by_name)
}

/// How often each thread of a process went to sleep by itself, and its state; without those threads that KVM itself starts in it
/// (`kvm-nx-lpage-recovery`).
fn threads(pid: u32) -> Vec<(String, u64, char)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|task| {
        let status = fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
        let sleeps = field("voluntary_ctxt_switches:").parse().unwrap();
        (field("Name:"), sleeps, field("State:").chars().next().unwrap())
    });
    let mut threads: Vec<_> = tasks.filter(|(name, ..)| !name.starts_with("kvm-")).collect();
    threads.sort();
    threads
}

#[test]
fn a_shim_is_small_and_idle_while_its_guest_halts() {
    if !soc::has_kvm() {
        return;
    }
    let mut soc = Soc::start(&[]);
    let pid = soc.child.as_ref().unwrap().id();
    // cli; hlt; jmp back
    soc.real_mode(2, Irqchip::Full, &[0xfa, 0xf4, 0xeb, 0xfd]);
    soc.run();
    soc.say_polling(false);
    // The shim's heartbeat tells of its time: of none where others have the CPUs.
    let beats = |soc: &mut Soc, n: u64, look: &mut dyn FnMut()| {
        let (first, deadline) = (soc.client.host_beat(), Instant::now() + soc::PATIENCE);
        while soc.client.host_beat() < first + n {
            std::thread::sleep(Duration::from_millis(50));
            soc.pump(None);
            look();
            assert!(Instant::now() < deadline, "no heartbeat");
        }
    };
    // The first beats are the start's.
    beats(&mut soc, 3, &mut || {});
    let (before, n) = (threads(pid), 4);
    let mut running = 0;
    beats(&mut soc, n, &mut || {
        running += threads(pid).iter().filter(|(name, _, state)| name.starts_with("vcpu") && *state == 'R').count();
    });
    let after = threads(pid);
    let (private, own, by_name) = private_kib(pid);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let tables = status.lines().find(|l| l.starts_with("VmPTE")).unwrap();
    println!(
        "private {private} KiB, {own} KiB without code and constants, {tables}; {before:?}, {n} heartbeats later {after:?}\n{by_name}"
    );
    assert_eq!(after.len(), 3, "vCPUs + 1");
    for ((name, before, _), (_, after, _)) in before.iter().zip(&after) {
        let wakeups = after - before;
        if name.starts_with("vcpu") {
            assert!(wakeups <= 1, "{name} was woken {wakeups} times while its guest halted");
        } else {
            // Once a heartbeat, or as much as a page's way back to where it was unmapped takes.
            assert!((n - 1..=3 * n).contains(&wakeups), "{name} was woken {wakeups} times in {n} heartbeats");
        }
    }
    assert_eq!(running, 0, "vCPUs ran while their guest halted");
    assert!(own < 400, "{own} KiB\n{by_name}");
    // A debug build's code is several times as large.
    let released = !cfg!(debug_assertions) || std::env::var_os("OUTBOARD_SHIM").is_some();
    assert!(private < 1000 || !released, "{private} KiB\n{by_name}");
    assert!(soc.shut_down().success());
}
