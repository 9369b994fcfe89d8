//! The Debian disk boots through SeaBIOS and GRUB, and takes a log-in on its serial line: shown under QEMU, so that a failure
//! under soc-vmm is soc-vmm's.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use testbed::debian::{self, Line, Shell};
use testbed::fetch;
use testbed::machine::Error;
use testbed::process::Child;

const BOOT_LIMIT: Duration = Duration::from_secs(200);
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn the_disk_boots_through_seabios_and_grub() {
    if !testbed::machines_or_skip("the_disk_boots_through_seabios_and_grub") {
        return;
    }
    let tools = debian::tools().unwrap();
    let mut qemu = Qemu::start(&["-bios", tools.seabios().to_str().unwrap()]);
    let mut shell = Shell::log_in(&mut qemu, BOOT_LIMIT).unwrap();
    let answer = shell.run("echo $((6 * 7)); echo out of turn >&2; (exit 3)", LIMIT).unwrap();
    assert_eq!((answer.status, answer.output.as_str()), (3, "42\nout of turn\n"));
    let answer = shell.run("findmnt -n -o SOURCE /; uname -r", LIMIT).unwrap();
    assert!(answer.output.starts_with("/dev/vda3\n6.1."), "{answer:?}");
    shell.last("poweroff").unwrap();
    let status = qemu.child.wait(LIMIT).unwrap();
    assert!(status.is_some_and(|status| status.success()), "{}", qemu.text());
}

/// A QEMU with a copy of the disk, and its serial line.
struct Qemu {
    child: Child,
    keyboard: ChildStdin,
    seen: usize,
    dir: tempfile::TempDir,
}

impl Qemu {
    fn start(args: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk");
        debian::image().unwrap().copy_disk(&disk).unwrap();
        let mut qemu: Command = fetch::qemu().unwrap().command("qemu-system-x86_64");
        qemu.args(["-machine", "q35,accel=tcg", "-cpu", "max,la57=off", "-m", "512", "-smp", "2"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot"])
            .args(["-drive", &format!("if=none,id=disk,format=raw,file={}", disk.display())])
            .args(["-device", "virtio-blk-pci,drive=disk"])
            .args(args)
            .stdin(Stdio::piped())
            .stdout(File::create(log(dir.path())).unwrap());
        let mut child = Child::spawn(qemu).unwrap();
        let keyboard = child.stdin().unwrap();
        Self { child, keyboard, seen: 0, dir }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(log(self.dir.path())).unwrap()).into_owned()
    }
}

impl Line for Qemu {
    fn read_until(&mut self, text: &str, limit: Duration) -> Result<String, Error> {
        let end = Instant::now() + limit;
        loop {
            let all = self.text();
            if let Some(at) = all[self.seen..].find(text) {
                let before = all[self.seen..][..at].to_owned();
                self.seen += at + text.len();
                return Ok(before);
            }
            assert!(Instant::now() < end, "no {text:?} in {all}");
            sleep(Duration::from_millis(20));
        }
    }

    fn type_text(&mut self, text: &str) -> Result<(), Error> {
        self.keyboard.write_all(text.as_bytes()).unwrap();
        Ok(())
    }
}

fn log(dir: &Path) -> PathBuf {
    dir.join("log")
}
