//! A Linux guest of an emulated server goes on on another one while it works.

use std::time::Duration;

use integration::machines::but_for_the_emulator;
use integration::test_name;
use tempfile::TempDir;
use testbed::bed::{Bed, BedConfig};
use testbed::guest::UP_MARK;
use testbed::protocol::Status;
use testbed::vmm::{VmConfig, Vmm};

/// How long a guest may take to come up. Seconds on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(120);

const NAME: &str = "migration-linux";

#[test]
fn linux_moves_to_another_server_and_back() {
    but_for_the_emulator(linux_moves);
}

fn linux_moves() {
    if !testbed::machines_or_skip(&test_name()) {
        return;
    }
    let dir = TempDir::new().unwrap();
    let beds = ["migration-a", "migration-b"].map(|name| BedConfig::new(name, 1).start().unwrap());
    let vm = with_rings(NAME);
    let mut vmm = Vmm::run(&beds[0], &vm).unwrap();
    vmm.expect(&format!("{UP_MARK}{}", vm.cpus), BOOT_LIMIT).unwrap();
    vmm.expect("# ", ANSWER_LIMIT).unwrap();
    // The shell keeps what it knows, and a process beside it counts, and writes a megabyte each time.
    vmm.type_text(concat!(
        "known=6d1f0c52; (i=0; while :; do i=$((i+1)); echo $i >/tmp/count;",
        " dd if=/dev/urandom of=/tmp/written bs=64k count=16 2>/dev/null; done) &\n",
    ))
    .unwrap();
    vmm.expect("# ", ANSWER_LIMIT).unwrap();
    for (number, bed) in [&beds[1], &beds[0]].into_iter().enumerate() {
        vmm = moved(vmm, bed, &dir, number);
        let before = count(&mut vmm);
        vmm.type_text("sleep 1; echo it is $known; nproc\n").unwrap();
        vmm.expect("it is 6d1f0c52\r\n2\r\n", ANSWER_LIMIT).unwrap();
        assert!(count(&mut vmm) > before);
    }
    vmm.type_text("dmesg | grep -e BUG -e 'Call Trace'; echo complaints $?; poweroff -f\n").unwrap();
    vmm.expect("complaints 1\r\n", ANSWER_LIMIT).unwrap();
    assert_eq!(vmm.wait_for_exit(ANSWER_LIMIT).unwrap(), Status::Code(0));
}

/// A VM whose host logs dirty pages in rings.
fn with_rings(name: &str) -> VmConfig {
    VmConfig { args: vec!["--dirty-ring".into(), "1024".into()], ..VmConfig::new(name, 0) }
}

/// Moves the guest to a function of `bed`: with a limit for what its vCPUs write, the second time by post-copy.
fn moved<'a>(mut from: Vmm<'_>, bed: &'a Bed, dir: &TempDir, number: usize) -> Vmm<'a> {
    // So slowly that what the guest writes in a round takes longer than a look at whether that is over.
    let post_copy = ["--postcopy", "--downtime", "0", "--bandwidth", "16M"];
    let how: &[&str] = if number == 1 { &post_copy } else { &["--dirty-limit", "1", "--downtime", "10"] };
    let there = with_rings(&format!("{NAME}-{number}"));
    let (mut to, told) = from.move_to(bed, &there, dir.path(), how).unwrap();
    println!("{told}");
    assert_eq!(told.contains("while it ran there"), number == 1, "{told}");
    assert_eq!(from.wait_for_exit(ANSWER_LIMIT).unwrap(), Status::Code(0), "{}", from.errors());
    to.type_text("\n").unwrap();
    to.expect("# ", ANSWER_LIMIT).unwrap();
    to
}

fn count(vmm: &mut Vmm<'_>) -> u64 {
    // What is typed is shown too, but not with the number. While the next one is written the file is empty.
    vmm.type_text("echo count$(echo) $(until grep . /tmp/count; do :; done) and on\n").unwrap();
    vmm.expect("count ", ANSWER_LIMIT).unwrap();
    let said = vmm.read_until(" and on", ANSWER_LIMIT).unwrap();
    said.trim_end_matches(" and on").trim().parse().unwrap_or_else(|_| panic!("{said:?}"))
}
