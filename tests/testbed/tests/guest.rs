//! The guest's image boots, answers at its console, and obeys `reboot -f` and `poweroff -f`: shown under QEMU, so that a
//! failure under soc-vmm is soc-vmm's.

use std::fs::File;
use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use testbed::fetch;
use testbed::guest;
use testbed::process::Child;

#[test]
fn the_guest_image_lives() {
    if !testbed::machines_or_skip("the_guest_image_lives") {
        return;
    }
    let image = guest::image().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("log");
    let mut qemu: Command = fetch::qemu().unwrap().command("qemu-system-x86_64");
    qemu.args(["-machine", "q35,accel=tcg", "-cpu", "max,la57=off", "-m", "512", "-smp", "2"])
        .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
        .args(["-append", "console=ttyS0 quiet"])
        .arg("-kernel")
        .arg(&image.kernel)
        .arg("-initrd")
        .arg(&image.initrd)
        .stdin(Stdio::piped())
        .stdout(File::create(&log).unwrap());
    let mut qemu = Child::spawn(qemu).unwrap();
    let mut keyboard = qemu.stdin().unwrap();
    let mut seen = 0;
    let mut wait = |needle: &str| {
        let end = Instant::now() + Duration::from_secs(90);
        loop {
            let text = String::from_utf8_lossy(&std::fs::read(&log).unwrap()).into_owned();
            if let Some(at) = text[seen..].find(needle) {
                seen += at + needle.len();
                return;
            }
            assert!(Instant::now() < end, "no {needle:?} in {text}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait("OUTBOARD-GUEST-UP cpus=2\r\n");
    wait("# ");
    keyboard.write_all(b"echo $((6 * 7)) is it\n").unwrap();
    wait("42 is it");
    keyboard.write_all(b"reboot -f\n").unwrap();
    wait(guest::UP_MARK);
    wait("# ");
    keyboard.write_all(b"poweroff -f\n").unwrap();
    let status = qemu.wait(Duration::from_secs(30)).unwrap();
    assert!(status.is_some_and(|status| status.success()));
}
