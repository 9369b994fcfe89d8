//! The console on a real terminal: this program starts itself on a pseudo-terminal, as a child with a console whose "guest"
//! sends back what it gets, and looks at the terminal's modes from outside.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel as thread_channel};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::signal::{Signal, raise};
use nix::sys::termios::{LocalFlags, tcgetattr};
use soc_vmm::bus::Wake;
use soc_vmm::cli::SerialSpec;
use soc_vmm::console::SerialBackend;
use soc_vmm::control::{Action, ShutdownCause, VmInfo, channel};
use soc_vmm::devices::{input_pipe, output_pipe};

const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    if let Some(end) = std::env::args().skip_while(|arg| arg != "--child").nth(1) {
        return child(&end);
    }
    let cases: [(&str, fn()); 7] = [
        ("keys_reach_the_guest_and_ctrl_a_x_quits", keys_reach_the_guest_and_ctrl_a_x_quits),
        ("a_panic_restores_the_terminal", || ends_by_itself("panic")),
        ("an_abort_restores_the_terminal", || ends_by_itself("abort")),
        ("a_stack_overflow_restores_the_terminal", || ends_by_itself("overflow")),
        ("a_signal_restores_the_terminal", || ends_by_itself("sigquit")),
        ("the_end_of_input_ends_nothing", the_end_of_input_ends_nothing),
        ("a_pipe_has_no_commands", a_pipe_has_no_commands),
    ];
    run(&cases);
}

/// Runs what the arguments name, or lists it: as much of the test harness's command line as its runners use.
fn run(cases: &[(&str, fn())]) {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let given = |option: &str| arguments.iter().any(|argument| argument == option);
    let mut names = arguments.iter().filter(|argument| !argument.starts_with('-') && *argument != "terse").peekable();
    let all = names.peek().is_none();
    let names: Vec<&String> = names.collect();
    let named =
        |case: &str| names.iter().any(|name| if given("--exact") { case == *name } else { case.contains(*name) });
    // None is ignored by default.
    let chosen: Vec<_> = cases.iter().filter(|(case, _)| !given("--ignored") && (all || named(case))).collect();
    if given("--list") {
        chosen.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    for (name, case) in &chosen {
        case();
        println!("test {name} ... ok");
    }
    let left = cases.len() - chosen.len();
    println!("\ntest result: ok. {} passed; 0 failed; 0 ignored; 0 measured; {left} filtered out", chosen.len());
}

/// The other side of a test: a console on standard input and output. It ends as `end` says, once it got a key.
fn child(end: &str) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let code = runtime.block_on(async {
        #[derive(Debug)]
        struct NoDevice;
        impl Wake for NoDevice {
            fn wake(&self) {}
        }
        let (vm, mut control) = channel(VmInfo { name: "c".into(), cpus: 1, memory: 4096, function: "local".into() });
        let (mut output, reader) = output_pipe(4096, Arc::new(NoDevice));
        let (writer, mut input) = input_pipe(4096, Arc::new(NoDevice));
        let console = SerialBackend::open(&SerialSpec::Stdio).unwrap().attach(reader, writer, &vm).unwrap();
        assert!("ready\n".bytes().all(|byte| output.push(byte)));
        let mut tick = tokio::time::interval(Duration::from_millis(2));
        let code = loop {
            tokio::select! {
                order = control.next() => {
                    let order = order.unwrap();
                    assert_eq!(order.action(), Action::Quit(ShutdownCause::HostUi));
                    control.finish(order, Ok(()));
                    break 7;
                }
                _ = tick.tick() => {
                    let mut bytes = VecDeque::new();
                    input.take(64, &mut bytes);
                    match (bytes.is_empty(), end) {
                        (false, "panic") => panic!("as told"),
                        (false, "abort") => std::process::abort(),
                        (false, "overflow") => std::process::exit(overflow(1) as i32),
                        (false, "sigquit") => raise(Signal::SIGQUIT).unwrap(),
                        _ => {}
                    }
                    assert!(bytes.iter().all(|byte| output.push(byte.to_ascii_uppercase())));
                    if bytes.contains(&b'.') {
                        break 0;
                    }
                }
            }
        };
        drop((output, input));
        console.finish().await;
        code
    });
    std::process::exit(code);
}

/// Takes stack until there is none.
#[allow(unconditional_recursion, reason = "it is to overflow the stack")]
fn overflow(depth: u64) -> u64 {
    let taken = std::hint::black_box([depth; 512]);
    overflow(depth + 1) + taken[0]
}

/// A child, what it prints, and how to type.
struct Session {
    child: Child,
    printed: Receiver<Vec<u8>>,
    seen: Vec<u8>,
    /// The slave, to look at.
    terminal: Option<OwnedFd>,
}

impl Session {
    fn on_terminal(end: &str) -> (Self, std::fs::File) {
        let pty = openpty(None, None).unwrap();
        assert!(!is_raw(&pty.slave), "a new terminal is raw already");
        let slave = || Stdio::from(pty.slave.try_clone().unwrap());
        // setsid(1) makes the terminal the controlling one, with the child in its foreground.
        let mut command = Command::new("setsid");
        command.args(["--ctty", "--wait"]).arg(std::env::current_exe().unwrap()).args(["--child", end]);
        let child = command.stdin(slave()).stdout(slave()).stderr(slave()).spawn().unwrap();
        let master = std::fs::File::from(pty.master);
        let printed = pump(master.try_clone().unwrap());
        (Self { child, printed, seen: Vec::new(), terminal: Some(pty.slave) }, master)
    }

    fn wait_for(&mut self, text: &str) {
        let deadline = Instant::now() + PATIENCE;
        while !String::from_utf8_lossy(&self.seen).contains(text) {
            match self.printed.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(bytes) => self.seen.extend(bytes),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {
                    panic!("no {text:?} in {:?}", String::from_utf8_lossy(&self.seen))
                }
            }
        }
    }

    fn exit(mut self) -> Option<i32> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                if let Some(terminal) = &self.terminal {
                    let modes = tcgetattr(terminal.as_fd()).unwrap();
                    let cooked = LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG;
                    assert!(modes.local_flags.contains(cooked), "the terminal is left raw: {modes:?}");
                }
                return status.code();
            }
            if Instant::now() > deadline {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                panic!("the child doesn't end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn is_raw(terminal: &OwnedFd) -> bool {
    let modes = tcgetattr(terminal.as_fd()).unwrap();
    !modes.local_flags.intersects(LocalFlags::ICANON | LocalFlags::ECHO | LocalFlags::ISIG)
}

fn pump(mut from: impl Read + Send + 'static) -> Receiver<Vec<u8>> {
    let (sender, receiver) = thread_channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = from.read(&mut bytes) {
            if sender.send(bytes[..count].to_vec()).is_err() {
                return;
            }
        }
    });
    receiver
}

fn keys_reach_the_guest_and_ctrl_a_x_quits() {
    let (mut session, mut keys) = Session::on_terminal("quit");
    session.wait_for("ready");
    assert!(is_raw(session.terminal.as_ref().unwrap()));
    // Ctrl-C and the doubled Ctrl-A are the guest's; the help is ours.
    keys.write_all(b"a\x03b\x01\x01c").unwrap();
    session.wait_for("A\x03B\x01C");
    keys.write_all(b"\x01h").unwrap();
    session.wait_for("Ctrl-A x");
    keys.write_all(b"\x01x").unwrap();
    assert_eq!(session.exit(), Some(7));
}

fn ends_by_itself(end: &str) {
    let (mut session, mut keys) = Session::on_terminal(end);
    session.wait_for("ready");
    assert!(is_raw(session.terminal.as_ref().unwrap()));
    keys.write_all(b"k").unwrap();
    assert_ne!(session.exit(), Some(0));
}

fn piped() -> Session {
    let mut command = Command::new(std::env::current_exe().unwrap());
    let mut child = command.args(["--child", "dot"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let printed = pump(child.stdout.take().unwrap());
    Session { child, printed, seen: Vec::new(), terminal: None }
}

fn the_end_of_input_ends_nothing() {
    let mut session = piped();
    session.wait_for("ready");
    drop(session.child.stdin.take());
    std::thread::sleep(Duration::from_millis(300));
    assert!(session.child.try_wait().unwrap().is_none(), "the end of its input ended it");
    session.child.kill().unwrap();
    session.exit();
}

fn a_pipe_has_no_commands() {
    let mut session = piped();
    session.wait_for("ready");
    session.child.stdin.as_mut().unwrap().write_all(b"a\x01xb.").unwrap();
    session.wait_for("A\x01XB.");
    assert_eq!(session.exit(), Some(0));
}
