//! The dirty log names exactly the frames that the guest wrote, on two vCPUs at once.

use std::collections::BTreeSet;

use api_channel::call::{Call, DirtyFetch, DirtyLimit, DirtyRun, Memslot, Statistic, VCPU_ALL};
use api_channel::codec::Reader;
use integration::soc::{Answer, Board, Seen, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::Completion;
use payloads::{EXIT_PASS, Privilege, dirty, ports};

const VCPUS: u8 = 2;
const FRAME: u64 = 4096;
/// Entries of the smallest dirty ring that any KVM has.
const RING: u32 = 1024;

type Frames = BTreeSet<u64>;

/// The payload, both vCPUs between two rounds.
struct Rounds {
    soc: Soc,
    board: Board,
    memory: u64,
    /// A read of the command port of each vCPU.
    waiting: Vec<Seen>,
}

impl Rounds {
    /// Starts the payload, and the log once its vCPUs wait.
    fn start(privilege: Privilege) -> Self {
        Self::with_rings(privilege, 0)
    }

    /// The same, with dirty rings of so many entries.
    fn with_rings(privilege: Privilege, dirty_ring: u32) -> Self {
        let payload = dirty::dirty(VCPUS, privilege).unwrap();
        let memory = dirty::memory(VCPUS);
        let mut soc = Soc::start(&[]);
        soc.create(&Shape { memory, dirty_ring, ..Shape::of(&payload) });
        soc.load(&payload);
        soc.run();
        let mut rounds = Self { soc, board: Board::default(), memory, waiting: Vec::new() };
        rounds.gather();
        rounds.soc.ok(&Call::DirtyLog(true));
        rounds
    }

    /// Serves until every vCPU reads the command port, and leaves them there.
    fn gather(&mut self) {
        while self.waiting.len() < VCPUS.into() {
            let seen = self.soc.take();
            if seen.reads(ports::COMMAND) {
                self.waiting.push(seen);
            } else {
                let answer = self.board.serve(&seen);
                self.soc.answer(&seen, answer);
            }
        }
    }

    /// Gives all waiting vCPUs a command.
    fn command(&mut self, command: u32) {
        for seen in std::mem::take(&mut self.waiting) {
            self.soc.answer(&seen, Answer::Plain(Completion::ok(command.into())));
        }
    }

    /// Has a round done; the frames that it wrote.
    fn round(&mut self, round: u32) -> Frames {
        self.command(round);
        self.gather();
        (0..VCPUS).flat_map(|vcpu| dirty::frames(vcpu, round)).collect()
    }

    /// Fetches runs of `pages` pages from `first` on; frames, and where to go on.
    fn fetch(&mut self, first: u64, pages: u64, clear: bool) -> (Frames, u64) {
        self.fetch_by(if clear { DirtyFetch::CLEAR } else { 0 }, first, pages)
    }

    fn fetch_by(&mut self, flags: u32, first: u64, pages: u64) -> (Frames, u64) {
        let fetch = DirtyFetch { ram: 0, flags, first, pages };
        let (payload, bulk) = self.soc.ok(&Call::DirtyFetch(fetch));
        let runs: Vec<DirtyRun> = Reader::new(&bulk).list(1 << 16).unwrap();
        for pair in runs.windows(2) {
            assert!(pair[0].first + pair[0].pages < pair[1].first, "runs are apart and ascend: {runs:?}");
        }
        let frames = runs.iter().flat_map(|run| run.first..run.first + run.pages).collect();
        (frames, Reader::new(&payload).take().unwrap())
    }

    fn fetch_all(&mut self, clear: bool) -> Frames {
        let pages = self.memory / FRAME;
        let (frames, next) = self.fetch(0, pages, clear);
        assert_eq!(next, pages);
        frames
    }

    fn end(mut self) {
        self.command(dirty::STOP);
        assert_eq!(self.soc.run_to_exit(&mut self.board), EXIT_PASS, "{}", self.board.console);
        assert!(self.soc.shut_down().unwrap().success());
    }
}

fn shows_what_is_written(mut rounds: Rounds, privilege: Privilege) {
    rounds.fetch_all(true);
    for round in 1..=5 {
        let written = rounds.round(round);
        assert_eq!(rounds.fetch_all(true), written, "{privilege:?}, round {round}");
        assert_eq!(rounds.fetch_all(true), Frames::new(), "{privilege:?}: cleared after round {round}");
    }
    // Not cleared, the log adds up.
    let mut written = rounds.round(6);
    assert_eq!(rounds.fetch_all(false), written);
    written.extend(rounds.round(7));
    assert_eq!(rounds.fetch_all(false), written);
    // Part by part: each clears its own pages alone.
    let middle = rounds.memory / FRAME / 2 + 3;
    let (low, next) = rounds.fetch(0, middle, true);
    assert_eq!((&low, next), (&written.range(..middle).copied().collect(), middle));
    assert_eq!(rounds.fetch_all(true), &written - &low);
    rounds.end();
}

#[test]
fn the_log_is_exactly_what_two_vcpus_wrote_at_cpl0() {
    if kvm(&test_name()) {
        shows_what_is_written(Rounds::start(Privilege::Cpl0), Privilege::Cpl0);
    }
}

#[test]
fn the_log_is_exactly_what_two_vcpus_wrote_at_cpl3() {
    if kvm(&test_name()) {
        shows_what_is_written(Rounds::start(Privilege::Cpl3), Privilege::Cpl3);
    }
}

#[test]
fn rings_tell_exactly_what_two_vcpus_wrote_at_cpl3() {
    if kvm(&test_name()) {
        shows_what_is_written(Rounds::with_rings(Privilege::Cpl3, RING), Privilege::Cpl3);
    }
}

/// Where KVM overruns a ring, every page counts as written.
#[test]
fn rings_tell_no_less_than_what_two_vcpus_wrote_at_cpl0() {
    if !kvm(&test_name()) {
        return;
    }
    let mut rounds = Rounds::with_rings(Privilege::Cpl0, RING);
    rounds.fetch_all(true);
    for some in 0..5 {
        let written: Frames = (1..=10).flat_map(|round| rounds.round(some * 10 + round)).collect();
        let told = rounds.fetch_all(true);
        assert!(told.is_superset(&written), "the {some}th ten rounds: {} pages are missing", (&written - &told).len());
    }
    rounds.end();
}

/// A counter of a vCPU.
fn counted(soc: &mut Soc, name: &str, vcpu: u8) -> u64 {
    let (_, bulk) = soc.ok(&Call::Statistics);
    let all: Vec<Statistic> = Reader::new(&bulk).list(1 << 16).unwrap();
    let is_it =
        |s: &&Statistic| s.target == u64::from(vcpu) && s.name.starts_with(name.as_bytes()) && s.name[name.len()] == 0;
    all.iter().find(is_it).map_or(0, |counter| counter.value)
}

#[test]
fn a_vcpu_makes_room_in_its_ring_and_one_that_has_a_limit_stands_still_for_it() {
    const ROUNDS: u32 = 12;
    if !kvm(&test_name()) {
        return;
    }
    let mut rounds = Rounds::with_rings(Privilege::Cpl3, RING);
    rounds.fetch_all(true);
    let before = [0, 1].map(|vcpu| counted(&mut rounds.soc, "shim.dirtied", vcpu));
    rounds.soc.ok(&Call::DirtyLimit(DirtyLimit { vcpu: 1, reserved: 0, pages: 20_000 }));
    let written: Frames = (1..=ROUNDS).flat_map(|round| rounds.round(round)).collect();
    for vcpu in [0, 1] {
        assert_ne!(counted(&mut rounds.soc, "shim.ring_full", vcpu), 0, "vCPU {vcpu}");
    }
    assert_eq!(counted(&mut rounds.soc, "shim.stand_ns", 0), 0, "it has no limit");
    assert_ne!(counted(&mut rounds.soc, "shim.stand_ns", 1), 0);
    assert_eq!(rounds.fetch_all(true), written);
    for vcpu in [0, 1] {
        let dirtied = counted(&mut rounds.soc, "shim.dirtied", vcpu) - before[usize::from(vcpu)];
        let own = rounds_of(vcpu, ROUNDS);
        assert!(dirtied >= own.len() as u64, "vCPU {vcpu} wrote {} pages, and was counted with {dirtied}", own.len());
    }
    // As rings were last read: what was written since is told when they are read again.
    let written = rounds.round(ROUNDS + 1);
    let pages = rounds.memory / FRAME;
    assert_eq!(rounds.fetch_by(DirtyFetch::CLEAR | DirtyFetch::AS_READ, 0, pages), (Frames::new(), pages));
    assert_eq!(rounds.fetch_all(true), written);
    // A limit that is taken back, and a log that ends.
    rounds.soc.ok(&Call::DirtyLimit(DirtyLimit { vcpu: VCPU_ALL, reserved: 0, pages: 0 }));
    rounds.round(ROUNDS + 2);
    rounds.soc.ok(&Call::DirtyLog(false));
    rounds.round(ROUNDS + 3);
    rounds.soc.ok(&Call::DirtyLog(true));
    rounds.fetch_all(true);
    let written = rounds.round(ROUNDS + 4);
    assert_eq!(rounds.fetch_all(true), written);
    rounds.end();
}

fn rounds_of(vcpu: u8, rounds: u32) -> Frames {
    (1..=rounds).flat_map(|round| dirty::frames(vcpu, round)).collect()
}

#[test]
fn a_memslot_that_goes_leaves_its_dirty_pages_to_the_log() {
    if kvm(&test_name()) {
        a_memslot_goes(Rounds::start(Privilege::Cpl0));
    }
}

#[test]
fn a_memslot_that_goes_leaves_its_dirty_pages_to_the_log_of_rings() {
    if kvm(&test_name()) {
        a_memslot_goes(Rounds::with_rings(Privilege::Cpl3, RING));
    }
}

/// What lies below the vCPUs' regions isn't looked at: KVM marks page tables as accessed when it maps their pages anew.
fn a_memslot_goes(mut rounds: Rounds) {
    let told = |rounds: &mut Rounds, clear| rounds.fetch_all(clear).split_off(&(u64::from(payloads::FREE) / FRAME));
    let memory = rounds.memory;
    let slots = |parts: &[(u64, u64)]| -> Call {
        Call::SetMemslots(
            parts.iter().map(|&(base, len)| Memslot { base, len, offset: base, ram: 0, flags: 0 }).collect(),
        )
    };
    rounds.fetch_all(true);
    let mut written = rounds.round(1);
    // Where the second vCPU writes is a slot of its own now: the one slot that was there is gone.
    let middle = u64::from(payloads::FREE) + u64::from(dirty::REGION);
    rounds.soc.ok(&slots(&[(0, middle), (middle, memory - middle)]));
    written.extend(rounds.round(2));
    assert_eq!(told(&mut rounds, false), written, "of the old slot and of the new ones");
    assert_eq!(told(&mut rounds, true), written);
    assert_eq!(told(&mut rounds, true), Frames::new());
    // And a slot that nothing replaces: the guest doesn't touch it meanwhile.
    let written = rounds.round(3);
    rounds.soc.ok(&slots(&[(0, middle)]));
    assert_eq!(told(&mut rounds, true), written);
    rounds.soc.ok(&slots(&[(0, middle), (middle, memory - middle)]));
    let written = rounds.round(4);
    assert_eq!(told(&mut rounds, true), written);
    rounds.end();
}
