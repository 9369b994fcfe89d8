//! No wake-up is lost, in either direction.

use ioreq_ring::Posted;
use ioreq_ring::wire::{IDLE, TAIL};
use loom::thread;

use crate::bus::{Omit, World};
use crate::{Lane, Through, answer, ever, write};

const WORLDS: [World; 3] = [World::Cached, World::Bus, World::Unpushed];

/// In which order a side goes to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Goes {
    /// As it must: flag, then look.
    Rightly,
    /// Without the look behind the flag: it counts on the one before.
    LookingEarly,
    /// Without the flag.
    Silently,
}

/// The host goes to sleep while the SoC completes its request. Whether it sleeps and nobody wakes it.
fn host_sleeps_on(world: World, goes: Goes, through: Through, omit: Omit) -> bool {
    ever(None, move || {
        let Lane { mut host, mut soc, .. } = Lane::without(world, through, omit);
        host.submit(&write(1, 1)).unwrap();
        let request = soc.poll().unwrap().unwrap();
        let soc = thread::spawn(move || {
            soc.complete(&answer(&request)).unwrap();
            soc.host_sleeps().unwrap()
        });
        let early = goes == Goes::LookingEarly && host.poll().unwrap().is_some();
        if goes != Goes::Silently {
            host.about_to_sleep();
        }
        let sleeps = !early && (goes == Goes::LookingEarly || host.poll().unwrap().is_none());
        let raised = soc.join().unwrap();
        sleeps && !raised
    })
}

/// What the host does while the SoC goes to sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sends {
    Request,
    Post,
}

/// The SoC goes to sleep while the host sends. Whether it sleeps and nobody rings.
fn soc_sleeps_on(world: World, sends: Sends, goes: Goes, through: Through, omit: Omit) -> bool {
    ever(None, move || {
        let Lane { mut host, soc, idle } = Lane::without(world, through, omit);
        if world == World::Unpushed {
            host = host.reading_back();
        }
        idle.awake();
        let host = thread::spawn(move || match sends {
            Sends::Request => host.submit(&write(1, 1)).unwrap(),
            Sends::Post => host.post(&write(1, 1)).unwrap() == Posted::Sent { ring: true },
        });
        let early = goes == Goes::LookingEarly && soc.has_work();
        if goes != Goes::Silently {
            idle.about_to_sleep().unwrap();
        }
        let sleeps = !early && (goes == Goes::LookingEarly || !soc.has_work());
        let rung = host.join().unwrap();
        sleeps && !rung
    })
}

#[test]
fn a_sleeping_host_is_woken() {
    for world in WORLDS {
        assert!(!host_sleeps_on(world, Goes::Rightly, Through::HostControl, Omit::Nothing), "{world:?}");
    }
}

#[test]
fn a_sleeping_host_needs_every_step() {
    for world in WORLDS {
        for goes in [Goes::LookingEarly, Goes::Silently] {
            assert!(host_sleeps_on(world, goes, Through::HostControl, Omit::Nothing), "{world:?} {goes:?}");
        }
        let lost = |through, omit| host_sleeps_on(world, Goes::Rightly, through, omit);
        assert!(lost(Through::SocCompletion, Omit::Flush), "the wait until the completion has arrived, {world:?}");
        assert!(lost(Through::SocControl, Omit::Load(IDLE, 1)), "the SoC's look at the flag, {world:?}");
    }
    let lost = |world, omit| host_sleeps_on(world, Goes::Rightly, Through::HostControl, omit);
    assert!(lost(World::Cached, Omit::Fence), "the fence behind the flag");
    assert!(lost(World::Bus, Omit::Load(IDLE, 0)), "the load that pushes the flag");
}

#[test]
fn a_sleeping_soc_is_rung() {
    for world in WORLDS {
        for sends in [Sends::Request, Sends::Post] {
            let lost = soc_sleeps_on(world, sends, Goes::Rightly, Through::HostRequest, Omit::Nothing);
            assert!(!lost, "{world:?} {sends:?}");
        }
    }
}

#[test]
fn a_sleeping_soc_needs_every_step() {
    for sends in [Sends::Request, Sends::Post] {
        for world in WORLDS {
            for goes in [Goes::LookingEarly, Goes::Silently] {
                assert!(soc_sleeps_on(world, sends, goes, Through::HostRequest, Omit::Nothing), "{world:?} {goes:?}");
            }
            let looks = soc_sleeps_on(world, sends, Goes::Rightly, Through::HostSocIdle, Omit::Load(0, 1));
            assert!(looks, "the host's look at the flag, {world:?}");
        }
        let lost = |world, through, omit| soc_sleeps_on(world, sends, Goes::Rightly, through, omit);
        assert!(lost(World::Cached, Through::SocSocIdle, Omit::Fence), "the fence behind the flag");
        assert!(lost(World::Bus, Through::SocSocIdle, Omit::Load(0, 0)), "the read-back");
        assert!(lost(World::Cached, Through::HostRequest, Omit::Fence), "the fence in front of the look at the flag");
        assert!(lost(World::Unpushed, Through::HostControl, Omit::Load(IDLE, 0)), "the host's read-back");
    }
    let tail = soc_sleeps_on(World::Bus, Sends::Post, Goes::Rightly, Through::HostControl, Omit::Store(TAIL, 1));
    assert!(tail, "the tail behind a posted write");
}
