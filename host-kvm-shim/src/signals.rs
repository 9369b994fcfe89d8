//! Signals that are no end of a shim.
//!
//! `unsafe`: sigaction.
#![allow(unsafe_code)]

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

/// Those that ask a process to end.
const ENDS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];

/// A file that may not grow, guest memory among them (RLIMIT_FSIZE), is an error where it is written, and not the end of this process.
pub fn ignore_file_size() {
    handle(&[Signal::SIGXFSZ], SigHandler::SigIgn);
}

/// Whoever signals all of a soc-vmm's job or service at once means the soc-vmm, which ends this process by hanging up: it may have more to say
/// to the VM before.
pub fn leave_ends_to_the_soc() {
    handle(&ENDS, SigHandler::SigIgn);
    // It blocked them for the time until here; what came is gone with that.
    let _ = SigSet::from_iter(ENDS).thread_unblock();
}

/// From now on they end this process: there is nobody left who would.
pub fn obey_ends() {
    handle(&ENDS, SigHandler::SigDfl);
}

fn handle(signals: &[Signal], how: SigHandler) {
    let action = SigAction::new(how, SaFlags::empty(), SigSet::empty());
    for &signal in signals {
        // SAFETY: no function is called: the kernel ignores the signal, or does what it does by default. It doesn't fail with a signal
        // that there is.
        let _ = unsafe { sigaction(signal, &action) };
    }
}
