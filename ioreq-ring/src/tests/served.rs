//! Each request is served once and in order, whatever the order of the two sides' steps.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::{Host, Memory, Soc, carried, completion, request};
use crate::wire::POSTED_SLOTS;
use crate::{Completion, Direction, Kind, LaneError, Phase, Posted, Request, SocIdle, drain};

#[derive(Clone, Debug)]
enum Step {
    Submit(Request),
    Post { address: u64, data: u64, times: u32 },
    Poll,
    HostSleeps(bool),
    Take,
    Complete(Completion),
    Drain,
    SocSleeps(bool),
    Reattach,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => request().prop_map(Step::Submit),
        3 => (any::<u64>(), any::<u64>(), 1..50u32).prop_map(|(address, data, times)| Step::Post { address, data, times }),
        3 => Just(Step::Poll),
        1 => any::<bool>().prop_map(Step::HostSleeps),
        3 => Just(Step::Take),
        3 => completion().prop_map(Step::Complete),
        1 => Just(Step::Drain),
        1 => any::<bool>().prop_map(Step::SocSleeps),
        1 => Just(Step::Reattach),
    ]
}

/// What a lane should be doing.
#[derive(Debug, Default)]
struct Expected {
    waiting: Option<Request>,
    taken: bool,
    answer: Option<Completion>,
    sleeps: bool,
    /// Posted writes since the last credit, served or not.
    uncredited: u32,
    /// Of those, served.
    served: u32,
}

proptest! {
    #[test]
    fn every_request_is_served_once_in_order(
        starts in prop::collection::vec((carried(), carried()), 1..4),
        steps in prop::collection::vec((any::<prop::sample::Index>(), step()), 1..100),
    ) {
        let memories: Vec<_> = starts.iter().map(|&(requests, posts)| Memory::after(requests, posts)).collect();
        let mut hosts: Vec<_> =
            memories.iter().zip(&starts).map(|(m, &(r, p))| Host::after(m.host_windows(), r, p)).collect();
        let attach = |memory: &Memory| Soc::new(memory.soc_windows(Clone::clone));
        let mut socs: Vec<_> = memories.iter().map(attach).collect();
        let idle = SocIdle::new(memories[0].soc_idle.clone());
        let mut soc_sleeps = true;
        let mut lanes: Vec<Expected> = starts.iter().map(|_| Expected::default()).collect();
        let mut posted: VecDeque<(usize, Request)> = VecDeque::new();
        let mut tsc = 0;

        for (index, step) in steps {
            let i = index.index(hosts.len());
            let lane = &mut lanes[i];
            match step {
                Step::Submit(request) => {
                    let submitted = hosts[i].submit(&request);
                    if lane.waiting.is_some() {
                        prop_assert_eq!(submitted, Err(LaneError::Order));
                    } else {
                        let ring = submitted.unwrap();
                        prop_assert!(i != 0 || ring == soc_sleeps);
                        prop_assert!(socs[i].has_work());
                        lane.waiting = Some(request);
                    }
                }
                Step::Post { address, data, times } => {
                    for _ in 0..times {
                        tsc += 1;
                        let write = Request::access(Kind::MMIO, Direction::Write, address, data, 8, tsc);
                        match hosts[i].post(&write).unwrap() {
                            Posted::Full => prop_assert_eq!(lane.uncredited, POSTED_SLOTS),
                            Posted::Sent { ring } => {
                                prop_assert!(lane.uncredited < POSTED_SLOTS);
                                prop_assert!(i != 0 || ring == soc_sleeps);
                                prop_assert!(socs[i].has_work());
                                lane.uncredited += 1;
                                posted.push_back((i, write));
                            }
                        }
                    }
                }
                Step::Poll => {
                    let completion = hosts[i].poll().unwrap();
                    prop_assert_eq!(completion, lane.answer.take());
                    if completion.is_some() {
                        lane.waiting = None;
                    }
                    prop_assert_eq!(hosts[i].waiting(), lane.waiting.is_some());
                }
                Step::HostSleeps(sleeps) => {
                    if sleeps { hosts[i].about_to_sleep() } else { hosts[i].awake() }
                    lane.sleeps = sleeps;
                    prop_assert_eq!(socs[i].host_sleeps(), Ok(sleeps));
                }
                Step::Take => {
                    let taken = socs[i].poll().unwrap();
                    let fresh = !lane.taken && lane.answer.is_none();
                    prop_assert_eq!(taken, lane.waiting.filter(|_| fresh));
                    lane.taken |= taken.is_some();
                    prop_assert_eq!(socs[i].phase(), if lane.taken { Phase::Processing } else { Phase::Free });
                }
                Step::Complete(completion) => {
                    let completed = socs[i].complete(&completion);
                    if lane.taken {
                        completed.unwrap();
                        lane.taken = false;
                        lane.answer = Some(completion);
                    } else {
                        prop_assert_eq!(completed, Err(LaneError::Order));
                    }
                }
                Step::Drain => {
                    let mut wrong = None;
                    let served = &mut posted;
                    drain(&mut socs, |lane, write| {
                        let expected = served.pop_front();
                        if expected != Some((lane, write.request)) {
                            wrong = Some((expected, lane, *write));
                        }
                        lanes[lane].served += 1;
                        if lanes[lane].served == POSTED_SLOTS / 4 {
                            lanes[lane].served = 0;
                            lanes[lane].uncredited -= POSTED_SLOTS / 4;
                        }
                    })
                    .unwrap();
                    prop_assert_eq!(wrong, None);
                    prop_assert!(posted.is_empty());
                }
                Step::SocSleeps(sleeps) => {
                    if sleeps { idle.about_to_sleep().unwrap() } else { idle.awake() }
                    soc_sleeps = sleeps;
                }
                Step::Reattach => {
                    socs[i] = attach(&memories[i]);
                    lane.uncredited -= std::mem::take(&mut lane.served);
                    match lane.taken {
                        true => prop_assert_eq!(socs[i].in_flight(), Ok(lane.waiting.unwrap())),
                        false => prop_assert_eq!(socs[i].in_flight(), Err(LaneError::Order)),
                    }
                }
            }
        }
    }
}
