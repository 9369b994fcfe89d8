//! The dirty log names exactly the frames that the guest wrote, on two vCPUs at once.

use std::collections::BTreeSet;

use api_channel::call::{Call, DirtyFetch, DirtyRun, Memslot};
use api_channel::codec::Reader;
use integration::soc::{Answer, Board, Seen, Shape, Soc};
use integration::{kvm, test_name};
use ioreq_ring::Completion;
use payloads::{EXIT_PASS, Privilege, dirty, ports};

const VCPUS: u8 = 2;
const FRAME: u64 = 4096;

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
        let payload = dirty::dirty(VCPUS, privilege).unwrap();
        let memory = dirty::memory(VCPUS);
        let mut soc = Soc::start(&[]);
        soc.create(&Shape { memory, ..Shape::of(&payload) });
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
        let fetch = DirtyFetch { ram: 0, clear: clear.into(), first, pages };
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

fn shows_what_is_written(privilege: Privilege) {
    let mut rounds = Rounds::start(privilege);
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
        shows_what_is_written(Privilege::Cpl0);
    }
}

#[test]
fn the_log_is_exactly_what_two_vcpus_wrote_at_cpl3() {
    if kvm(&test_name()) {
        shows_what_is_written(Privilege::Cpl3);
    }
}

#[test]
fn a_memslot_that_goes_leaves_its_dirty_pages_to_the_log() {
    if !kvm(&test_name()) {
        return;
    }
    let mut rounds = Rounds::start(Privilege::Cpl0);
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
    assert_eq!(rounds.fetch_all(false), written, "of the old slot and of the new ones");
    assert_eq!(rounds.fetch_all(true), written);
    assert_eq!(rounds.fetch_all(true), Frames::new());
    // And a slot that nothing replaces: the guest doesn't touch it meanwhile.
    let written = rounds.round(3);
    rounds.soc.ok(&slots(&[(0, middle)]));
    assert_eq!(rounds.fetch_all(true), written);
    rounds.soc.ok(&slots(&[(0, middle), (middle, memory - middle)]));
    let written = rounds.round(4);
    assert_eq!(rounds.fetch_all(true), written);
    rounds.end();
}
