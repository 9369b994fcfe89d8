//! Round trips, and the posted ring with its credits.

use ioreq_ring::wire::{POSTED_SLOTS, TAIL};
use ioreq_ring::{LaneError, Posted, Request, drain};
use loom::thread;

use crate::bus::{Omit, World};
use crate::{Host, Lane, Soc, Through, answer, ever, write};

/// Requests one after the other. Whether one came torn, or its answer did.
fn torn_round_trip(world: World, through: Through, omit: Omit) -> bool {
    ever(Some(3), move || {
        let Lane { mut host, mut soc, .. } = Lane::without(world, through, omit);
        let soc = thread::spawn(move || {
            let mut torn = false;
            for i in 1..=2 {
                let request = loop {
                    match soc.poll() {
                        Ok(Some(request)) => break request,
                        Ok(None) => thread::yield_now(),
                        Err(_) => return true,
                    }
                };
                torn |= request != write(i, i);
                soc.complete(&answer(&write(i, i))).unwrap();
                soc.host_sleeps().unwrap();
            }
            torn
        });
        let mut torn = false;
        for i in 1..=2 {
            host.submit(&write(i, i)).unwrap();
            // What makes a posted request arrive in the end: time, which a model doesn't have.
            host.about_to_sleep();
            let completion = loop {
                match host.poll() {
                    Ok(Some(completion)) => break Some(completion),
                    Ok(None) => thread::yield_now(),
                    Err(_) => break None,
                }
            };
            torn |= completion != Some(answer(&write(i, i)));
            host.awake();
        }
        soc.join().unwrap() || torn
    })
}

#[test]
fn requests_and_completions_come_whole() {
    for world in [World::Cached, World::Bus] {
        assert!(!torn_round_trip(world, Through::HostRequest, Omit::Nothing), "{world:?}");
    }
}

fn serve(soc: &mut Soc, served: &mut Vec<Request>) -> Result<(), LaneError> {
    drain(std::slice::from_mut(soc), |_, write| served.push(write.request)).map_err(|(_, e)| e)
}

/// Posts `write(i, i)` for each `i` that there is room for, and says which.
fn post(host: &mut Host, numbers: std::ops::Range<u64>) -> Result<Vec<u64>, LaneError> {
    let mut sent = Vec::new();
    for i in numbers {
        if let Posted::Sent { .. } = host.post(&write(i, i))? {
            sent.push(i);
        }
    }
    Ok(sent)
}

/// A host that posts around the ring while the SoC drains it. Whether what is served is not what was sent.
fn lost_post(world: World, through: Through, omit: Omit) -> bool {
    ever(Some(3), move || {
        let Lane { mut host, mut soc, .. } = Lane::without(world, through, omit);
        // A full ring but for one slot, before the race starts.
        let mut sent = post(&mut host, 1..u64::from(POSTED_SLOTS)).unwrap();
        let racing = thread::spawn(move || {
            let sent = post(&mut host, 100..103);
            host.about_to_sleep();
            sent
        });
        let mut served = Vec::new();
        let mut broken = serve(&mut soc, &mut served).is_err();
        match racing.join().unwrap() {
            Ok(late) => sent.extend(late),
            Err(_) => broken = true,
        }
        broken |= serve(&mut soc, &mut served).is_err();
        broken || served != sent.iter().map(|&i| write(i, i)).collect::<Vec<_>>()
    })
}

#[test]
fn posted_writes_come_once_in_order_and_whole() {
    for world in [World::Cached, World::Bus] {
        assert!(!lost_post(world, Through::HostRequest, Omit::Nothing), "{world:?}");
    }
}

#[test]
fn lines_and_rings_need_every_step() {
    for world in [World::Cached, World::Bus] {
        assert!(torn_round_trip(world, Through::HostRequest, Omit::SequenceLast), "a request's sequence stored last");
        assert!(
            torn_round_trip(world, Through::SocCompletion, Omit::SequenceLast),
            "a completion's sequence stored last"
        );
        assert!(lost_post(world, Through::HostControl, Omit::Exact(TAIL, 1)), "a tail that counts what was posted");
        assert!(lost_post(world, Through::SocCredit, Omit::Exact(0, 1)), "a credit that counts what was consumed");
    }
}
