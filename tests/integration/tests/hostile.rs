//! A host that lies, against the real soc-vmm: it ends its VM with one line, or goes on; it never crashes, hangs or swells.

use std::time::{Duration, Instant};

use integration::hostile::{Attack, Dice, Ended, HostileHost, Trial, free_of_trouble, one_line, wait_until};
use nix::sys::signal::Signal;
use payloads::{Payload, Privilege};

/// How long an attack goes on before the host hangs up.
const LASTS: Duration = Duration::from_millis(700);
/// How long soc-vmm may take to end after that, on a busy machine.
const MOST: Duration = Duration::from_secs(120);
/// Most memory that soc-vmm may have had, in KiB: unoptimized, it takes some 30 MiB for a small VM.
const MOST_MEMORY: u64 = 96 << 10;
/// Calls that make a VM of one vCPU and start it.
const CALLS: u32 = 13;
/// Attacks of each kind.
const SEEDS: u64 = 4;

fn payload() -> Payload {
    payloads::pio::pio(Privilege::Cpl0).expect("the payload assembles")
}

/// Runs soc-vmm against an attack; how it ended, and how many calls were answered.
fn attacked(attack: Attack, seed: u64, calls: u32, most: Duration) -> (Ended, u32) {
    let what = format!("{attack:?} after {calls} calls, seed {seed:#x}");
    let trial = Trial::default();
    let host = HostileHost::listen(&trial.path("function"), attack, seed, calls, LASTS);
    let mut vm = trial.vm("vm", &payload(), &["--function", &format!("unix:{}", trial.at("function"))]);
    let (start, mut memory) = (Instant::now(), 0);
    while vm.runs() {
        memory = memory.max(vm.proc_status("VmHWM"));
        assert!(start.elapsed() < most, "{what}: soc-vmm hangs: {}", vm.stderr());
        std::thread::sleep(Duration::from_millis(5));
    }
    let ended = vm.wait(most);
    free_of_trouble(&what, &ended);
    assert!(memory < MOST_MEMORY, "{what}: soc-vmm took {memory} KiB");
    let calls = host.calls();
    drop(host);
    std::fs::remove_file(trial.path("function")).expect("the host's own socket");
    trial.leaves_nothing(&what);
    (ended, calls)
}

/// Runs an attack with several seeds at once. Whatever it is, soc-vmm must say in one line of its own how it ended.
fn survives(attack: Attack) {
    // One that nobody has tried before, beside those that everybody tries.
    use std::hash::{BuildHasher, RandomState};
    let new = RandomState::new().hash_one(0);
    std::thread::scope(|scope| {
        for seed in (0..SEEDS).chain([new]) {
            // Somewhere in the making of a VM, or after it.
            let calls = Dice::new(seed).below(u64::from(CALLS) + 1) as u32;
            scope.spawn(move || {
                let (ended, _) = attacked(attack, seed, calls, MOST);
                let what = format!("{attack:?}, seed {seed:#x}");
                assert!(matches!(ended.status.code(), Some(4 | 6)), "{what}: {:?} {}", ended.status, ended.stderr);
                let own: Vec<_> = ended.stderr.lines().filter(|line| line.starts_with("soc-vmm: ")).collect();
                assert_eq!(own.len(), 1, "{what}: {}", ended.stderr);
                let printable = ended.stderr.chars().all(|c| c == '\n' || !c.is_control());
                assert!(printable && ended.stderr.len() < 1 << 18, "{what}: {:?}", ended.stderr);
            });
        }
    });
}

#[test]
fn an_honest_host_of_the_same_make_gets_its_exit_served() {
    let (ended, calls) = attacked(Attack::None(0x15), 1, 0, MOST);
    assert_eq!(ended.status.code(), Some(0x2b), "after {calls} calls: {}", ended.stderr);
    // It is ended by two more: its vCPUs are paused, so that devices stop in order, and it is destroyed.
    assert_eq!(calls, CALLS + 2);
}

#[test]
fn a_host_of_another_version() {
    let (ended, _) = attacked(Attack::Version, 1, 0, MOST);
    one_line("another version", &ended, 4, &["speaks versions 2 to 4, this side 1", "upgrade"]);
}

#[test]
fn a_host_that_answers_no_more_does_not_keep_a_vm_from_being_ended() {
    let trial = Trial::default();
    for calls in [3, CALLS] {
        let path = trial.path(&format!("function-{calls}"));
        let _host = HostileHost::listen(&path, Attack::Silence, 1, calls, MOST * 2);
        let name = format!("vm-{calls}");
        let mut vm = trial.vm(&name, &payload(), &["--function", &format!("unix:{}", path.display())]);
        wait_until("the monitor listens", MOST, || trial.path(&format!("{name}.qmp")).exists());
        std::thread::sleep(LASTS);
        vm.signal(Signal::SIGTERM);
        let ended = vm.wait(MOST);
        free_of_trouble("a silent host", &ended);
        assert_eq!((ended.status.code(), ended.stderr.as_str()), (Some(0), ""));
    }
    trial.leaves_nothing("a silent host");
}

#[test]
fn headers_and_region_tables() {
    for attack in [Attack::Header, Attack::ChangingHeader, Attack::Table, Attack::ChangingTable] {
        survives(attack);
    }
}

#[test]
fn replies_and_events() {
    for attack in [Attack::Reply, Attack::StaleReply, Attack::Rings, Attack::Events, Attack::Logs] {
        survives(attack);
    }
}

#[test]
fn lanes() {
    for attack in [Attack::Lanes, Attack::Requests, Attack::Posted, Attack::Reports] {
        survives(attack);
    }
}

#[test]
fn memory_mappings_bells_and_packets() {
    for attack in [Attack::Card, Attack::Mailbox, Attack::Unmap, Attack::Bells, Attack::Packets] {
        survives(attack);
    }
}

#[test]
fn each_single_reply_can_be_wrong() {
    std::thread::scope(|scope| {
        for calls in 0..CALLS {
            scope.spawn(move || {
                for seed in 0..4 {
                    let (ended, _) = attacked(Attack::Reply, seed << 8 | u64::from(calls), calls, MOST);
                    assert!(matches!(ended.status.code(), Some(4 | 6)), "{:?} {}", ended.status, ended.stderr);
                }
            });
        }
    });
}
