//! Two vCPUs with a guest lock between them see the order in which they held it.

use std::sync::Arc;

use ioreq_ring::wire::TAIL;
use ioreq_ring::{Request, drain};
use loom::sync::Mutex;
use loom::thread;

use crate::bus::{Bus, Omit, World};
use crate::{Host, Lane, Soc, Through, ever, write};

/// What the guest's lock guards: the order in which it was held. Its length is the host's TSC, which every exit reads.
type Lock = Arc<Mutex<Vec<u64>>>;

/// Takes the guest's lock, exits while it holds it, and leaves its number in the order.
fn locked(lock: &Lock, number: u64, exit: impl FnOnce(&Request)) {
    let mut order = lock.lock().unwrap();
    let tsc = order.len() as u64 + 1;
    exit(&write(number, tsc));
    order.push(number);
}

fn lanes(count: usize, world: World, through: Through, omit: Omit) -> (Vec<Host>, Vec<Soc>) {
    let bus = Bus::new(world);
    (0..count).map(|_| Lane::on(&bus, through, omit)).map(|lane| (lane.host, lane.soc)).unzip()
}

fn post(host: &mut Host, request: &Request) {
    let _ = host.post(request).unwrap();
}

fn drain_into(lanes: &mut [Soc], served: &mut Vec<u64>) {
    drain(lanes, |_, write| served.push(write.request.data)).unwrap();
}

/// Two vCPUs post under the lock, one of them twice. Whether they are ever served in another order.
fn posts_disordered(world: World, through: Through, omit: Omit) -> bool {
    ever(Some(3), move || {
        let (mut hosts, mut socs) = lanes(2, world, through, omit);
        let lock = Lock::default();
        let [mut b, mut a] = [hosts.pop().unwrap(), hosts.pop().unwrap()];
        let [of_a, of_b] = [lock.clone(), lock.clone()];
        let a = thread::spawn(move || {
            locked(&of_a, 1, |write| post(&mut a, write));
            a.about_to_sleep();
            a
        });
        let b = thread::spawn(move || {
            locked(&of_b, 2, |write| post(&mut b, write));
            locked(&of_b, 3, |write| post(&mut b, write));
            b.about_to_sleep();
            b
        });
        let mut served = Vec::new();
        drain_into(&mut socs, &mut served);
        let _hosts = (a.join().unwrap(), b.join().unwrap());
        drain_into(&mut socs, &mut served);
        drain_into(&mut socs, &mut served);
        served != *lock.lock().unwrap()
    })
}

/// The same with three vCPUs, one write each.
fn three_disordered(world: World, through: Through, omit: Omit) -> bool {
    ever(Some(2), move || {
        let (hosts, mut socs) = lanes(3, world, through, omit);
        let lock = Lock::default();
        let vcpu = |(mut host, number): (Host, u64)| {
            let lock = lock.clone();
            thread::spawn(move || {
                locked(&lock, number, |write| post(&mut host, write));
                host.about_to_sleep();
            })
        };
        let vcpus: Vec<_> = hosts.into_iter().zip(1..).map(vcpu).collect();
        let mut served = Vec::new();
        drain_into(&mut socs, &mut served);
        vcpus.into_iter().for_each(|vcpu| vcpu.join().unwrap());
        drain_into(&mut socs, &mut served);
        drain_into(&mut socs, &mut served);
        served != *lock.lock().unwrap()
    })
}

/// One vCPU posts under the lock, the other makes a synchronous request. Whether the request is ever served before a write that was
/// posted before it, if these lanes are drained first.
fn request_overtakes(world: World, drained: std::ops::Range<usize>) -> bool {
    ever(Some(3), move || {
        let (mut hosts, mut socs) = lanes(2, world, Through::HostRequest, Omit::Nothing);
        let lock = Lock::default();
        let [mut b, mut a] = [hosts.pop().unwrap(), hosts.pop().unwrap()];
        let [of_a, of_b] = [lock.clone(), lock.clone()];
        let a = thread::spawn(move || locked(&of_a, 1, |write| post(&mut a, write)));
        let b = thread::spawn(move || {
            locked(&of_b, 2, |write| post(&mut b, write));
            locked(&of_b, 3, |write| assert!(b.submit(write).is_ok()));
        });
        let mut served = Vec::new();
        if socs[1].poll().unwrap().is_some() {
            drain_into(&mut socs[drained.clone()], &mut served);
            served.push(3);
        }
        a.join().unwrap();
        b.join().unwrap();
        let order = lock.lock().unwrap();
        let before = order.iter().take(served.len());
        // Writes that were posted after the request may be served before it: nobody can tell. Those before it must be.
        let request = order.iter().position(|&n| n == 3).unwrap();
        !served.is_empty() && before.take(request).ne(served.iter().take(request))
    })
}

#[test]
fn posted_writes_are_served_in_the_order_of_the_lock() {
    for world in [World::Cached, World::Bus] {
        assert!(!posts_disordered(world, Through::HostRequest, Omit::Nothing), "{world:?}");
        assert!(!three_disordered(world, Through::HostRequest, Omit::Nothing), "{world:?}");
    }
}

#[test]
fn a_request_is_served_behind_the_writes_before_it() {
    for world in [World::Cached, World::Bus] {
        assert!(!request_overtakes(world, 0..2), "{world:?}");
        assert!(request_overtakes(world, 1..2), "every lane must be drained, {world:?}");
    }
}

#[test]
fn the_order_needs_every_step() {
    for world in [World::Cached, World::Bus] {
        assert!(posts_disordered(world, Through::SocControl, Omit::SecondLook(TAIL)), "the second look at the tails");
        assert!(posts_disordered(world, Through::SocPosted, Omit::TimeStamps), "the time stamps");
        assert!(three_disordered(world, Through::SocControl, Omit::SecondLook(TAIL)), "the second look at the tails");
        assert!(three_disordered(world, Through::SocPosted, Omit::TimeStamps), "the time stamps");
    }
}
