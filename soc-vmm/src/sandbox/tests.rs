//! Filters as the kernel would run them, on calls that aren't made. What they do to a process: `tests/sandbox.rs`.

use proptest::prelude::*;

use super::*;

/// A verdict, worst first (seccomp(2)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Verdict {
    Killed,
    Refused(u32),
    Allowed,
}

/// Runs classic BPF, of which filters use a few instructions, on a call: the lowest verdict of all filters counts.
fn verdict(spec: &SandboxSpec, call: u32, argument: u64) -> Verdict {
    let filters = spec.filters().unwrap();
    filters.iter().map(|filter| run(filter, call, argument)).min().unwrap()
}

fn run(filter: &[sock_filter], call: u32, argument: u64) -> Verdict {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => 0xc000_003e,
        _ => 0xc000_00b7,
    };
    // seccomp_data: number, architecture, instruction pointer, six arguments.
    let load = |at: u32| match at {
        0 => call,
        4 => architecture,
        16 => argument as u32,
        20 => (argument >> 32) as u32,
        _ => 0,
    };
    let (mut at, mut word) = (0usize, 0u32);
    loop {
        let sock_filter { code, jt, jf, k } = filter[at];
        at += 1;
        let jump = |holds: bool| usize::from(if holds { jt } else { jf });
        match code {
            0x20 => word = load(k),
            0x05 => at += k as usize,
            0x15 => at += jump(word == k),
            0x25 => at += jump(word > k),
            0x35 => at += jump(word >= k),
            0x54 => word &= k,
            0x06 => {
                return match k & 0xffff_0000 {
                    0x7fff_0000 => Verdict::Allowed,
                    0x0005_0000 => Verdict::Refused(k & 0xffff),
                    0x8000_0000 => Verdict::Killed,
                    _ => panic!("verdict {k:#x}"),
                };
            }
            _ => panic!("instruction {code:#x}"),
        }
    }
}

fn of(spec: &SandboxSpec, call: c_long) -> Verdict {
    verdict(spec, call as u32, 0)
}

#[test]
fn each_category_denies_its_own_and_no_more() {
    let refused = Verdict::Refused(libc::EPERM as u32);
    for (text, calls, verdict) in [
        ("on,obsolete=deny", &[calls::OBSOLETE, own::OBSOLETE].concat()[..], Verdict::Killed),
        ("on,obsolete=allow,elevateprivileges=deny", calls::PRIVILEGES, Verdict::Killed),
        ("on,obsolete=allow,spawn=deny", &[calls::SPAWN, own::SPAWN].concat(), Verdict::Killed),
        ("on,obsolete=allow,resourcecontrol=deny", calls::RESOURCES, refused),
    ] {
        let spec = SandboxSpec::of_qemu(text).unwrap().unwrap();
        let nothing = SandboxSpec::of_qemu("on,obsolete=allow,elevateprivileges=children").unwrap().unwrap();
        for &call in calls {
            assert_eq!((of(&spec, call), of(&nothing, call)), (verdict, Verdict::Allowed), "{text}: call {call}");
        }
        for &call in [calls::FOREIGN, own::FOREIGN].concat().iter() {
            assert_eq!((of(&spec, call), of(&nothing, call)), (Verdict::Killed, Verdict::Killed), "call {call}");
        }
        // What a VMM lives by.
        for call in [libc::SYS_read, libc::SYS_openat, libc::SYS_mmap, libc::SYS_futex, libc::SYS_io_uring_enter] {
            assert_eq!((of(&spec, call), of(&SandboxSpec::STRICT, call)), (Verdict::Allowed, Verdict::Allowed));
        }
    }
}

#[test]
fn threads_are_started_and_processes_are_not() {
    // As the C library starts a thread, and as it forks.
    let thread =
        (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
    let process = (libc::CLONE_CHILD_SETTID | libc::CLONE_CHILD_CLEARTID | libc::SIGCHLD) as u64;
    let clone = |spec: &SandboxSpec, flags| verdict(spec, libc::SYS_clone as u32, flags);
    assert_eq!(clone(&SandboxSpec::STRICT, thread), Verdict::Allowed);
    assert_eq!(clone(&SandboxSpec::STRICT, process), Verdict::Killed);
    assert_eq!(clone(&SandboxSpec::QEMU, process), Verdict::Allowed);
    assert_eq!(of(&SandboxSpec::STRICT, libc::SYS_clone3), Verdict::Refused(libc::ENOSYS as u32));
    assert_eq!(of(&SandboxSpec::QEMU, libc::SYS_clone3), Verdict::Allowed);
}

#[test]
fn what_libvirt_writes_is_strict() {
    let text = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";
    assert_eq!(SandboxSpec::of_qemu(text).unwrap(), Some(SandboxSpec::STRICT));
    assert_eq!(SandboxSpec::of_qemu("on").unwrap(), Some(SandboxSpec::QEMU));
    assert_eq!(SandboxSpec::of_qemu("enable=on,spawn=allow").unwrap(), Some(SandboxSpec::QEMU));
    assert_eq!(SandboxSpec::of_qemu("off,spawn=deny").unwrap(), None);
    for (text, why) in [
        ("", "write on or off"),
        ("yes", "write on or off"),
        ("on,spawn", "'spawn': write"),
        ("on,spawn=maybe", "spawn is allow or deny"),
        ("on,spawn=children", "spawn is allow or deny"),
        ("on,spwan=deny", "there is no 'spwan'"),
        ("on,spawn=deny,spawn=allow", "spawn is there twice"),
        ("on,", "'': write"),
    ] {
        let said = SandboxSpec::of_qemu(text).unwrap_err().to_string();
        assert!(said.contains(why), "{text:?}: {said}");
    }
}

proptest! {
    /// A number of another calling convention, under which a call has two, is no way around.
    #[test]
    fn no_number_past_the_own_ones_is_allowed(call: u32, argument: u64) {
        if own::FIRST_FOREIGN.is_some_and(|first| call >= first) {
            prop_assert_eq!(verdict(&SandboxSpec::QEMU, call, argument), Verdict::Killed);
        }
    }

    #[test]
    fn any_text_is_understood_or_refused(text in "(on|off|enable=on)?(,(spawn|obsolete|x)?=?(allow|deny|children)?){0,5}") {
        let _ = (SandboxSpec::of_qemu(&text), text.parse::<SandboxSwitch>());
    }
}
