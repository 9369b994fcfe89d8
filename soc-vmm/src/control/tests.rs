use proptest::prelude::*;

use super::*;

fn vm() -> (VmHandle, VmControl) {
    channel(VmInfo { name: "t".into(), cpus: 1, memory: 1 << 20, function: "local".into() })
}

fn kinds(events: &mut broadcast::Receiver<Event>) -> Vec<EventKind> {
    std::iter::from_fn(|| events.try_recv().ok()).map(|event| event.kind).collect()
}

/// Asks, carries the order out (if there is one) with `outcome`, and gives the answer.
async fn exchange(
    handle: &VmHandle,
    control: &mut VmControl,
    command: Command,
    outcome: Result<(), String>,
) -> (Option<Action>, Result<(), ControlError>) {
    let mut done = None;
    let ask = handle.ask(command);
    tokio::pin!(ask);
    loop {
        tokio::select! {
            biased;
            answer = &mut ask => return (done, answer),
            order = control.next() => {
                let order = order.expect("a handle is alive");
                done = Some(order.action());
                control.finish(order, outcome.clone());
            }
        }
    }
}

#[tokio::test]
async fn stop_and_cont_are_idempotent_and_say_so_once() {
    let (handle, mut control) = vm();
    let mut events = handle.events().unwrap();
    control.started();
    assert_eq!(exchange(&handle, &mut control, Command::Cont, Ok(())).await, (None, Ok(())));
    assert_eq!(exchange(&handle, &mut control, Command::Stop, Ok(())).await, (Some(Action::Pause), Ok(())));
    assert_eq!(exchange(&handle, &mut control, Command::Stop, Ok(())).await, (None, Ok(())));
    assert_eq!(handle.state(), RunState::Paused);
    assert_eq!(exchange(&handle, &mut control, Command::Cont, Ok(())).await, (Some(Action::Resume), Ok(())));
    assert_eq!(kinds(&mut events), [EventKind::Resume, EventKind::Stop, EventKind::Resume]);
}

#[tokio::test]
async fn a_failed_order_changes_nothing_and_says_why() {
    let (handle, mut control) = vm();
    control.started();
    let mut events = handle.events().unwrap();
    let (_, answer) = exchange(&handle, &mut control, Command::Stop, Err("vCPU 1 is stuck".into())).await;
    assert_eq!(answer, Err(ControlError::Refused("vCPU 1 is stuck".into())));
    assert_eq!((handle.state(), kinds(&mut events)), (RunState::Running, vec![]));
}

#[tokio::test]
async fn powered_off_runs_again_only_after_a_reset() {
    let (handle, mut control) = vm();
    control.started();
    let mut events = handle.events().unwrap();
    control.ends(ShutdownCause::GuestShutdown);
    let (done, answer) = exchange(&handle, &mut control, Command::Cont, Ok(())).await;
    assert_eq!(done, None);
    assert!(matches!(answer, Err(ControlError::Refused(why)) if why.contains("Resetting")));
    exchange(&handle, &mut control, Command::Reset, Ok(())).await.1.unwrap();
    assert_eq!(handle.state(), RunState::Prelaunch);
    exchange(&handle, &mut control, Command::Cont, Ok(())).await.1.unwrap();
    assert_eq!(
        kinds(&mut events),
        [
            EventKind::Shutdown { guest: true, reason: ShutdownCause::GuestShutdown },
            EventKind::Stop,
            EventKind::Reset { guest: false, reason: ShutdownCause::HostQmpSystemReset },
            EventKind::Resume
        ]
    );
}

#[tokio::test]
async fn what_is_said_while_the_vm_is_built_decides_whether_it_runs() {
    let (handle, mut control) = vm();
    assert!(control.autostart());
    for (command, autostart) in [(Command::Stop, false), (Command::Cont, true), (Command::Stop, false)] {
        tokio::select! {
            () = control.told_to_quit() => panic!("{command:?} is no quit"),
            answer = handle.ask(command) => assert_eq!(answer, Ok(())),
        }
        assert_eq!((control.autostart(), control.state()), (autostart, RunState::Prelaunch));
    }
    tokio::select! {
        () = control.told_to_quit() => panic!("a reset is no quit"),
        answer = handle.reset() => assert!(matches!(answer, Err(ControlError::Refused(_)))),
    }
    let (told, answer) = tokio::join!(control.told_to_quit(), handle.quit(ShutdownCause::HostSignal));
    assert_eq!((told, answer, handle.state()), ((), Ok(()), RunState::Shutdown));
}

#[tokio::test]
async fn an_ended_vm_answers_everyone_and_closes_the_events() {
    let (handle, mut control) = vm();
    let mut events = handle.events().unwrap();
    let asking = tokio::spawn({
        let handle = handle.clone();
        async move { handle.reset().await }
    });
    let order = control.next().await.unwrap();
    control.ends(ShutdownCause::HostError);
    drop((order, control));
    assert_eq!(asking.await.unwrap(), Err(ControlError::Ended));
    assert_eq!(handle.stop().await, Err(ControlError::Ended));
    assert_eq!(handle.state(), RunState::InternalError);
    assert_eq!(kinds(&mut events), [EventKind::Shutdown { guest: false, reason: ShutdownCause::HostError }]);
    assert!(matches!(events.try_recv(), Err(broadcast::error::TryRecvError::Closed)));
    assert!(handle.events().is_none());
}

#[derive(Clone, Copy, Debug)]
enum Happens {
    Asked(Command),
    GuestReset,
    Ends(ShutdownCause),
    Fails,
}

fn happens() -> impl Strategy<Value = (Happens, bool)> {
    let what = prop_oneof![
        4 => prop_oneof![Just(Command::Stop), Just(Command::Cont), Just(Command::Reset), Just(Command::Powerdown)]
            .prop_map(Happens::Asked),
        1 => Just(Happens::GuestReset),
        1 => prop_oneof![Just(ShutdownCause::GuestShutdown), Just(ShutdownCause::HostError)].prop_map(Happens::Ends),
        1 => Just(Happens::Fails),
    ];
    (what, any::<bool>())
}

proptest! {
    /// Whatever happens in whatever order: no illegal transition (it would panic), and who only hears the events knows at
    /// each step whether the vCPUs run.
    #[test]
    fn events_tell_the_state(steps in prop::collection::vec(happens(), 1..40), paused: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async {
            let (handle, mut control) = vm();
            let mut events = handle.events().unwrap();
            let mut runs = false;
            if !paused {
                control.started();
            }
            for (what, works) in steps {
                let outcome = if works { Ok(()) } else { Err("no".to_owned()) };
                match what {
                    Happens::Asked(command) => {
                        let before = handle.state();
                        let (done, answer) = exchange(&handle, &mut control, command, outcome).await;
                        prop_assert_eq!(answer.is_ok(), works && done.is_some() || done.is_none() && !matches!(
                            (command, before), (Command::Cont, RunState::Shutdown | RunState::InternalError)));
                    }
                    Happens::GuestReset => control.guest_reset(),
                    Happens::Ends(cause) => control.ends(cause),
                    Happens::Fails if handle.state() != RunState::InternalError => control.stopped(RunState::InternalError),
                    Happens::Fails => {}
                }
                for kind in kinds(&mut events) {
                    match kind {
                        EventKind::Stop => { prop_assert!(runs); runs = false; }
                        EventKind::Resume => { prop_assert!(!runs); runs = true; }
                        _ => {}
                    }
                }
                prop_assert_eq!(runs, handle.state().is_running());
            }
            Ok(())
        })?;
    }
}
