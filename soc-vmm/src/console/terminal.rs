//! Standard input as a raw terminal, put back as it was on every way out.
//!
//! The ways out: the guard's drop, a panic (which aborts in release builds: a hook), and signals that kill a process before any
//! of its code runs again. The last needs a signal handler, hence this module's `unsafe`.
#![allow(unsafe_code)]

use std::io::{self, IsTerminal};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::sync::{Once, OnceLock};

use nix::libc;
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, raise, sigaction};
use nix::sys::termios::{OutputFlags, SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use nix::unistd::{getpgrp, tcgetpgrp};

/// The terminal's modes before it became raw; null: it isn't. A pointer, because the signal handler reads it.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(null_mut());

/// Signals that end a process at once. Those that ask it to end (SIGINT, SIGTERM, SIGHUP) come as events elsewhere, and SIGBUS
/// belongs to who maps the function's memory.
const FATAL: [Signal; 5] = [Signal::SIGABRT, Signal::SIGQUIT, Signal::SIGSEGV, Signal::SIGILL, Signal::SIGFPE];

/// What was to be done on each of [`FATAL`] before.
static PREVIOUS: [OnceLock<SigAction>; FATAL.len()] = [const { OnceLock::new() }; FATAL.len()];

/// The process's terminal is raw as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input's terminal raw. `None`: it is no terminal, or this process is in its background, where the first
    /// touch of it would stop the process.
    ///
    /// # Errors
    /// The terminal refuses.
    pub fn enter() -> io::Result<Option<Self>> {
        if !stdin_is_terminal() || tcgetpgrp(io::stdin())? != getpgrp() {
            return Ok(None);
        }
        let before = tcgetattr(io::stdin())?;
        static GUARDED: Once = Once::new();
        GUARDED.call_once(guard_ways_out);
        let saved = Box::into_raw(Box::new(libc::termios::from(before.clone())));
        // On a second entry without a drop between, the first modes are the ones to go back to. The loser is never freed: the
        // signal handler may hold it.
        let _ = SAVED.compare_exchange(null_mut(), saved, Ordering::AcqRel, Ordering::Acquire);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw(before))?;
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether standard input is a terminal.
pub(super) fn stdin_is_terminal() -> bool {
    io::stdin().is_terminal()
}

/// Every key goes to the guest; output is still translated, so that log lines start at the left.
fn raw(mut modes: Termios) -> Termios {
    cfmakeraw(&mut modes);
    modes.output_flags |= OutputFlags::OPOST;
    modes
}

/// Puts the modes back, once. Async-signal-safe: an atomic swap and tcsetattr(3).
fn restore() {
    let saved = SAVED.swap(null_mut(), Ordering::AcqRel);
    if !saved.is_null() {
        // SAFETY: `saved` came from `Box::into_raw` in `enter` and is never freed, so it points to a whole termios. What the
        // terminal says doesn't matter: there is nothing left to try.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSANOW, saved) };
    }
}

fn guard_ways_out() {
    let shown = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        shown(info);
    }));
    let flags = SaFlags::SA_ONSTACK | SaFlags::SA_SIGINFO;
    let action = SigAction::new(SigHandler::SigAction(on_fatal), flags, SigSet::empty());
    for (signal, previous) in FATAL.into_iter().zip(&PREVIOUS) {
        // SAFETY: `on_fatal` does only what is async-signal-safe.
        if let Ok(before) = unsafe { sigaction(signal, &action) } {
            let _ = previous.set(before);
        }
    }
}

/// Puts the terminal back, then lets the signal do what it would have done.
extern "C" fn on_fatal(number: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    let Some(which) = FATAL.iter().position(|signal| *signal as libc::c_int == number) else { return };
    let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
    let before = PREVIOUS[which].get().unwrap_or(&default);
    // SAFETY: restores a disposition that stood before ours, or the default; sigaction(2) is async-signal-safe.
    let restored = unsafe { sigaction(FATAL[which], before) };
    // SAFETY: the kernel passes a whole siginfo to an SA_SIGINFO handler.
    let is_fault = unsafe { (*info).si_code } > 0;
    // A fault comes again when this returns, with its address, by which the standard library knows a stack overflow. A signal
    // that was sent doesn't; raised here, it is blocked until this returns.
    if restored.is_ok() && !is_fault {
        let _ = raise(FATAL[which]);
    }
}
