//! Mappings that survive the device behind them.
//!
//! A BAR whose device has vanished, or has its memory space disabled, raises SIGBUS where it is touched. For a mapping that is
//! [guarded](Guard) the handler puts a page of ones in its place, as a read of a vanished device gives on PCIe, and notes the loss; any
//! other SIGBUS goes on to whoever had the signal before.
//!
//! `unsafe`: a signal handler. It takes no lock, and of the system it asks memory mappings alone.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::null_mut;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering};

use nix::errno::Errno;
use nix::libc;

use crate::FunctionError;

/// A guarded range of addresses; not guarded any more when dropped.
#[derive(Debug)]
pub(crate) struct Guard(&'static Slot);

/// A place in the list that the handler reads. Places are never freed, only used again.
#[derive(Debug)]
struct Slot {
    claimed: AtomicBool,
    /// First address; 0 while nothing is guarded.
    base: AtomicUsize,
    len: AtomicUsize,
    lost: AtomicBool,
    next: *const Slot,
}

// SAFETY: `next` is written before the slot is published and never again, and what it points to is never freed.
unsafe impl Sync for Slot {}
// SAFETY: as above; nothing in a slot belongs to a thread.
unsafe impl Send for Slot {}

static SLOTS: AtomicPtr<Slot> = AtomicPtr::new(null_mut());
/// What SIGBUS did before.
static PREVIOUS: OnceLock<Result<libc::sigaction, Errno>> = OnceLock::new();

impl Guard {
    /// Guards `len` bytes from `base`, both multiples of the page size.
    pub(crate) fn new(base: usize, len: usize) -> Result<Self, FunctionError> {
        if let Err(errno) = PREVIOUS.get_or_init(install) {
            return Err(FunctionError::Os("handle SIGBUS", *errno));
        }
        let slot = slots().find(|slot| !slot.claimed.swap(true, Ordering::Acquire)).unwrap_or_else(new_slot);
        slot.lost.store(false, Ordering::Relaxed);
        slot.len.store(len, Ordering::Relaxed);
        slot.base.store(base, Ordering::Release);
        Ok(Self(slot))
    }

    /// Whether an access faulted since.
    pub(crate) fn is_lost(&self) -> bool {
        self.0.lost.load(Ordering::Acquire)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.base.store(0, Ordering::Release);
        self.0.claimed.store(false, Ordering::Release);
    }
}

/// A claimed slot at the head of the list.
fn new_slot() -> &'static Slot {
    let slot = Box::leak(Box::new(Slot {
        claimed: AtomicBool::new(true),
        base: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        lost: AtomicBool::new(false),
        next: null_mut(),
    }));
    let mut head = SLOTS.load(Ordering::Acquire);
    loop {
        slot.next = head;
        match SLOTS.compare_exchange_weak(head, slot, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => return slot,
            Err(now) => head = now,
        }
    }
}

fn slots() -> impl Iterator<Item = &'static Slot> {
    // SAFETY: the list's pointers are null or leaked slots, published after they were filled in.
    let first = unsafe { SLOTS.load(Ordering::Acquire).as_ref() };
    // SAFETY: as above.
    std::iter::successors(first, |slot| unsafe { slot.next.as_ref() })
}

/// Takes SIGBUS over; what it did before.
fn install() -> Result<libc::sigaction, Errno> {
    let mut previous = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: zeroes are an action with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = on_bus_error as *const () as usize;
    // On the alternate stack, where the thread has one, like the standard library's own handler.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both structures live through the call, and the handler has the three-argument form that SA_SIGINFO asks for.
    Errno::result(unsafe { libc::sigaction(libc::SIGBUS, &raw const action, previous.as_mut_ptr()) })?;
    // SAFETY: the call succeeded, so it was filled in; zeroes are valid too.
    Ok(unsafe { previous.assume_init() })
}

extern "C" fn on_bus_error(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let errno = Errno::last_raw();
    // SAFETY: the kernel passes a valid record, and SIGBUS has an address in it.
    let address = unsafe { (*info).si_addr() } as usize;
    if !slots().any(|slot| slot.replaces(address)) {
        pass_on(signal, info, context);
    }
    Errno::set_raw(errno);
}

impl Slot {
    /// Puts a page of ones where `address` is, if it is this slot's.
    fn replaces(&self, address: usize) -> bool {
        let base = self.base.load(Ordering::Acquire);
        let len = self.len.load(Ordering::Relaxed);
        if base == 0 || !(base..base.saturating_add(len)).contains(&address) {
            return false;
        }
        self.lost.store(true, Ordering::Release);
        // Pages are of 4 KiB, or of 64 KiB or 2 MiB where the kernel refuses that; none may reach beyond what is guarded.
        [4096, 65536, 2 << 20].into_iter().any(|size| {
            let page = address / size * size;
            page >= base && page + size <= base.saturating_add(len) && ones_at(page, size)
        })
    }
}

/// Puts ones into the page of `size` bytes at `page`, which is guarded; whether it could.
fn ones_at(page: usize, size: usize) -> bool {
    let (prot, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at an address the kernel chooses replaces nothing.
    let ones = unsafe { libc::mmap(null_mut(), size, prot, flags, -1, 0) };
    if ones == libc::MAP_FAILED {
        return false;
    }
    for word in 0..size / 8 {
        // SAFETY: within what was just mapped, which nobody else knows.
        unsafe { ones.cast::<u64>().add(word).write(u64::MAX) };
    }
    let how = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    // SAFETY: moves the page to where a guarded mapping's is, whose users reach it by atomics, or by one
    // instruction, which goes on where it faulted: they see the device or ones.
    let moved = unsafe { libc::mremap(ones, size, size, how, page as *mut c_void) };
    if moved == libc::MAP_FAILED {
        // SAFETY: still where it was, and nobody knows it.
        unsafe { libc::munmap(ones, size) };
    }
    moved != libc::MAP_FAILED
}

/// Does what SIGBUS did before.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    type Plain = extern "C" fn(c_int);
    type Informed = extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void);
    let previous = PREVIOUS.get().and_then(|previous| previous.as_ref().ok());
    match previous {
        Some(action) if !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN) => {
            if action.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: whoever installed the handler said that it has this form.
                let handler = unsafe { std::mem::transmute::<usize, Informed>(action.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: as above.
                let handler = unsafe { std::mem::transmute::<usize, Plain>(action.sa_sigaction) };
                handler(signal);
            }
        }
        // The access is made again, and then ends the process as it should.
        _ => {
            // SAFETY: SIG_DFL is an action for every signal.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use nix::unistd::ftruncate;

    use crate::{BusError, BusMemory, Mapping};

    /// Stands for a BAR: a file that loses its pages under a mapping, as a device's are taken away.
    #[test]
    fn a_vanished_bar_reads_all_ones_and_says_so() {
        const PAGE: usize = 0x1_0000;
        let file = memfd_create(c"bar", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 4 * PAGE as i64).unwrap();
        let bar = Mapping::device(file.as_fd(), 0, 4 * PAGE).unwrap().window();
        let other = Mapping::device(file.as_fd(), 0, PAGE).unwrap().window();
        bar.store(8, 5);
        bar.store(3 * PAGE, 7);
        assert_eq!((bar.load(8), bar.flush(), bar.is_lost()), (5, Ok(()), false));
        ftruncate(&file, PAGE as i64).unwrap();
        assert_eq!(bar.load(8), 5, "what is still there");
        assert_eq!(bar.load(3 * PAGE), u64::MAX);
        assert_eq!(bar.load_u32(3 * PAGE + 4), u32::MAX);
        bar.store(2 * PAGE + 8, 1);
        assert_eq!((bar.flush(), bar.is_lost()), (Err(BusError::Gone), true));
        assert!(!other.is_lost(), "another mapping has lost nothing");

        // A slot is used again, and forgets.
        drop(bar);
        let again = Mapping::device(file.as_fd(), 0, PAGE).unwrap().window();
        assert!(!again.is_lost());
    }

    #[test]
    fn a_long_copy_goes_on_where_memory_vanished() {
        const PAGE: usize = 0x1_0000;
        let file = memfd_create(c"ram", MFdFlags::MFD_CLOEXEC).unwrap();
        ftruncate(&file, 4 * PAGE as i64).unwrap();
        let ram = Mapping::guarded(file.as_fd(), 0, 4 * PAGE, crate::Reach::Local).unwrap().window();
        ram.copy_in(0, &vec![7; 4 * PAGE]);
        ftruncate(&file, PAGE as i64).unwrap();
        let mut copy = vec![0; 4 * PAGE];
        ram.copy_out(0, &mut copy);
        assert!(copy[..PAGE].iter().all(|byte| *byte == 7) && copy[PAGE..].iter().all(|byte| *byte == 0xff));
        assert!(ram.is_lost());

        let ram = Mapping::guarded(file.as_fd(), 0, 4 * PAGE, crate::Reach::Local).unwrap().window();
        ram.copy_in(0, &vec![9; 4 * PAGE]);
        let mut first = vec![0; PAGE];
        ram.copy_out(0, &mut first);
        assert!(first.iter().all(|byte| *byte == 9) && ram.is_lost());
    }

    /// Runs itself once more, as the process that is to end.
    #[test]
    fn a_fault_elsewhere_still_ends_the_process() {
        const AGAIN: &str = "OUTBOARD_TEST_FAULT";
        if std::env::var_os(AGAIN).is_some() {
            let file = memfd_create(c"bar", MFdFlags::MFD_CLOEXEC).unwrap();
            ftruncate(&file, 0x1_0000).unwrap();
            let _guarded = Mapping::device(file.as_fd(), 0, 0x1_0000).unwrap();
            let plain = Mapping::new(file.as_fd(), 0, 0x1_0000, crate::Reach::Local).unwrap().window();
            ftruncate(&file, 0).unwrap();
            plain.load(0);
            return;
        }
        let this = std::env::current_exe().unwrap();
        let test = ["--exact", "fault::tests::a_fault_elsewhere_still_ends_the_process"];
        // A test that is emulated is started again as cargo started it.
        let emulator = std::env::var_os("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER");
        let mut again = match emulator.filter(|_| std::env::consts::ARCH == "aarch64") {
            Some(emulator) => {
                let mut command = Command::new(emulator);
                command.arg(this);
                command
            }
            None => Command::new(this),
        };
        let ended = again.args(test).env(AGAIN, "1").output().unwrap();
        assert_eq!(ended.status.signal(), Some(nix::libc::SIGBUS), "{ended:?}");
    }
}
