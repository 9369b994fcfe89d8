//! Answers to what the machine is asked.

use std::fs;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::time::{ClockId, clock_gettime, clock_settime};
use nix::unistd::Pid;
use testbed_init::{Answer, Call, Line, Request};

use crate::port::Port;
use crate::programs::Programs;
use crate::{boot, in_background, inspect};

/// Takes calls until one asks to switch the machine off.
pub(crate) fn serve(control: &Arc<Port>, programs: &Programs) {
    control.send(&Line::Ready);
    loop {
        let line = control.receive();
        let call: Call = match serde_json::from_str(&line) {
            Ok(call) => call,
            Err(error) => {
                // Its number is unknown, so nobody waits for a reply: the console says it.
                println!("testbed-init: not a call ({error}): {}", line.trim());
                continue;
            }
        };
        let id = call.id;
        match call.request {
            Request::PowerOff => {
                let result = Ok(Answer::Done);
                control.send(&Line::Reply { id, result });
                return;
            }
            // It may take long, and others are asked meanwhile.
            request @ Request::Exec { .. } => {
                let (control, programs) = (Arc::clone(control), programs.clone());
                in_background("exec", move || {
                    let result = answer(request, &programs);
                    control.send(&Line::Reply { id, result });
                });
            }
            request => {
                let result = answer(request, programs);
                control.send(&Line::Reply { id, result });
            }
        }
    }
}

/// Does what is asked.
pub(crate) fn answer(request: Request, programs: &Programs) -> Result<Answer, String> {
    match request {
        Request::Inventory => inspect::inventory().map(Answer::Inventory),
        Request::List => inspect::programs().map(Answer::Programs),
        Request::Run { program, args, channel } => programs.run(&program, &args, channel.as_deref()).map(Answer::Pid),
        Request::Exec { program, args, seconds } => {
            programs.exec(&program, &args, Duration::from_secs(seconds)).map(Answer::Ended)
        }
        Request::Signal { pid, signal } => {
            let signal = Signal::try_from(signal).map_err(|e| format!("signal {signal}: {e}"))?;
            kill(Pid::from_raw(pid), signal).map_err(|e| format!("process {pid}: {e}"))?;
            Ok(Answer::Done)
        }
        Request::Memory { pid } => inspect::memory(pid).map(Answer::Memory),
        Request::Threads { pid } => inspect::threads(pid).map(Answer::Threads),
        Request::Descriptors { pid } => {
            let open = u32::try_from(pid).map_err(io::Error::other).and_then(testbed_init::descriptors);
            open.map(Answer::Descriptors).map_err(|e| format!("process {pid}: {e}"))
        }
        Request::Clock => clock().map(Answer::Clock),
        Request::StepClock { by } => step_clock(by).map(|()| Answer::Done),
        Request::Read { path } => fs::read_to_string(&path).map(Answer::Text).map_err(|e| format!("{path}: {e}")),
        Request::Write { path, text } => {
            fs::write(&path, text).map(|()| Answer::Done).map_err(|e| format!("{path}: {e}"))
        }
        Request::Bind { function } => boot::bind(&function).map(|()| Answer::Done),
        Request::PowerOff => Ok(Answer::Done),
    }
}

fn clock() -> Result<i64, String> {
    let time = clock_gettime(ClockId::CLOCK_REALTIME).map_err(|e| format!("clock: {e}"))?;
    Ok(time.num_nanoseconds())
}

fn step_clock(by: i64) -> Result<(), String> {
    let time = TimeSpec::nanoseconds(clock()?.saturating_add(by));
    clock_settime(ClockId::CLOCK_REALTIME, time).map_err(|e| format!("clock: {e}"))
}
