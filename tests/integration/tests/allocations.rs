//! A vCPU's thread allocates nothing on the exit path: counted by the allocator of a process that the shim shares with this test.
//!
//! `unsafe`: an allocator is no safe thing to write, and the running thread's name has no safe reader that doesn't allocate.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use api_channel::call::{Call, Irqchip, PostedRange, VmCreated};
use integration::soc::{Answer, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::{Completion, LineChange};
use nix::libc;

/// The system's allocator, with the calls of vCPU threads counted.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: the system's allocator does the work.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.realloc(at, layout, len) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(at, layout) }
    }
}

fn count() {
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    if name.starts_with(b"vcpu") {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

/// Real mode, for ever: in al, 0x90; in ax, 0x90; out 0x91, eax; out 0x92, al (posted); an access of memory that is not there, and a
/// string of 8 bytes to and from a port.
const EXITS: [u8; 42] = [
    0xb8, 0xff, 0xff, 0x8e, 0xd8, // mov ax, 0xffff; mov ds, ax
    0xe4, 0x90, // again: in al, 0x90
    0xe5, 0x90, // in ax, 0x90
    0x66, 0xe7, 0x91, // out 0x91, eax
    0xe6, 0x92, // out 0x92, al
    0xa1, 0x10, 0x00, // mov ax, [0x10], which is 0x100000
    0xa3, 0x10, 0x00, // mov [0x10], ax
    0xba, 0x93, 0x00, // mov dx, 0x93
    0xbe, 0x00, 0x20, // mov si, 0x2000
    0xb9, 0x08, 0x00, // mov cx, 8
    0x26, 0xf3, 0x6e, // es: rep outsb
    0xbf, 0x00, 0x20, // mov di, 0x2000
    0xb9, 0x08, 0x00, // mov cx, 8
    0xf3, 0x6c, // rep insb
    0xeb, 0xdb, // jmp again
];

#[test]
fn exits_of_every_kind_allocate_nothing() {
    if !kvm(&test_name()) {
        return;
    }
    let mut soc = Soc::in_process();
    let created = soc.create(&Shape { vcpus: 1, memory: 1 << 20, irqchip: Irqchip::Full, spin_ns: 0, dirty_ring: 0 });
    if created.features & VmCreated::POSTING != 0 {
        soc.ok(&Call::PostedRanges(vec![PostedRange { base: 0x92, len: 1, ports: 1 }]));
    }
    soc.load_real_mode(&EXITS);
    soc.run();
    let serve = |soc: &mut Soc, exits: u32| {
        let mut kinds = std::collections::BTreeSet::new();
        for n in 1..=exits {
            let seen = soc.take();
            let request = &seen.request;
            kinds.insert((request.kind.0, request.address, request.string, request.direction as u8, seen.posted));
            let answer = if request.string && request.direction == ioreq_ring::Direction::Read {
                Answer::String(vec![7; request.length.into()])
            } else {
                let change = LineChange { gsi: 5, high: n % 2 == 0, sequence: n };
                // A line, now and then; a sleep, now and then.
                let lines = [(n % 10 == 0).then_some(change), None];
                Answer::Plain(Completion { lines, ..Completion::ok(0) })
            };
            soc.answer(&seen, answer);
        }
        kinds
    };
    let count = || ALLOCATIONS.load(Ordering::Relaxed);
    // The thread's own start allocates, as do its first exit and its first line change.
    serve(&mut soc, 200);
    assert!(count() > 0, "what vCPU threads allocate is counted");
    let before = count();
    let kinds = serve(&mut soc, 20_000);
    assert_eq!(count() - before, 0, "exits: {kinds:?}");
    assert!(kinds.len() >= 7, "{kinds:?}");
    soc.pause(|_| Answer::Plain(Completion::ok(0)));
    soc.shut_down();
}
