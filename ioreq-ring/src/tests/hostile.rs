//! A peer that writes anything anywhere at any time, between two loads too: typed errors, and an end.

use std::cell::RefCell;
use std::rc::Rc;

use proptest::prelude::*;
use proptest::sample::Index;

use super::{Heap, Host, Memory, carried, completion, request};
use crate::wire::{POSTED_SLOTS, STRING_PAGE, TAIL};
use crate::{
    BusError, BusMemory, Completion, Direction, HostLane, HostWindows, Kind, LaneError, Posted, Request, SocLane, drain,
};

/// What a hostile peer stores over a word.
#[derive(Clone, Debug)]
enum Word {
    Any(u64),
    /// What stands there, a few further or back, perhaps with a reserved bit.
    Near {
        step: i32,
        high: Option<u8>,
    },
    /// A legal header under the next sequence.
    Request(Request),
    /// A legal header under the next sequence.
    Completion(Completion),
}

fn word() -> impl Strategy<Value = Word> {
    prop_oneof![
        any::<u64>().prop_map(Word::Any),
        Just(Word::Any(u64::MAX)),
        (-70i32..70, prop::option::of(32..64u8)).prop_map(|(step, high)| Word::Near { step, high }),
        request().prop_map(Word::Request),
        completion().prop_map(Word::Completion),
    ]
}

impl Word {
    fn over(&self, old: u64) -> u64 {
        let next = (old as u32).wrapping_add(1);
        match self {
            Self::Any(word) => *word,
            Self::Near { step, high } => {
                u64::from((old as u32).wrapping_add_signed(*step)) | high.map_or(0, |bit| 1 << bit)
            }
            Self::Request(request) => request.header(next),
            Self::Completion(completion) => completion.to_words(next)[3],
        }
    }
}

/// What the peer does before each load: mostly nothing.
type Script = Rc<RefCell<std::vec::IntoIter<Option<Word>>>>;

fn script() -> impl Strategy<Value = Vec<Option<Word>>> {
    prop::collection::vec(prop::option::weighted(0.1, word()), 0..200)
}

/// Memory whose words change just before they are loaded.
#[derive(Clone, Debug)]
struct Shifty {
    heap: Heap,
    script: Script,
}

impl BusMemory for Shifty {
    fn len(&self) -> usize {
        self.heap.len()
    }
    fn load(&self, offset: usize) -> u64 {
        if let Some(Some(word)) = self.script.borrow_mut().next() {
            self.heap.store(offset, word.over(self.heap.load(offset)));
        }
        self.heap.load(offset)
    }
    fn store(&self, offset: usize, word: u64) {
        self.heap.store(offset, word);
    }
    fn store_line(&self, offset: usize, words: &[u64]) {
        self.heap.store_line(offset, words);
    }
    fn copy_in(&self, offset: usize, data: &[u8]) {
        self.heap.copy_in(offset, data);
    }
    fn copy_out(&self, offset: usize, data: &mut [u8]) {
        self.heap.copy_out(offset, data);
    }
    fn fence(&self) {}
    fn flush(&self) -> Result<(), BusError> {
        Ok(())
    }
}

#[derive(Clone, Debug)]
enum Step {
    Scribble { window: Index, offset: Index, word: Word },
    Submit(Request),
    Post(u32),
    Take,
    Complete(Completion),
    Drain,
    Look,
    Reattach,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (any::<Index>(), any::<Index>(), word())
            .prop_map(|(window, offset, word)| Step::Scribble { window, offset, word }),
        2 => request().prop_map(Step::Submit),
        2 => (1..=POSTED_SLOTS + 1).prop_map(Step::Post),
        2 => Just(Step::Take),
        1 => completion().prop_map(Step::Complete),
        2 => Just(Step::Drain),
        1 => Just(Step::Look),
        1 => Just(Step::Reattach),
    ];
    prop::collection::vec(step, 1..100)
}

fn scribble(windows: &[&Heap], window: Index, offset: Index, word: &Word) {
    let window = window.get(windows);
    // Mostly the words that mean something: the first, and the last.
    let offset = match offset.index(window.len() / 8 + 8) {
        i if i < window.len() / 8 => i * 8,
        i if i % 2 == 0 => window.len() - 8,
        _ => 0,
    };
    window.store(offset, word.over(window.load(offset)));
}

fn post<B: BusMemory, M: BusMemory>(host: &mut HostLane<B, M>) -> Result<Posted, LaneError> {
    host.post(&Request::access(Kind::MMIO, Direction::Write, 0, 0, 1, 0))
}

proptest! {
    #[test]
    fn the_soc_stands_a_hostile_host((requests, posts) in (carried(), carried()), steps in steps(), script in script()) {
        let memories = [Memory::after(requests, posts), Memory::after(0, 0)];
        let [one, other] = &memories;
        let mut hosts = [Host::after(one.host_windows(), requests, posts), Host::after(other.host_windows(), 0, 0)];
        let script = Rc::new(RefCell::new(script.into_iter()));
        let shifty = |heap: &Heap| Shifty { heap: heap.clone(), script: script.clone() };
        let attach = |m: &Memory| {
            let mut windows = m.soc_windows(shifty);
            // No peer reaches the private words.
            windows.private.script = Rc::default();
            SocLane::new(windows)
        };
        let mut lanes = memories.each_ref().map(attach);
        for (i, step) in steps.into_iter().enumerate() {
            let i = i % 2;
            match step {
                Step::Scribble { window, offset, word } => {
                    let windows = [&memories[i].request, &memories[i].control, &memories[i].posted];
                    scribble(&windows, window, offset, &word);
                }
                Step::Submit(request) => {
                    let _ = hosts[i].submit(&request);
                }
                Step::Post(times) => {
                    for _ in 0..times {
                        let _ = post(&mut hosts[i]);
                    }
                }
                Step::Take => {
                    if let Ok(Some(request)) = lanes[i].poll() {
                        prop_assert!(usize::from(request.length) <= STRING_PAGE && request.kind.0 != 0);
                    }
                }
                Step::Complete(completion) => {
                    let _ = lanes[i].complete(&completion);
                }
                Step::Drain => {
                    let (mut served, mut plain) = (0, true);
                    let _ = drain(&mut lanes, |_, write| {
                        served += 1;
                        plain &= write.request.postable();
                    });
                    prop_assert!(plain && served <= 2 * POSTED_SLOTS);
                }
                Step::Look => {
                    let _ = (lanes[i].has_work(), lanes[i].host_sleeps(), lanes[i].in_flight(), lanes[i].resend());
                }
                Step::Reattach => lanes[i] = attach(&memories[i]),
            }
        }
    }

    #[test]
    fn the_host_stands_a_hostile_soc((requests, posts) in (carried(), carried()), steps in steps(), script in script()) {
        let memory = Memory::after(requests, posts);
        let script = Rc::new(RefCell::new(script.into_iter()));
        let shifty = |heap: &Heap| Shifty { heap: heap.clone(), script: script.clone() };
        let mut host = HostLane::after(
            HostWindows {
                request: shifty(&memory.request),
                control: shifty(&memory.control),
                posted: shifty(&memory.posted),
                completion: shifty(&memory.completion),
                credit: shifty(&memory.credit),
                soc_idle: shifty(&memory.soc_idle),
                outs: shifty(&memory.outs),
                ins: shifty(&memory.ins),
            },
            requests,
            posts,
        );
        for step in steps {
            match step {
                Step::Scribble { window, offset, word } => {
                    scribble(&[&memory.completion, &memory.credit, &memory.soc_idle, &memory.ins], window, offset, &word);
                }
                Step::Submit(request) => {
                    let waiting = host.waiting();
                    prop_assert_eq!(host.submit(&request).is_err(), waiting);
                }
                Step::Post(times) => {
                    for _ in 0..times {
                        let before = memory.control.load(TAIL) as u32;
                        let posted = post(&mut host);
                        let after = memory.control.load(TAIL) as u32;
                        let sent = posted.is_ok_and(|posted| posted != Posted::Full);
                        prop_assert_eq!(after, before.wrapping_add(u32::from(sent)));
                        if posted == Ok(Posted::Full) {
                            prop_assert_eq!(memory.credit.load(0), u64::from(after.wrapping_sub(POSTED_SLOTS)));
                        }
                    }
                }
                Step::Take | Step::Complete(_) | Step::Drain => {
                    let waiting = host.waiting();
                    if let Ok(Some(_)) = host.poll() {
                        prop_assert!(waiting && !host.waiting());
                    }
                }
                Step::Look | Step::Reattach => {
                    host.about_to_sleep();
                    host.awake();
                }
            }
        }
    }

    #[test]
    fn a_tail_that_nobody_can_have_written_is_refused(
        posts in carried(),
        first in any::<u64>(),
        ahead in 0..=POSTED_SLOTS,
        back in 1..=POSTED_SLOTS,
    ) {
        let looks = |words: Vec<u64>| {
            let memory = Memory::after(0, posts);
            let script = words.into_iter().map(|word| Some(Word::Any(word))).collect::<Vec<_>>();
            let script = Rc::new(RefCell::new(script.into_iter()));
            let mut windows = memory.soc_windows(|heap| Shifty { heap: heap.clone(), script: Rc::default() });
            windows.control.script = script;
            drain(&mut [SocLane::new(windows)], |_, _| {})
        };
        if first >> 32 != 0 || (first as u32).wrapping_sub(posts) > POSTED_SLOTS {
            prop_assert_eq!(looks(vec![first]), Err((0, LaneError::Tail { head: posts, tail: first as u32 })));
        }
        let back = back.min(ahead);
        let (ahead, behind) = (posts.wrapping_add(ahead), posts.wrapping_add(ahead - back));
        if back != 0 {
            let refused = looks(vec![u64::from(ahead), u64::from(behind)]);
            prop_assert_eq!(refused, Err((0, LaneError::Tail { head: ahead, tail: behind })));
        }
    }
}
