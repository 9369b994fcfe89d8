//! The program itself: what it prints where, and how it ends.

use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Output, Stdio};

use soc_vmm::control::{Action, ListeningSocket, VmControl, VmInfo, channel};
use soc_vmm::qmp::{Greet, Server};

fn soc_vmm(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_soc-vmm")).args(args).output().unwrap()
}

/// What it printed, and its status.
fn ended(args: &[&str]) -> (String, String, i32) {
    let output = soc_vmm(args);
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(output.stdout), text(output.stderr), output.status.code().unwrap())
}

#[test]
fn a_wrong_command_line_is_one_line_and_status_2() {
    let missing = "/no/such/kernel";
    let cases: [(&[&str], &str); 10] = [
        (&[], "--help"),
        (&["frobnicate"], "frobnicate"),
        (&["-name", "guest=a", "-machine", "pc"], "-machine: type: there is no machine 'pc'"),
        (&["migrate", "a", "b"], "'a': it names no place; say tcp:HOST:PORT"),
        (&["run"], "--kernel"),
        (&["run", "--kernel", missing, "--disk", "d"], "--disk"),
        (&["run", "--kernel", missing, "--memory", "0"], "--memory"),
        (&["run", "--kernel", missing], missing),
        (&["run", "--firmware", missing, "--nvram", missing], "there): No such file or directory (os error 2)\n"),
        (&["run", "--kernel", missing, "--no-such\n\noption"], "--no-such"),
    ];
    for (args, word) in cases {
        let (out, err, status) = ended(args);
        assert_eq!((out.as_str(), status), ("", 2), "{args:?}: {err}");
        assert!(err.starts_with("soc-vmm: ") && err.ends_with('\n') && err.lines().count() == 1, "{args:?}: {err:?}");
        assert!(err.contains(word), "{args:?}: {err:?}");
    }
}

/// A qcow2 image of version 2 with one entry in each of its tables, over `backing`, which is raw.
fn overlay(backing: &str) -> Vec<u8> {
    const CLUSTER: usize = 0x1_0000;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &2u32.to_be_bytes());
    put(8, &0x200u64.to_be_bytes());
    put(16, &(backing.len() as u32).to_be_bytes());
    put(20, &16u32.to_be_bytes());
    put(24, &0x1000u64.to_be_bytes());
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(0x200, backing.as_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for used in 0..4 {
        put(2 * CLUSTER + 2 * used, &1u16.to_be_bytes());
    }
    image
}

#[test]
fn a_qcow2_image_stands_on_the_node_that_it_is_said_to_stand_on() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (rom, base, other, top) = (at("rom"), at("base"), at("other"), at("top.qcow2"));
    for (path, bytes) in
        [(&rom, vec![1; 0x1000]), (&base, vec![2; 0x1000]), (&other, vec![2; 0x1000]), (&top, overlay("base"))]
    {
        std::fs::write(path, bytes).unwrap();
    }
    let file = |name: &str, path: &str| format!("driver=file,node-name={name},filename={path},read-only=on");
    let image = |backing: &str| {
        format!(r#"{{"driver":"qcow2","node-name":"d","file":{{"driver":"file","filename":"{top}"}}{backing}}}"#)
    };
    // What comes behind it is wrong too: it is told where the image is right.
    let right = "descriptor 200 was not passed";
    for (backing, said) in [
        (r#","backing":"b""#, right),
        ("", right),
        (r#","backing":null"#, "backing: the image names a backing file, and shall have none"),
        (r#","backing":"o""#, "backing: the image names another backing file than that of 'o'"),
        (r#","backing":"nothing""#, "there is no back end 'nothing'"),
    ] {
        let (_, err, status) = ended(&[
            "-machine",
            "q35",
            "-bios",
            &rom,
            "-blockdev",
            &file("bs", &base),
            "-blockdev",
            "driver=raw,node-name=b,file=bs,read-only=on",
            "-blockdev",
            &file("o", &other),
            "-blockdev",
            &image(backing),
            "-netdev",
            "tap,id=n,fd=200",
        ]);
        assert_eq!(status, 2, "{backing}: {err}");
        assert!(err.contains(said), "{backing}: {err}");
    }
}

#[test]
fn a_file_is_one_thing_of_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (rom, vars, base, top, iso) = (at("rom"), at("vars"), at("base"), at("top.qcow2"), at("iso"));
    // A firmware volume's header: its length, its signature.
    let mut variables = vec![0; 0x1000];
    variables[32..40].copy_from_slice(&0x1000u64.to_le_bytes());
    variables[40..44].copy_from_slice(b"_FVH");
    std::fs::write(&vars, variables).unwrap();
    for (path, bytes) in
        [(&rom, vec![1; 0x1000]), (&base, vec![2; 0x1000]), (&top, overlay("base")), (&iso, vec![3; 512])]
    {
        std::fs::write(path, bytes).unwrap();
    }
    std::os::unix::fs::symlink("rom", at("link")).unwrap();
    let disk = |path: &str| format!("file={path}");
    let console = |path: &str| format!("file:{path}");
    let files = || [&rom, &vars, &base, &top, &iso].map(|path| std::fs::read(path).unwrap());
    let before = files();
    let of_rom = "is also the firmware image of this VM: give a copy, or say readonly=on";
    let of_base = "the file is the disk's backing file of this VM";
    for (more, words) in [
        (vec!["--disk", &disk(&rom)], of_rom),
        (vec!["--disk", &disk(&at("link"))], of_rom),
        (vec!["--nvram", &vars, "--disk", &disk(&vars)], "is also the variable store of this VM: give a copy"),
        (vec!["--nvram", &vars, "--serial", &console(&vars)], "the file is the variable store of this VM"),
        (vec!["--disk", &disk(&base), "--disk", &disk(&base)], "base: it is in use: another program or disk writes it"),
        (
            vec!["--disk", &disk(&top), "--disk", &disk(&base)],
            "another program or disk reads it and needs it unchanged",
        ),
        (vec!["--disk", &disk(&iso), "--cdrom", &iso], "another program or disk writes it"),
        (vec!["--disk", &disk(&top), "--debugcon", &console(&base)], of_base),
        (vec!["--disk", &disk(&top), "--serial", &console(&base)], of_base),
        (
            vec!["--disk", &disk(&top), "--serial", &console(&top)],
            "top.qcow2 is also the serial port's output of this VM",
        ),
        (
            vec!["--disk", &format!("{},readonly=on", disk(&top)), "--serial", &console(&top)],
            "the file is the disk image of this VM",
        ),
        (vec!["--cdrom", &iso, "--serial", &console(&iso)], "the file is the CD-ROM's image of this VM"),
    ] {
        let serial: &[&str] = if more.contains(&"--serial") { &[] } else { &["--serial", "null"] };
        let mut command = Command::new(env!("CARGO_BIN_EXE_soc-vmm"));
        command.env("XDG_RUNTIME_DIR", dir.path()).args(["run", "--firmware", &rom]).args(serial).args(&more);
        // Not reached; a VM that was started would have no end.
        command.args(["--function", &format!("unix:{}", at("absent"))]);
        let ended = command.output().unwrap();
        let err = String::from_utf8(ended.stderr).unwrap();
        assert!(err.contains(words) && err.lines().count() == 1, "{more:?}: {err:?}");
        assert_eq!(ended.status.code(), Some(2), "{more:?}: {err:?}");
        assert!(files() == before, "{more:?}: a file was changed");
    }
}

#[test]
fn nothing_is_waited_for_and_no_file_of_the_vm_is_destroyed() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let (rom, disk, fifo, read) = (at("rom"), at("disk"), at("fifo"), at("read"));
    std::fs::write(&rom, [1; 0x1000]).unwrap();
    std::fs::write(&disk, [2; 0x1000]).unwrap();
    for path in [&fifo, &read] {
        nix::unistd::mkfifo(path.as_str(), nix::sys::stat::Mode::S_IRWXU).unwrap();
    }
    let _reader = std::fs::File::options().read(true).custom_flags(nix::libc::O_NONBLOCK).open(&read).unwrap();
    let node = format!("driver=raw,node-name=d,file.driver=file,file.filename={disk}");
    let log = |path: &str| format!("null,id=c,logfile={path}");
    let (of_fifo, of_rom, of_disk) = (log(&fifo), log(&rom), log(&disk));
    let content = |path: &str| format!("name=opt/x,file={path}");
    let (from_fifo, from_zero) = (content(&fifo), content("/dev/zero"));
    for (more, words) in [
        (vec!["-chardev", &of_fifo], "nobody reads the FIFO"),
        (vec!["-chardev", &of_rom, "-device", "isa-serial,chardev=c"], "the file is the firmware image of this VM"),
        (vec!["-chardev", &of_disk, "-blockdev", &node], "disk is also the chardev's output of this VM"),
        (vec!["-pidfile", &fifo], "-pidfile: can't write"),
        (vec!["-pidfile", &read], "it is no regular file"),
        (vec!["-pidfile", &rom], "-pidfile: the file is the firmware image of this VM"),
        (vec!["-pidfile", &disk, "-blockdev", &node], "-pidfile: the file is the disk image of this VM"),
        (vec!["-fw_cfg", &from_fifo], "it is no regular file"),
        (vec!["-fw_cfg", &from_zero], "it is no regular file"),
    ] {
        // A function that isn't there is not reached; a VM that was started would have no end.
        let function = format!("function=unix:{}", at("absent"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_soc-vmm"));
        command.args(["-machine", "q35", "-nodefaults", "-nographic", "-bios", &rom, "-outboard", &function]);
        let ended = command.env("XDG_RUNTIME_DIR", dir.path()).args(&more).output().unwrap();
        let err = String::from_utf8(ended.stderr).unwrap();
        assert!(err.contains(words) && err.lines().count() == 1, "{more:?}: {err:?}");
        assert_eq!(ended.status.code(), Some(2), "{more:?}: {err:?}");
        assert_eq!((std::fs::read(&rom).unwrap(), std::fs::read(&disk).unwrap()), (vec![1; 0x1000], vec![2; 0x1000]));
    }
    assert!(std::path::Path::new(&read).exists(), "it is not this process's");
}

#[test]
fn nobody_who_can_be_told_changes_no_status() {
    let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
    let (reader, closed) = std::io::pipe().unwrap();
    drop(reader);
    let cases: [(&[&str], i32); 4] = [
        (&["frobnicate"], 2),
        (&["run", "--kernel", "/no/such/kernel", "--log", "trace"], 2),
        (&["status", "--qmp", "/no/such/socket"], 4),
        (&["--help"], 0),
    ];
    for (args, status) in cases {
        for stderr in [Stdio::from(full()), Stdio::from(closed.try_clone().unwrap())] {
            let ended = Command::new(env!("CARGO_BIN_EXE_soc-vmm")).args(args).stderr(stderr).output().unwrap();
            assert_eq!(ended.status.code(), Some(status), "{args:?}");
        }
    }
}

#[test]
fn help_and_version_go_to_standard_output() {
    for args in [["-h"], ["--help"], ["-V"], ["--version"]] {
        let (out, err, status) = ended(&args);
        assert!(out.contains("soc-vmm") && err.is_empty() && status == 0, "{args:?}: {out:?} {err:?} {status}");
    }
}

#[test]
fn a_vm_that_is_not_there_is_status_4() {
    let (_, err, status) = ended(&["status", "--qmp", "/no/such/socket"]);
    assert!(err.contains("/no/such/socket") && err.lines().count() == 1, "{err:?}");
    assert_eq!(status, 4);
}

#[test]
fn an_argument_that_is_no_utf8_is_named() {
    use std::os::unix::ffi::OsStrExt;
    let strange = std::ffi::OsStr::from_bytes(b"web\xff");
    for option in ["--name", "--memory", "--cmdline"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_soc-vmm"));
        let output = command.args(["run", "--kernel", "/no/such/kernel", option]).arg(strange).output().unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), err.lines().count()), (Some(2), 1), "{err}");
        assert!(err.contains(option) && err.contains("web") && err.contains("UTF-8"), "{err}");
    }
}

/// What may be behind a control socket instead of a VM.
#[derive(Clone, Copy, Debug)]
enum Deaf {
    /// It listens, and accepts nobody.
    Mute,
    /// Likewise, and as many wait as can.
    Full,
    /// It begins to greet.
    Half,
}

#[test]
fn whoever_does_not_greet_holds_no_command_up() {
    use std::os::unix::net::{UnixListener, UnixStream};
    /// Less than a command's own 70 s, more than a greeting may take.
    const MOST: std::time::Duration = std::time::Duration::from_secs(40);
    let dir = tempfile::tempdir().unwrap();
    let (done, results) = std::sync::mpsc::channel();
    let mut held = Vec::new();
    for deaf in [Deaf::Mute, Deaf::Full, Deaf::Half] {
        let path = dir.path().join(format!("{deaf:?}"));
        let listener = UnixListener::bind(&path).unwrap();
        match deaf {
            Deaf::Mute => held.push(std::thread::spawn(move || drop((listener, std::thread::park())))),
            Deaf::Full => {
                nix::sys::socket::listen(&listener, nix::sys::socket::Backlog::new(0).unwrap()).unwrap();
                let waits = UnixStream::connect(&path).unwrap();
                held.push(std::thread::spawn(move || drop((listener, waits, std::thread::park()))));
            }
            Deaf::Half => held.push(std::thread::spawn(move || {
                let mut clients = Vec::new();
                for client in listener.incoming().take(2) {
                    let mut client = client.unwrap();
                    std::io::Write::write_all(&mut client, b"{\"QMP\": {\"version\"").unwrap();
                    clients.push(client);
                }
                std::thread::park();
            })),
        }
        for verb in ["status", "quit"] {
            let (done, path) = (done.clone(), path.to_str().unwrap().to_owned());
            std::thread::spawn(move || done.send((deaf, ended(&[verb, "--qmp", &path]))));
        }
    }
    for _ in 0..6 {
        let (deaf, (out, err, status)) = results.recv_timeout(MOST).expect("a command that is held up");
        assert_eq!((out.as_str(), status, err.lines().count()), ("", 4, 1), "{deaf:?}: {err}");
        assert!(err.contains(&format!("{deaf:?}")) && err.contains("kill -CONT"), "{err}");
    }
    held.iter().for_each(|thread| thread.thread().unpark());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commands_drive_a_vm() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.qmp");
    let (vm, control) = channel(VmInfo { name: "w".into(), cpus: 1, memory: 1 << 30, function: "local".into() });
    let server = Server::start(&vm, vec![ListeningSocket::bind(&path).unwrap()], Greet::AtOnce).unwrap();
    let plays = tokio::spawn(play(control));
    let socket = path.to_str().unwrap().to_owned();
    tokio::task::spawn_blocking(move || {
        for (command, state) in
            [("pause", "paused"), ("reset", "prelaunch"), ("resume", "running"), ("powerdown", "running")]
        {
            assert_eq!(ended(&[command, "--qmp", &socket]), (String::new(), String::new(), 0), "{command}");
            let (shown, _, status) = ended(&["status", "--qmp", &socket]);
            assert!(shown.starts_with(&format!("w: {state} (1 vCPU, 1G, function local")), "{command}: {shown}");
            assert_eq!(status, 0);
        }
        let (json, _, _) = ended(&["status", "--json", "--qmp", &socket]);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&json).unwrap()["status"], "running");
        assert_eq!(ended(&["quit", "--qmp", &socket]).2, 0);
    })
    .await
    .unwrap();
    let done = plays.await.unwrap();
    assert_eq!(done[..4], [Action::Pause, Action::Reset, Action::Resume, Action::PowerButton]);
    server.close().await;
}

/// A VM that does what it is told.
async fn play(mut control: VmControl) -> Vec<Action> {
    control.started();
    let mut done = Vec::new();
    while let Some(order) = control.next().await {
        done.push(order.action());
        control.finish(order, Ok(()));
        if matches!(done.last(), Some(Action::Quit(_))) {
            break;
        }
    }
    done
}
