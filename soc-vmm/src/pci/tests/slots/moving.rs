//! A fabric whose guest goes on behind another one, amid whatever it does to its slots.

use super::*;

fn states(slot: &Slot) -> States {
    let mut states = States::default();
    FabricSide::both(&slot.rig.fabric).iter().for_each(|side| side.save_into("", &mut states));
    states
}

fn load(from: &Slot, to: &Slot) -> Result<(), StateError> {
    let mut states = states(from);
    FabricSide::both(&to.rig.fabric).iter_mut().try_for_each(|side| side.load("", &mut states))?;
    states.end()
}

#[test]
fn a_device_that_the_guest_is_asked_for_is_let_go_on_the_other_side() {
    let from = Slot::new(false);
    from.drive();
    from.insert().unwrap();
    from.command(slot_control::INDICATOR_ON);
    from.set(SLOT_STATUS, 0xffff);
    // Windows of the port and of what is behind it.
    from.rig.config(PORT, 0x20, 4, Some(0xc000_c000));
    from.rig.config(PORT, 4, 2, Some(7));
    from.rig.config(BEHIND, 0x10, 4, Some(0xc000_1000));
    from.rig.config(BEHIND, 4, 2, Some(7));
    from.ask_out().unwrap();

    // Its device was there from the start.
    let to = Slot::new(false);
    let requester = Requester::default();
    let device = Probe::new(7, &[(0, MEM32), (2, MEM64), (1, IO)]);
    to.rig.fabric.lock().unwrap().insert(to.port, device, requester.clone()).unwrap();
    load(&from, &to).unwrap();
    assert_eq!(states(&to), states(&from));
    assert_eq!(to.messages.raised(), [], "what stands was told");
    assert_eq!(to.messages.routed(), from.messages.routed());
    assert_eq!((requester.id(), to.rig.read(false, 0xc000_1004, 4)), (1 << 8, Some(4)));
    let windows = |slot: &Slot| {
        let signals = slot.rig.around.signals.lock().unwrap();
        (slot.rig.around.posted.lock().unwrap().clone(), signals.iter().map(|signal| signal.window).collect::<Vec<_>>())
    };
    assert_eq!((windows(&to), windows(&to).1.len()), (windows(&from), 1));
    to.command(slot_control::INDICATOR_OFF | slot_control::POWER_OFF);
    assert_eq!(*to.emptied.lock().unwrap(), [(to.port, 1)]);
    assert!(from.emptied.lock().unwrap().is_empty());
}

#[test]
fn a_slot_with_a_device_on_one_side_alone_is_named() {
    let (empty, full) = (Slot::new(true), Slot::new(true));
    full.insert().unwrap();
    for (from, to, words) in [
        (&full, &empty, "behind port pci.1 is a device at the source, and none here"),
        (&empty, &full, "behind port pci.1 is none at the source, and one here"),
    ] {
        let refused = load(from, to).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
    }
    // A device of another kind, or in another place.
    let other = Slot::new(true);
    let endpoint = Probe::new(8, &[(0, MEM32)]);
    other.rig.fabric.lock().unwrap().plug(None, 0x10, endpoint).unwrap();
    assert!(
        load(&other, &empty).unwrap_err().to_string().contains("a state of probe@02.0, which this machine doesn't")
    );
    assert!(load(&empty, &other).unwrap_err().to_string().contains("no state of probe@02.0, which this machine has"));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_guest_can_not_tell_behind_which_fabric_it_is(
        prepared: bool,
        before in prop::collection::vec(step(), 0..40),
        after in prop::collection::vec(step(), 1..40),
    ) {
        let (one, two) = (Slot::new(prepared), Slot::new(prepared));
        let take = |slot: &Slot, step: &Step| match step {
            Step::Write { at, len, value } => _ = slot.rig.config(PORT, *at, *len, Some((*value).into())),
            Step::Insert => _ = slot.insert(),
            Step::AskOut => _ = slot.ask_out(),
            Step::Reset => slot.reset(),
        };
        before.iter().for_each(|step| take(&one, step));
        if one.rig.fabric.lock().unwrap().nodes().count() == 2 {
            two.insert().unwrap();
        }
        load(&one, &two).unwrap();
        let mut seen = [&one, &two].map(|slot| (slot.messages.raised().len(), slot.emptied.lock().unwrap().len()));
        for step in &after {
            for slot in [&one, &two] {
                take(slot, step);
            }
            prop_assert_eq!(states(&one), states(&two), "{:?}", step);
            let [news, others] = std::array::from_fn(|n| {
                let slot = [&one, &two][n];
                let before = std::mem::replace(
                    &mut seen[n],
                    (slot.messages.raised().len(), slot.emptied.lock().unwrap().len()),
                );
                (slot.messages.raised()[before.0..].to_vec(), seen[n].1 - before.1)
            });
            prop_assert_eq!(news, others, "{:?}", step);
            for bus in 0..3 {
                prop_assert_eq!(one.rig.config(bus << 8, 0, 4, None), two.rig.config(bus << 8, 0, 4, None));
            }
        }
    }
}
