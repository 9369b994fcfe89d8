//! What a shim costs its host: private memory, threads, CPU while the guest halts.

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

/// Threads of a process, without those that KVM itself starts in it (`kvm-nx-lpage-recovery`), and the CPU time that all of them used, guest time apart, in clock ticks.
fn threads_and_ticks(pid: u32) -> (usize, u64) {
    let names =
        fs::read_dir(format!("/proc/{pid}/task")).unwrap().map(|t| fs::read_to_string(t.unwrap().path().join("comm")));
    let threads = names.filter(|name| !name.as_ref().unwrap().starts_with("kvm-")).count();
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    let field = |i: usize| fields[i - 3].parse::<u64>().unwrap();
    // proc(5): 14 utime, which includes 43, guest_time; 15 stime.
    (threads, field(14) + field(15) - field(43))
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
    let start = Instant::now();
    let seconds = 4;
    // The first second is the start's.
    while start.elapsed() < Duration::from_secs(1) {
        std::thread::sleep(Duration::from_millis(100));
        soc.pump(None);
    }
    let (threads, before) = threads_and_ticks(pid);
    while start.elapsed() < Duration::from_secs(1 + seconds) {
        std::thread::sleep(Duration::from_millis(100));
        soc.pump(None);
    }
    let (_, after) = threads_and_ticks(pid);
    let (private, own, by_name) = private_kib(pid);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let tables = status.lines().find(|l| l.starts_with("VmPTE")).unwrap();
    println!(
        "private {private} KiB, {own} KiB without code and constants, {tables}, {threads} threads, {} ticks in {seconds} s\n{by_name}",
        after - before
    );
    assert_eq!(threads, 3, "vCPUs + 1");
    assert!(own < 400, "{own} KiB\n{by_name}");
    // A debug build's code is several times as large.
    let released = !cfg!(debug_assertions) || std::env::var_os("OUTBOARD_SHIM").is_some();
    assert!(private < 1000 || !released, "{private} KiB\n{by_name}");
    assert!(after - before <= 1, "{} ticks of 10 ms in {seconds} s", after - before);
    assert!(soc.shut_down().success());
}
