//! The table against a model of who has what.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn tenant(uid: u32) -> Tenant {
    Tenant { uid, pid: Some(uid as i32 + 1000), vm: format!("vm-{uid}") }
}

fn table(count: usize, limit: Option<usize>, now: Instant) -> Table {
    Table::new((0..count).map(|i| format!("unix:/{i}")).collect(), limit, now)
}

/// One that is known to be all free.
fn free(count: usize, limit: Option<usize>, now: Instant) -> Table {
    let mut table = table(count, limit, now);
    (0..count).for_each(|index| table.tried(index, Ok(()), now));
    table
}

#[test]
fn none_is_given_out_before_it_was_opened() {
    let now = Instant::now();
    let mut table = table(1, None, now);
    assert_eq!((table.take(&tenant(1)), table.next_try(0)), (Taken::Wait, Some(Duration::ZERO)));
    table.tried(0, Err("nobody listens".into()), now);
    assert_eq!((table.take(&tenant(1)), table.next_try(0)), (Taken::Wait, Some(PAUSES.0)));
    assert_eq!(table.late(0, now + PATIENCE / 2), Some(PATIENCE / 2));
    assert_eq!(table.late(0, now + PATIENCE), None);
    let refusal = "the one function is not free: unix:/0 is broken: nobody listens";
    assert_eq!(table.take(&tenant(1)), Taken::Refused(refusal.into()));
    table.tried(0, Ok(()), now);
    assert_eq!((table.take(&tenant(1)), table.next_try(0)), (Taken::Function(0), None));
}

#[test]
fn a_refusal_says_who_has_them() {
    let now = Instant::now();
    let mut table = free(2, None, now);
    for index in 0..2 {
        assert_eq!(table.take(&tenant(index as u32)), Taken::Function(index));
    }
    let refusal = "none of 2 functions is free: unix:/0 is used by vm-0 (pid 1000, uid 0); unix:/1 is used by vm-1 (pid 1001, uid 1)";
    assert_eq!(table.take(&tenant(2)), Taken::Refused(refusal.into()));
    table.given_back(0, None, now);
    assert_eq!(table.take(&tenant(2)), Taken::Wait);
    let listed = table.list();
    assert_eq!((listed[0].state, listed[1].state), (Standing::Clearing, Standing::Used));
    assert_eq!((listed[1].vm.as_deref(), listed[1].pid, listed[1].uid), (Some("vm-1"), Some(1001), Some(1)));
}

#[test]
fn a_user_has_no_more_than_its_limit_of_them_also_by_complaints() {
    let now = Instant::now();
    let mut table = free(4, Some(1), now);
    assert_eq!(table.take(&tenant(1)), Taken::Function(0));
    assert_eq!(table.take(&tenant(1)), Taken::Refused("user 1 has 1 functions already, which is its limit".into()));
    table.given_back(0, Some("holds another VM".into()), now);
    assert!(matches!(table.take(&tenant(1)), Taken::Refused(_)), "it could have them all put aside");
    assert_eq!(table.next_try(0), Some(AFTER_COMPLAINT.0));
    assert_eq!(table.take(&tenant(2)), Taken::Function(1));
    // Root has no limit.
    assert_eq!((table.take(&tenant(0)), table.take(&tenant(0))), (Taken::Function(2), Taken::Function(3)));
    table.tried(0, Ok(()), now);
    assert_eq!(table.take(&tenant(1)), Taken::Function(0));
    table.given_back(0, Some("still".into()), now);
    assert_eq!(table.next_try(0), Some(2 * AFTER_COMPLAINT.0));
}

#[test]
fn pauses_grow_to_their_longest() {
    let now = Instant::now();
    let mut table = table(1, None, now);
    for _ in 0..100 {
        table.tried(0, Err("no".into()), now);
    }
    assert_eq!(table.next_try(0), Some(LONGEST_CLEARING));
    table.tried(0, Err("no".into()), now + PATIENCE);
    assert_eq!(table.next_try(0), Some(PAUSES.1));
}

/// What happens to a table.
#[derive(Clone, Debug)]
enum Step {
    Take(u32),
    Fail(usize),
    GiveBack(usize, bool),
    Try(usize, bool),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        (0u32..4).prop_map(Step::Take),
        (0usize..8).prop_map(Step::Fail),
        (0usize..8, any::<bool>()).prop_map(|(nth, complains)| Step::GiveBack(nth, complains)),
        (0usize..8, any::<bool>()).prop_map(|(nth, opens)| Step::Try(nth, opens)),
        (0u64..8).prop_map(Step::Wait),
    ];
    proptest::collection::vec(step, 0..200)
}

proptest! {
    /// Nobody is given what another one has, or what wasn't opened since another one had it; limits hold; nothing is lost for good.
    #[test]
    fn each_function_has_one_user_and_is_opened_in_between(count in 1usize..6, limit in 1usize..4, steps in steps()) {
        let mut now = Instant::now();
        let mut table = table(count, Some(limit), now);
        let mut users = BTreeMap::<usize, u32>::new();
        let mut opened = vec![false; count];
        let nth = |users: &BTreeMap<usize, u32>, n: usize| users.keys().nth(n % users.len().max(1)).copied();
        for step in steps {
            match step {
                Step::Take(uid) => match table.take(&tenant(uid)) {
                    Taken::Function(index) => {
                        prop_assert!(std::mem::take(&mut opened[index]));
                        prop_assert_eq!(users.insert(index, uid), None);
                        prop_assert!(uid == 0 || users.values().filter(|user| **user == uid).count() <= limit);
                    }
                    Taken::Wait => prop_assert!(!opened.contains(&true)),
                    Taken::Refused(why) => {
                        prop_assert!(!opened.contains(&true) || why.starts_with("user "), "{}", why);
                    }
                },
                Step::Fail(n) => if let Some(index) = nth(&users, n) {
                    users.remove(&index);
                    table.failed(index, "gone".into());
                },
                Step::GiveBack(n, complains) => if let Some(index) = nth(&users, n) {
                    users.remove(&index);
                    table.given_back(index, complains.then(|| "no".into()), now);
                },
                Step::Try(n, opens) => {
                    let index = n % count;
                    if table.next_try(index).is_some() {
                        table.tried(index, if opens { Ok(()) } else { Err("no".into()) }, now);
                        opened[index] = opens;
                    }
                }
                Step::Wait(seconds) => {
                    now += Duration::from_secs(seconds);
                    (0..count).for_each(|index| { table.late(index, now); });
                }
            }
            for (index, listed) in table.list().iter().enumerate() {
                prop_assert_eq!(listed.uid, users.get(&index).copied());
                prop_assert_eq!(listed.state == Standing::Free, opened[index]);
                prop_assert_eq!(table.next_try(index).is_some(), !opened[index] && !users.contains_key(&index));
            }
        }
    }
}
